"""Errors that a user can mend: what was given, what is allowed, what to do; the command line prints no traceback."""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Sequence


class NeucoreError(Exception):
    """Base of every error this package raises on bad input; shared: each process of a run has it, the first tells."""

    shared = False


class ConfigError(NeucoreError, ValueError):
    """A yaml file or an option is wrong; all problems are listed at once."""

    shared = True


class DataError(NeucoreError, ValueError):
    """Annotations, splits or folders are missing or malformed."""


class ImageError(DataError):
    """A file is no readable image."""


class CheckpointError(NeucoreError, RuntimeError):
    """A weight file is missing, damaged, hostile or of another architecture."""


class FileError(NeucoreError, OSError):
    """A file or folder that cannot be used: its path, the system's reason, what to do; `note`: what else to know."""

    note = ""

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike | None = None, note: str = "") -> "FileError":
        """The same as an error of ours; `path`: what was used, where the error itself names nothing."""
        if isinstance(error, cls):
            found = error
        else:
            named = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else path
            reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
            found = cls(error.errno or 0, reason, None if named is None else os.fsdecode(named))
        found.note = found.note or note
        return found

    def __str__(self) -> str:
        place = "" if self.filename is None else f"{self.filename}: "
        remedy = _REMEDIES.get(self.errno, "check the path, and the drive it is on")
        return f"{place}{self.strerror}; {remedy}{'. ' if self.note else ''}{self.note}"


_FULL = "free space there, or choose another folder"
_ALLOWED = "check the permissions of it and of its folder, or choose another folder"
_OPEN = "fewer workers (run.num_workers, --workers), or a higher `ulimit -n`"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "the file system, or `ulimit -f`, takes no file of this size; choose another folder",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.EACCES: _ALLOWED,
    errno.EPERM: _ALLOWED,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file where a folder is wanted; choose another path",
    errno.EEXIST: "a file is there where a folder is wanted; move it away, or choose another path",
    errno.EISDIR: "give the path of a file",
    errno.ENXIO: "give the path of a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "these links lead in a circle; give the path of a file or folder",
    errno.EMFILE: _OPEN,
    errno.ENFILE: _OPEN,
    errno.ENOMEM: "use smaller batches, or fewer workers",
}


def explained(error: BaseException) -> NeucoreError | None:
    """What a user can mend of an error of Python or of torch: no memory is left, a process that loads data died or
    hangs. None for any other."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())  # torch tells the signal in the cause
    if hang := re.search(r"DataLoader timed out after (\S+) seconds", text):
        return NeucoreError(
            f"the processes that load data gave nothing for {hang[1]} s. Is the drive of the images, or the link to "
            "their shards, slow or gone? Use run.num_workers=0 to see, or a larger run.loader_timeout (0: no limit)"
        )
    remedy = "use run.num_workers=0, fewer workers, or smaller batches"
    if re.search(r"shared memory|/torch_", text) and "No space left" in text:
        return NeucoreError(f"shared memory is full: docker run --shm-size=8g, or --ipc=host; or {remedy}")
    killed = re.search(r"DataLoader worker \(pid.*?\) is (killed by signal: [^.]*)", text)
    if killed or re.search(r"DataLoader worker \(pid.*?\) exited unexpectedly", text):
        return NeucoreError(
            f"a process that loads data {'was ' + killed[1].strip() if killed else 'exited unexpectedly'}. A bus error "
            "says that shared memory is full (docker run --shm-size=8g, or --ipc=host), a kill that memory is; "
            f"{remedy}"
        )
    if os.strerror(errno.EMFILE) in text or "received 0 items of ancdata" in text:  # each batch is handed over as files
        return NeucoreError(f"too many files are open; {_OPEN}")
    signs = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    if not isinstance(error, MemoryError) and not any(sign in text.lower() for sign in signs):
        return None
    return NeucoreError(
        f"out of memory ({text[:200] or type(error).__name__}); use smaller batches (run.batch_size_train, "
        "run.batch_size_eval, --batch-size; with run.grad_cache_chunk the loss still sees the whole batch), "
        "or run.num_workers=0"
    )


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A sentence tail such as ` Did you mean 'val'? Allowed: test, train, val.`"""
    allowed = sorted(str(name) for name in allowed)
    return f"{did_you_mean(given, allowed)} Allowed: {', '.join(allowed) or 'nothing'}."


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """A sentence tail such as ` Did you mean 'val'?`; empty where no known name is near, or too many to look at.

    Known names may come from a file: what is too long to be printed is not compared either.
    """
    if len(known) > 20_000 or len(str(given)) > 300:
        return ""
    match = difflib.get_close_matches(str(given), [name for name in known if len(name) <= 300], n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def first_few(items: Iterable[object], shown: int = 4, separator: str = ", ") -> str:
    """The first items and the number of the others, such as `a, b, and 3 more`."""
    texts = [str(item) for item in items]
    rest = len(texts) - shown
    return separator.join([*texts[:shown], *([f"and {rest} more"] if rest > 0 else [])])
