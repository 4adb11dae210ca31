"""Token features of frozen encoders, computed once and memory-mapped from disk.

A cache lives in `<root>/<key>/`, the key being a digest of the encoder's fingerprint and of every item's content:
another encoder, other weights or a changed image lead to another folder, so a stale cache is never read. Rows are
appended in order and progress is recorded, so an interrupted build goes on where it stopped; `manifest.json` is
written last.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import sha256_file, sha256_text, write_json

FORMAT = 1
_RECORD_EVERY = 8  # batches between two records of progress


class FeatureCache:
    """Ragged token features [n_i, D] and one pooled vector [P] an item, as float16 on disk; read by item name."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        self.folder, self.width, self.pooled_width = folder, manifest["width"], manifest["pooled_width"]
        counts = np.fromfile(folder / "counts.i32", dtype=np.int32)
        rows = int(counts.sum())
        sizes = {
            "tokens.f16": rows * self.width * 2,
            "pooled.f16": len(names) * self.pooled_width * 2,
            "counts.i32": len(names) * 4,
        }
        for name, size in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else -1
            if found != size:
                raise DataError(
                    f"{folder / name}: damaged feature cache ({found} bytes, expected {size}). Delete {folder}; "
                    "it is made anew"
                )
        self._offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._row = {name: index for index, name in enumerate(names)}
        self._maps: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def __len__(self) -> int:
        return len(self._row)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # loader workers map the files themselves

    def _map(self, name: str, width: int) -> np.ndarray:
        if name not in self._maps:
            path = self.folder / name
            empty = path.stat().st_size == 0
            data = np.zeros(0, np.float16) if empty else np.memmap(path, dtype=np.float16, mode="r")
            self._maps[name] = data.reshape(-1, width)
        return self._maps[name]

    def tokens(self, name: str) -> torch.Tensor:
        """Token features [n, D], float32."""
        index = self._row[name]
        rows = self._map("tokens.f16", self.width)[self._offsets[index] : self._offsets[index + 1]]
        return torch.from_numpy(rows.astype(np.float32))

    def pooled(self, name: str) -> torch.Tensor:
        """Pooled vector [P], float32."""
        return torch.from_numpy(self._map("pooled.f16", self.pooled_width)[self._row[name]].astype(np.float32))


def content_fingerprints(paths: Sequence[Path], progress: bool = True) -> list[str]:
    """sha256 of every file's bytes (or of those of an image in a shard): what makes a changed image visible."""
    return [
        sha256_file(path) if isinstance(path, str | os.PathLike) else hashlib.sha256(path.read()).hexdigest()
        for path in tqdm(paths, "checking images", unit="image", disable=not progress or None, leave=False)
    ]


def build_cache(
    root: str | Path,
    kind: str,
    encoder: str,
    names: Sequence[str],
    contents: Sequence[str],
    encode: Callable[[Sequence[str]], Iterator[tuple[np.ndarray, np.ndarray]]],
    batch_size: int = 32,
    progress: bool = True,
) -> FeatureCache:
    """Open the cache of these items, making or completing it first.

    Args:
        root: folder of all caches. kind: "images" or "texts", for the progress bar.
        encoder: the encoder's fingerprint. names: unique item names. contents: a fingerprint of each item's content.
        encode: takes a batch of names, yields (tokens [n,D], pooled [P]) an item, in order.
    Returns: a FeatureCache over `names`. Two processes that want the same cache wait for one another.
    """
    if len(set(names)) != len(names):
        raise ValueError("names of cached items must be unique")
    identity = {"format": FORMAT, "encoder": encoder, "items": sha256_text(json.dumps([list(names), list(contents)]))}
    folder = Path(root) / f"{kind}-{sha256_text(json.dumps(identity, sort_keys=True))[:24]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        manifest = folder / "manifest.json"
        if manifest.exists() and json.loads(manifest.read_text()).get("identity") != identity:
            raise DataError(f"{folder}: holds the features of something else. Delete it; it is made anew")
        if not manifest.exists():
            _fill(folder, identity, kind, names, encode, batch_size, progress)
    return FeatureCache(folder, names)


def _fill(
    folder: Path, identity: dict, kind: str, names: Sequence[str], encode, batch_size: int, progress: bool
) -> None:
    record = folder / "progress.json"
    state = (
        json.loads(record.read_text()) if record.exists() else {"items": 0, "sizes": {}, "width": 0, "pooled_width": 0}
    )
    if any(
        not (folder / name).exists() or (folder / name).stat().st_size < size for name, size in state["sizes"].items()
    ):
        state = {"items": 0, "sizes": {}, "width": 0, "pooled_width": 0}  # a file lost its end: begin again
    files = {}
    try:
        for name in ("tokens.f16", "pooled.f16", "counts.i32"):
            path = folder / name
            path.touch()
            os.truncate(path, state["sizes"].get(name, 0))  # what was written after the last record is redone
            files[name] = open(path, "ab")  # noqa: SIM115 - three files, closed below
        bar = tqdm(
            total=len(names),
            initial=state["items"],
            desc=f"encoding {kind}",
            unit=kind[:-1],
            disable=not progress,
            mininterval=0.1 if sys.stderr.isatty() else 15,  # a log file gets a line now and then
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
                state.update(items=start + len(part), sizes={name: (folder / name).stat().st_size for name in files})
                write_json(record, state)
        bar.close()
    finally:
        for stream in files.values():
            stream.close()
    write_json(
        folder / "manifest.json",
        {"identity": identity, "items": len(names), "width": state["width"], "pooled_width": state["pooled_width"]},
    )
