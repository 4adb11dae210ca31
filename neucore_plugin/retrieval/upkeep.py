"""What keeps an index in step with its pictures, small, and known to be whole: sync, compaction, verification."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from neucore_plugin.common.errors import DataError, first_few
from neucore_plugin.common.files import file_errors, sha256_file
from neucore_plugin.common.names import name_of, path_of
from neucore_plugin.retrieval import units
from neucore_plugin.retrieval.building import SAVED, check_model, read
from neucore_plugin.retrieval.encoding import Encoded, Failure, bar, check_shapes, encode, row_of
from neucore_plugin.retrieval.rows import Row
from neucore_plugin.retrieval.sources import Collected, Item, relative, repeated
from neucore_plugin.retrieval.units import Facts, Manifest, Part


@dataclass
class Synced:
    """What `sync` did, by names: only those `added` and `changed` were encoded.

    moved: new names of pictures that were known under another; touched: as before, but for their time; failures: could
    not be read.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unchanged: int = 0


@dataclass(frozen=True)
class _Work:
    """A picture that the index lacks as it is. old: position of what lies in its place; same: of its content."""

    item: Item
    old: int | None
    same: int | None
    digest: str | None


# ---- sync -----------------------------------------------------------------------------------------------------------


def sync(
    index: Any, collected: Collected, folder: Path, batch_size: int, workers: int, progress: bool, unit_size: int
) -> Synced:
    """Bring a `GalleryIndex` up to what was collected in a folder; what lies elsewhere is left alone.

    A picture is known by its place, and by its content where that is new. One that a list has named keeps that name.
    """
    done, there = Synced(), dict(_below(index, folder))
    paths = {row.path: position for position, row in there.items()}
    by_digest = {row.digest: position for position, row in there.items() if row.digest is not None}
    sizes = {row.bytes for row in there.values()}
    work = []
    wanted: set[str] = set()
    for item in tqdm(collected.items, "comparing", unit="image", disable=not progress):
        wanted.add(path := relative(item.file, index.root))
        found = _compared(item, paths.get(path), there, by_digest, sizes)
        if found is None:
            done.unchanged += 1
        else:
            work.append(found)
    gone = [position for position, row in there.items() if row.path not in wanted]
    work = _named(work, there, set(gone))
    _check_names(index, work, set(gone))
    with bar(sum(some.same is None for some in work), progress) as shown:
        for start in range(0, len(work), unit_size):
            some = work[start : start + unit_size]
            made = _made(index, some, there, batch_size, workers, shown)
            kept = [one.same for one in some if one.same is not None and there[one.same].name == one.item.name]
            index.change(made, sorted({*kept, *(one.old for one in some if one.old is not None)}))
            _note(done, some, made)
    index.change(Encoded({}, [], []), gone)  # last: a picture that moved is never at neither place
    done.removed = [name for position in gone if (name := there[position].name) not in done.moved]
    return done


def _below(index: Any, folder: Path) -> Iterable[tuple[int, Row]]:
    """(position, row) of the pictures whose files lie in a folder or below."""
    above = index.root is not None and index.root.is_relative_to(folder)  # the root itself, or what it lies in
    inside = "" if above else f"{relative(folder, index.root)}/"
    absolute = f"{name_of(folder.as_posix())}/"
    for position, row in index.rows():
        whole = path_of(row.path).is_absolute()
        if row.place is None and row.path.startswith(absolute if whole else inside):
            yield position, row


def _named(work: Iterable[_Work], there: Mapping[int, Row], gone: set[int]) -> list[_Work]:
    """With the names that a list gave: of a picture that stays, and of one that moved; a copy of it has its path."""
    found = []
    for some in work:
        known = some.old if some.old is not None else some.same if some.same in gone else None
        if known is not None and there[known].name != there[known].path:
            some = replace(some, item=replace(some.item, name=there[known].name))
            gone = gone - {known}
        found.append(some)
    return found


def _check_names(index: Any, work: Sequence[_Work], gone: set[int]) -> None:
    """DataError where a file has the name that a list gave to another picture: names would stand twice."""
    names = [some.item.name for some in work]
    known = index.positions_of(names)
    taken = [name for some in work if known.get(name := some.item.name) not in {None, some.old, some.same, *gone}]
    if again := sorted({*taken, *repeated(names)}):
        raise DataError(
            f"other pictures of the index have the names of {first_few(map(repr, again), 5)} in the folder; rename "
            "these files, or remove those pictures from the index"
        )


