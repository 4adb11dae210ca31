"""Atomic writes, fingerprints, and texts: UTF-8 whatever the locale. JSON that is read holds no surprises."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from neucore_plugin.common.errors import DataError

_DEEPEST = 64  # levels of a JSON file: ours and the published ones have five


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success it is flushed to disk and renamed, on failure removed.

    A reader therefore sees the old file or the whole new one, also after a kill. Text is UTF-8; what UTF-8 cannot say
    (a file name of other bytes) is written as its escape, which is JSON's as well.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        how = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with os.fdopen(handle, mode, **how) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600; the file should be as readable as any other
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically; refuses NaN and infinities, which are no JSON."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    with atomic_write(path, "w") as stream:
        stream.write(text + "\n")


def read_text(path: str | Path, remedy: str = "fetch it again") -> str:
    """A text file as UTF-8, with or without a byte order mark. DataError names file, reason and remedy."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no text in UTF-8 ({error}); {remedy}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:  # a null byte, or a letter that the locale's file names cannot hold
        raise DataError(f"{path}: no name of a file ({error}); {remedy}") from None


def read_json(path: str | Path, kind: type | None = None, remedy: str = "fetch it again") -> Any:
    """What a JSON file holds; `kind`: dict or list, where one of them is wanted.

    DataError, with the entry where there is one, for what cannot be read, is no JSON (NaN is none) or something else,
    for a key that stands twice, a number that no 64 bits hold, and lists in lists without end.
    """
    try:
        value = _parsed(read_text(path, remedy))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: no valid JSON ({error}); {remedy}") from None
    if kind is not None and not isinstance(value, kind):
        what = {dict: "object", list: "list"}[kind]
        raise DataError(f"{path}: expected a JSON {what}, given {type(value).__name__}; {remedy}")
    return value


class _Wrong(str):
    """Stands in a parsed value where the text has what is refused: the reason."""


def _parsed(text: str) -> Any:
    """Parse JSON. Raises ValueError that says what is wrong and where."""
    refused = []

    def refuse(reason: str) -> _Wrong:
        refused.append(_Wrong(reason))
        return refused[-1]

    def whole(digits: str) -> Any:
        fits = len(digits) <= 20 and abs(int(digits)) < 1 << 63
        return int(digits) if fits else refuse(f"the number {digits[:20]}... is too large")

    def real(digits: str) -> Any:
        return value if math.isfinite(value := float(digits)) else refuse(f"the number {digits[:20]} is too large")

    def mapping(pairs: list[tuple[str, Any]]) -> Any:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                return refuse(f"the key {key[:80]!r} stands twice")
            found[key] = value
        return found

    try:
        value = json.loads(
            text,
            parse_int=whole,
            parse_float=real,
            parse_constant=lambda name: refuse(f"{name} is no number"),
            object_pairs_hook=mapping,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [[value]]
    for _ in range(_DEEPEST):  # level by level: nothing recurses
        inside = (part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer))
        level = [part for part in inside if isinstance(part, dict | list)]
    if level:
        raise ValueError("nested too deeply")
    if refused:
        raise ValueError(_first_refusal(value))
    return value


def _first_refusal(value: Any, where: str = "") -> str:
    """The first refusal in a parsed value and its place, such as "entry 3, weights: ..."; "" where there is none."""
    if isinstance(value, _Wrong):
        return f"{where}: {value}" if where else str(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        name = f"entry {key}" if isinstance(key, int) else key[:80]
        if found := _first_refusal(inner, f"{where}, {name}" if where else name):
            return found
    return ""


def sha256_file(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: IO[bytes]) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hexadecimal sha256 of a text's UTF-8 bytes; a file name that is no UTF-8 counts as well."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cache_dir(override: str | Path | None = None) -> Path:
    """Folder for caches: `override`, else $NEUCORE_CACHE, else ~/.cache/neucore; it is not created here.

    It holds features/ (outputs of frozen encoders, concepts of captions), emoji/ (drawings), and
    missing-images-NAME.txt.
    """
    chosen = override or os.environ.get("NEUCORE_CACHE") or "~/.cache/neucore"
    return Path(chosen).expanduser().absolute()


def features_dir(override: str | Path | None = None) -> Path:
    """Where features and concepts are kept, in the folder for caches."""
    return cache_dir(override) / "features"
