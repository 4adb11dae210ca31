"""An index's folder: reading what is in force, building it unit by unit, putting changes at its end, saving it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from neucore_plugin.common.errors import DataError, first_few
from neucore_plugin.common.files import file_errors
from neucore_plugin.common.images import LOOKED_FOR
from neucore_plugin.common.names import name_of, path_of
from neucore_plugin.retrieval import earlier, units
from neucore_plugin.retrieval.encoding import (
    Encoded,
    Failure,
    RetrievalModel,
    bar,
    encode,
    fingerprint_of,
    probe,
    tell,
)
from neucore_plugin.retrieval.rows import Row
from neucore_plugin.retrieval.sources import Collected, Item, in_shard, relative, repeated
from neucore_plugin.retrieval.units import Facts, Manifest, Part

SAVED = 1 << 17  # images of a unit that `save` and compaction write: 256 MB where each has 1,024 numbers


@dataclass(frozen=True)
class Settings:
    """How pictures are encoded and stored."""

    batch_size: int
    dtype: torch.dtype
    workers: int
    progress: bool
    unit_size: int


class Held(Protocol):
    """What is asked here of an index."""

    folder: Path | None
    manifest: Manifest | None
    units: dict[str, Facts]
    parts: list[Part]
    root: Path | None
    failures: list[Failure]
    model_fingerprint: str | None
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    stored: int
    alive: Tensor | None


def check_model(expected: str | None, model: Any, where: str = "") -> None:
    """DataError when another model built the index (fingerprints differ)."""
    given = fingerprint_of(model)
    if given and expected and given != expected:
        raise DataError(
            f"the index{where} was built by model {expected}, but the model given is {given}: their "
            "encodings cannot be compared; build the index again with this model, or load the one that built it"
        )


def read(folder: Path, verify: bool = False) -> tuple[Manifest, dict[str, Facts], list[Part]]:
    """What is in force: the manifest, the units, and their files mapped. Raises DataError.

    verify: every byte is read and the sums are compared.
    """
    with file_errors(folder):
        while True:
            manifest, names = units.read_manifest(folder), units.listed(folder)
            try:
                found = units.in_force(units.read_all(folder, manifest))
                parts = units.open_parts(folder, manifest, found)
                units.removed_rows(found)
                if (
                    wrong := next((text for _, text in units.check_sums(folder, found) if text), None)
                    if verify
                    else None
                ):
                    raise DataError(wrong)
            except (DataError, OSError):
                if _unchanged(folder, manifest, names):
                    raise
                continue
            if _unchanged(folder, manifest, names):  # else it was saved anew or compacted while it was read
                return manifest, found, parts


def _unchanged(folder: Path, manifest: Manifest, names: list[str]) -> bool:
    return units.read_manifest(folder) == manifest and units.listed(folder) == names


# ---- building -------------------------------------------------------------------------------------------------------


def plan(collected: Collected, unit_size: int) -> dict[str, Sequence[Item] | Path]:
    """{unit: its pictures, or the shard that they are in}. A name says number and content of the unit."""
    items, found = collected.items, {}
    runs: list[Sequence[Item] | Path] = [items[start : start + unit_size] for start in range(0, len(items), unit_size)]
    for number, some in enumerate([*runs, *collected.shards]):
        if isinstance(some, Path):
            told = f"{relative(some, collected.root)}\0{some.stat().st_size}"
        else:
            told = "\0".join(f"{item.name}\0{sorted(item.attributes.items())}" for item in some)
        found[units.planned_name(number, sha256(told.encode("utf-8", "surrogatepass")).hexdigest())] = some
    return found


def build(
    model: RetrievalModel,
    collected: Collected,
    folder: Path,
    settings: Settings,
    checkpoint: str | None,
    share: tuple[int, int],
) -> None:
    """Encode what the index in `folder` lacks of a source. share: (number, of how many) processes doing this.

    DataError: the folder holds something else, an index of another model, or of another source; nothing is readable.
    """
    if settings.unit_size < 1:
        raise DataError(f"unit_size={settings.unit_size}: must be at least 1")
    with file_errors(folder):
        planned = plan(collected, settings.unit_size)
    manifest = _begin(model, collected, folder, settings, checkpoint, planned)
    there = units.read_all(folder, manifest)
    # where nothing could be read at all, a drive was away: these are tried again
    again = {name for name, facts in there.items() if facts.failures and not facts.count and not facts.replaces}
    done = units.planned_done(there) - again
    own = [name for number, name in enumerate(planned) if number % share[1] == share[0] and name not in done]
    failures, read_ = [], sum(facts.count for facts in there.values())
    root = path_of(manifest.root) if manifest.root else None
    known = sum(len(some) for some in map(planned.get, own) if not isinstance(some, Path))
    with bar(known, settings.progress) as shown:
        for number, name in enumerate(own):
            some, bad = planned[name], []
            if isinstance(some, Path):
                some, bad = _unpacked(some, collected.root)
                shown.total = shown.n + len(some) * (len(own) - number)  # the others are as large, as far as is known
            made = encode(model, some, root, settings.batch_size, settings.dtype, settings.workers, shown, digests=True)
            facts = Facts(manifest.id, manifest.model, failures=_plain([*bad, *made.failures]))
            with units.writing(folder):
                if name in again or name not in units.listed(folder):  # else the same share was started twice
                    units.put(folder, name, facts, made.encodings, made.rows)
            failures += [*bad, *made.failures]
            read_ += len(made.rows)
    if share[1] > 1 and not read_:  # one share of nothing but damage ends no other
        there = units.read_all(folder, manifest)
        read_ = sum(facts.count for facts in there.values())
        if not read_ and not set(planned) <= units.planned_done(there):
            return
    tell(failures, read_)
    if not read_ and not failures and set(planned) <= {*done, *own}:
        raise DataError(f"no images in {first_few(map(str, collected.shards))}; looked for {LOOKED_FOR}")


def _unpacked(shard: Path, root: Path | None) -> tuple[list[Item], list[Failure]]:
    """The pictures of a shard; a bad one is a failure like a bad picture, and the others are built."""
    try:
        return in_shard(shard, root), []
    except DataError as error:
        return [], [Failure(relative(shard, root), shard, str(error))]


def _begin(
    model: RetrievalModel,
    collected: Collected,
    folder: Path,
    settings: Settings,
    checkpoint: str | None,
    planned: Mapping[str, Any],
) -> Manifest:
    """The manifest of the index in `folder`, made where there is none; DataError where it is not this build's."""
    digest = sha256("\n".join(planned).encode()).hexdigest()
    if again := repeated(item.name for item in collected.items):
        raise DataError(f"names stand twice: {first_few(map(repr, again), 5)}; each image needs a name of its own")
    root = name_of(collected.root) if collected.root is not None else None
    dtype = next(name for name, value in units.DTYPES.items() if value == settings.dtype)
    _check_folder(folder)
    if not (folder / units.MANIFEST).exists():
        shapes = probe(model)
        units.check_writable(shapes, settings.dtype)
        wanted = Manifest(
            units.new_id(), fingerprint_of(model), checkpoint, root, dtype, shapes,
            {"units": len(planned), "sha256": digest},
        )  # fmt: skip
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with units.writing(folder):
            if not (folder / units.MANIFEST).exists():
                units.write_manifest(folder, wanted)
    manifest = units.read_manifest(folder)
    check_model(manifest.model, model, f" in {folder}")
    if manifest.dtype != dtype:
        raise DataError(
            f"the index in {folder} stores {manifest.dtype}, not {dtype}; give the same dtype, or another out"
        )
    if manifest.plan != {"units": len(planned), "sha256": digest}:
        raise DataError(
            f"the index in {folder} was begun with other pictures, or with another unit_size; `neucore index sync` "
            "brings it up to a folder, `index add` adds pictures; or give another out"
        )
    return manifest


