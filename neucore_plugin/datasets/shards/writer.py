"""Writing tar shards: in parallel, continued after a kill, equal content as equal bytes. Knows no host, no model.

What a folder of shards holds, and what is never done with it, stands in `reader.py`.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import (
    atomic_write,
    expanded,
    file_errors,
    lock,
    open_lock,
    sha256_file,
    sha256_text,
    write_json,
)
from neucore_plugin.common.images import is_hidden
from neucore_plugin.datasets.annotations import read_json
from neucore_plugin.datasets.shards.reader import FORMAT, INDEX, SPLIT_NAME, SUFFIXES, open_index, split_sum
from neucore_plugin.datasets.triplets import Gallery, Triplet

_UNFINISHED = re.compile(r"\.(shard-[0-9]+\.(tar|json)|triplets-.+\.json|index\.json|writing\.json)\..+\.tmp")


def write_shards(
    out: str | Path,
    name: str,
    paths: Mapping[str, Path],
    splits: Mapping[str, tuple[Sequence[Triplet], Gallery]],
    *,
    max_bytes: int = 256 << 20,
    workers: int = 2,
    progress: bool = True,
    left_out: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a data set as shards of about `max_bytes`; returns the path of the index.

    paths: image files by name, each written once; splits: as readers give them; left_out: by split, what missing
    images cost (see `catalogue.load`), kept for the results. Whole shards of a former call are kept, damaged ones are
    written anew. Raises DataError for missing image files, or a folder of other content.
    """
    out = expanded(out)
    if max_bytes < 1 or workers < 1:
        raise DataError(f"max_bytes {max_bytes}, workers {workers}: give at least 1")
    content = {
        split: {
            "triplets": [_plain(triplet) for triplet in triplets],
            "gallery": list(gallery.ids),
            "left_out": dict((left_out or {}).get(split, {})),
        }
        for split, (triplets, gallery) in splits.items()
    }
    facts = _facts(paths, content)
    sizes = [(image, Path(path).suffix.lower(), facts[image].st_size) for image, path in paths.items()]
    key = sha256_text(json.dumps([FORMAT, name, max_bytes, sizes, content], ensure_ascii=False, sort_keys=True))
    # Of the output: errors of images are told where they are read.
    with file_errors(out, "What is finished is kept: give the same command again"):
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out) as alone:
            _claim(out, key, alone)
            jobs = [(out / f"shard-{i:05d}.tar", names) for i, names in enumerate(_plan(paths, facts, max_bytes))]
            with (
                ThreadPoolExecutor(workers) as pool,
                tqdm(total=len(paths), desc="writing shards", unit="image", disable=not progress) as bar,
            ):
                shards = list(pool.map(lambda job: _write_shard(*job, paths, facts, bar), jobs))
            rows = {}
            for split, plain in content.items():
                write_json(out / f"triplets-{split}.json", plain, indent=None)
                counts = {"queries": len(plain["triplets"]), "gallery": len(plain["gallery"])}
                rows[split] = {**counts, "sha256": split_sum(plain)}
            head = {"format": FORMAT, "name": name, "content": key, "images": len(paths)}
            write_json(out / INDEX, {**head, "splits": rows, "shards": shards}, indent=None)
            for part in (*out.glob("shard-*.json"), *out.glob("writing.json")):
                part.unlink()
    return out / INDEX


def _plain(triplet: Triplet) -> dict[str, Any]:
    plain = dataclasses.asdict(triplet)
    if not triplet.aspects:  # younger than the format: shards of other data sets stay what they were
        del plain["aspects"]
    return plain


def _facts(paths: Mapping[str, Path], content: Mapping[str, Any]) -> dict[str, os.stat_result]:
    """Size and times of each image file. DataError for what cannot become shards."""
    bad = [split for split in content if not SPLIT_NAME.fullmatch(split)]
    if bad or not content:
        raise DataError(f"splits {bad}: names of letters, digits, '.', '_' and '-' are wanted, at least one")
    facts = {}
    missing = []
    for name, path in paths.items():
        try:
            facts[name] = os.stat(path)
        except (OSError, ValueError):  # a ValueError: no name that a file can have
            missing.append(str(path))
            continue
        if not stat.S_ISREG(facts[name].st_mode):
            missing.append(str(path))
    if missing:
        raise DataError(f"{len(missing):,} images have no file, such as {missing[0]}; see `neucore data check`")
    if not paths:
        raise DataError("there are no images to write; does the gallery of a split name any?")
    for split, plain in content.items():
        named = (*plain["gallery"], *(triplet["reference"] for triplet in plain["triplets"]))
        unknown = [name for name in named if name not in facts]
        if unknown:
            raise DataError(f"split {split!r} names {len(unknown):,} images that are not given, such as {unknown[0]!r}")
    return facts


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[bool]:
    """Only one process writes into a folder; it is told by a lock that ends with the process, however that ends.

    Yields whether that is certain: some network drives lock no folders.
    """
    folder = open_lock(out)
    try:
        try:
            alone = lock(folder, without=f"let no other process write shards into {out}")
        except BlockingIOError:
            raise DataError(f"{out}: another process writes shards here; wait for it") from None
        yield alone
    finally:
        if folder is not None:
            os.close(folder)


