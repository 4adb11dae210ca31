"""Feature maps extracted before, a file a picture: numpy's `.npy`, or a pickle of an array, of which nothing runs.

CIRR is published with maps of a ResNet-152, [2048,7,7] or [1,2048,7,7], in the tree of its pictures.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.images import check_images
from neucore_plugin.common.pickles import refuse_bombs

_KINDS = ("f2", "f4", "f8")
_LARGEST = 64 << 20


def is_map(path: Any) -> bool:
    """Whether a file is one of feature maps, by its suffix."""
    return isinstance(path, Path) and path.suffix in (".npy", ".pkl")


def map_file(place: Path) -> Path:
    """The file of the maps of a picture: its path with the suffix .npy, or as published .pkl."""
    converted = place.with_suffix(".npy")
    return converted if converted.is_file() else place.with_suffix(".pkl")


def check_files(paths: Sequence[Any], processor: Any) -> list[tuple[Any, str]]:
    """Read every picture or map once and return [(path, reason)] of those that fail, in the given order."""
    failures = check_images([path for path in paths if not is_map(path)], processor)
    for path in tqdm(list(filter(is_map, paths)), "checking maps", unit="map", disable=None, leave=False):
        try:
            read_map(path)
        except ImageError as error:
            failures.append((path, str(error)))
    return failures


def read_map(path: Path) -> np.ndarray:
    """The map of a file, float32 [W,h,w]. Raises ImageError, which names the file."""
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise ValueError(f"it has {size:,} bytes; no map of one picture is that large")
        content = path.read_bytes()
        if path.suffix == ".npy":
            values = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            refuse_bombs(content)
            values = _Unpickler(io.BytesIO(content)).load()
            if type(values) is not _Array or values.values is None:
                raise ValueError("it holds no array")
            values = values.values
        if values.ndim == 4 and values.shape[0] == 1:
            values = values[0]
        if values.ndim != 3 or values.dtype.kind != "f" or not values.size:
            raise ValueError(f"it holds {values.dtype} {list(values.shape)}, not floats [channels, height, width]")
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinity")
    except OSError as error:
        raise ImageError(f"cannot read the feature map {path}: {error.strerror}") from error
    except Exception as error:  # a damaged or hostile pickle raises whatever it likes
        raise ImageError(f"{path} is no feature map: {str(error)[:200] or type(error).__name__}") from error
    return np.ascontiguousarray(values, dtype=np.float32)


# What numpy's names stand for in a pickle. A pickle may set attributes of whatever it is handed, so these are classes
# of this file alone, and what they make is inert until its parts are checked.


class _Dtype:
    __slots__ = ("name",)

    def __init__(self, name: Any, *_: Any) -> None:
        if name not in _KINDS:
            raise pickle.UnpicklingError("refused: its array holds no floating-point numbers")
        self.name = name

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "="):
            raise pickle.UnpicklingError("refused: an unknown order of bytes")
        self.name = state[1] + self.name


class _Array:
    __slots__ = ("values",)

    def __init__(self, *_: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, content = state
        self._fill(content, dtype, shape, "F" if by_columns is True else "C")

    def _fill(self, content: Any, dtype: Any, shape: Any, order: str) -> None:
        sizes = type(shape) is tuple and len(shape) <= 4 and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or type(dtype) is not _Dtype or type(content) not in (bytes, bytearray):
            raise pickle.UnpicklingError("refused: no array of plain numbers")
        self.values = np.frombuffer(content, dtype=np.dtype(dtype.name)).reshape(shape, order=order)


class _FromBuffer:
    """`_frombuffer(content, dtype, shape, order)`, which protocol 5 calls."""

    __slots__ = ()

    def __new__(cls, content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        array = _Array()
        array._fill(content, dtype, shape, "F" if order == "F" else "C")
        return array

    def __setstate__(self, state: Any) -> None:
        """There are no instances: a pickle that sets attributes of the class itself fails here."""


class _Encode:
    """`_codecs.encode(text, "latin1")`, by which older protocols hold bytes."""

    __slots__ = ()

    def __new__(cls, text: Any, coding: Any) -> bytes:
        if type(text) is not str or coding != "latin1":
            raise pickle.UnpicklingError("refused: an unknown coding of bytes")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        """As in `_FromBuffer`."""


_KNOWN = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array, ("_codecs", "encode"): _Encode}
for _core in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _Array
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _FromBuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}, which no array needs")
        return _KNOWN[module, name]
