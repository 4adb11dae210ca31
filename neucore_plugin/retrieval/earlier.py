"""Indexes of the earlier format, "neucore-index-1": read as they are, never written.

One `.npy` for each encoding key, `ids.json` (names, paths, failures), and `manifest.json`, which names the files in
force with their sizes and sums. Arrays are opened with allow_pickle=False and memory-mapped.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import file_errors, open_array, read_json, sha256_file
from neucore_plugin.retrieval.units import DTYPES, MANIFEST, REMEDY, read_format

FORMAT = "neucore-index-1"

_FAILURE = ("name", "path", "reason")


@dataclass
class Stored:
    """What such an index holds; paths are relative to root where they lie below it. encodings: [G,*] a key."""

    names: list[str]
    paths: list[str]
    encodings: dict[str, Tensor]
    root: str | None
    failures: list[dict[str, str]]
    model_fingerprint: str | None


def read(folder: Path, verify: bool) -> Stored:
    """Open it. Sizes are always compared with the manifest, sha256 sums with `verify`. Raises DataError."""
    with file_errors(folder):
        while True:
            manifest = _checked(folder)
            try:
                return _opened(folder, manifest, verify)
            except (DataError, OSError):
                if _checked(folder) == manifest:  # else it was saved anew in between, which takes the files away
                    raise


def files_of(folder: Path) -> list[Path]:
    """Its files but the manifest: what a new index in its place makes superfluous."""
    return [folder / name for name in _checked(folder)["files"]]


def _opened(folder: Path, manifest: dict[str, Any], verify: bool) -> Stored:
    count = manifest["count"]
    for name, noted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"index {str(folder)!r}: {name} is missing; {REMEDY}")
        if path.stat().st_size != noted["bytes"] or (verify and sha256_file(path) != noted["sha256"]):
            raise DataError(f"index {str(folder)!r}: {name} is not the file that was saved (damaged or cut); {REMEDY}")
    try:
        rows = read_json(folder / manifest["ids"], dict, REMEDY)
        names, paths, failures = rows["names"], rows["paths"], rows["failures"]
        if not all(isinstance(text, str) for text in (*names, *paths, *(f[key] for f in failures for key in _FAILURE))):
            raise TypeError(f"{manifest['ids']} holds something else than names, paths and reasons")
        encodings = {key: torch.from_numpy(open_array(folder / name)) for key, name in manifest["encodings"].items()}
        lengths = {len(names), len(paths), *(len(value) for value in encodings.values())}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"index {str(folder)!r} cannot be read ({error}); {REMEDY}") from error
    known = all(value.dtype in DTYPES.values() for value in encodings.values())
    if lengths != {count} or not encodings or not known:
        raise DataError(f"index {str(folder)!r}: its files do not agree with its manifest of {count} images; {REMEDY}")
    return Stored(names, paths, encodings, manifest["root"], failures, manifest["model"])


def _checked(folder: Path) -> dict[str, Any]:
    path, manifest = folder / MANIFEST, read_format(folder)
    try:
        ids, files, keys = manifest["ids"], manifest["files"], manifest["encodings"]
        named = [ids, *keys.values()]
        sound = set(named) == set(files) and all(_sound_file(name, noted) for name, noted in files.items())
        sound = sound and all(isinstance(manifest[key], int) for key in ("count", "generation"))
        sound = sound and all(isinstance(manifest[key], str | None) for key in ("model", "root"))
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound or manifest.get("format") != FORMAT:
        raise DataError(f"{str(path)!r} lacks fields or names files outside its folder; {REMEDY}")
    return manifest


def _sound_file(name: str, noted: dict[str, Any]) -> bool:
    """A plain file name: a manifest from elsewhere must not reach (or delete) other files."""
    plain = re.fullmatch(r"[A-Za-z0-9_]+-\d+\.(npy|json)", name) is not None
    return plain and isinstance(noted["sha256"], str) and isinstance(noted["bytes"], int)
