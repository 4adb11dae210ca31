"""Writing tar shards: in parallel, continued after a kill, equal content as equal bytes. Knows no host, no model.

What a folder of shards holds, and what is never done with it, stands in `reader.py` and `stream.py`.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import random
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from neucore_plugin.datasets.shards.reader import FORMAT, INDEX, MANIFEST, SPLIT_NAME, SUFFIXES, open_index, split_sum
from neucore_plugin.datasets.shards.stream import EVAL, STREAM_FORMAT, open_manifest
from neucore_plugin.datasets.triplets import Gallery, Triplet

_UNFINISHED = re.compile(
    r"\.((shard|train[A-Za-z0-9_.-]*)-[0-9]+\.(tar|json)|triplets-.+\.json|(index|stream|writing)\.json)\..+\.tmp"
)
_EVENLY = 8  # shards of samples come in multiples of it, so that usual numbers of readers get equally many
Splits = Mapping[str, tuple[Sequence[Triplet], Gallery]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """What becomes one member of a shard: an image file, or bytes."""

    name: str  # of the image
    member: str
    source: Path | bytes
    size: int
    touched: float = 0.0  # when the file was changed last

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else _read_file(self.source)


_Jobs = list[tuple[Path, list[_Part]]]


def write_shards(
    out: str | Path,
    name: str,
    paths: Mapping[str, Path],
    splits: Splits,
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
    content = _content(splits, left_out)
    facts = _facts(paths, content, max_bytes, workers)
    key = _key(FORMAT, name, max_bytes, paths, facts, content)
    jobs = [(out / f"shard-{i:05d}.tar", parts) for i, parts in enumerate(_plan(paths, facts, max_bytes))]

    def finish(shards: list[dict[str, Any]]) -> None:
        rows = {}
        for split, plain in content.items():
            write_json(out / f"triplets-{split}.json", plain, indent=None)
            counts = {"queries": len(plain["triplets"]), "gallery": len(plain["gallery"])}
            rows[split] = {**counts, "sha256": split_sum(plain)}
        head = {"format": FORMAT, "name": name, "content": key, "images": len(paths)}
        write_json(out / INDEX, {**head, "splits": rows, "shards": shards}, indent=None)

    return _write_folder(out, INDEX, key, jobs, workers, progress, finish)


def write_stream(
    out: str | Path,
    name: str,
    paths: Mapping[str, Path],
    splits: Splits,
    *,
    max_bytes: int = 256 << 20,
    workers: int = 2,
    progress: bool = True,
    left_out: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a data set as whole samples (see `stream.py`), and the splits to evaluate on by place below `eval/`.

    Arguments, errors and continuing as `write_shards`. The triplets of a training split are spread over its shards by
    a fixed shuffle, evenly. Returns the path of the manifest, which is written last.
    """
    out = expanded(out)
    left_out = left_out or {}
    train = {split: found for split, found in splits.items() if split.startswith("train")}
    rest = {split: found for split, found in splits.items() if split not in train}
    if not train:
        raise DataError(f"splits {sorted(splits)}: none begins with train, and only training reads whole samples")
    if unanswered := [t.query_id for triplets, _ in train.values() for t in triplets if not t.targets]:
        raise DataError(f"{len(unanswered):,} queries of training have no target, such as {unanswered[0]!r}")
    content = _content({split: (triplets, Gallery((), ())) for split, (triplets, _) in train.items()}, left_out)
    named = {x for triplets, _ in train.values() for t in triplets for x in (t.reference, t.targets[0])}
    used = {image: path for image, path in paths.items() if image in named}
    facts = _facts(used, content, max_bytes, workers)
    if lacking := sorted(named - used.keys()):
        raise DataError(f"{len(lacking):,} targets of training are not given, such as {lacking[0]!r}")
    key = _key(STREAM_FORMAT, name, max_bytes, paths, facts, {**content, "eval": sorted(rest)})
    jobs: _Jobs = []
    dealt: dict[str, list[list[int]]] = {}
    for split, (triplets, _) in train.items():
        plain = content[split]["triplets"]
        samples = [_sample(number, triplets[number], plain[number], used, facts) for number in range(len(triplets))]
        dealt[split] = _deal([sum(part.size + 1536 for part in parts) for parts in samples], max_bytes)
        for i, numbers in enumerate(dealt[split]):
            jobs.append((out / f"{split}-{i:05d}.tar", [part for number in numbers for part in samples[number]]))

    def finish(shards: list[dict[str, Any]]) -> None:
        files = {shard["file"]: {"bytes": shard["bytes"], "sha256": shard["sha256"]} for shard in shards}
        rows = {}
        written = [out / f"triplets-{split}.json" for split in content]
        for path, (split, plain) in zip(written, content.items(), strict=True):
            write_json(path, plain, indent=None)
            listed = [{"file": f"{split}-{i:05d}.tar", "queries": numbers} for i, numbers in enumerate(dealt[split])]
            rows[split] = {"queries": len(plain["triplets"]), "sha256": split_sum(plain), "shards": listed}
        if rest:
            wanted = {x for _, gallery in rest.values() for x in gallery.ids}
            wanted |= {t.reference for triplets, _ in rest.values() for t in triplets}
            images = {image: path for image, path in paths.items() if image in wanted}
            options = {"max_bytes": max_bytes, "workers": workers, "progress": progress, "left_out": left_out}
            write_shards(out / EVAL, name, images, rest, **options)
            written += sorted((out / EVAL).iterdir())
        for path in written:
            fact = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            files[path.relative_to(out).as_posix()] = fact
        head = {"format": STREAM_FORMAT, "name": name, "content": key}
        write_json(out / MANIFEST, {**head, "splits": rows, "files": files}, indent=None)

    return _write_folder(out, MANIFEST, key, jobs, workers, progress, finish)


