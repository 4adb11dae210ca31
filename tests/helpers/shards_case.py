"""Small shards for the tests: the drawings of conftest in several tar files, and a way to falsify their index."""

import json
from pathlib import Path

from shapes import write_shapes

from neucore_plugin.datasets import folder
from neucore_plugin.datasets.shards import reader, writer


def shapes(root: Path) -> tuple[dict, dict]:
    """Image files by name, and triplets and gallery of train and val."""
    write_shapes(root)
    paths = folder.images(root)
    return paths, {split: folder.load_split(root, split, paths) for split in ("train", "val")}


def write(data, out: Path, **options) -> Path:
    paths, splits = data
    settings = {"max_bytes": 12_000, "workers": 2, "progress": False} | options
    return writer.write_shards(out, "folder", paths, splits, **settings)


def edit_index(out: Path, change) -> None:
    path = out / reader.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