def _compared(
    item: Item, old: int | None, there: Mapping[int, Row], by_digest: Mapping[str, int], sizes: set[int | None]
) -> _Work | None:
    """None where the picture is as it was encoded: by size and time, else by its content."""
    row = there[old] if old is not None else None
    try:
        status = os.stat(item.file)
        if row is not None and (row.bytes, row.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return None
        digest = sha256_file(item.file) if status.st_size in sizes else None
    except OSError:  # encoding says why
        return _Work(item, old, None, None)
    if digest is None:
        return _Work(item, old, None, None)
    same = old if row is not None and row.digest == digest else by_digest.get(digest)
    return _Work(item, old, same, digest)


def _made(
    index: Any, work: Sequence[_Work], there: Mapping[int, Row], batch_size: int, workers: int, shown: Any
) -> Encoded:
    """Encodings and rows of some work: taken over where the content is known, else encoded. Attributes stay."""
    kept, items, rows = [], [], []
    for some in work:
        known = some.old if some.old is not None else some.same
        item = some.item if known is None else replace(some.item, attributes=there[known].attributes)
        try:
            status = os.stat(item.file)
        except OSError:
            items.append(item)
            continue
        if some.same is None:
            items.append(item)
            continue
        kept.append(some.same)
        facts = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "digest": some.digest}
        rows.append(replace(row_of(item, index.root, digest=False), **facts))
    made = encode(index.model, items, index.root, batch_size, index.dtype, workers, shown, digests=True)
    if not kept:
        return made
    encodings = {}
    for key, value in index.candidates(torch.tensor(kept)).items():  # float32 holds every float16
        encodings[key] = torch.cat([value.to(index.dtype), *([made.encodings[key]] if made.rows else [])])
    return Encoded(encodings, [*rows, *made.rows], made.failures)


def _note(done: Synced, work: Iterable[_Work], made: Encoded) -> None:
    failed = {failure.name for failure in made.failures}
    done.failures += sorted(failed)
    for some in work:
        name = some.item.name
        if name in failed:
            continue
        if some.same is None:
            (done.added if some.old is None else done.changed).append(name)
        else:
            (done.touched if some.same == some.old else done.moved).append(name)


def moved_root(index: Any, folder: Path) -> bool:
    """Whether the whole gallery has moved to `folder`, which the manifest then says.

    Its old root is no more, and a picture is in the same place below the new one: else it is another folder, to which
    the pictures of a drive that is away have not moved.
    """
    kept = index.manifest.root
    if kept is None or path_of(kept).exists() or index.root != path_of(kept) or folder.is_relative_to(index.root):
        return False
    if not any(_lies(row, folder) for _, row in index.rows()):
        return False
    with units.writing(index.folder):
        units.write_manifest(index.folder, replace(index.manifest, root=name_of(folder)))
    return True


def _lies(row: Row, folder: Path) -> bool:
    try:
        return not path_of(row.path).is_absolute() and os.stat(folder / path_of(row.path)).st_size == row.bytes
    except OSError:
        return False


# ---- compaction -----------------------------------------------------------------------------------------------------


def compact(folder: Path) -> tuple[int, int]:
    """Merge small units, drop removed rows: (units before, units after). Others may read and build meanwhile.

    Each merged unit is put in force by one rename, which takes the place of those it replaces; then they are deleted.
    """
    with units.writing(folder) as alone:
        manifest, found, parts = read(folder)
        gone = units.removed_rows(found)
        for group in _groups(parts, gone):
            if len(group) > 1 or gone.get(group[0].unit):
                _replace(folder, manifest, found, [part.unit for part in group], *_kept(group, gone))
        empty = [name for name, facts in found.items() if not facts.count]
        if len(empty) > 1:  # what they removed is dropped by now
            _replace(folder, manifest, found, empty, {}, [])
        left = units.in_force(units.read_all(folder, manifest))
        units.delete(folder, [name for name in units.listed(folder) if name not in left])
        if alone:
            units.tidy(folder, left)
    return len(found), len(left)


def _groups(parts: Iterable[Part], gone: Mapping[str, set[int]]) -> list[list[Part]]:
    """Neighbours that fit into one unit together."""
    groups: list[list[Part]] = []
    size = 0
    for part in parts:
        count = part.count - len(gone.get(part.unit, ()))
        if not groups or size + count > SAVED:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += count
    return groups