def _content(splits: Splits, left_out: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """What the file of each split holds."""
    return {
        split: {
            "triplets": [_plain(triplet) for triplet in triplets],
            "gallery": list(gallery.ids),
            "left_out": dict((left_out or {}).get(split, {})),
        }
        for split, (triplets, gallery) in splits.items()
    }


def _key(
    form: str,
    name: str,
    max_bytes: int,
    paths: Mapping[str, Path],
    facts: Mapping[str, os.stat_result],
    content: Mapping[str, Any],
) -> str:
    sizes = [
        (image, Path(path).suffix.lower(), facts[image].st_size) for image, path in paths.items() if image in facts
    ]
    return sha256_text(json.dumps([form, name, max_bytes, sizes, content], ensure_ascii=False, sort_keys=True))


def _write_folder(
    out: Path,
    index: str,
    key: str,
    jobs: _Jobs,
    workers: int,
    progress: bool,
    finish: Callable[[list[dict[str, Any]]], None],
) -> Path:
    """Write the shards; `finish` takes their records in order, and writes the index last."""
    # Of the output: errors of images are told where they are read.
    with file_errors(out, "What is finished is kept: give the same command again"):
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out) as alone:
            _claim(out, index, key, alone)
            total = sum(len(parts) for _, parts in jobs)
            with (
                ThreadPoolExecutor(workers) as pool,
                tqdm(total=total, desc="writing shards", unit="file", disable=not progress) as bar,
            ):
                shards = list(pool.map(lambda job: _write_shard(*job, index, bar), jobs))
            finish(shards)
            for note in (*(path.with_suffix(".json") for path, _ in jobs), out / "writing.json"):
                note.unlink(missing_ok=True)
    return out / index


def _plain(triplet: Triplet) -> dict[str, Any]:
    plain = dataclasses.asdict(triplet)
    younger = ("aspects", "wordings", "near_twins", "in_place")  # than the format: shards without stay what they were
    return {name: value for name, value in plain.items() if value or name not in younger}


def _facts(
    paths: Mapping[str, Path], content: Mapping[str, Any], max_bytes: int, workers: int
) -> dict[str, os.stat_result]:
    """Size and times of each image file. DataError for what cannot become shards."""
    if max_bytes < 1 or workers < 1:
        raise DataError(f"max_bytes {max_bytes}, workers {workers}: give at least 1")
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


def _plan(paths: Mapping[str, Path], facts: Mapping[str, os.stat_result], max_bytes: int) -> list[list[_Part]]:
    """The images of each shard, in order."""
    shards: list[list[_Part]] = [[]]
    filled = 0
    for number, (name, path) in enumerate(paths.items()):
        size = facts[name].st_size + 1536  # header and padding
        if filled and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(_image(name, f"{number:06d}", path, facts[name]))
        filled += size
    return shards


def _image(name: str, stem: str, path: Path, fact: os.stat_result) -> _Part:
    suffix = Path(path).suffix.lower()
    member = f"{stem}{suffix if suffix in SUFFIXES else '.img'}"
    return _Part(name, member, path, fact.st_size, max(fact.st_mtime, fact.st_ctime))


