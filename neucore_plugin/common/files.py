"""Atomic writes, locks, fingerprints, and texts: UTF-8 whatever the locale. JSON that is read holds no surprises."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from neucore_plugin.common.errors import ConfigError, DataError, FileError
from neucore_plugin.common.names import path_of

log = logging.getLogger(__name__)
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
_DEEPEST = 64  # levels of a JSON file: ours and the published ones have five


@contextmanager
def file_errors(path: str | Path, note: str = "") -> Iterator[None]:
    """Whatever the system refuses within becomes a `FileError` that names a file, else `path`."""
    try:
        yield
    except BrokenPipeError:  # no trouble of a file: the reader has gone
        raise
    except OSError as error:
        found = FileError.of(error, path, note)
        if found is error:
            raise
        raise found from error


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success it is flushed to disk and renamed, on failure removed.

    A reader therefore sees the old file or the whole new one, also after a kill. Text is UTF-8; what UTF-8 cannot say
    (a file name of other bytes) is written as its escape, which is JSON's as well. Links are followed: the file that
    they lead to is replaced, and it keeps its permissions. What is no file but can be written (a terminal, a pipe,
    /dev/stdout, /dev/null) is written into. Raises `FileError` for anything else, and for what the system refuses.
    """
    path = expanded(path)
    with file_errors(path):
        try:
            with (_into if _takes_a_stream(path) else _beside)(path, mode) as stream:
                yield stream
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch.save hides that the drive is full
                raise error.__context__ from error
            raise


@contextmanager
def _beside(path: str | Path, mode: str) -> Iterator[IO]:
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    before = place.stat() if place.exists() else None
    if before and not os.access(place, os.W_OK):  # renaming would not mind
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    handle, temporary = _new_beside(place)
    try:
        with os.fdopen(handle, mode, **_coding(mode)) as stream:
            if before:
                with contextlib.suppress(OSError, AttributeError):  # some systems know neither
                    os.chown(temporary, before.st_uid, before.st_gid)
                with contextlib.suppress(OSError):
                    os.chmod(temporary, stat.S_IMODE(before.st_mode))
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, place)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, temporary, path)
        raise


def _coding(mode: str) -> dict[str, str]:
    return {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}


def _new_beside(place: Path) -> tuple[int, Path]:
    """A new file, open, as readable as the umask has it (tempfile makes 0600, and reading the umask sets it)."""
    name = place.name if len(os.fsencode(place.name)) < 200 else place.name[:40]
    while True:
        temporary = place.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            return os.open(temporary, flags, 0o666), temporary
        except FileExistsError:
            continue
        except OSError as error:
            _name(error, temporary, place)
            raise


def _name(error: BaseException, temporary: Path, path: str | Path) -> None:
    """Let the error name the file that was to be written instead of ours beside it."""
    if isinstance(error, OSError) and error.filename == os.fspath(temporary):
        error.filename = os.fspath(path)


@contextmanager
def _into(path: str | Path, mode: str) -> Iterator[IO]:
    own = _own_descriptor(path)
    handle = os.open(path, os.O_WRONLY) if own is None else os.dup(own)  # standard output may be a file: write on there
    with os.fdopen(handle, mode, **_coding(mode)) as stream:
        yield stream


def _takes_a_stream(path: str | Path) -> bool:
    """Whether `path` is written as it stands. OSError for folders, drives and sockets."""
    if _own_descriptor(path) is not None:
        return True
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISREG(kind):
        return False
    if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
        return True
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    raise OSError(errno.ENXIO, "is a device or a socket", str(path))


