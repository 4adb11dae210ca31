"""neucore index accelerate: the first stage of an index with very many pictures."""

import argparse
from pathlib import Path

from neucore_plugin.commands.loading import add_model_arguments, opened
from neucore_plugin.common.text import visible

HELP = "make or extend the approximate first stage of a large index (Qdrant Edge), which searches use by themselves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The index, and its model."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="what `neucore index build` wrote")
    add_model_arguments(parser, required=False)


def run(arguments: argparse.Namespace) -> None:
    """Build it, and say what its recall is on this gallery. Raises NeucoreError."""
    from neucore_plugin.retrieval.qdrant_edge import WORTH_FROM, EdgeCache
    from neucore_plugin.retrieval.recall import recall

    index = opened(arguments)
    written = EdgeCache.build(index)
    print(visible(f"{arguments.index}: {written:,} images put into the first stage; {len(index):,} images in all"))
    if (found := recall(index)) is not None:
        print(f"of the 50 best images {100 * found['made']:.1f} % are among its candidates (made-up queries)")
    if index.stored < WORTH_FROM:
        print(f"searches use it from {WORTH_FROM:,} images on; below, to score them all is as quick")
