"""neucore shards: a data set as tar shards, or a check of shards that are there."""

import argparse
import os
import shlex
from pathlib import Path

from neucore_plugin.commands import positive
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.config.published import PUBLISHED

HELP = "write a data set as tar shards (webdataset's layout), to train from with data_type: shards or stream"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, --root, --out and the sizes; --verify alone checks a folder."""
    parser.add_argument("name", nargs="?", choices=(*PUBLISHED, "folder"), help="the data set")
    parser.add_argument("--root", type=Path, help="its root folder (default: its variable, such as NEUCORE_CIRR_ROOT)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards; an interrupted run is continued")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="default: all that can be trained on or evaluated")
    parser.add_argument("--max-mb", type=positive, default=256, help="size of a shard in MiB (default 256)")
    parser.add_argument("--workers", type=positive, default=4, help="shards written at a time (default 4)")
    parser.add_argument(
        "--missing",
        choices=("error", "skip"),
        default="error",
        help="skip: leave images that have no file or cannot be read out, with the queries that need them; the shards "
        "keep the counts",
    )
    parser.add_argument(
        "--triplets",
        action="store_true",
        help="whole samples (query and both pictures) of the training splits, for data_type: stream; the others by "
        "place, below eval/",
    )
    parser.add_argument("--verify", action="store_true", help="read every byte of the shards in --out and check them")


def run(arguments: argparse.Namespace) -> None:
    """Write, or check. Raises ConfigError and DataError."""
    from neucore_plugin.datasets import folder
    from neucore_plugin.datasets.published import catalogue
    from neucore_plugin.datasets.shards import reader, stream, writer
    from neucore_plugin.datasets.triplets import left_out_text

    if arguments.verify:
        if (arguments.out / reader.MANIFEST).is_file():
            counted = f"{stream.verify(arguments.out):,} samples"
        else:
            counted = f"{reader.verify(arguments.out):,} images"
        print(f"{arguments.out}: {counted}, all as they were written")
        return
    if arguments.name is None:
        raise ConfigError(f"which data set? Give one of {', '.join((*PUBLISHED, 'folder'))}, or --verify")
    left_out = {}
    if arguments.name == "folder":
        if arguments.root is None:
            raise ConfigError("--root is needed: the folder with the images and their annotations")
        known = folder.images(arguments.root)
        names = arguments.splits or folder.splits(arguments.root)
        splits = {split: folder.load_split(arguments.root, split, known) for split in names}
        named = {name for _, gallery in splits.values() for name in gallery.ids}
        named |= {name for triplets, _ in splits.values() for t in triplets for name in (t.reference, *t.targets)}
        paths = {name: path for name, path in known.items() if name in named}
    else:
        names = arguments.splits or catalogue.READERS[arguments.name].answered
        root, splits, left_out = catalogue.load(arguments.name, arguments.root, names, arguments.missing)
        for row in left_out.values():
            row["files"] = [os.path.relpath(file, root) for file in row["files"]]
        paths = {name: path for _, gallery in splits.values() for name, path in gallery.files.items()}
    write, kind = (writer.write_stream, "stream") if arguments.triplets else (writer.write_shards, "shards")
    index = write(
        arguments.out,
        arguments.name,
        paths,
        splits,
        max_bytes=arguments.max_mb << 20,
        workers=arguments.workers,
        left_out=left_out,
    )
    print(f"{index}: {len(paths):,} images, {', '.join(splits)}")
    for split, row in left_out.items():
        print(f"{split}: {left_out_text(row)}")
    print(f"train from them: --options datasets.{arguments.name}.data_type={kind} ", end="")
    print(shlex.quote(f"datasets.{arguments.name}.build_info.root={arguments.out}"))