def _own_descriptor(path: str | Path) -> int | None:
    """The open file of this process that links lead to, as /dev/stdout does."""
    place = os.fspath(path)
    for _ in range(40):  # as many as Linux follows
        if not os.path.islink(place):
            return None
        folder, name = os.path.realpath(os.path.dirname(place)), os.path.basename(place)
        if re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd", folder) and name.isdecimal():
            return int(name)
        place = os.path.join(folder, os.readlink(place))
    return None


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it on success, removed on failure: `path` is whole, or not there.

    Raises ConfigError where something is there already, an empty folder aside; FileError for what the system refuses.
    """
    path = expanded(path).absolute()
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise ConfigError(f"{path} is there already; give a new folder, or move that one away")
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: str | Path, without: str | None = None) -> Iterator[bool]:
    """Keep other processes and threads out of a folder, or of what a lock file (made here) stands for; waits for them.

    Yields False where the file system has no locks, with the warning `without`, which says what follows from it.
    """
    handle = open_lock(path)
    try:
        try:
            held = lock(handle, without=without)
        except BlockingIOError:
            log.info("waiting for another process that uses %s", path)
            held = lock(handle, wait=True, without=without)
        yield held
    finally:
        if handle is not None:
            os.close(handle)


def open_lock(path: str | Path) -> int | None:
    """A folder or a lock file, opened to be locked; None where the system has no such locks. Raises `FileError`."""
    try:
        import fcntl  # noqa: F401
    except ImportError:  # not a POSIX system
        return None
    with file_errors(path):
        return os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT, 0o666)


def lock(handle: int | None, wait: bool = False, whole_process: bool = False, without: str | None = None) -> bool:
    """Lock what `open_lock` opened, until it is closed. False where the file system has no locks: `without` is warned.

    whole_process: until the process ends, whatever its children do; it may lock twice. BlockingIOError: another has it.
    """
    if handle is not None:
        import fcntl

        take = fcntl.lockf if whole_process else fcntl.flock
        try:
            take(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except OSError as error:  # ENOLCK, ENOTSUP, ENOSYS, EBADF, ...: only these mean that another has it
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(*error.args) from error
    if without:
        log.warning("no locks on this file system: %s", without)
    return False


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
        raise DataError(f"{path}: no text in UTF-8 ({error}); save it as UTF-8, or {remedy}") from None
    except FileNotFoundError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except OSError as error:
        raise DataError(f"{FileError.of(error, path)}, or {remedy}") from None
    except ValueError as error:  # a null byte, or a letter that the locale's file names cannot hold
        raise DataError(f"{path}: no name of a file ({error}); {remedy}") from None


def read_json(path: str | Path, kind: type | None = None, remedy: str = "fetch it again") -> Any:
    """What a JSON file holds; `kind`: dict or list, where one of them is wanted.

    DataError, with the entry where there is one, for what cannot be read, is no JSON (NaN is none) or something else,
    for a key that stands twice, a number that no 64 bits hold, and lists in lists without end.
    """
    try:
        value = parse_json(read_text(path, remedy))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: no valid JSON ({error}); {remedy}") from None
    if kind is not None and not isinstance(value, kind):
        what = {dict: "object", list: "list"}[kind]
        raise DataError(f"{path}: expected a JSON {what}, given {type(value).__name__}; {remedy}")
    return value


def open_array(path: str | Path) -> Any:
    """The array of a `.npy` file, mapped into memory; what is changed there stays off the disk. Raises DataError."""
    from numpy.lib.format import open_memmap  # here: whoever reads configs imports this module, and is light

    try:
        return open_memmap(path, mode="c")
    except Exception as error:  # a damaged or hostile header raises whatever it likes
        raise DataError(f"{path} is no .npy matrix of numbers ({error})") from error


class _Wrong(str):
    """Stands in a parsed value where the text has what is refused: the reason."""


def parse_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError that says what is wrong and where, for all that `read_json` refuses."""
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


def expanded(path: str | Path) -> Path:
    """`path` with the home folder for a leading ~, in UTF-8; the ~ of a user who is not known stays as it is.

    Raises ConfigError where the own home is meant and not known (a user id without an entry, HOME not set).
    """
    found = os.path.expanduser(path)
    if Path(found).parts[:1] == ("~",):
        raise ConfigError(
            f"{os.fspath(path)}: this user has no home folder; set HOME, or give a whole path "
            "(of caches: the environment variable NEUCORE_CACHE)"
        )
    try:
        os.fsencode(found)
    except UnicodeEncodeError:  # a text of a config, in a locale that lacks its letters
        return path_of(os.fspath(found))
    return Path(found)


def hub_name(source: str | Path) -> tuple[str, str | None] | None:
    """(OWNER/NAME, revision or None) of a text OWNER/NAME or OWNER/NAME@REVISION; None for any other.

    None also for what is there as a file or folder, and for what looks like the path of a file: its first part is a
    folder here, or it ends as a file of weights does.
    """
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", os.fspath(source))
    if found is None or Path(found[1]).suffix in WEIGHT_FILES or expanded(source).exists():
        return None
    return None if Path(found[1]).parent.is_dir() else (found[1], found[2])


def cache_dir(override: str | Path | None = None) -> Path:
    """Folder for caches: `override`, else $NEUCORE_CACHE, else ~/.cache/neucore; it is not created here.

    It holds features/ (outputs of frozen encoders, concepts of captions), emoji/ (drawings), streams/ (shards that were
    fetched), and missing-images-NAME.txt.
    """
    chosen = override or os.environ.get("NEUCORE_CACHE") or "~/.cache/neucore"
    return expanded(chosen).absolute()


def features_dir(override: str | Path | None = None) -> Path:
    """Where features and concepts are kept, in the folder for caches."""
    return cache_dir(override) / "features"
