"""Token features of frozen encoders, computed once and memory-mapped from disk.

A cache lives in `<root>/<key>/`, the key being a digest of the encoder's fingerprint and of every item's content:
another encoder, other weights or a changed image lead to another folder, so a stale cache is never read. Rows are
appended in order and progress is recorded, so an interrupted build goes on where it stopped; `manifest.json` is
written last.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import file_errors, locked, read_json, sha256_file, sha256_text, write_json

FORMAT = 1
_FILES = ("tokens.f16", "pooled.f16", "counts.i32")
_RECORD_EVERY = 8  # batches between two records of progress

Encode = Callable[[Sequence[str]], Iterator[tuple[np.ndarray, np.ndarray]]]


class FeatureCache:
    """Ragged token features [n_i, D] and one pooled vector [P] an item, as float16 on disk; read by item name."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        remedy = f"delete {folder}: it is made anew"
        manifest = read_json(folder / "manifest.json", dict, remedy)
        self.folder, self.width, self.pooled_width = folder, manifest.get("width"), manifest.get("pooled_width")
        if type(self.width) is not int or type(self.pooled_width) is not int:
            raise DataError(f"{folder / 'manifest.json'}: lacks the widths of the features; {remedy}")
        counts = np.fromfile(folder / "counts.i32", dtype=np.int32)
        rows = int(counts.sum())
        sizes = (rows * self.width * 2, len(names) * self.pooled_width * 2, len(names) * 4)
        for name, size in zip(_FILES, sizes, strict=True):
            if (found := _size(folder / name)) != size:
                raise DataError(
                    f"{folder / name}: damaged feature cache ({found} bytes, expected {size}). Delete {folder}; "
                    "it is made anew"
                )
        self._offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._row = {name: index for index, name in enumerate(names)}
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # loader workers map the files themselves

    def _map(self, name: str, width: int) -> np.ndarray:
        if name not in self._maps:
            path = self.folder / name
            empty = path.stat().st_size == 0
            data = np.zeros(0, np.float16) if empty else np.memmap(path, dtype=np.float16, mode="c")
            self._maps[name] = data.reshape(-1, width)
        return self._maps[name]

    def tokens(self, name: str) -> torch.Tensor:
        """Token features [n, D], float32."""
        index = self._row[name]
        rows = self._map("tokens.f16", self.width)[self._offsets[index] : self._offsets[index + 1]]
        return torch.from_numpy(rows).float()  # several times faster than numpy's own conversion

    def pooled(self, name: str) -> torch.Tensor:
        """Pooled vector [P], float32."""
        return torch.from_numpy(self._map("pooled.f16", self.pooled_width)[self._row[name]]).float()

    def place(self, name: str) -> int:
        """Where an item stands, for `rows`."""
        return self._row[name]

    def rows(self, kind: str, places: np.ndarray) -> torch.Tensor:
        """Of many items at once, float32: "pooled" [n,P], or "tokens" [n,N,D] of items that have equally many."""
        if kind == "pooled":
            return torch.from_numpy(self._map("pooled.f16", self.pooled_width)[places]).float()
        counts = self._offsets[places + 1] - self._offsets[places]
        if len(lengths := set(counts.tolist())) > 1:
            raise DataError(f"{self.folder}: items differ in the number of their tokens: {sorted(lengths)}")
        index = self._offsets[places][:, None] + np.arange(max(lengths, default=0))
        return torch.from_numpy(self._map("tokens.f16", self.width)[index]).float()


def content_fingerprints(paths: Sequence[Path]) -> list[str]:
    """sha256 of every file's bytes (or of those of an image in a shard): what makes a changed image visible."""
    return [
        sha256_file(path) if isinstance(path, str | os.PathLike) else hashlib.sha256(path.read()).hexdigest()
        for path in tqdm(paths, "checking images", unit="image", disable=None, leave=False)
    ]


def build_cache(
    root: str | Path,
    kind: str,
    encoder: str,
    names: Sequence[str],
    contents: Sequence[str],
    encode: Encode,
    batch_size: int,
) -> FeatureCache:
    """Open the cache of these items, making or completing it first.

    Args:
        root: folder of all caches. kind: "images" or "texts", for the progress bar.
        encoder: the encoder's fingerprint. names: unique item names. contents: a fingerprint of each item's content.
        encode: takes a batch of names, yields (tokens [n,D], pooled [P]) an item, in order.
    Returns: a FeatureCache over `names`. Two processes that want the same cache wait for one another.
    """
    identity = {"format": FORMAT, "encoder": encoder, "items": sha256_text(json.dumps([list(names), list(contents)]))}
    folder = Path(root) / f"{kind}-{sha256_text(json.dumps(identity, sort_keys=True))[:24]}"
    with file_errors(folder, "Another folder: run.cache_dir, or the environment variable NEUCORE_CACHE"):
        if not (folder / "manifest.json").exists():  # a complete one may lie where nothing can be written
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_suffix(".lock"), without="a cache is not continued after a break there") as alone:
                if not (folder / "manifest.json").exists():
                    work = (folder, identity, kind, names, encode, batch_size)
                    _fill(*work) if alone else _fill_apart(*work)
        return FeatureCache(folder, names)


def _fill_apart(folder: Path, *work: Any) -> None:
    """Where nothing keeps other processes out: fill a folder of our own, then give it the name, if none was faster."""
    own = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        _fill(own, *work)
        try:
            own.rename(folder)
        except OSError:
            if not (folder / "manifest.json").exists():
                shutil.rmtree(folder)  # begun where there were locks
                own.rename(folder)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _fill(folder: Path, identity: dict, kind: str, names: Sequence[str], encode: Encode, batch_size: int) -> None:
    folder.mkdir(exist_ok=True)
    record = folder / "progress.json"
    try:
        state = read_json(record, dict)
        lost = any(_size(folder / name) < state["sizes"][name] for name in _FILES)
        lost = lost or not all(isinstance(state[key], int) for key in ("items", "width", "pooled_width"))
    except (DataError, KeyError, TypeError):  # nothing was recorded, or not by us
        lost = True
    if lost:  # begin (again)
        state = {"items": 0, "sizes": dict.fromkeys(_FILES, 0), "width": 0, "pooled_width": 0}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "ab")) for name in _FILES}
        for name, stream in files.items():
            stream.truncate(state["sizes"][name])  # what was written after the last record is redone
        bar = stack.enter_context(
            tqdm(
                total=len(names),
                initial=state["items"],
                desc=f"encoding {kind}",
                unit=kind[:-1],
                mininterval=0.1 if sys.stderr.isatty() else 15,  # a log file gets a line now and then
            )
        )
        for batch, start in enumerate(range(state["items"], len(names), batch_size), 1):
            part = names[start : start + batch_size]
            for tokens, pooled in encode(part):
                files["tokens.f16"].write(np.ascontiguousarray(tokens, dtype=np.float16).tobytes())
                files["pooled.f16"].write(np.ascontiguousarray(pooled, dtype=np.float16).tobytes())
                files["counts.i32"].write(np.int32(len(tokens)).tobytes())
                state.update(width=int(tokens.shape[-1]), pooled_width=int(pooled.shape[-1]))
            bar.update(len(part))
            if batch % _RECORD_EVERY == 0 or start + batch_size >= len(names):
                for stream in files.values():
                    stream.flush()
                    os.fsync(stream.fileno())
                state.update(items=start + len(part), sizes={name: _size(folder / name) for name in _FILES})
                write_json(record, state)
    widths = {key: state[key] for key in ("width", "pooled_width")}
    write_json(folder / "manifest.json", {"identity": identity, "items": len(names), **widths})


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
