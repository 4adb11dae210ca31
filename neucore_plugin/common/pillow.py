"""Two settings of Pillow that decide what is read, ours while we read, in the thread that reads.

Pillow keeps them for the whole process: the host's import allows cut files, and other code may change either at any
moment, in any thread. So each is replaced, once, by a value that looks at the thread: while a picture is read here it
is ours, everywhere else it is what was set.
"""

import contextlib
import threading
import types
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageFile


class _Reading(threading.local):
    limit: int | None = None  # the pixel limit of the picture that this thread reads


_reading = _Reading()


@contextlib.contextmanager
def pillow_as_set_here(max_pixels: int) -> Iterator[None]:
    """In this thread no cut file is read, and `max_pixels` is the limit: also of Pillow's `crop`, say."""
    before, _reading.limit = _reading.limit, max_pixels
    try:
        yield
    finally:
        _reading.limit = before


class _CutFilesAllowed:
    """Stands for LOAD_TRUNCATED_IMAGES: a cut file would become a half grey picture."""

    def __init__(self, outside: Any) -> None:
        self.outside = outside

    def value(self) -> Any:
        return self.outside if _reading.limit is None else False

    def __bool__(self) -> bool:
        return bool(self.value())


class _PixelLimit:
    """Stands for MAX_IMAGE_PIXELS: Pillow warns of more than that, and refuses more than twice as much."""

    def __init__(self, outside: Any) -> None:
        self.outside = outside

    def value(self) -> Any:
        return self.outside if _reading.limit is None else _reading.limit

    def __rmul__(self, times: int) -> float:
        if _reading.limit is not None:
            return _reading.limit
        return float("inf") if self.outside is None else times * self.outside

    def __lt__(self, pixels: int) -> bool:
        return _reading.limit is None and self.outside is not None and self.outside < pixels

    def __str__(self) -> str:
        return str(self.value())


def _replace(module: types.ModuleType, name: str, kind: type) -> None:
    inside = vars(module)  # what the module's own functions find

    def keep(value: Any) -> None:
        inside[name] = value if isinstance(value, kind) else kind(value)  # mock.patch puts back what it found inside

    keep(inside[name])
    seen = property(lambda _: inside[name].value(), lambda _, value: keep(value))
    module.__class__ = type(type(module).__name__, (type(module),), {name: seen})  # what all others find, and set


_replace(ImageFile, "LOAD_TRUNCATED_IMAGES", _CutFilesAllowed)
_replace(Image, "MAX_IMAGE_PIXELS", _PixelLimit)
