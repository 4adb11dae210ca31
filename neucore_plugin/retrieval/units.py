"""An index on disk, format "neucore-index-2": a log of units, each a transaction.

    INDEX/manifest.json           what all units have in common; made once, replaced only by a whole new index
    INDEX/units/UNIT/KEY.npy      encodings [n,*] of a key, float16 or float32
    INDEX/units/UNIT/rows.sqlite  names, paths, attributes (rows.py)
    INDEX/units/UNIT.json         written last: sizes and sums of the files, failures, rows that it removes from other
                                  units, units that it replaces

A unit without its JSON does not exist, so a kill at any moment loses what was not acknowledged and nothing else. Units
are read in the order of their names, which is the order of the gallery. Files are memory-mapped, and stay so after a
compaction has deleted them. Nothing is believed: names are plain, rows lie in their unit, sizes and sums are compared.
"""

import contextlib
import logging
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neucore_plugin.common.errors import DataError, first_few
from neucore_plugin.common.files import (
    atomic_write,
    file_errors,
    locked,
    open_array,
    read_json,
    sha256_file,
    write_json,
)
from neucore_plugin.retrieval import rows as rows_file
from neucore_plugin.retrieval.rows import Row, Rows

log = logging.getLogger(__name__)

FORMAT = "neucore-index-2"
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
REMEDY = "build the index again (`neucore index build`, or GalleryIndex.build)"

_UNIT = re.compile(r"[0-9]{8}-[ap][0-9a-f]{7}(-[0-9]{1,6})?")  # p: planned by a build, a: added later; its compactions
_KEY = re.compile(r"[A-Za-z0-9_]{1,64}")
_SUM = re.compile(r"[0-9a-f]{64}")
_FAILURE = {"name", "path", "reason"}
_MANY_FILES = 256  # units, from which on the process asks for a higher limit of open files


@dataclass(frozen=True)
class Manifest:
    """What all units have in common. id: random, of this index; shapes: {key: shape of one image's encoding}.

    plan: {"units", "sha256"} of the build that made the index, None where no build did.
    """

    id: str
    model: str | None
    checkpoint: str | None
    root: str | None
    dtype: str
    shapes: dict[str, tuple[int, ...]]
    plan: dict[str, Any] | None = None


@dataclass
class Facts:
    """The JSON of a unit. files: {name: {"bytes", "sha256"}}; removes: {unit: rows}; replaces: units."""

    index: str
    model: str | None
    count: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    removes: dict[str, list[int]] = field(default_factory=dict)
    replaces: list[str] = field(default_factory=list)


@dataclass
class Part:
    """A run of gallery positions from `start`: a unit on disk (`unit` its name), or pictures held in memory (None)."""

    unit: str | None
    start: int
    count: int
    arrays: dict[str, Tensor]
    rows: Rows


# ---- manifest -------------------------------------------------------------------------------------------------------


def new_id() -> str:
    """Of an index."""
    return secrets.token_hex(8)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put it in force: from here on only units of its id count."""
    shapes = {key: list(shape) for key, shape in manifest.shapes.items()}
    values = {"format": FORMAT, **asdict(manifest), "shapes": shapes}
    write_json(folder / MANIFEST, {"keys" if key == "shapes" else key: value for key, value in values.items()})


def read_format(folder: Path) -> dict[str, Any]:
    """The manifest as it stands, of whatever format. DataError: none there."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "is a file" if folder.exists() else "does not exist"
        what = "has no manifest.json: no index, or its saving was never finished" if folder.is_dir() else what
        raise DataError(f"index folder {str(folder)!r} {what}; {REMEDY}")
    return read_json(path, dict, REMEDY)


