"""An approximate first stage for large local galleries: Qdrant's engine in this process (`qdrant-edge-py`).

It is a cache beside the units of an index, in its folder `nearest/`: int8 vectors and their graph, made by `build` from
the units and from nothing else, so that it can be thrown away at any time. Its manifest, written last, names the units
it was made of, with their sums, and every file with its size and sum: a cache that is damaged, half-written or of other
units is not used. Units that came later are no damage: their few rows are scored exactly beside the candidates.

The engine itself refuses neither NaN nor a cut file, and knows no lock: all three are seen to here.
"""

import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.files import file_errors, lock, open_lock, read_json, sha256_file, write_json
from neucore_plugin.retrieval.nearest import FirstOrder, Parts, check_factors

log = logging.getLogger(__name__)

FORMAT = "neucore-nearest-1"
FOLDER = "nearest"
WORTH_FROM = 100_000  # images; below this the exact search is as quick
CANDIDATES = 1000  # scored exactly for each query: recall of the true top 50 over 0.99 where it was measured
EXACT_ROWS = 50_000  # rows that a filter leaves, or that came after the cache: so few are all scored exactly
_NAME = "plain"  # of the one vector of a point
_STEP = 4096  # rows inserted at a time
_REMEDY = "it is made anew by `neucore index accelerate`"


class EdgeCache:
    """The cache of one index, open for look-ups; `close` it, or use it with `with`. Made by `build`, opened by `open`.

    covered: how many rows of the index it holds. One process at a time: see `open`.
    """

    _shard: Any = None
    _handle: int | None = None  # of the lock

    def __init__(self, index: Any, manifest: dict[str, Any]):
        edge = _edge()
        with _engine("opened"):
            self._shard = edge.EdgeShard.load(os.fspath(_folder(index) / manifest["shard"]))
        self.order = _order(manifest)
        starts = {part.unit: part.start for part in index.parts}
        self._starts = np.array([starts[unit["name"]] for unit in manifest["units"]], dtype=np.int64)
        inside = torch.zeros(index.stored, dtype=torch.bool)
        for unit in manifest["units"]:
            inside[starts[unit["name"]] : starts[unit["name"]] + unit["count"]] = True
        self.covered = int(inside.sum())
        self._outside = (~inside).nonzero().flatten()

    def __enter__(self) -> "EdgeCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have it."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @classmethod
    def open(cls, index: Any) -> "EdgeCache | None":
        """The cache of a saved index, or None: there is none; or it does not fit or is in use, which is warned of."""
        folder = _folder(index)
        if folder is None or not (folder / "manifest.json").is_file():
            return None
        handle = None
        try:
            handle = open_lock(folder)
            lock(handle)
            manifest = _read(index)
            if (late := index.stored - sum(unit["count"] for unit in manifest["units"])) > EXACT_ROWS:
                raise DataError(f"{late} images came after {folder}; `neucore index accelerate` takes them in")
            cache = cls(index, manifest)
            cache._handle = handle
            return cache
        except (OSError, DataError, ConfigError) as error:
            if handle is not None:
                os.close(handle)
            used = isinstance(error, BlockingIOError)
            log.warning(
                "searching exactly: %s", f"{folder} is in use by another process (one at a time)" if used else error
            )
            return None

    def nearest(self, parts: Parts, wanted: int) -> Tensor:
        """Positions [K] of the rows worth scoring for one query, ascending: about `wanted`, and all later rows.

        parts: see `FirstOrder.query`. Removed rows are among them. DataError: NaN in the query.
        """
        edge = _edge()
        query = self.order.query(parts).numpy()
        quantized = edge.QuantizationSearchParams(rescore=False)  # the exact scores come from the units
        with _engine("searched"):
            found = self._shard.query(
                edge.QueryRequest(
                    limit=wanted,
                    query=edge.Query.Nearest(query, using=_NAME),
                    params=edge.SearchParams(hnsw_ef=wanted, quantization=quantized),
                )
            )
        ids = np.fromiter((point.id for point in found), dtype=np.int64, count=len(found))
        positions = torch.from_numpy(self._starts[ids >> 32] + (ids & 0xFFFFFFFF))
        return torch.cat([positions, self._outside]).unique()

    @classmethod
    def build(cls, index: Any, progress: bool = True) -> int:
        """Make or extend the cache of a saved index that has its model; how many rows were put in.

        A kill leaves no cache, or the earlier one. DataError: NaN in a unit, or an index held in memory; ConfigError:
        the model's score has no factors, or the package is missing.
        """
        folder = _folder(index)
        if folder is None:
            raise DataError("an index held in memory needs no first stage; save it first")
        check_factors(index.model)
        _edge()
        _forget(index)
        with file_errors(folder):
            folder.mkdir(exist_ok=True)
            handle = open_lock(folder)
            try:
                lock(handle)
                return _build(index, folder, progress)
            except BlockingIOError:
                raise DataError(
                    f"{folder} is in use by another process: end its search or service, then try again"
                ) from None
            finally:
                if handle is not None:
                    os.close(handle)