def _sample(
    number: int,
    triplet: Triplet,
    plain: Mapping[str, Any],
    paths: Mapping[str, Path],
    facts: Mapping[str, os.stat_result],
) -> list[_Part]:
    """KEY.json, KEY.reference.jpg and KEY.target.jpg: the query and the bytes of its two image files."""
    text = json.dumps(plain).encode()
    parts = [_Part(f"{number:08d}.json", f"{number:08d}.json", text, len(text))]
    for role, name in (("reference", triplet.reference), ("target", triplet.targets[0])):
        parts.append(_image(name, f"{number:08d}.{role}", paths[name], facts[name]))
    return parts


def _deal(sizes: Sequence[int], max_bytes: int) -> list[list[int]]:
    """The numbers of the samples of each shard: shuffled, since annotations come in groups, and evenly many."""
    order = list(range(len(sizes)))
    random.Random(0).shuffle(order)
    count = -(-max(1, math.ceil(sum(sizes) / max_bytes)) // _EVENLY) * _EVENLY
    return [order[shard::count] for shard in range(min(count, len(order)))]


def _claim(out: Path, index: str, key: str, alone: bool) -> None:
    """The folder is empty, or holds (a part of) the same content; else DataError. A finished index is kept."""
    for path in out.iterdir() if alone else ():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink()  # a former call was killed
    for note in (out / index, out / "writing.json"):
        if note.is_file():
            if read_json(note, dict, "the shards").get("content") != key:
                raise DataError(
                    f"{out} holds shards of other images, splits or settings; give another --out, or empty it"
                )
            return
    if not all(is_hidden(path.name) for path in out.iterdir()):
        raise DataError(f"{out} is not empty and holds no shards of ours; give another --out")
    write_json(out / "writing.json", {"content": key})


def _write_shard(path: Path, parts: Sequence[_Part], index: str, bar: Any) -> dict[str, Any]:
    """One shard and a note of what is in it; both stand only when whole. What a former call finished is taken over."""
    places = _places(parts)
    if record := _finished(path, places, parts, index):
        bar.update(len(parts))
        return record
    with atomic_write(path) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for part in parts:
            data = part.read()
            if len(data) != part.size:
                raise DataError(f"{part.source}: was changed while the shards were written; give the command again")
            info = tarfile.TarInfo(part.member)  # time, owner and mode are constants: equal content gives equal bytes
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            bar.update(1)
    record = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path), "images": places}
    write_json(path.with_suffix(".json"), record, indent=None)
    return record


def _places(parts: Sequence[_Part]) -> list[dict[str, Any]]:
    """Where the members of a shard lie: after a header of 512 bytes each, padded to a multiple of 512."""
    places, end = [], 0
    for part in parts:
        places.append({"name": part.name, "offset": end + 512, "size": part.size})
        end += 512 + part.size + -part.size % 512
    return places


def _finished(path: Path, places: list[dict[str, Any]], parts: Sequence[_Part], index: str) -> dict[str, Any] | None:
    """The record of a shard that a former call finished; None: write it, since it is absent, damaged or ill recorded.

    Images that were touched since are compared with what the shard holds. Where one differs, the shard of an
    interrupted call is written anew; a complete folder may be in use, so there it is a DataError.
    """
    note = path.with_suffix(".json")
    if not path.is_file():
        return None
    if complete := not note.is_file():
        record = _indexed(path, index)
    else:
        record = read_json(note, dict, "the shards")
    written = path.stat()
    if not record or record.get("bytes") != written.st_size or record.get("images", places) != places:
        return None
    if sha256_file(path) != record.get("sha256"):
        return None
    for part, place in zip(parts, places, strict=True):
        if part.touched < written.st_mtime:
            continue
        with open(path, "rb") as stream:
            stream.seek(place["offset"])
            if stream.read(place["size"]) == part.read():
                continue
        if complete:
            raise DataError(f"{path.parent}: {part.source} has changed since; give another --out, or empty the folder")
        return None
    return record


def _indexed(path: Path, index: str) -> dict[str, Any] | None:
    """The record of a shard in a complete folder's index; None where it has none, or is damaged."""
    if not (path.parent / index).is_file():
        return None
    try:
        if index == MANIFEST:
            record = open_manifest(read_json(path.parent / index, dict, "the shards"), str(path.parent))[1].get(
                path.name
            )
            return record and {"file": path.name, **record}
        return next((row for row in open_index(path.parent)[1]["shards"] if row.get("file") == path.name), None)
    except DataError:  # all is written anew
        return None


def _read_file(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend it, then give the command again") from None