def _kept(group: Sequence[Part], gone: Mapping[str, set[int]]) -> tuple[dict[str, Tensor], list[Row]]:
    arrays: dict[str, list[Tensor]] = {}
    rows: list[Row] = []
    for part in group:
        struck = gone.get(part.unit, set())
        keep = torch.tensor([row for row in range(part.count) if row not in struck], dtype=torch.long)
        rows += [row for number, row in enumerate(part.rows) if number not in struck]
        if len(keep):
            for key, value in part.arrays.items():
                arrays.setdefault(key, []).append(value[keep])
    return {key: torch.cat(values) for key, values in arrays.items()}, rows


def _replace(
    folder: Path,
    manifest: Manifest,
    found: Mapping[str, Facts],
    names: Sequence[str],
    arrays: Mapping[str, Tensor],
    rows: Sequence[Row],
) -> None:
    replaced = {
        *names,
        *(name for unit in names for name in found[unit].replaces),
    }  # a build must know what it has done
    failures = {failure["name"]: failure for unit in names for failure in found[unit].failures}
    facts = Facts(manifest.id, manifest.model, failures=list(failures.values()), replaces=sorted(replaced))
    units.put(folder, units.compacted_name(names[0]), facts, arrays, rows)
    units.delete(folder, names)


# ---- verification ---------------------------------------------------------------------------------------------------


def verify(index: Any, model: Any = None, progress: bool = True) -> dict[str, Any]:
    """Read every byte of an index: its `info`, and "problems", a list of texts.

    Sums, databases, numbers, names that stand twice; with a model its fingerprint.
    """
    problems = []
    if model is not None:
        problems += _problem(lambda: check_model(index.model_fingerprint, model, f" in {index.folder}"))
        problems += [] if problems else _problem(lambda: check_shapes(index.shapes, model))
    bad = set()
    checked = units.check_sums(index.folder, index.units)
    for name, wrong in tqdm(checked, "checking", len(index.units), unit="unit", disable=not progress):
        if wrong:
            problems.append(wrong)
            bad.add(name)
    names: list[str] = []
    for part in index.parts:
        if part.unit not in bad:
            problems += _problem(lambda part=part: names.extend(_names(index, part)))
    if again := repeated(names):
        problems.append(f"names stand twice: {first_few(map(repr, again), 5)}; remove them, and add or sync them again")
    return {**info(index), "problems": problems}


def _names(index: Any, part: Part) -> list[str]:
    """Names of the images of a part; DataError for damage."""
    part.rows.check()
    for key, value in part.arrays.items():
        if not all(bool(block.isfinite().all()) for block in value.split(65536)):
            raise DataError(f"{part.unit}/{key}.npy holds NaN or infinite numbers; {units.REMEDY}")
    alive = index.alive
    return [row.name for place, row in enumerate(part.rows, part.start) if alive is None or alive[place]]


def _problem(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except DataError as error:
        return [str(error)]
    return []


def unreadable(index: Any) -> list[Failure]:
    """What could not be read, each once with the last reason; without what could be read later on."""
    last = {failure.name: failure for failure in index.failures}
    read = index.positions_of(list(last))
    return [failure for failure in last.values() if failure.name not in read]


def info(index: Any) -> dict[str, Any]:
    """What an index says of itself."""
    manifest = index.manifest
    facts: dict[str, Any] = {
        "folder": str(index.folder) if index.folder else None,
        "images": len(index),
        "removed": index.stored - len(index),
        "failures": len(unreadable(index)),
        "units": len(index.units),
        "bytes": sum(noted["bytes"] for facts in index.units.values() for noted in facts.files.values()),
        "model": index.model_fingerprint,
        "checkpoint": manifest.checkpoint if manifest else None,
        "root": str(index.root) if index.root else None,
        "dtype": str(index.dtype).removeprefix("torch."),
        "keys": {key: list(shape) for key, shape in index.shapes.items()},
    }
    if manifest is not None and manifest.plan is not None:
        facts["planned_units"] = manifest.plan["units"]
        with file_errors(index.folder):
            facts["planned_units_done"] = len(units.planned_done(units.read_all(index.folder, manifest)))
    return facts