def worth_scoring(index: Any, query: Any, encoded: Any, places: Tensor | None) -> Tensor | None:
    """Gallery positions [n], ascending, of the images to score for one query; None: all, or all of `places`.

    query, encoded: of `queries`. places [n]: what is there and passes the filter, None: all. Where a filter leaves few
    candidates more are looked up; where few images are left at all, they are all scored.
    """
    allowed = index.stored if places is None else len(places)
    if query.exact or query.k is None or index.stored < WORTH_FROM or allowed <= EXACT_ROWS:
        return None
    if (cache := opened(index)) is None:
        return None
    left_out = len(encoded.left_out) + len(query.exclude)
    least = max(CANDIDATES, 4 * (query.k + left_out))
    mask = None
    if places is not None:
        mask = torch.zeros(index.stored, dtype=torch.bool)
        mask[places] = True
    parts = [(weight, index.model.query_factors(part)) for weight, part in encoded.parts]
    wanted = least * index.stored // allowed
    try:
        while wanted <= index.stored // 4:  # beyond it, to score them all is as quick
            found = cache.nearest(parts, wanted)
            kept = found if mask is None else found[mask[found]]
            if 2 * len(kept) >= least:
                return kept
            wanted *= 4
    except DataError as error:
        log.warning("searching exactly: %s", error)
    return None


def opened(index: Any) -> EdgeCache | None:
    """The cache, kept open with the index object for as long as that has the same units."""
    units = (index.stored, len(index.parts), index.parts[0].unit)
    if index.first_stage is not None and index.first_stage[0] != units:
        _forget(index)
    if index.first_stage is None:
        index.first_stage = (units, EdgeCache.open(index))
    return index.first_stage[1]


def _forget(index: Any) -> None:
    if index.first_stage is not None and index.first_stage[1] is not None:
        index.first_stage[1].close()
    index.first_stage = None


def check(index: Any) -> str | None:
    """What is damaged in the cache of an index, its files' sums compared; None: nothing, or there is none."""
    folder = _folder(index)
    if folder is None or not (folder / "manifest.json").is_file():
        return None
    try:
        manifest = _read(index, fitting=False)
        for name, noted in manifest["files"].items():
            if sha256_file(folder / name) != noted["sha256"]:
                return f"{folder / name} is not the file that was written; {_REMEDY}"
    except (DataError, OSError) as error:
        return str(error)
    return None


def _build(index: Any, folder: Path, progress: bool) -> int:
    edge = _edge()
    path = folder / "manifest.json"
    try:
        manifest = _read(index) if path.is_file() else None
    except DataError as error:
        log.info("making the first stage anew: %s", error)
        manifest = None
    known = {unit["name"] for unit in manifest["units"]} if manifest else set()
    new = [part for part in index.parts if part.unit not in known]
    if manifest and not new:
        return 0
    path.unlink(missing_ok=True)  # from here to the end there is no cache
    if manifest:
        shard, order, units = manifest["shard"], _order(manifest), manifest["units"]
    else:
        shard, order, units = f"shard-{secrets.token_hex(8)}", None, []
    for entry in folder.iterdir():
        if entry.name != shard and entry.is_dir() and entry.name.startswith("shard-"):
            shutil.rmtree(entry)
    units = [*units, *({"name": part.unit, "sum": _sum(index, part.unit), "count": part.count} for part in new)]
    number = {unit["name"]: place for place, unit in enumerate(units)}
    store = None
    total = sum(part.count for part in new)
    try:
        with tqdm(total=total, desc="first stage", unit="image", disable=not progress) as bar, _engine("written"):
            for part, start in _runs(new):
                block = {key: value[start : start + _STEP].float() for key, value in part.arrays.items()}
                factors = index.model.gallery_factors(block)
                order = order or FirstOrder.of(factors)
                vectors = order.gallery(factors).cpu().numpy()
                store = store or _shard(edge, folder / shard, vectors.shape[1], fresh=manifest is None)
                first = (number[part.unit] << 32) + start
                points = [edge.Point(first + row, {_NAME: vector}) for row, vector in enumerate(vectors)]
                store.update(edge.UpdateOperation.upsert_points(points))
                bar.update(len(points))
            if store is not None:
                bar.set_description("first stage: graph")
                while store.optimize():
                    pass
                store.flush()
                store.close()
                edge.EdgeShard.load(os.fspath(folder / shard)).close()  # the first opening writes its settings out
    except BaseException:
        shutil.rmtree(folder / shard, ignore_errors=True)
        raise
    if store is None and manifest is None:
        raise DataError("the index holds no image")
    files = sorted(file for file in (folder / shard).rglob("*") if file.is_file())
    write_json(
        path,
        {
            "format": FORMAT,
            "shard": shard,
            "units": units,
            "shared": order.shared,
            "squares": None if order.squares is None else order.squares.tolist(),
            "count": order.count,
            "files": {
                file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
                for file in files
            },
        },
    )
    return total


