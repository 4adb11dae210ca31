"""Which pictures an index is made of: a folder, files, or names with their files."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError, first_few
from neucore_plugin.common.images import LOOKED_FOR, LeftOut, find_images, is_hidden, told
from neucore_plugin.common.names import name_of
from neucore_plugin.common.shard_image import ShardImage

log = logging.getLogger(__name__)

File = Path | ShardImage
Source = str | Path | Sequence[str | Path] | Mapping[str, str | Path | ShardImage]


@dataclass(frozen=True)
class Item:
    """A picture to encode: its name in the index, its file or its place in a shard, what else is known of it."""

    name: str
    file: File
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Collected:
    """The pictures of a source, in gallery order; root: the folder that names are relative to, None of a mapping."""

    root: Path | None
    items: list[Item]
    left_out: LeftOut


def collect(source: Source, root: Path | None = None) -> Collected:
    """Every picture of a source, and what was left out, which is logged too. With `root` names are relative to it.

    DataError: nothing there, a source of another kind, or a name that stands twice.
    """
    if isinstance(source, Mapping):
        if not source:
            raise DataError("an empty mapping of images; give at least one {name: file}")
        items = [
            Item(str(name), file if isinstance(file, ShardImage) else canonical(file)) for name, file in source.items()
        ]
        return Collected(root, items, LeftOut())
    if isinstance(source, (str, Path)):
        return _folder(source, root)
    given = [canonical(path) for path in source]
    paths = [path for path in given if not is_hidden(path.name)]
    left_out = LeftOut({"hidden": len(given) - len(paths)} if len(paths) < len(given) else {})
    if not paths:
        raise DataError(f"an empty list of images; give at least one file; {told(left_out)}".rstrip("; "))
    if left_out:
        log.warning("the given files: %s", told(left_out))
    root = root or Path(os.path.commonpath([path.parent for path in paths]))
    items = [Item(relative(path, root), path) for path in paths]
    if again := repeated(item.name for item in items):
        raise DataError(f"given twice: {first_few(map(repr, again), 5)}; give each image once")
    return Collected(root, items, left_out)


def _folder(source: str | Path, root: Path | None) -> Collected:
    folder = Path(source)
    if not folder.is_dir():
        what = "is a file; give a list of files, or a folder" if folder.exists() else "does not exist"
        raise DataError(f"image folder {str(source)!r} {what}")
    folder = folder.resolve()
    root = root or folder
    found, left_out = find_images(folder)
    paths = sorted((relative(path, root), path) for path in found)
    if not paths:
        text = f"no images in {str(source)!r} or below; looked for {LOOKED_FOR}; {told(left_out)}"
        raise DataError(text.rstrip("; "))
    if left_out:
        log.warning("%s: %s", source, told(left_out))
    return Collected(root, [Item(name, path) for name, path in paths], left_out)


def canonical(path: str | Path) -> Path:
    """Absolute path with the links of its folder followed, so that one file has one spelling; its own name is kept."""
    plain = os.path.abspath(path)
    return Path(os.path.realpath(os.path.dirname(plain)), os.path.basename(plain))


def relative(path: Path, root: Path | None) -> str:
    """Text of the posix path below root, or of the path as it is when it lies elsewhere."""
    below = root is not None and path.is_relative_to(root)
    return name_of((path.relative_to(root) if below else path).as_posix())


def repeated(names: Iterable[str]) -> list[str]:
    """The names that stand in the list more than once."""
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]
