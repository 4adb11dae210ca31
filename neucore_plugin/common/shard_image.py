"""A picture inside a tar shard, read by place: it is taken wherever a path is."""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from functools import lru_cache

from neucore_plugin.common.errors import DataError


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image inside a shard: `load_image` takes it as it takes a path."""

    shard: str
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """The bytes of the image file. Raises DataError where the shard ends before them."""
        try:
            opened = _opened(self.shard)  # held while reading: two threads may open one shard, and the cache keeps one
            whole = 0 <= self.offset <= self.offset + self.size <= os.fstat(opened.number).st_size
            data = os.pread(opened.number, self.size, self.offset) if whole and self.size >= 0 else None
        except OSError as error:
            raise DataError(
                f"{self.shard} cannot be read ({error.strerror}); is the folder of shards complete?"
            ) from None
        if data is None or len(data) != self.size:
            raise DataError(f"{self.shard} is truncated: it ends before image {self.name!r}; copy the shard again")
        return data

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


class _Opened:
    """A descriptor that is closed when its last user lets go of it: not before a thread has read to the end."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its writer
        if not stat.S_ISREG(os.fstat(self.number).st_mode):
            raise OSError(errno.EINVAL, "is no file", path)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.number)


@lru_cache(maxsize=128)  # of the 1,024 files that a process may usually open
def _opened(path: str) -> _Opened:
    """One descriptor a shard; reading by place moves no position, so threads and forked workers may share it."""
    return _Opened(path)


def forget_opened() -> None:
    """Open shards anew: a folder that was written again is not read by the old files."""
    _opened.cache_clear()
