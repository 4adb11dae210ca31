"""Atomic writes and fingerprints of files."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success it is flushed to disk and renamed, on failure removed.

    A reader therefore sees the old file or the whole new one, also after a kill.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
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
    """Hexadecimal sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


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
