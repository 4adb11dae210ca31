"""The command line: train, evaluate, search and report here, the others in commands/. Light until a command runs."""

import argparse
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neucore_plugin import __version__
from neucore_plugin.errors import ConfigError, DataError, NeucoreError

COMMANDS = ("data", "vocab", "shards", "submit", "convert")  # modules of neucore_plugin.commands
DESCRIPTION = "NEUCORE: find images by a picture and a sentence that says what should be different."
EXAMPLES = """\
examples:
  neucore train --cfg-path projects/neucore/train_emoji.yaml
  neucore train --cfg-path my.yaml --options run.seed=1 run.output_dir=output/second
  neucore evaluate --cfg-path my.yaml --checkpoint output/emoji/RUN/checkpoint_best.pth
  neucore search --checkpoint BEST.pth --folder photos --image photos/cat.jpg --text "now asleep" --html found.html
  neucore report output/emoji
  neucore data emoji
  neucore data check cirr --root /data/cirr
  neucore vocab cirr --root /data/cirr --out concepts.json
  neucore shards cirr --root /data/cirr --out /data/cirr-shards
  neucore submit cirr --cfg-path projects/neucore/eval_cirr.yaml --checkpoint BEST.pth
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the commands `neucore` and `python -m neucore_plugin`; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def run_train(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m lavis.train`, with the options of the host's own script."""
    parser = argparse.ArgumentParser(prog="python -m lavis.train", description="Train and evaluate by a config file.")
    _add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    return guarded(lambda: _train(arguments))


