"""neucore serve: an index behind HTTP, and a page to search it with."""

import argparse
import sys
from pathlib import Path
from typing import Any

from neucore_plugin import __version__
from neucore_plugin.commands.loading import add_model_arguments, load

HELP = "search an index in the browser, or over HTTP"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The index, its model, and who may reach it."""
    parser.epilog = "example: neucore serve my_index --feedback my_votes"
    parser.add_argument("index", type=Path, metavar="INDEX", help="what `neucore index build` wrote")
    add_model_arguments(parser, required=False)
    parser.add_argument("--root", type=Path, help="where the pictures lie now, if they were moved")
    add_service_arguments(parser)


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the service is reached, by whom, and whether it keeps votes."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=_port, default=8000, help="port (default 8000; 0: any free one)")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="token that requests must bring (default: $NEUCORE_TOKEN)"
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that the service is asked by, through a proxy say; it then wants a token",
    )
    parser.add_argument("--feedback", type=Path, metavar="DIR", help="keep votes on results there, as training data")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a whole number from 0 to 65535")
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C. Raises NeucoreError."""

    def opened() -> Any:
        from neucore_plugin.retrieval import GalleryIndex

        index = GalleryIndex.open(arguments.index, root=arguments.root)
        index.attach(load(arguments, index), where=f" in {arguments.index}")
        index.search(text="a picture", k=1)  # what is loaded by the first query is there when the first user asks
        return index

    serve(arguments, opened, arguments.index.resolve().name)


def serve(arguments: argparse.Namespace, opened: Any, title: str, credit: str | None = None, ready: Any = None) -> None:
    """Bind, then open the index by `opened()`, then serve it. ready(url): called once requests are answered."""
    from neucore_plugin.serve import running

    running.require()
    inside = running.is_loopback(arguments.host) and not arguments.allowed_host
    token = running.find_token(arguments.token_file, needed=not inside)
    with running.bind(arguments.host, arguments.port) as listening:  # before the seconds that loading takes
        from neucore_plugin.host.importing import before_import

        before_import()
        from neucore_plugin.serve.app import create_app
        from neucore_plugin.serve.feedback import Feedback
        from neucore_plugin.serve.guard import Access, Limits

        feedback = Feedback(arguments.feedback) if arguments.feedback else None
        index = opened()
        limit = getattr(arguments, "max_pixels", None)
        limits = Limits() if limit is None else Limits(max_pixels=limit)
        access = Access(running.names(arguments.host, arguments.allowed_host), token)
        about = {"title": title, "credit": credit, "version": __version__}
        app = create_app(index, access=access, limits=limits, feedback=feedback, **about)

        def say(url: str) -> None:
            votes = (
                f"votes go to {arguments.feedback}" if feedback else "votes are not kept (--feedback DIR keeps them)"
            )
            print(f"{len(index):,} pictures at {url}\n{votes}; Ctrl-C ends the service", file=sys.stderr, flush=True)
            if ready is not None:
                ready(url)

        running.serve(app, listening, say)
