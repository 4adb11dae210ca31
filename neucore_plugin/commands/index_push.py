"""neucore index push: an index into a Qdrant server."""

import argparse
from pathlib import Path

from neucore_plugin.commands import positive
from neucore_plugin.commands.loading import add_model_arguments, opened
from neucore_plugin.common.text import visible

HELP = "make a collection of a Qdrant server equal to an index; an interrupted push is continued"
EXAMPLE = """\
example, of a server whose key is in the environment variable QDRANT_API_KEY:
  neucore index push photos.index --qdrant http://127.0.0.1:6333 --collection photos --shards 6 --replicas 2
  neucore search --qdrant http://127.0.0.1:6333 --collection photos --checkpoint BEST.pth --text "a red dress"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The index, the collection, and how a new one is laid out."""
    parser.epilog, parser.formatter_class = EXAMPLE, argparse.RawDescriptionHelpFormatter
    parser.add_argument("index", type=Path, metavar="INDEX", help="what `neucore index build` wrote")
    parser.add_argument("--qdrant", required=True, metavar="URL", help="the server, such as http://127.0.0.1:6333")
    parser.add_argument(
        "--collection", required=True, metavar="NAME", help="its collection, made where it is not there"
    )
    new = parser.add_argument_group("of a new collection (default: as the server is set)")
    new.add_argument("--shards", type=positive, help="parts over which the server's nodes share the images")
    new.add_argument("--replicas", type=positive, help="how many nodes hold each shard")
    new.add_argument("--on-disk", action="store_true", help="keep the vectors on disk, not in memory")
    new.add_argument("--quantize", action="store_true", help="look up int8 copies, kept in memory; scores stay exact")
    add_model_arguments(parser, required=False)


def run(arguments: argparse.Namespace) -> None:
    """Push, and say what was written. Raises NeucoreError."""
    from neucore_plugin.retrieval import qdrant_server

    client = qdrant_server.connect(arguments.qdrant)
    index = opened(arguments)
    layout = qdrant_server.Layout(arguments.shards, arguments.replicas, arguments.on_disk, arguments.quantize)
    written, there = qdrant_server.push(index, client, arguments.collection, layout, arguments.qdrant)
    print(visible(f"{arguments.collection}: {written:,} images written, {there:,} there"))