def read_manifest(folder: Path) -> Manifest:
    """DataError: not there, of another format, or it says what no index says."""
    plain = read_format(folder)
    where = str(folder / MANIFEST)
    if (given := plain.get("format")) != FORMAT:
        raise DataError(f"{where!r} has format {given!r:.80}, not {FORMAT!r}; {REMEDY}, in a folder of its own")
    texts, keys, plan = ("model", "checkpoint", "root"), plain.get("keys"), plain.get("plan")
    sound = set(plain) == {"format", "id", "dtype", "keys", "plan", *texts}
    sound = sound and all(isinstance(plain[key], str | None) for key in texts)
    sound = sound and _is_id(plain["id"])
    sound = sound and plain["dtype"] in list(DTYPES) and isinstance(keys, dict) and len(keys) > 0
    sound = sound and all(_KEY.fullmatch(key) and _is_shape(shape) for key, shape in keys.items())
    if sound and plan is not None:
        sound = isinstance(plan, dict) and set(plan) == {"units", "sha256"} and _is_count(plan["units"])
        sound = sound and isinstance(plan["sha256"], str) and _SUM.fullmatch(plan["sha256"]) is not None
    if not sound:
        raise DataError(f"{where!r} does not say what the manifest of an index says (damaged or altered); {REMEDY}")
    shapes = {key: tuple(shape) for key, shape in keys.items()}
    return Manifest(plain["id"], *(plain[key] for key in texts), plain["dtype"], shapes, plan)


def _own(path: Path) -> None:
    """An index from elsewhere must not lead to other files: DataError for links, and what is no file is not opened."""
    for place in (path, path.parent):
        if (place is path or place.name == "units") and place.is_symlink():
            raise DataError(f"{place} is a link: an index holds its files itself; {REMEDY}")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file; {REMEDY}")


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16}", value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def _is_shape(value: Any) -> bool:
    sizes = isinstance(value, list) and len(value) <= 4 and all(_is_count(size) and size > 0 for size in value)
    return sizes and math.prod(value) < 1 << 40


# ---- reading --------------------------------------------------------------------------------------------------------


def listed(folder: Path) -> list[str]:
    """Names of the units that have their JSON, in order."""
    with contextlib.suppress(FileNotFoundError):
        names = (entry.name for entry in os.scandir(folder / "units"))
        return sorted(name[:-5] for name in names if name.endswith(".json") and _UNIT.fullmatch(name[:-5]))
    return []


def read_all(folder: Path, manifest: Manifest) -> dict[str, Facts]:
    """{unit: its JSON} of all units of this index, in order; also of those that another replaces."""
    found = {name: read_facts(folder, manifest, name) for name in listed(folder)}
    return {name: facts for name, facts in found.items() if facts is not None}


def in_force(found: Mapping[str, Facts]) -> dict[str, Facts]:
    """Those that no other replaces. DataError where units replace each other: pictures would vanish."""
    replaced = {name for facts in found.values() for name in facts.replaces}
    left = {name: facts for name, facts in found.items() if name not in replaced}
    # a compaction names all that the units it replaces have replaced
    if lost := (replaced & set(found)) - {name for facts in left.values() for name in facts.replaces}:
        raise DataError(f"units {first_few(sorted(lost))} replace each other (damaged or altered); {REMEDY}")
    return left


def read_facts(folder: Path, manifest: Manifest, name: str) -> Facts | None:
    """A unit's JSON; None for a unit of another index that a save cut short has left. DataError: it lies."""
    path = folder / "units" / f"{name}.json"
    _own(path)
    plain = read_json(path, dict, REMEDY)
    if _is_id(plain.get("index")) and plain["index"] != manifest.id:
        return None
    fields = set(Facts.__dataclass_fields__)
    if set(plain) != fields:
        strange = sorted(set(plain) - fields) or sorted(fields - set(plain))
        raise DataError(f"{path}: has unknown keys or lacks some ({', '.join(strange)[:200]}); {REMEDY}")
    facts = Facts(**plain)
    if facts.index != manifest.id:
        raise DataError(f"{path}: does not say which index it belongs to; {REMEDY}")
    if facts.model != manifest.model:
        raise DataError(
            f"{path}: was encoded by model {facts.model!r:.200}, the index by {manifest.model!r:.200}: their encodings "
            f"cannot be compared; {REMEDY}"
        )
    files = {*(f"{key}.npy" for key in manifest.shapes), rows_file.FILE} if facts.count else set()
    sound = _is_count(facts.count) and isinstance(facts.files, dict) and set(facts.files) == files
    sound = sound and all(
        isinstance(noted, dict) and set(noted) == {"bytes", "sha256"} and _is_count(noted["bytes"])
        and isinstance(noted["sha256"], str) and _SUM.fullmatch(noted["sha256"])
        for noted in facts.files.values()
    )  # fmt: skip
    sound = sound and isinstance(facts.failures, list) and isinstance(facts.removes, dict)
    sound = sound and all(
        isinstance(entry, dict) and set(entry) == _FAILURE and all(isinstance(text, str) for text in entry.values())
        for entry in facts.failures
    )
    sound = sound and all(
        _UNIT.fullmatch(unit) and isinstance(gone, list) and all(_is_count(row) for row in gone)
        for unit, gone in facts.removes.items()
    )
    sound = sound and isinstance(facts.replaces, list)
    sound = sound and all(isinstance(unit, str) and _UNIT.fullmatch(unit) for unit in facts.replaces)
    if not sound or name in facts.replaces:
        raise DataError(f"{path}: names other files, units or numbers than a unit has (damaged or altered); {REMEDY}")
    return facts


