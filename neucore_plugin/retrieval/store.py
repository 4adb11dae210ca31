"""An index on disk: one `.npy` for each encoding key, `ids.json`, and `manifest.json`, which is written last.

Every save uses names of its own, with a random number in them, and the manifest names the files in force: the earlier
index stays whole until the new manifest replaces its own, and two savers at once never share a file. Arrays are opened
with allow_pickle=False and memory-mapped.
"""

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import (
    atomic_write,
    file_errors,
    locked,
    open_array,
    read_json,
    sha256_file,
    write_json,
)

FORMAT = "neucore-index-1"
MANIFEST = "manifest.json"
DTYPES = (torch.float32, torch.float16)

_FAILURE = ("name", "path", "reason")
_REMEDY = "build the index again (GalleryIndex.build, then save)"


@dataclass
class Stored:
    """What a saved index holds; paths are relative to root where they lie below it. encodings: [G,*] a key."""

    names: list[str]
    paths: list[str]
    encodings: dict[str, Tensor]
    root: str | None
    failures: list[dict[str, str]]
    model_fingerprint: str | None


def write(folder: str | Path, stored: Stored) -> None:
    """Save into `folder` (made if needed). DataError: the folder holds a manifest that is not an index's."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{str(folder)!r} is a file; give a folder for the index")
    for key, value in stored.encodings.items():
        if not re.fullmatch(r"[A-Za-z0-9_]+", key) or value.dtype not in DTYPES:
            raise DataError(f"encoding {key!r} of {value.dtype} cannot be stored; use a plain name, float32 or float16")
    _earlier(folder)
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as alone:
            _write(folder, stored, alone)


def _write(folder: Path, stored: Stored, alone: bool) -> None:
    """alone: nobody else saves there, so that what killed savers left can be told, and is taken away."""
    number = secrets.randbelow(9 * 10**17) + 10**17
    keys, ids = {key: f"{key}-{number}.npy" for key in stored.encodings}, f"ids-{number}.json"
    names = [*keys.values(), ids]
    try:
        for key, value in stored.encodings.items():
            with atomic_write(folder / keys[key]) as stream:
                np.save(stream, value.numpy(), allow_pickle=False)
        rows = {"names": stored.names, "paths": stored.paths, "failures": stored.failures}
        write_json(folder / ids, rows, indent=None)
        manifest = {
            "format": FORMAT,
            "generation": number,
            "count": len(stored.names),
            "model": stored.model_fingerprint,
            "root": stored.root,
            "encodings": keys,
            "ids": ids,
            "files": {n: {"sha256": sha256_file(folder / n), "bytes": (folder / n).stat().st_size} for n in names},
        }
        before = _earlier(folder)
        write_json(folder / MANIFEST, manifest)
    except BaseException:
        if (_earlier(folder) or {}).get("ids") != ids:
            for name in names:
                (folder / name).unlink(missing_ok=True)
        raise
    for name in before["files"] if before else ():
        (folder / name).unlink(missing_ok=True)
    left = rf"\.?({'|'.join((*keys, 'ids'))})-\d{{18}}\.(npy|json)(\.[0-9a-f]+\.tmp)?|\.{MANIFEST}\.[0-9a-f]+\.tmp"
    for path in folder.iterdir() if alone else ():
        if path.name not in names and re.fullmatch(left, path.name):
            path.unlink(missing_ok=True)


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The manifest of the index that is there; DataError where one is that is not an index's."""
    return _read_manifest(folder) if (folder / MANIFEST).exists() else None


def read(folder: str | Path, verify: bool = True) -> Stored:
    """Open a saved index. Sizes are always compared with the manifest, sha256 sums with `verify`."""
    folder = Path(folder)
    with file_errors(folder):
        while True:
            manifest = _read_manifest(folder)
            try:
                return _opened(folder, manifest, verify)
            except (DataError, OSError):
                if _read_manifest(folder) == manifest:  # else it was saved anew in between, which takes the files away
                    raise


def _opened(folder: Path, manifest: dict[str, Any], verify: bool) -> Stored:
    count = manifest["count"]
    for name, noted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"index {str(folder)!r}: {name} is missing; {_REMEDY}")
        if path.stat().st_size != noted["bytes"] or (verify and sha256_file(path) != noted["sha256"]):
            raise DataError(f"index {str(folder)!r}: {name} is not the file that was saved (damaged or cut); {_REMEDY}")
    try:
        rows = read_json(folder / manifest["ids"], dict, _REMEDY)
        names, paths, failures = rows["names"], rows["paths"], rows["failures"]
        if not all(isinstance(text, str) for text in (*names, *paths, *(f[key] for f in failures for key in _FAILURE))):
            raise TypeError(f"{manifest['ids']} holds something else than names, paths and reasons")
        encodings = {key: torch.from_numpy(open_array(folder / name)) for key, name in manifest["encodings"].items()}
        lengths = {len(names), len(paths), *(len(value) for value in encodings.values())}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"index {str(folder)!r} cannot be read ({error}); {_REMEDY}") from error
    if lengths != {count} or not encodings or any(value.dtype not in DTYPES for value in encodings.values()):
        raise DataError(f"index {str(folder)!r}: its files do not agree with its manifest of {count} images; {_REMEDY}")
    return Stored(names, paths, encodings, manifest["root"], failures, manifest["model"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        what = "is a file" if folder.exists() else "does not exist"
        what = "has no manifest.json: no index, or its saving was never finished" if folder.is_dir() else what
        raise DataError(f"index folder {str(folder)!r} {what}; {_REMEDY}")
    manifest = read_json(path, dict, _REMEDY)
    if (given := manifest.get("format")) != FORMAT:
        raise DataError(f"{str(path)!r} has format {given!r:.80}, not {FORMAT!r}; {_REMEDY}, in a folder of its own")
    try:
        ids, files, keys = manifest["ids"], manifest["files"], manifest["encodings"]
        named = [ids, *keys.values()]
        sound = set(named) == set(files) and all(_sound_file(name, noted) for name, noted in files.items())
        sound = sound and all(isinstance(manifest[key], int) for key in ("count", "generation"))
        sound = sound and all(isinstance(manifest[key], str | None) for key in ("model", "root"))
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise DataError(f"{str(path)!r} lacks fields or names files outside its folder; {_REMEDY}")
    return manifest


def _sound_file(name: str, noted: dict[str, Any]) -> bool:
    """A plain file name: a manifest from elsewhere must not reach (or delete) other files."""
    plain = re.fullmatch(r"[A-Za-z0-9_]+-\d+\.(npy|json)", name) is not None
    return plain and isinstance(noted["sha256"], str) and isinstance(noted["bytes"], int)
