"""Which pictures an index is made of: a folder, files, names with their files, a list with attributes, or tar shards.

Lists and shards may come from elsewhere: what they name is read as a picture and as nothing else, and names are labels.
"""

import csv
import io
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError, first_few
from neucore_plugin.common.files import parse_json, read_json, read_text
from neucore_plugin.common.images import LOOKED_FOR, LeftOut, find_images, image_suffixes, is_hidden, told
from neucore_plugin.common.names import name_of, path_of
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
    """The pictures of a source, in gallery order; root: the folder that names are relative to, None of a mapping.

    shards: tar files whose pictures come after `items`; `everything` looks them up, `in_shard` those of one.
    """

    root: Path | None
    items: list[Item]
    left_out: LeftOut
    shards: list[Path] = field(default_factory=list)

    def everything(self) -> list[Item]:
        """All pictures, those in the shards too. DataError where there are none."""
        items = [*self.items, *(item for shard in self.shards for item in in_shard(shard, self.root))]
        if not items:
            raise DataError(f"no images in {first_few(map(str, self.shards))}; looked for {LOOKED_FOR}")
        return items


def collect(source: Source, root: Path | None = None) -> Collected:
    """Every picture of a source, and what was left out, which is logged too. With `root` names are relative to it.

    A folder without pictures, but with tar files, is a folder of shards; one of `neucore shards` gives its own names.
    A file is a list (.csv, .json, .jsonl; `listed` says how it is read) or a shard (.tar).

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
    if folder.is_file():
        return _file(canonical(folder), root)
    if not folder.is_dir():
        what = "is no file of pictures" if folder.exists() else "does not exist"
        raise DataError(f"image folder {str(source)!r} {what}")
    folder = folder.resolve()
    root = root or folder
    if (folder / _OWN_SHARDS).is_file() and (found := _own_shards(folder)):
        return Collected(root, found, LeftOut())
    found, left_out = find_images(folder)
    paths = sorted((relative(path, root), path) for path in found)
    if not paths and left_out[".tar"]:
        return Collected(root, [], left_out - LeftOut({".tar": left_out[".tar"]}), sorted(_tars(folder), key=name_of))
    if not paths:
        text = f"no images in {str(source)!r} or below; looked for {LOOKED_FOR}; {told(left_out)}"
        raise DataError(text.rstrip("; "))
    if left_out:
        log.warning("%s: %s", source, told(left_out))
    return Collected(root, [Item(name, path) for name, path in paths], left_out)


def _file(path: Path, root: Path | None) -> Collected:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return Collected(root or path.parent, [], LeftOut(), [path])
    if suffix in _LISTS:
        items = listed(path, root or path.parent)
        return Collected(root or path.parent, items, LeftOut())
    raise DataError(
        f"image folder {str(path)!r} is a file; give a list of files, or a folder; of files a list (.csv, .json, "
        ".jsonl) or a shard (.tar, not compressed)"
    )


# ---- lists ----------------------------------------------------------------------------------------------------------

_PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
_WHOLE, _REAL = re.compile(r"-?(0|[1-9][0-9]{0,17})"), re.compile(r"-?[0-9]{1,15}\.[0-9]{1,15}([eE][+-]?[0-9]{1,2})?")


def listed(path: Path, root: Path) -> list[Item]:
    """The pictures of a list: a CSV file with a header, a JSON list, or one JSON value a line (.jsonl).

    One column, or key, is the file (`path`, `file`, `filename`, `image`, ...), below the list's folder or as a whole
    path; `name` is its name in the index, else the path below `root` is; all others are attributes. In a CSV numbers,
    true and false are taken as such, 007 and the like as text, and an empty cell is no attribute. A JSON entry may be
    a path alone. DataError names the entry.
    """
    rows = list(_LISTS[path.suffix.lower()](path))
    if not rows:
        raise DataError(f"{path}: lists no images; give at least one")
    items = []
    for number, row in enumerate(rows, start=1):
        row = {"path": row} if isinstance(row, str) else row
        where = f"{path}, entry {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: is {type(row).__name__}; give a path, or an object with a path and attributes")
        key = next((key for key in _PATHS if key in row), None)
        if key is None or not isinstance(row[key], str) or not row[key] or "\0" in row[key]:
            there = f"it has {first_few(map('{!r:.40}'.format, row))}" if key is None else f"its {key!r} is none"
            raise DataError(f"{where}: names no file; {there}. Name the file, a text, by one of {', '.join(_PATHS)}")
        file, name = canonical(path.parent / path_of(row[key])), row.get("name")
        if name is not None and (not isinstance(name, str) or not name):
            raise DataError(f"{where}: its name is {name!r:.80}; give a text, or leave it out")
        attributes = {other: value for other, value in row.items() if other not in (key, "name") and value is not None}
        items.append(Item(relative(file, root) if name is None else name, file, attributes))
    if again := repeated(item.name for item in items):
        raise DataError(f"{path}: given twice: {first_few(map(repr, again), 5)}; give each image once")
    return items


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True, skipinitialspace=True)
        if again := repeated(reader.fieldnames or ()):
            raise DataError(
                f"{path}: the header names {first_few(map(repr, again))} twice; give each column its own name"
            )
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}, line {reader.line_num}: has not as many cells as the header; mend it")
            yield {key: _typed(key, cell) for key, cell in row.items()}
    except csv.Error as error:
        raise DataError(f"{path}: no valid CSV ({error}); save it as CSV with a header, in UTF-8") from None


def _typed(key: str, cell: str) -> Any:
    if key in _PATHS or key == "name" or not cell:
        return cell or None
    if cell in ("true", "false", "True", "False"):
        return cell.lower() == "true"
    return int(cell) if _WHOLE.fullmatch(cell) else float(cell) if _REAL.fullmatch(cell) else cell


def _json_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: no valid JSON ({error}); mend it") from None


_LISTS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".csv": _csv,
    ".json": lambda path: read_json(path, list, "give a list of paths, or of objects"),
    ".jsonl": _json_lines,
}

# ---- tar shards -----------------------------------------------------------------------------------------------------

_OWN_SHARDS = "index.json"
_NOTE = 1 << 20  # bytes of a member that says something of a picture


def _tars(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(place, name) for name in files if name.lower().endswith(".tar") and not is_hidden(name))


def in_shard(path: Path, root: Path | None) -> list[Item]:
    """The pictures of a tar shard in webdataset's layout, by its headers: members A.jpg, with A.json and A.txt beside.

    A name is the shard's below `root`, without its suffix, and the member's. The keys of A.json are attributes, A.txt
    is the attribute `text`. Whatever else there is, links and hidden files are passed over. DataError: no tar, or cut.
    """
    suffixes, prefix = image_suffixes(), relative(path, root)[: -len(".tar")]
    pictures: dict[str, tuple[str, ShardImage]] = {}
    notes: dict[str, dict[str, Any]] = {}
    try:
        end = os.path.getsize(path)
        with tarfile.open(path, "r:", errors="surrogateescape", encoding="utf-8") as tar:
            for member in tar:
                if member.size < 0:  # Python would read the same header for ever
                    raise tarfile.ReadError("a member has a negative size")
                folder, _, name = member.name.rpartition("/")
                if not member.isreg() or member.issparse() or is_hidden(name):
                    continue
                stem, suffix = os.path.splitext(name)
                key = f"{folder}/{name.partition('.')[0]}"
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("it ends before its last member")
                if suffix.lower() in suffixes:
                    name = f"{prefix}/{member.name}"
                    pictures[name] = key, ShardImage(str(path), member.offset_data, member.size, name)
                elif suffix in (".json", ".txt") and member.size <= _NOTE and "." not in stem:
                    notes.setdefault(key, {}).update(_note(suffix, tar.extractfile(member).read(), path, member.name))
    except (tarfile.TarError, OSError, ValueError, EOFError, MemoryError, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} is no whole tar file ({reason}); a compressed one must be unpacked first") from None
    return [Item(name, image, notes.get(key, {})) for name, (key, image) in pictures.items()]


def _note(suffix: str, data: bytes, path: Path, member: str) -> dict[str, Any]:
    text = data.decode("utf-8", "replace").strip()
    if suffix == ".txt":
        return {"text": text}
    try:
        value = parse_json(text)
    except ValueError as error:
        log.warning("%s: %s is no JSON (%s), so its picture has no attributes", path, member, error)
        value = {}
    return value if isinstance(value, dict) else {"json": value}


def _own_shards(folder: Path) -> list[Item]:
    """The pictures of a folder that `neucore shards` wrote, by the names that they have there; [] of any other."""
    index = read_json(folder / _OWN_SHARDS)
    if not isinstance(index, dict) or index.get("format") != "neucore-shards-1":
        return []
    items = {}
    try:
        for shard in index["shards"]:
            file, size = shard["file"], shard["bytes"]
            if not re.fullmatch(r"shard-[0-9]{5,7}\.tar", file) or os.path.getsize(folder / file) != size:
                raise ValueError(f"{file!r:.80} is no shard of this folder, or of another size")
            for image in shard["images"]:
                name, offset, length = image["name"], image["offset"], image["size"]
                whole = type(offset) is int and type(length) is int
                if (
                    not isinstance(name, str)
                    or name in items
                    or not whole
                    or not 0 <= offset <= offset + length <= size
                ):
                    raise ValueError(f"image {name!r:.80} has no place of its own")
                items[name] = Item(name, ShardImage(str(folder / file), offset, length, name))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{folder / _OWN_SHARDS}: {error}; write the shards again with `neucore shards`") from None
    return list(items.values())


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