def _runs(parts: list[Any]) -> Iterator[tuple[Any, int]]:
    for part in parts:
        yield from ((part, start) for start in range(0, part.count, _STEP))


def _shard(edge: Any, folder: Path, width: int, fresh: bool) -> Any:
    if not fresh:
        return edge.EdgeShard.load(os.fspath(folder))
    folder.mkdir()
    int8 = edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, quantile=0.99, memory=edge.Memory.Pinned)
    vector = edge.EdgeVectorParams(
        size=width,
        distance=edge.Distance.Dot,
        datatype=edge.VectorStorageDatatype.Float16,
        memory=edge.Memory.Cold,
        quantization_config=int8,
    )
    return edge.EdgeShard.create(os.fspath(folder), edge.EdgeConfig(vectors={_NAME: vector}, wal_enabled=False))


def _read(index: Any, fitting: bool = True) -> dict[str, Any]:
    """The manifest; DataError where it or its files are damaged or, if `fitting`, the index has other units."""
    folder = _folder(index)
    path = folder / "manifest.json"
    manifest = read_json(path, dict, _REMEDY)
    try:
        if manifest["format"] != FORMAT:
            raise DataError(f"{path} has format {manifest['format']!r:.80}, not {FORMAT!r}; {_REMEDY}")
        squares = manifest["squares"]
        sound = Path(manifest["shard"]).name == manifest["shard"] and manifest["shard"].startswith("shard-")
        sound = sound and isinstance(manifest["shared"], bool) and isinstance(manifest["count"], int)
        sound = sound and (squares is None or all(math.isfinite(value) and value >= 0 for value in squares))
        files = {name: noted["bytes"] for name, noted in manifest["files"].items()}
        units = {unit["name"]: (unit["sum"], unit["count"]) for unit in manifest["units"]}
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise DataError(f"{path} lacks fields or holds others; {_REMEDY}")
    there = {
        file.relative_to(folder).as_posix(): file for file in (folder / manifest["shard"]).rglob("*") if file.is_file()
    }
    wrong = [name for name in files if name not in there or there[name].stat().st_size != files[name]]
    if wrong or set(there) != set(files):
        which = wrong[0] if wrong else sorted(set(there) - set(files))[0]
        raise DataError(f"{folder / which} is not the file that was written (damaged or cut); {_REMEDY}")
    present = {part.unit: part.count for part in index.parts}
    told = {name: (_sum(index, name), count) for name, count in present.items() if name in units}
    gone = [name for name in units if told.get(name) != units[name]]
    if fitting and gone:
        raise DataError(f"{folder} was made of other units than the index has now (of {gone[0]!r}); {_REMEDY}")
    return manifest


def _folder(index: Any) -> Path | None:
    return None if index.folder is None else Path(index.folder) / FOLDER


def _sum(index: Any, unit: str) -> str:
    """Of the unit's own JSON, which is written once and holds the sums of its files."""
    return sha256_file(Path(index.folder) / "units" / f"{unit}.json")


def _order(manifest: dict[str, Any]) -> FirstOrder:
    squares = manifest["squares"]
    squares = None if squares is None else torch.tensor(squares, dtype=torch.float64)
    return FirstOrder(manifest["shared"], squares, manifest["count"])


@contextmanager
def _engine(what: str) -> Iterator[None]:
    """The engine's own errors, its panics included, as one of ours."""
    try:
        yield
    except BaseException as error:
        # the engine raises bare Exceptions, and panics that are no Exceptions; all others pass
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"the first stage cannot be {what} ({' '.join(str(error).split())[:200]}); {_REMEDY}"
        ) from error


def _edge() -> Any:
    try:
        import qdrant_edge
    except ImportError as error:
        raise ConfigError(
            f"the approximate first stage needs a package that is not installed ({error}): "
            "pip install 'neucore-plugin[qdrant]'"
        ) from error
    return qdrant_edge