def open_parts(folder: Path, manifest: Manifest, units: Mapping[str, Facts]) -> list[Part]:
    """The units that hold pictures, mapped. DataError: a file is missing, of another size, or of another shape."""
    parts, start = [], 0
    if len(units) > _MANY_FILES:
        _more_files()
    for name, facts in units.items():
        if facts.count:
            parts.append(open_part(folder, manifest, name, facts, start))
            start += facts.count
    return parts


def open_part(folder: Path, manifest: Manifest, name: str, facts: Facts, start: int) -> Part:
    """One unit, mapped; its first picture has the gallery position `start`."""
    place = folder / "units" / name
    if place.is_symlink():
        raise DataError(f"{place} is a link: an index holds its files itself; {REMEDY}")
    for file, noted in facts.files.items():
        try:
            status = os.lstat(place / file)
        except FileNotFoundError:
            raise DataError(f"index {str(folder)!r}: {name}/{file} is missing; {REMEDY}") from None
        if stat.S_ISLNK(status.st_mode):
            raise DataError(f"{place / file} is a link: an index holds its files itself; {REMEDY}")
        if not stat.S_ISREG(status.st_mode) or status.st_size != noted["bytes"]:
            raise DataError(f"index {str(folder)!r}: {_not_saved(name, file)}")
    dtype = DTYPES[manifest.dtype]
    arrays = {key: _mapped(place / f"{key}.npy", facts.count, shape, dtype) for key, shape in manifest.shapes.items()}
    return Part(name, start, facts.count, arrays, Rows.open(place / rows_file.FILE, facts.count))


def removed_rows(units: Mapping[str, Facts]) -> dict[str, set[int]]:
    """{unit in force: its rows that were taken out}. DataError for a row beyond its unit."""
    gone: dict[str, set[int]] = {}
    for name, facts in units.items():
        for unit, numbers in facts.removes.items():
            if unit not in units:  # a compaction has dropped them
                continue
            if numbers and max(numbers) >= units[unit].count:
                raise DataError(f"unit {name} removes row {max(numbers)} of {unit}, which has fewer; {REMEDY}")
            gone.setdefault(unit, set()).update(numbers)
    return gone


def _not_saved(unit: str, file: str) -> str:
    return f"{unit}/{file} is not the file that was saved (damaged or cut); {REMEDY}"


def check_sums(folder: Path, units: Mapping[str, Facts]) -> Iterator[tuple[str, str | None]]:
    """(unit, what is wrong with one of its files or None) of each unit, every byte read."""
    for name, facts in units.items():
        wrong = None
        for file, noted in facts.files.items():
            with file_errors(folder):
                if sha256_file(folder / "units" / name / file) != noted["sha256"]:
                    wrong = f"index {str(folder)!r}: {_not_saved(name, file)}"
        yield name, wrong


def _mapped(path: Path, count: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[count,*shape], mapped; what is changed there stays off the disk. No file stays open, however many there are."""
    kind = np.float16 if dtype == torch.float16 else np.float32
    try:
        with open(path, "rb") as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("another version")
            header = np.lib.format.read_array_header_1_0(stream)
            start, size = stream.tell(), os.fstat(stream.fileno()).st_size
    except Exception as error:  # a damaged or hostile header raises whatever it likes
        raise DataError(f"{path} is no .npy matrix of numbers ({error}); {REMEDY}") from error
    numbers, width = count * math.prod(shape), np.dtype(kind).itemsize
    if header != ((count, *shape), False, np.dtype(kind)) or size != start + numbers * width or start % width:
        raise DataError(f"{path} does not hold {count} encodings of the manifest's shape and dtype; {REMEDY}")
    try:
        text = str(path.absolute()).encode().decode()
    except UnicodeEncodeError:  # a folder that torch cannot be told of
        return torch.from_numpy(open_array(path))
    try:
        flat = torch.from_file(text, shared=False, size=size // width, dtype=dtype)
    except RuntimeError as error:
        raise DataError(f"{path} cannot be mapped into memory ({error}); {REMEDY}") from None
    return flat[start // width :].view(count, *shape)


def _more_files() -> None:
    """Each unit keeps one file open, so that it can be read after a compaction has deleted it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536) if hard > 0 else 65536), hard))