def _check_folder(folder: Path) -> None:
    """DataError: a file, or a folder with a manifest that is no index's."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{str(folder)!r} is a file; give a folder for the index")
    if (folder / units.MANIFEST).exists() and units.read_format(folder).get("format") != earlier.FORMAT:
        units.read_manifest(folder)


def _plain(failures: Sequence[Failure]) -> list[dict[str, str]]:
    return [
        {"name": f.name, "path": name_of(f.path) if isinstance(f.path, Path) else str(f.path), "reason": f.reason}
        for f in failures
    ]


# ---- changing -------------------------------------------------------------------------------------------------------


def append(index: Held, made: Encoded, removes: dict[str, list[int]]) -> Part | None:
    """Put a unit at the end of the index's folder, and into its `units`; gives its part, None where it has no pictures.

    DataError: rows are to be removed from a unit that is gone since the index was opened.
    """
    folder, manifest = index.folder, index.manifest
    facts = Facts(manifest.id, manifest.model, failures=_plain(made.failures), removes=removes)
    with units.writing(folder):
        if units.read_manifest(folder).id != manifest.id or not set(removes) <= set(units.listed(folder)):
            raise DataError(f"the index in {folder} was compacted or saved anew since it was opened; open it again")
        name = units.next_name(folder)
        rows = [Row(**{**_values(row), "path": _repath(row.path, index.root, manifest.root)}) for row in made.rows]
        units.put(folder, name, facts, made.encodings, rows)
    index.units[name] = facts
    return units.open_part(folder, manifest, name, facts, index.stored) if facts.count else None


def _values(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Row.__dataclass_fields__}


def _repath(path: str, opened: Path | None, kept: str | None) -> str:
    """A path below the root that the index was opened with is the same below the root that its manifest names."""
    if path_of(path).is_absolute() or (opened is not None and kept is not None):
        return path
    return name_of((opened / path_of(path)).as_posix()) if opened is not None else path


# ---- saving ---------------------------------------------------------------------------------------------------------


def runs(parts: Sequence[Part], alive: Tensor | None, most: int) -> Iterator[tuple[dict[str, Tensor], list[Row]]]:
    """(encodings, rows) of at most `most` images each, those that were removed left out."""
    arrays: list[dict[str, Tensor]] = []
    rows: list[Row] = []

    def taken() -> tuple[dict[str, Tensor], list[Row]]:
        return {key: torch.cat([some[key] for some in arrays]) for key in arrays[0]}, rows

    for part in parts:
        known = iter(part.rows)
        for start in range(0, part.count, most):
            end = min(start + most, part.count)
            keep = alive[part.start + start : part.start + end] if alive is not None else torch.ones(end - start) > 0
            some = [row for row, kept in zip(islice(known, end - start), keep.tolist(), strict=True) if kept]
            if len(rows) + len(some) > most and rows:
                yield taken()
                arrays, rows = [], []
            if some:
                arrays.append({key: value[start:end][keep] for key, value in part.arrays.items()})
                rows += some
    if rows:
        yield taken()


def save(index: Held, folder: Path) -> None:
    """Write an index whole, in place of the one that is there. Raises DataError."""
    _check_folder(folder)
    units.check_writable(index.shapes, index.dtype)
    root = name_of(index.root) if index.root is not None else None
    dtype = next(name for name, value in units.DTYPES.items() if value == index.dtype)
    checkpoint = index.manifest.checkpoint if index.manifest else None
    manifest = Manifest(units.new_id(), index.model_fingerprint, checkpoint, root, dtype, index.shapes)
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with units.writing(folder) as alone:
        old = _files_before(folder)
        written: list[str] = []
        try:
            for arrays, rows in runs(index.parts, index.alive, SAVED):
                failures = [] if written else _plain(index.failures)
                written.append(units.next_name(folder))
                units.put(folder, written[-1], Facts(manifest.id, manifest.model, failures=failures), arrays, rows)
            units.write_manifest(folder, manifest)
        except BaseException:
            if not _is_in_force(folder, manifest):
                units.delete(folder, written)
            raise
        for path in old:
            path.unlink(missing_ok=True)
        if alone:
            units.tidy(folder, written)
        else:
            units.delete(folder, [name for name in units.listed(folder) if name not in written])


def _is_in_force(folder: Path, manifest: Manifest) -> bool:
    with contextlib.suppress(DataError):
        return units.read_manifest(folder).id == manifest.id
    return False


def _files_before(folder: Path) -> list[Path]:
    """Of an index of the earlier format."""
    if (folder / units.MANIFEST).exists() and units.read_format(folder).get("format") == earlier.FORMAT:
        return earlier.files_of(folder)
    return []