def _plan(
    paths: Mapping[str, Path], facts: Mapping[str, os.stat_result], max_bytes: int
) -> list[list[tuple[str, str]]]:
    """(image name, member name) of each shard, in order."""
    shards: list[list[tuple[str, str]]] = [[]]
    filled = 0
    for number, (name, path) in enumerate(paths.items()):
        size = facts[name].st_size + 1536  # header and padding
        if filled and filled + size > max_bytes:
            shards.append([])
            filled = 0
        suffix = Path(path).suffix.lower()
        shards[-1].append((name, f"{number:06d}{suffix if suffix in SUFFIXES else '.img'}"))
        filled += size
    return shards


def _claim(out: Path, key: str, alone: bool) -> None:
    """The folder is empty, or holds (a part of) the same content; else DataError. A finished index is kept."""
    for path in out.iterdir() if alone else ():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink()  # a former call was killed
    for note in (out / INDEX, out / "writing.json"):
        if note.is_file():
            if read_json(note, dict, "the shards").get("content") != key:
                raise DataError(
                    f"{out} holds shards of other images, splits or settings; give another --out, or empty it"
                )
            return
    if not all(is_hidden(path.name) for path in out.iterdir()):
        raise DataError(f"{out} is not empty and holds no shards of ours; give another --out")
    write_json(out / "writing.json", {"content": key})


def _write_shard(
    path: Path,
    members: Sequence[tuple[str, str]],
    paths: Mapping[str, Path],
    facts: Mapping[str, os.stat_result],
    bar: Any,
) -> dict[str, Any]:
    """One shard and a note of what is in it; both stand only when whole. What a former call finished is taken over."""
    places = _places(members, facts)
    if record := _finished(path, places, paths, facts):
        bar.update(len(members))
        return record
    with atomic_write(path) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, member in members:
            data = _read_file(paths[name])
            if len(data) != facts[name].st_size:
                raise DataError(f"{paths[name]}: was changed while the shards were written; give the command again")
            info = tarfile.TarInfo(member)  # time, owner and mode are constants: equal content gives equal bytes
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            bar.update(1)
    record = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path), "images": places}
    write_json(path.with_suffix(".json"), record, indent=None)
    return record


def _places(members: Sequence[tuple[str, str]], facts: Mapping[str, os.stat_result]) -> list[dict[str, Any]]:
    """Where the images of a shard lie: after a header of 512 bytes each, padded to a multiple of 512."""
    places, end = [], 0
    for name, _ in members:
        size = facts[name].st_size
        places.append({"name": name, "offset": end + 512, "size": size})
        end += 512 + size + -size % 512
    return places


def _finished(
    path: Path,
    places: Sequence[Mapping[str, Any]],
    paths: Mapping[str, Path],
    facts: Mapping[str, os.stat_result],
) -> dict[str, Any] | None:
    """The record of a shard that a former call finished; None: write it, since it is absent, damaged or ill recorded.

    Images that were touched since are compared with what the shard holds. Where one differs, the shard of an
    interrupted call is written anew; a complete folder may be in use, so there it is a DataError.
    """
    note = path.with_suffix(".json")
    if not path.is_file():
        return None
    if complete := not note.is_file():
        if not (path.parent / INDEX).is_file():
            return None
        try:
            rows = open_index(path.parent)[1]["shards"]
        except DataError:  # an index without its lists: all is written anew
            return None
        record = next((row for row in rows if row.get("file") == path.name), None)
    else:
        record = read_json(note, dict, "the shards")
    written = path.stat()
    if not record or record.get("bytes") != written.st_size or record.get("images") != places:
        return None
    if sha256_file(path) != record.get("sha256"):
        return None
    for row in record["images"]:
        name = row["name"]
        if max(facts[name].st_mtime, facts[name].st_ctime) < written.st_mtime:
            continue
        with open(path, "rb") as stream:
            stream.seek(row["offset"])
            if stream.read(row["size"]) == _read_file(paths[name]):
                continue
        if complete:
            raise DataError(f"{path.parent}: {paths[name]} has changed since; give another --out, or empty the folder")
        return None
    return record


def _read_file(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend it, then give the command again") from None