# ---- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path) -> Iterator[bool]:
    """Alone in the index for as long as a unit takes to be written, or a compaction. False: there are no locks here."""
    with file_errors(folder), locked(folder) as held:
        yield held


def next_name(folder: Path) -> str:
    """Of a unit at the end; call it while `writing`."""
    last = max((int(name[:8]) for name in listed(folder)), default=-1)
    return f"{last + 1:08d}-a{secrets.token_hex(4)[1:]}"


def planned_name(number: int, digest: str) -> str:
    """Of a unit of a build: the same source always makes the same."""
    return f"{number:08d}-p{digest[:7]}"


def compacted_name(first: str) -> str:
    """Of the unit that takes the place of a run of units, `first` being the first: it stays in the run's place."""
    number, token, *times = first.split("-")
    return f"{number}-{token}-{int(times[0]) + 1 if times else 1}"


def planned_done(found: Mapping[str, Facts]) -> set[str]:
    """The units of the build that are there, or were until a compaction."""
    names = {*found, *(name for facts in found.values() for name in facts.replaces)}
    return {name for name in names if "-p" in name and name.count("-") == 1}


def put(folder: Path, name: str, facts: Facts, arrays: Mapping[str, Tensor], rows: Iterable[Row]) -> Facts:
    """Write a unit, while `writing`; with its last rename it is there. facts: all but count and files.

    What an earlier try has left of it is overwritten. On an error nothing of it stays. Raises FileError.
    """
    place = folder / "units" / name
    _own(folder / "units" / f"{name}.json")
    facts.count = len(next(iter(arrays.values()))) if arrays else 0
    with file_errors(place):
        (folder / "units").mkdir(parents=True, exist_ok=True)
        try:
            if facts.count:
                _fill(place, facts, arrays, rows)
            write_json(folder / "units" / f"{name}.json", asdict(facts), indent=None)
        except BaseException:
            if not (folder / "units" / f"{name}.json").exists():
                shutil.rmtree(place, ignore_errors=True)
            raise
        _flush(folder / "units")
    return facts


def _fill(place: Path, facts: Facts, arrays: Mapping[str, Tensor], rows: Iterable[Row]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for key, value in arrays.items():
        with atomic_write(place / f"{key}.npy") as stream:
            np.save(stream, value.contiguous().numpy(), allow_pickle=False)
    path = place / rows_file.FILE
    count = rows_file.write(path, rows)
    if count != facts.count:
        raise ValueError(f"{count} rows for {facts.count} encodings")
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())
    _flush(place)
    facts.files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(place.iterdir())}


def _flush(folder: Path) -> None:
    """The names in a folder, to the disk."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def delete(folder: Path, names: Iterable[str]) -> None:
    """Take units away that are not in force: first the JSON, without which the rest does not exist."""
    for name in names:
        (folder / "units" / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "units" / name, ignore_errors=True)


def tidy(folder: Path, keep: Iterable[str]) -> None:
    """Take away what killed writers left, while `writing` with a lock that holds."""
    kept = set(keep)
    for entry in list(os.scandir(folder / "units")) if (folder / "units").is_dir() else ():
        stem = entry.name.removesuffix(".json")
        if _UNIT.fullmatch(stem) and stem not in kept:
            shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
        elif re.fullmatch(rf"\.{_UNIT.pattern}\.json\.[0-9a-f]+\.tmp", entry.name):
            os.unlink(entry)
    for path in folder.glob(f".{MANIFEST}.*.tmp"):
        path.unlink(missing_ok=True)


def check_writable(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
    """DataError for what a unit cannot hold."""
    for key in shapes:
        if not _KEY.fullmatch(key) or dtype not in DTYPES.values():
            raise DataError(f"encoding {key!r} of {dtype} cannot be stored; use a plain name, float32 or float16")
