"""Pictures in and out: uploads are decoded, and thumbnails made, in a few threads, never in the model's.

Whatever leaves is encoded anew from decoded pixels: a file that was put in a picture's place shows nothing, and places
and cameras that a photograph names stay here. A source is what an index names (a path, or a picture in a tar shard), or
the bytes of an upload.
"""

import base64
import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.images import MAX_PIXELS, load_image
from neucore_plugin.common.pillow import pillow_as_set_here

THUMBNAIL, LARGE = 320, 2048  # pixels at the longer side
_KEPT = 64 << 20  # bytes of thumbnails kept in memory


class Pictures:
    """Decodes for a model's processor, with bounds of its own. `threads` at most decode at once."""

    def __init__(self, processor: Any, max_pixels: int, threads: int) -> None:
        self.processor = processor
        self.max_pixels = min(max_pixels, getattr(processor, "max_pixels", MAX_PIXELS))
        self._pool = ThreadPoolExecutor(threads, "neucore-decode")
        self._made: OrderedDict[tuple, bytes] = OrderedDict()
        self._size, self._lock = 0, threading.Lock()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """`work` in one of the decoding threads."""
        return self._pool.submit(work, *arguments)

    def load(self, source: Any) -> Image.Image:
        """RGB, as the model's processor reads pictures. Raises ImageError."""
        plain = getattr(self.processor, "plain", False)
        return load_image(source, plain=plain, max_pixels=self.max_pixels)

    def pixels(self, source: Any) -> Any:
        """What the model reads of a picture, [3,H,W]: small, however large the picture is. Raises ImageError."""
        return self.processor(self.load(source))

    def kind(self, data: bytes) -> str:
        """Suffix, such as `.jpg`, of the format of an uploaded picture that could be loaded."""
        with pillow_as_set_here(self.max_pixels), Image.open(io.BytesIO(data)) as image:
            form = image.format
        usual = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}
        known = sorted(suffix for suffix, of in Image.registered_extensions().items() if of == form)
        return usual.get(form) or (f".{form.lower()}" if f".{form.lower()}" in known else known[0])

    def shown(self, source: Any, size: int) -> tuple[bytes, str]:
        """A file of the index as a browser shows it, at most `size` pixels long, and its media type. ImageError."""
        key = (tag(source, size), size)
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key], _media(self._made[key])
        image = self.load(source)
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        data = encoded(image)
        with self._lock:
            if size <= THUMBNAIL and key not in self._made:
                self._made[key], self._size = data, self._size + len(data)
            while self._size > _KEPT:
                self._size -= len(self._made.popitem(last=False)[1])
        return data, _media(data)


def tag(source: Any, size: int) -> str:
    """An ETag that changes when the file does. Raises ImageError where it is gone."""
    place = getattr(source, "shard", source)
    try:
        status = os.stat(place)
    except OSError as error:
        raise ImageError(f"its file cannot be read any more ({error.strerror})") from None
    text = f"{source}\0{status.st_mtime_ns}\0{status.st_size}\0{size}"
    return f'"{hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]}"'


def whole_file(source: Any) -> bytes:
    """The bytes of a picture of the index. Raises ImageError."""
    try:
        return source.read() if hasattr(source, "read") else Path(source).read_bytes()
    except OSError as error:
        raise ImageError(f"its file cannot be read any more ({error.strerror})") from None


def encoded(image: Image.Image) -> bytes:
    """PNG for drawings (few colours), JPEG for photographs."""
    stream = io.BytesIO()
    if image.getcolors(4096) is not None:
        image.save(stream, "PNG")
    else:
        image.save(stream, "JPEG", quality=88)
    return stream.getvalue()


def data_address(data: bytes) -> str:
    """A picture that stands in a text."""
    return f"data:{_media(data)};base64,{base64.b64encode(data).decode('ascii')}"


def _media(data: bytes) -> str:
    return "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