def run_evaluate(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m lavis.evaluate`."""
    parser = argparse.ArgumentParser(prog="python -m lavis.evaluate", description="Evaluate by a config file.")
    _add_config_arguments(parser, evaluate=True)
    arguments = parser.parse_args(argv)
    return guarded(lambda: _evaluate(arguments))


def guarded(command: Callable[[], Any]) -> int:
    """Run a command: its exit code (0 where it gives none), 2 after one `error: ...`, 130 after Ctrl-C.

    Of several processes only the first prints; the others would say the same.
    """
    try:
        code = command()
    except NeucoreError as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, ConfigError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # torchrun ends all processes when one has ended: the first must get to print
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code if isinstance(code, int) else 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="neucore", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"neucore {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train by a config file, then evaluate its test splits")
    _add_config_arguments(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="evaluate a trained checkpoint by a config file")
    _add_config_arguments(evaluate, evaluate=True)
    evaluate.set_defaults(run=_evaluate)

    search = commands.add_parser("search", help="search a folder of images with a picture and a sentence")
    search.add_argument("--checkpoint", required=True, type=Path, help="what training wrote: .../checkpoint_best.pth")
    search.add_argument("--folder", required=True, type=Path, help="images to search; sub-folders are included")
    search.add_argument("--image", help="reference: an image file, or the name of an image of the folder")
    search.add_argument("--text", help="relative caption: what should be different from the reference")
    search.add_argument("-k", type=_positive, default=10, help="number of results (default 10)")
    search.add_argument("--json", action="store_true", help="print the results as JSON")
    search.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows the results")
    search.add_argument("--batch-size", type=_positive, default=32, help="images encoded at a time (default 32)")
    search.add_argument("--module", help="module of your own to import first: it registers the checkpoint's backbone")
    search.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    search.set_defaults(run=_search)

    report = commands.add_parser("report", help="print the result table of a run, or write it as a page")
    report.add_argument("folder", type=Path, help="a run's folder, or the output folder that holds results.json")
    report.add_argument("--html", type=Path, metavar="FILE", help="write tables and charts as one HTML file")
    report.add_argument("--svg", type=Path, metavar="FILE", help="write the chart of R@1 and R@10 as a picture")
    report.set_defaults(run=_report)

    for name in COMMANDS:
        module = importlib.import_module(f"neucore_plugin.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser, evaluate: bool = False) -> None:
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="config file with model, datasets and run")
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override settings of the file, such as run.max_epoch=2 (also as pairs: run.max_epoch 2)",
    )
    if evaluate:
        parser.add_argument("--checkpoint", help="the same as --options model.checkpoint=PATH")
        parser.add_argument(
            "--protocol",
            nargs="+",
            metavar="PRESET",
            help="presets to evaluate with, in one pass over the gallery, such as: hard soft (CIRR)",
        )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _train(arguments: argparse.Namespace) -> None:
    from neucore_plugin import host

    host.run(arguments.cfg_path, arguments.options)


def _evaluate(arguments: argparse.Namespace) -> None:
    from neucore_plugin import config, host

    options = config.dotlist(arguments.options)
    if arguments.checkpoint:
        options.append(f"model.checkpoint={arguments.checkpoint}")
    if arguments.protocol:
        names = list((config.read_yaml(arguments.cfg_path).get("datasets") or {}).keys())
        if len(names) != 1:
            raise ConfigError(
                f"--protocol needs a config with one data set, this has {', '.join(names) or 'none'}; "
                "give --options datasets.NAME.build_info.protocol=[...]"
            )
        options.append(f"datasets.{names[0]}.build_info.protocol=[{','.join(arguments.protocol)}]")
    host.run(arguments.cfg_path, options, evaluate=True)


def _search(arguments: argparse.Namespace) -> None:
    if arguments.image is None and not (arguments.text or "").strip():
        raise DataError("nothing to search with; give --image, --text, or both")
    if not arguments.folder.is_dir():
        raise DataError(f"--folder {arguments.folder} is no folder")
    from neucore_plugin import host, load_model
    from neucore_plugin.retrieval import GalleryIndex, search_page

    host.before_import()
    if arguments.module:
        host.register_all()
        try:
            importlib.import_module(arguments.module)
        except ImportError as error:
            raise ConfigError(f"--module {arguments.module}: {error}; install it, or put it on PYTHONPATH") from error
    model = load_model(arguments.checkpoint, device=host.pick_device(arguments.device))
    log = logging.getLogger("neucore_plugin.retrieval")
    level = log.level
    log.setLevel(logging.ERROR)  # what could not be read is printed below
    try:
        index = GalleryIndex.build(
            model, arguments.folder, batch_size=arguments.batch_size, progress=not arguments.json
        )
    finally:
        log.setLevel(level)
    for failure in index.failures:
        print(f"left out {failure.name}: {failure.reason}", file=sys.stderr)
    hits = index.search(arguments.image, arguments.text, k=min(arguments.k, max(1, len(index) - 1)))
    if arguments.json:
        rows = [{"rank": hit.rank, "name": hit.name, "score": hit.score, "path": str(hit.path)} for hit in hits]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        for hit in hits:
            print(f"{hit.rank:3d}  {hit.score:8.4f}  {hit.name}")
    if arguments.html:
        reference = index.reference(arguments.image)[0] if arguments.image is not None else None
        search_page(arguments.html, reference, arguments.text, hits)
        print(f"page: {arguments.html}", file=sys.stderr)


def _report(arguments: argparse.Namespace) -> None:
    found = next(
        (path for name in ("evaluation.json", "results.json") if (path := arguments.folder / name).is_file()), None
    )
    if found is None:
        raise DataError(
            f"{arguments.folder}: neither evaluation.json nor results.json is there; `neucore evaluate` writes them"
        )
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
        content = content if "results" in content else {"results": content}
        results, per_change = content.pop("results"), content.pop("per_change", None)
        from neucore_plugin.results import table_lines

        print("\n".join(table_lines(results)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{found}: is no result file ({type(error).__name__}: {error}); evaluate again") from error
    if arguments.svg:
        from neucore_plugin.files import atomic_write
        from neucore_plugin.retrieval.charts import results_chart_svg

        with atomic_write(arguments.svg, "w") as stream:
            stream.write(results_chart_svg(results))
    if arguments.html:
        from neucore_plugin.retrieval import write_report
        from neucore_plugin.retrieval.charts import row_label

        rows = next(iter(results.values()), {})
        title = f"{row_label(next(iter(rows), 'results'))}: {arguments.folder.resolve().name}"
        write_report(arguments.html, title, results, settings=content, per_change=per_change)
        print(f"page: {arguments.html}", file=sys.stderr)
