"""Reading pictures safely: any file a user may have becomes an upright RGB picture, or one error that names it.

Also which files are pictures: `find_images`. What comes out never depends on threads or on Pillow's own switches.
"""

import contextlib
import heapq
import importlib
import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from neucore_plugin.common.errors import DataError, ImageError, first_few
from neucore_plugin.common.names import name_of
from neucore_plugin.common.pillow import pillow_as_set_here

MAX_PIXELS = 200_000_000  # what phones make at most; decoded and as RGB it takes 1.6 GB
WHOLE_PIXELS = 64_000_000  # a larger JPEG is decoded at a half, a quarter or an eighth of its sides
_STRIP = 4_000_000  # pixels converted at a time
_TEXT = 1 << 20  # bytes of a text in a PNG that may say how the picture is turned

_one_at_a_time = threading.RLock()

Picture = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image

# ---- reading --------------------------------------------------------------------------------------------------------


def load_image(source: Picture, *, plain: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture (path, bytes, binary file, or one of Pillow's) as RGB, fully decoded and upright (EXIF).

    Equal pictures give equal pixels, however they are given. Transparent parts become white; of an animation the first
    frame is taken; grey of 16 bits is divided by 257, other deep grey ends at its maximum. Of a JPEG with more than
    WHOLE_PIXELS pixels a half, a quarter or an eighth of each side is decoded. The caller's picture or open file stays
    as it is. Raises ImageError, which names the file and the remedy; also where a file is cut, whatever Pillow's
    LOAD_TRUNCATED_IMAGES says.

    plain: Pillow's own `convert("RGB")`, as most published code reads pictures: not turned by EXIF, transparency
        dropped, grey of 16 bits clipped. `load_for` gives it where a processor has an attribute `plain`.
    max_pixels: more than that (in the header) are refused before any pixel is decoded.
    """
    name = _name(source)
    try:
        return _load(source, name, plain, max_pixels)
    except Warning:  # made an error by the process's filters; Pillow warns of harmless oddities
        with _one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _load(source, name, plain, max_pixels)


def load_for(processor: Any, source: Picture) -> Image.Image:
    """`load_image` as a processor of images wants it: its `plain` and `max_pixels`, where it has them."""
    plain, limit = getattr(processor, "plain", False), getattr(processor, "max_pixels", MAX_PIXELS)
    return load_image(source, plain=plain, max_pixels=limit)


def check_images(paths: Iterable[str | os.PathLike], processor: Any = None) -> list[tuple[Path, str]]:
    """Read every picture once, as `processor` would, and return [(path, reason)] of those that fail, in order.

    Run before training: a bad file is then known at the start, not hours later. Threads share the work: decoding leaves
    the interpreter's lock.
    """
    files = [Path(path) if isinstance(path, str) else path for path in paths]

    def reason(path: Any) -> str:
        try:
            load_for(processor, path).close()
        except ImageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = pool.map(reason, files)
        bar = tqdm(reasons, total=len(files), desc="checking images", unit="image")
        return [(path, text) for path, text in zip(files, bar, strict=True) if text]


def _load(source: Picture, name: str, plain: bool, max_pixels: int) -> Image.Image:
    try:
        with pillow_as_set_here(max_pixels):
            if isinstance(source, Image.Image):
                data = _unread(source, name)
                if data is None:
                    return _rgb(source, name, plain, max_pixels)
                source = data
            with _stream(source, name) as stream:
                start, texts = stream.read(32), {}
                if start.startswith(_PNG):
                    stream, texts = _png_without_texts(stream)
                try:
                    opened = Image.open(stream, formats=_formats())  # reads the header only
                except UnidentifiedImageError as error:
                    text = f"{name} is no image that Pillow can read{_hint(start)}: replace it, or remove it"
                    raise ImageError(text) from error
                with opened as image:
                    image.info.update(texts)
                    return _rgb(image, name, plain, max_pixels)
    except (ImageError, Warning):
        raise
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise _too_large(name, int(found[0]) if found else max_pixels + 1, max_pixels) from error
    except MemoryError as error:
        raise ImageError(f"{name} does not fit into memory: shrink it") from error
    except Exception as error:  # each decoder reports damage in its own way (OSError, SyntaxError, zlib.error, ...)
        raise ImageError(f"{name} is truncated or damaged ({error}): fetch it again, or remove it") from error


def _name(source: Picture) -> str:
    if isinstance(source, Image.Image):
        return f"the {source.format or 'given'} picture"
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image data of {memoryview(source).nbytes:,} bytes"
    if not hasattr(source, "read"):
        text = f"an image is given as {type(source).__name__}: give a path, its bytes, a binary file, or a picture of "
        raise ImageError(text + "Pillow (Image.fromarray makes one of an array)")
    if not hasattr(source, "seek"):
        return str(source)  # an image of a shard says where it lies
    return str(getattr(source, "name", "image stream"))


def _unread(image: Image.Image, name: str) -> bytes | None:
    """The bytes of a file that Pillow opened and has not decoded yet, so that it is read as the file would be."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.tell():
        return None
    if image.fp is None or image.fp.closed:
        raise ImageError(f"{name} was closed before it was read: call its load() first, or give the path of its file")
    with _one_at_a_time:  # threads may share a picture
        return _whole(image.fp)


def _whole(stream: BinaryIO) -> bytes:
    """All bytes of an open file, which stays at its place; those that are left of one that cannot go back."""
    if not hasattr(stream, "seek") or (hasattr(stream, "seekable") and not stream.seekable()):
        return stream.read()  # an image of a shard, a pipe, an answer of a server
    place = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(place)
    return data


def _stream(source: Picture, name: str) -> BinaryIO:
    if isinstance(source, bytes | bytearray | memoryview):
        if not memoryview(source).nbytes:
            raise ImageError("image data of 0 bytes: nothing to read")
        return io.BytesIO(bytes(source))
    if not isinstance(source, str | os.PathLike):
        if isinstance(source, io.TextIOBase):
            raise ImageError(f"{name} is opened as text: open it as binary, with mode 'rb'")
        try:
            return io.BytesIO(_whole(source))
        except DataError as error:
            raise ImageError(f"{name} cannot be read: {error}") from error
    path = Path(name)
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


def _too_large(name: str, pixels: int, limit: int) -> ImageError:
    return ImageError(
        f"{name} has {pixels:,} pixels, the limit is {limit:,} (decompression bomb?): shrink it first, or raise "
        "max_pixels (of the processor cir_image; --max-pixels of `neucore index`, `search`, `data check`)"
    )


_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_TURNS = ("XML:com.adobe.xmp", "Raw profile type exif")  # texts in which Pillow looks for the orientation


def _png_without_texts(stream: BinaryIO) -> tuple[BinaryIO, dict[str, str]]:
    """The chunks of a PNG that make its picture (of an animation the first), and texts that may say how it is turned.

    Pillow refuses a whole file for the length of a text or a colour profile that nobody asked for.
    """
    end = stream.seek(0, os.SEEK_END)
    place = stream.seek(len(_PNG))
    kept, texts, kind = io.BytesIO(_PNG), {}, b""
    kept.seek(0, os.SEEK_END)
    while kind != b"IEND":
        head = stream.read(8)
        size, kind = struct.unpack(">I4s", head) if len(head) == 8 else (end, b"")
        place += size + 12
        if place > end:
            raise OSError("it ends before its end mark")
        if kind in _PNG_KEPT:
            kept.write(head + stream.read(size + 4))
        elif kind == b"tRNS":
            colour, (depth, form) = stream.read(size), kept.getvalue()[24:26]
            if form == 0 and depth < 8:  # of grey in few bits: Pillow compares it with the 8 that it decodes to
                colour = struct.pack(">H", colour[-1] % 2**depth * 255 // (2**depth - 1))
            kept.write(struct.pack(">I", len(colour)) + kind + colour + struct.pack(">I", zlib.crc32(kind + colour)))
        elif kind in _PNG_TEXTS:
            texts.update(_png_text(kind, stream.read(min(size, _TEXT))))
        stream.seek(place)
    kept.seek(0)
    return kept, texts


def _png_text(kind: bytes, body: bytes) -> Iterator[tuple[str, str]]:
    key, _, text = body.partition(b"\0")
    if (name := key.decode("latin-1")) in _TURNS:
        packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
        text = {b"tEXt": text, b"zTXt": text[1:], b"iTXt": text[2:].split(b"\0", 2)[-1]}[kind]
        with contextlib.suppress(zlib.error):
            yield name, (zlib.decompressobj().decompress(text, _TEXT) if packed else text).decode("utf-8", "replace")


# ---- to RGB ---------------------------------------------------------------------------------------------------------


def _rgb(image: Image.Image, name: str, plain: bool, max_pixels: int) -> Image.Image:
    width, height = image.size
    if (pixels := width * height) > max_pixels:
        raise _too_large(name, pixels, max_pixels)
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width} x {height} pixels: there is nothing to see")
    if pixels > WHOLE_PIXELS:
        scale = next((part for part in (2, 4) if pixels <= WHOLE_PIXELS * part**2), 8)
        image.draft(None, (max(1, width // scale), max(1, height // scale)))  # formats other than JPEG pass it over
    image.load()
    if plain:
        page = _unpremultiplied(image).copy()
        page.info = {}  # a transparent colour of a palette would be warned of
        page = page.convert("RGB")
    else:
        page = _turned(_flat(image), image)
    page.info = {}  # a turn that is still told would be made again by the next reader
    return page


def _flat(image: Image.Image) -> Image.Image:
    """RGB on white, strip by strip: the numbers in between are several times as large as the picture."""
    deep = image.mode.startswith("I") or image.mode == "F"
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    white = _white(image) if deep else 0.0
    page = Image.new("RGB", image.size)
    for top, part in _strips(image):
        page.paste(_grey(part, white) if deep else _on_white(part), (0, top))
    return page


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(part: Image.Image) -> Image.Image:
    part = _unpremultiplied(part)
    if not part.has_transparency_data:
        return part.convert("RGB")
    layer = part.convert("RGBA")
    page = Image.new("RGBA", layer.size, (255, 255, 255, 255))  # white, like the drawings' and catalogues' paper
    return Image.alpha_composite(page, layer).convert("RGB")


def _unpremultiplied(image: Image.Image) -> Image.Image:
    return image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image


def _white(image: Image.Image) -> float:
    """The value that becomes white: Pillow clips grey above 255. An unknown range ends at its maximum."""
    import numpy as np  # here, as checks of configs import this module for its limit, and are light

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 65535.0
    largest = 0.0
    for _, part in _strips(image):
        values = np.asarray(part)
        largest = max(largest, float(values[np.isfinite(values)].max(initial=0)))
    ranges = (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)
    return next((end for end in ranges if largest <= end), largest)


def _grey(part: Image.Image, white: float) -> Image.Image:
    import numpy as np

    values = np.asarray(part).astype(np.float64)
    grey = (np.clip(np.nan_to_num(values), 0, white) / (white / 255)).round().astype(np.uint8)
    if isinstance(clear := part.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _turned(page: Image.Image, image: Image.Image) -> Image.Image:
    """The page as the EXIF data of its image want it."""
    try:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = image.getexif()[ExifTags.Base.Orientation]
        page.info = {"exif": exif.tobytes()}
        return ImageOps.exif_transpose(page)
    except Warning:
        raise
    except Exception:  # none, or damaged: the picture itself is whole
        return page


# ---- which files are pictures ---------------------------------------------------------------------------------------

# Told apart by Pillow, but never decoded: films and measurements; EPS would start an interpreter of programs.
_NOT_READ = ("EPS", "MPEG")
# What Pillow reads with another package alone: suffixes, and marks within the first bytes.
_PACKAGES = {
    "pillow-heif": ((".heic", ".heif", ".hif"), (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1")),
    "a Pillow with AVIF": ((".avif", ".avifs"), (b"ftypavif", b"ftypavis")),
    "pillow-jxl-plugin": ((".jxl",), (b"JXL ",)),
}
LOOKED_FOR = ".bmp, .gif, .jpeg, .jpg, .png, .tif, .webp and what else Pillow reads"
LeftOut = Counter[str]  # files and folders that are no pictures to us, by the reason


def image_suffixes() -> frozenset[str]:
    """Of the files that the installed Pillow reads, in lower case, with the dot; also with a plug-in of its."""
    read = {*_formats(), "MPO"}  # several views in a JPEG
    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in read)


def find_images(folder: str | Path) -> tuple[list[Path], LeftOut]:
    """All pictures in a folder or below, sorted; and how much else lies there, by the reason.

    Hidden files and folders, and those that macOS adds (._NAME, __MACOSX), are no pictures. Linked folders are
    followed, after all others; a folder that is reached twice is read once.
    """
    suffixes, found, left_out = image_suffixes(), [], LeftOut()
    folders, links, read = [Path(folder)], [], set()
    while folders or links:
        place = folders.pop() if folders else heapq.heappop(links)[-1]  # the same order of links in every locale
        try:
            status = os.stat(place)
            if (key := (status.st_dev, status.st_ino)) in read:
                left_out["linked folders that are read elsewhere"] += 1
                continue
            read.add(key)
            with os.scandir(place) as listing:
                entries = list(listing)
        except OSError as error:
            left_out[f"folders that cannot be read ({error.strerror})"] += 1
            continue
        for entry in entries:
            path, suffix = Path(entry.path), os.path.splitext(entry.name)[1].lower()
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            if is_hidden(entry.name):
                left_out["hidden"] += 1
            elif is_folder:
                if entry.is_symlink():
                    heapq.heappush(links, (len(path.parts), name_of(path), path))
                else:
                    folders.append(path)
            elif not is_file:
                left_out["links that lead nowhere" if entry.is_symlink() else "no files"] += 1
            elif suffix in suffixes:
                found.append(path)
            else:
                left_out[_reason(suffix)] += 1
    return sorted(found, key=lambda path: Path(name_of(path))), left_out  # the same order in every locale


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's: hidden, or added by macOS."""
    return name.startswith(".") or name == "__MACOSX"


def told(left_out: LeftOut) -> str:
    """What was left out, such as `left out: 2 hidden, 1 .txt`; empty where it was nothing."""
    parts = [f"{count:,} {reason}" for reason, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))]
    return f"left out: {first_few(parts, 8)}" if parts else ""


def _reason(suffix: str) -> str:
    package = next((package for package, (suffixes, _) in _PACKAGES.items() if suffix in suffixes), None)
    return f"{suffix or 'without suffix'}{f' (install {package})' if package else ''}"


def _hint(start: bytes) -> str:
    """What the first bytes of a file say that Pillow does not know."""
    if start.startswith(b"\x00\x05\x16\x07"):
        return " (macOS's notes on another file, AppleDouble)"
    package = next((name for name, (_, marks) in _PACKAGES.items() if any(mark in start for mark in marks)), None)
    return f" without {package} (install it)" if package else ""


def _formats() -> list[str]:
    """Formats of the installed Pillow that are decoded; those that look at the first bytes before the others."""
    _plugins()
    Image.init()
    forms = [
        form
        for form in Image.ID
        if form not in _NOT_READ
        and not (isinstance(Image.OPEN[form][0], type) and issubclass(Image.OPEN[form][0], ImageFile.StubImageFile))
    ]
    return sorted(forms, key=lambda form: Image.OPEN[form][1] is None)


@lru_cache(maxsize=1)
def _plugins() -> None:
    """Packages that teach Pillow further formats, where they are installed."""
    with contextlib.suppress(Exception):
        importlib.import_module("pillow_heif").register_heif_opener()
    with contextlib.suppress(Exception):
        importlib.import_module("pillow_jxl")
