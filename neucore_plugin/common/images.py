"""Reading pictures safely: any file a user may have becomes an upright RGB picture, or one error that names it."""

import contextlib
import io
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from neucore_plugin.common.errors import DataError, ImageError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what a folder is searched for
MAX_PIXELS = 64_000_000  # four times a 16-megapixel photograph; decoded as RGB it takes 192 MB

Picture = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image


def load_image(source: Picture, *, plain: bool = False) -> Image.Image:
    """Read a picture (path, bytes, binary file, or one that Pillow opened) as RGB, fully decoded and upright (EXIF).

    Transparent parts become white; of an animation the first frame is taken. The size in the header is checked before
    any pixel is decoded. Raises ImageError, which names the file and the remedy.

    plain: Pillow's own `convert("RGB")`, as most published code reads pictures: not turned by EXIF, transparency
        dropped, grey of 16 bits clipped. `load_for` gives it where a processor has an attribute `plain`.
    """
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name, plain)
        with _stream(source, name) as stream, Image.open(stream) as image:  # reads the header only
            return _upright_rgb(image, name, plain)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is no image that Pillow can read: replace it, or remove it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, f"more than {Image.MAX_IMAGE_PIXELS:,}") from error
    except MemoryError as error:
        raise ImageError(f"{name} does not fit into memory: shrink it") from error
    except Exception as error:  # each decoder reports damage in its own way (OSError, SyntaxError, zlib.error, ...)
        raise ImageError(f"{name} is truncated or damaged ({error}): fetch it again, or remove it") from error


def load_for(processor: Any, source: Picture) -> Image.Image:
    """`load_image` as a processor of images wants it: with its attribute `plain`, where it has one."""
    return load_image(source, plain=getattr(processor, "plain", False))


def _name(source: Picture) -> str:
    if isinstance(source, Image.Image):
        return f"the {source.format or 'given'} picture"
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image data of {len(source):,} bytes"
    if not hasattr(source, "seek"):
        return str(source)  # an image of a shard says where it lies
    return str(getattr(source, "name", "image stream"))


def _stream(source: Picture, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise ImageError("image data of 0 bytes: nothing to read")
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "read"):
            raise ImageError(f"an image is given as {type(source).__name__}: give a path, bytes or a binary file")
        if hasattr(source, "seek"):
            return contextlib.nullcontext(source)  # the caller closes it
        try:
            return io.BytesIO(source.read())  # an image of a shard
        except DataError as error:
            raise ImageError(f"{name} cannot be read: {error}") from error
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a folder, not an image file: give the path of a file in it")
        if not path.is_file():
            raise ImageError(f"{name} does not exist: check the image root and the file name")
        if path.stat().st_size == 0:
            raise ImageError(f"{name} is empty (0 bytes): fetch it again")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be opened ({error}): check its name and permissions") from error


def _too_large(name: str, pixels: str) -> ImageError:
    return ImageError(f"{name} has {pixels} pixels, the limit is {MAX_PIXELS:,} (decompression bomb?): shrink it first")


def _upright_rgb(image: Image.Image, name: str, plain: bool) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width * height:,}")
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width} x {height} pixels: there is nothing to see")
    with _whole_files_only:
        image.load()
    if plain:
        return _plain_rgb(image)
    deep = 257.0 if image.format == "PNG" or image.mode.startswith("I;16") else None
    with contextlib.suppress(Exception):  # damaged EXIF data: the picture itself is whole
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image, deep)


def _plain_rgb(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.info = {}  # a turn or a transparent colour that is still known would be applied by the next reader
    return image.convert("RGB")


class _WholeFilesOnly:
    """Holds Pillow's switch for cut files off while any thread decodes.

    The host turns it on for the whole process when it is imported; a cut file would then become a half grey picture.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._outside_value = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._outside_value, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._outside_value


_whole_files_only = _WholeFilesOnly()


def _to_rgb(image: Image.Image, deep: float | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image, deep)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        page = Image.new("RGBA", layer.size, (255, 255, 255, 255))  # white, like the drawings' and catalogues' paper
        return Image.alpha_composite(page, layer).convert("RGB")
    return image.convert("RGB")  # a copy where it is RGB already


def _deep_grey_to_rgb(image: Image.Image, deep: float | None) -> Image.Image:
    """Pillow clips grey values above 255 to white. 16 bits are divided by 257; unknown ranges end at their maximum."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    largest = float(values.max())
    if deep is None:
        deep = 1 / 255 if image.mode == "F" and largest <= 1.0 else max(largest / 255.0, 1.0)
    grey = np.clip(values / deep, 0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def check_images(paths: Iterable[str | os.PathLike]) -> list[tuple[Path, str]]:
    """Read every picture once and return [(path, reason)] of those that fail, in the given order.

    Run before training: a bad file is then known at the start, not hours later. Threads share the work: decoding leaves
    the interpreter's lock.
    """
    files = [Path(path) if isinstance(path, str) else path for path in paths]

    def reason(path: Any) -> str:
        try:
            load_image(path).close()
        except ImageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = pool.map(reason, files)
        bar = tqdm(reasons, total=len(files), desc="checking images", unit="image")
        return [(path, text) for path, text in zip(files, bar, strict=True) if text]
