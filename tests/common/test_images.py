"""Reading pictures: every file is an upright RGB picture or one error that names it."""

import io
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageCms, ImageFile, PngImagePlugin, features

from neucore_plugin.common import images
from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.images import check_images, find_images, image_suffixes, load_image, told

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(side: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def huge_png(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes whose header promises width x height pixels."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_path_bytes_and_stream_give_the_same_pixels(tmp_path):
    path = tmp_path / "a.png"
    noise().save(path)
    expected = np.asarray(noise())
    with open(path, "rb") as stream:
        for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), stream, noise()):
            image = load_image(source)
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), expected)
        assert not stream.closed  # it is the caller's


def test_file_is_closed_and_pixels_stay(tmp_path):
    path = tmp_path / "a.png"
    noise().save(path)
    image = load_image(path)
    path.unlink()
    assert image.getpixel((1, 1)) == noise().getpixel((1, 1))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_is_refused(tmp_path, monkeypatch, form, kept):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # the host sets it, where a test before imported it
    data = encoded(noise(), form)
    path = tmp_path / f"cut.{form.lower()}"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match=r"cut\..*(truncated or damaged|no image).*(fetch it again|replace it)"):
        load_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_damaged_pixels_are_refused():
    data = bytearray(encoded(noise()))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match=r"image data of .* bytes is truncated or damaged"):
        load_image(bytes(data))


def make_bad(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jpg"
    if kind == "text":
        path.write_text("<html>404 not found</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        path.write_bytes(huge_png(16000, 16000))
    elif kind == "giant":
        path.write_bytes(huge_png(60000, 60000))
    return path


BAD = {
    "text": r"text\.jpg is no image .*replace it",
    "empty": r"empty\.jpg is empty \(0 bytes\)",
    "folder": r"folder\.jpg is a folder",
    "missing": r"missing\.jpg does not exist",
    "bomb": r"bomb\.jpg has 256,000,000 pixels, the limit is 200,000,000 .*raise max_pixels",
    "giant": r"giant\.jpg has 3,600,000,000 pixels, the limit is 200,000,000",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named(tmp_path, kind):
    with pytest.raises(ImageError, match=BAD[kind]):
        load_image(make_bad(tmp_path, kind))


def test_pixel_limit():
    assert load_image(encoded(noise(64)), max_pixels=64 * 64).size == (64, 64)
    for source in (encoded(noise(65)), noise(65)):
        with pytest.raises(ImageError, match="4,225 pixels, the limit is 4,096"):
            load_image(source, max_pixels=64 * 64)


@pytest.mark.parametrize("source", [b"", 7, None])
def test_wrong_sources(source):
    with pytest.raises(ImageError, match=r"0 bytes|given as (int|NoneType)"):
        load_image(source)


def half_transparent(mode: str) -> bytes:
    """Left half opaque red (or black), right half fully transparent."""
    alpha = Image.new("L", (8, 4), 0)
    alpha.paste(255, (0, 0, 4, 4))
    if mode in ("P", "GIF"):
        image = Image.new("P", (8, 4), 1)
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.paste(0, (0, 0, 4, 4))
        return encoded(image, "PNG" if mode == "P" else "GIF", transparency=1)
    if mode == "RGB":
        image = Image.new("RGB", (8, 4), (0, 255, 0))
        image.paste(RED, (0, 0, 4, 4))
        return encoded(image, "PNG", transparency=(0, 255, 0))
    image = Image.new("RGB" if mode == "RGBA" else "L", (8, 4), RED if mode == "RGBA" else 0)
    image.putalpha(alpha)
    return encoded(image)


@pytest.mark.parametrize("mode", ["P", "GIF", "RGB", "RGBA", "LA"])
def test_transparency_becomes_white(mode):
    image = load_image(half_transparent(mode))
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == ((0, 0, 0) if mode == "LA" else RED)
    assert image.getpixel((6, 1)) == WHITE


def test_half_opaque_is_blended():
    image = load_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 51))))  # a fifth black on white
    assert image.getpixel((0, 0)) == (204, 204, 204)


def test_cmyk_and_bilevel():
    red = load_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red.mode == "RGB"
    assert all(abs(a - b) < 20 for a, b in zip(red.getpixel((8, 8)), RED, strict=True))
    assert load_image(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (257, 1), (32896, 128), (65535, 255)])
def test_sixteen_bit_grey_is_scaled_not_clipped(value, grey):
    deep = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    for source in (encoded(deep), encoded(deep, "TIFF"), deep, Image.open(io.BytesIO(encoded(deep)))):
        assert load_image(source).getpixel((2, 2)) == (grey, grey, grey)


def test_float_grey():
    ramp = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [pixel[0] for pixel in np.asarray(load_image(encoded(ramp, "TIFF")))[0]] == [0, 128, 255]


# What each EXIF orientation asks for, as the place where the stored top left pixel belongs in a 3 x 2 picture.
CORNERS = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
TURNED = {5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    image = Image.new("RGB", (3, 2), WHITE)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = load_image(encoded(image, "PNG", exif=exif))
    assert upright.size == ((2, 3) if orientation in TURNED else (3, 2))
    vertical, horizontal = (CORNERS | TURNED)[orientation].split()
    place = (0 if horizontal == "left" else upright.width - 1, 0 if vertical == "top" else upright.height - 1)
    assert upright.getpixel(place) == RED


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_picture():
    assert load_image(encoded(noise(), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")).size == (64, 64)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert load_image(data).getpixel((4, 4)) == RED


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_check_images_lists_failures_in_order(tmp_path, capsys):
    good = [tmp_path / f"{place}.png" for place in range(4)]
    for path in good:
        noise(16).save(path)
    bad = [make_bad(tmp_path, kind) for kind in BAD]
    mixed = [good[0], bad[0], good[1], *bad[1:4], str(good[2]), *bad[4:], good[3]]
    failures = check_images(mixed)
    assert [path for path, _ in failures] == bad
    assert all(path.name in reason for path, reason in failures)
    assert check_images(good) == []
    assert "checking images" in capsys.readouterr().err
    assert check_images([]) == []


def test_cut_files_are_refused_also_where_the_host_allowed_them_for_the_whole_process(tmp_path, monkeypatch):
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert [name for name, _ in check_images([path] * 4)] == [path] * 4
    with Image.open(path) as opened, pytest.raises(ImageError, match="the PNG picture is truncated or damaged"):
        load_image(opened)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_plain_is_pillows_own_conversion_and_nothing_is_turned_later(form):
    image = noise(8).crop((0, 0, 8, 4)).convert("RGBA")
    image.putalpha(51)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = load_image(encoded(image, form, exif=exif, lossless=True), plain=True)
    expected = image.convert("RGB")  # the alpha channel dropped
    assert picture.tobytes() == expected.tobytes()
    assert load_image(picture).tobytes() == expected.tobytes()
    assert load_image(half_transparent("P"), plain=True).getpixel((6, 1)) == (0, 255, 0)


# ---- one conversion, however a picture is given ---------------------------------------------------------------------


def turned(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def deep_grey(kind: type) -> Image.Image:
    return Image.fromarray((np.arange(24, dtype=np.float64).reshape(4, 6) * 2849).astype(kind))


def lab() -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    return ImageCms.applyTransform(noise(12), ImageCms.buildTransform(*profiles, "RGB", "LAB"))


def frames(form: str, **options) -> bytes:
    return encoded(noise(16), form, save_all=True, append_images=[Image.new("RGB", (16, 16), RED)], **options)


def see_through(mode: str) -> Image.Image:
    image = noise(16).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((16, 16)))
    return image.quantize(32) if mode == "P" else image.convert(mode)


FILES = {
    "turned.jpg": lambda: encoded(noise(), "JPEG", exif=turned()),
    "turned.tif": lambda: encoded(noise(), "TIFF", exif=turned(8)),
    "turned.webp": lambda: encoded(noise(), "WEBP", exif=turned(5), lossless=True),
    "turned.avif": lambda: encoded(noise(), "AVIF", exif=turned(3)),
    "turned_grey.png": lambda: encoded(deep_grey(np.uint16), "PNG", exif=turned(6)),
    "grey.jpg": lambda: encoded(noise().convert("L"), "JPEG"),
    "grey_alpha.png": lambda: encoded(see_through("LA")),
    "palette.png": lambda: encoded(noise(16).quantize(32)),
    "palette_alpha.png": lambda: encoded(see_through("P")),
    "palette_alpha.gif": lambda: half_transparent("GIF"),
    "colour_key.png": lambda: half_transparent("RGB"),
    "deep.png": lambda: encoded(deep_grey(np.uint16)),
    "deep.tif": lambda: encoded(deep_grey(np.int32), "TIFF"),
    "float.tif": lambda: encoded(deep_grey(np.float32), "TIFF"),
    "deep.pgm": lambda: encoded(deep_grey(np.uint16), "PPM"),
    "cmyk.jpg": lambda: encoded(noise().convert("CMYK"), "JPEG"),
    "cmyk.tif": lambda: encoded(noise().convert("CMYK"), "TIFF"),
    "lab.tif": lambda: encoded(lab(), "TIFF"),
    "bilevel.tif": lambda: encoded(noise().convert("1"), "TIFF", compression="group4"),
    "alpha.tif": lambda: encoded(see_through("RGBA"), "TIFF"),
    "alpha.jp2": lambda: encoded(see_through("RGBA"), "JPEG2000"),
    "alpha.avif": lambda: encoded(see_through("RGBA"), "AVIF"),
    "alpha.tga": lambda: encoded(see_through("RGBA"), "TGA"),
    "alpha.ico": lambda: encoded(see_through("RGBA"), "ICO", sizes=[(16, 16)]),
    "film.gif": lambda: frames("GIF"),
    "film.png": lambda: frames("PNG"),
    "film.webp": lambda: frames("WEBP", lossless=True),
    "film.avif": lambda: frames("AVIF"),
    "film.tif": lambda: frames("TIFF"),
    "two_views.mpo": lambda: frames("MPO", exif=turned()),
}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_is_the_same_however_it_is_given(tmp_path, name):
    data, path = FILES[name](), tmp_path / name
    path.write_bytes(data)
    expected = load_image(path)
    loaded = Image.open(path)
    loaded.load()
    with open(path, "rb") as stream, Image.open(path) as opened, Image.open(io.BytesIO(data)) as from_bytes:
        wide = memoryview(bytes(2 * len(data))).cast("B").tobytes()
        spread = bytearray(wide)
        spread[::2] = data
        sources = [str(path), data, bytearray(data), memoryview(data), memoryview(spread)[::2], io.BytesIO(data)]
        for source in [*sources, stream, opened, from_bytes, loaded, loaded.copy(), expected]:
            found = load_image(source)
            assert (found.mode, found.size) == ("RGB", expected.size)
            assert found.tobytes() == expected.tobytes(), source
        opened.load()  # the caller's picture is as it was, and can still be read
        assert opened.size == loaded.size
        assert not stream.closed
    assert not expected.info  # nothing that the next reader would apply again


@pytest.mark.parametrize("mode", ["L", "LA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "PA", "P", "I", "F"])
def test_modes_in_memory_have_the_picture_s_colours(mode):
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB" if mode not in ("L", "I", "F") else "L")
    given = picture.convert("LA").convert("La") if mode == "La" else picture
    given = given.convert("RGBA").convert("RGBa") if mode == "RGBa" else given
    given = given.convert("P").convert("PA") if mode == "PA" else given
    given = given if given.mode == mode else given.convert(mode)
    difference = np.asarray(load_image(given), int) - np.asarray(picture.convert("RGB"), int)
    assert np.abs(difference).mean() < (16 if mode in ("P", "PA") else 2)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_see_through_is_white_in_every_mode(mode):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    given = {"La": lambda: clear.convert("LA").convert("La"), "RGBa": lambda: clear.convert("RGBa")}.get(mode)
    image = Image.new("PA", (4, 4), (0, 0)) if mode == "PA" else given() if given else clear.convert(mode)
    assert load_image(image).getpixel((1, 1)) == WHITE


def test_deep_grey_ends_where_its_range_ends():
    def greys(values, kind, **info) -> list[int]:
        image = Image.fromarray(np.array([values], dtype=kind))
        image.info.update(info)
        return [pixel[0] for pixel in np.asarray(load_image(image))[0]]

    assert greys([0, 32896, 65535], np.uint16) == [0, 128, 255]
    assert greys([0, 32896, 40000], np.int32) == [0, 128, 156]  # 16 bits that something widened
    assert greys([0, 100, 255], np.int32) == [0, 100, 255]
    assert greys([0, 10**6, 2 * 10**6], np.int32) == [0, 128, 255]
    assert greys([-1.0, np.nan, 0.5, np.inf], np.float32) == [0, 0, 128, 255]
    assert greys([0, 25.5, 255], np.float32) == [0, 26, 255]
    assert greys([0, 500, 1000], np.float32) == [0, 128, 255]
    assert greys([0, 0], np.float32) == [0, 0]
    assert greys([0, 32896, 65535], np.uint16, transparency=0) == [255, 128, 255]


def test_strips_do_not_show(monkeypatch):
    files = [FILES[name]() for name in ("deep.tif", "float.tif", "palette_alpha.png", "cmyk.tif", "lab.tif")]
    wholes = [load_image(data).tobytes() for data in files]
    monkeypatch.setattr(images, "_STRIP", 10)
    assert [load_image(data).tobytes() for data in files] == wholes


def test_what_is_no_picture_is_told(tmp_path):
    path = tmp_path / "a.png"
    noise().save(path)
    for array in (np.zeros((4, 4, 3), np.uint8), [[0, 1]], 3.5, object()):
        with pytest.raises(ImageError, match=rf"given as {type(array).__name__}: give a path, its bytes.*fromarray"):
            load_image(array)
    with open(path) as text, pytest.raises(ImageError, match="opened as text.*'rb'"):
        load_image(text)
    with Image.open(path) as closed:
        pass
    with pytest.raises(ImageError, match="closed before it was read"):
        load_image(closed)


def test_a_stream_that_cannot_go_back_is_read():
    class Pipe(io.RawIOBase):
        def __init__(self, data):
            self.rest = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.rest.readinto(buffer)

    assert load_image(Pipe(encoded(noise()))).tobytes() == noise().tobytes()


def test_open_files_of_any_kind_are_read_and_stay_at_their_place(tmp_path):
    data = encoded(noise())
    (path := tmp_path / "a.png").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "a.png")

    class Bytes(os.PathLike):
        def __fspath__(self):
            return os.fsencode(path)

    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        zipfile.ZipFile(tmp_path / "a.zip").open("a.png") as packed,
        tempfile.SpooledTemporaryFile() as spooled,
        open(path, "rb", buffering=0) as raw,
    ):
        spooled.write(data)
        for stream in (file, mapped, packed, spooled, raw, io.BytesIO(data)):
            stream.seek(7)
            assert load_image(stream).tobytes() == noise().tobytes(), stream
            assert stream.tell() == 7
    assert load_image(Bytes()).tobytes() == noise().tobytes()


@pytest.mark.parametrize(("depth", "clear"), [(1, 0), (2, 1), (2, 2), (4, 3), (4, 15), (8, 200), (16, 51400)])
def test_the_transparent_grey_of_a_png_is_white_in_every_depth(depth, clear):
    """Pillow compares the number of the file with the eight bits that it decodes to."""
    other = 2**depth - 1 - clear
    row = struct.pack(">HH" if depth == 16 else ">BB", clear, other)
    if depth < 8:
        row = bytes([clear << 8 - depth | other << 8 - 2 * depth])
    header = struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0)
    chunks = (
        chunk(b"IHDR", header),
        chunk(b"tRNS", struct.pack(">H", clear)),
        chunk(b"IDAT", zlib.compress(b"\0" + row)),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")
    greys = [pixel[0] for pixel in np.asarray(load_image(data))[0]]
    assert greys == [255, round(other * 255 / (2**depth - 1))]


def test_a_dark_scan_of_sixteen_bits_stays_dark():
    """The range of a file is what its header says, not what its pixels reach."""
    scan = b"P5 2 1 65535\n" + struct.pack(">HH", 100, 257)
    assert np.asarray(load_image(scan))[0, :, 0].tolist() == [0, 1]


# ---- whole and cut files, whatever Pillow's switches say -------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(*chunks: bytes, late: bool = False) -> bytes:
    """A whole PNG with further chunks, after its header or before its end."""
    data = encoded(noise(24))
    place = len(data) - 12 if late else 33
    return data[:place] + b"".join(chunks) + data[place:]


LONG = zlib.compress(bytes(3 << 20))
TALKATIVE = {
    "packed text": lambda: with_chunks(chunk(b"zTXt", b"Comment\0\0" + LONG)),
    "packed international text": lambda: with_chunks(chunk(b"iTXt", b"Comment\0\1\0\0\0" + LONG)),
    "plain text": lambda: with_chunks(chunk(b"tEXt", b"Comment\0" + b"a" * (2 << 20))),
    "much text": lambda: with_chunks(*[chunk(b"tEXt", b"Part\0" + b"a" * (1 << 20))] * 66),
    "long profile": lambda: with_chunks(chunk(b"iCCP", b"ICC\0\0" + LONG)),
    "late text": lambda: with_chunks(chunk(b"zTXt", b"Comment\0\0" + LONG), late=True),
    "text that is no text": lambda: with_chunks(chunk(b"zTXt", b"Comment\0\7" + b"?" * 99)),
    "profile that is none": lambda: with_chunks(chunk(b"iCCP", b"ICC\0\7" + b"?" * 99)),
    "text with a wrong sum": lambda: with_chunks(chunk(b"tEXt", b"Comment\0hello")[:-1] + b"\xff"),
    "chunk of someone's own": lambda: with_chunks(chunk(b"prVt", b"?" * 99)),
    "damaged animation": lambda: with_chunks(chunk(b"acTL", b"\0\0")),
}
SETTINGS = {
    "as imported": {},
    "cut files allowed": {(ImageFile, "LOAD_TRUNCATED_IMAGES"): True},
    "tight": {
        (Image, "MAX_IMAGE_PIXELS"): 1,
        (PngImagePlugin, "MAX_TEXT_CHUNK"): 1,
        (PngImagePlugin, "MAX_TEXT_MEMORY"): 1,
    },
    "loose": {
        (ImageFile, "LOAD_TRUNCATED_IMAGES"): True,
        (Image, "MAX_IMAGE_PIXELS"): None,
        (GifImagePlugin, "LOADING_STRATEGY"): GifImagePlugin.LoadingStrategy.RGB_ALWAYS,
    },
}


@pytest.fixture(params=SETTINGS)
def hostile(request, monkeypatch):
    for (module, name), value in SETTINGS[request.param].items():
        monkeypatch.setattr(module, name, value)
    yield
    for (module, name), value in SETTINGS[request.param].items():
        assert getattr(module, name) is value  # reading leaves what others set


@pytest.mark.parametrize("kind", TALKATIVE)
def test_a_whole_png_is_read_whatever_it_says_beside_its_picture(hostile, kind):
    assert load_image(TALKATIVE[kind]()).tobytes() == noise(24).tobytes()


@pytest.fixture(scope="module")
def written():
    """Made before any setting is changed: Pillow's own writers ask for them too."""
    return {name: make() for name, make in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_files_are_whole_or_refused_whatever_the_settings(written, hostile, name):
    data = written[name]
    assert load_image(data).tobytes() == load_image(io.BytesIO(data)).tobytes()
    several = name.startswith(("film", "two_views"))  # later frames are not looked at
    for kept in (0.2,) if several else (0.2, 0.5, 0.8, 0.95):
        with pytest.raises(ImageError, match="truncated or damaged|no image"):
            load_image(data[: int(len(data) * kept)])


@pytest.mark.parametrize("cut", [1, 4, 12, 13])
def test_a_png_without_its_end_is_cut(cut):
    with pytest.raises(ImageError, match="ends before its end mark"):
        load_image(encoded(noise(24))[:-cut])


def test_a_picture_in_a_jpeg_cut_before_its_end_is_refused(hostile):
    for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 95}):
        with pytest.raises(ImageError, match="truncated"):
            load_image(encoded(noise(), "JPEG", **options)[:-2])


def test_threads_and_a_switch_that_is_flipped_meanwhile_change_nothing():
    """One thread turns Pillow's switches without end, as hosts and other libraries do, while others read."""
    whole, cut = TALKATIVE["packed text"](), encoded(noise(96), "JPEG")[:-300]
    expected, stop, before = noise(24).tobytes(), threading.Event(), ImageFile.LOAD_TRUNCATED_IMAGES

    def flip() -> None:
        while not stop.is_set():
            for allowed, limit in ((True, 1), (False, None)):
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = allowed, limit

    def read(number: int) -> bool:
        if number % 2:
            return load_image(whole).tobytes() == expected
        with pytest.raises(ImageError, match="truncated"):
            load_image(cut)
        return True

    flipping = threading.Thread(target=flip)
    limit = Image.MAX_IMAGE_PIXELS
    flipping.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(400)))
    finally:
        stop.set()
        flipping.join()
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before, limit


def test_others_keep_pillow_s_switches(monkeypatch):
    """Ours hold for the picture that is read here, not for code beside us."""
    cut = encoded(noise(96), "JPEG")[:-300]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Image.open(io.BytesIO(cut)) as image:
        image.load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    with Image.open(io.BytesIO(cut)) as image, pytest.raises(OSError, match="truncated"):
        image.load()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert 2 * Image.MAX_IMAGE_PIXELS == 200
    with pytest.raises(Image.DecompressionBombError, match="exceeds limit of 200"):
        Image.open(io.BytesIO(encoded(noise(64))))
    with pytest.warns(Image.DecompressionBombWarning, match="exceeds limit of 100"):
        Image.open(io.BytesIO(encoded(noise(12))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert Image.MAX_IMAGE_PIXELS is None
    Image.open(io.BytesIO(encoded(noise(64))))


def test_a_switch_that_is_mocked_is_put_back():
    """unittest.mock reads and writes the module's own dictionary, past its attributes."""
    whole, cut = encoded(noise(96)), encoded(noise(96), "JPEG")[:-300]
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    with mock.patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", not before[0]):
        assert ImageFile.LOAD_TRUNCATED_IMAGES is not before[0]
        with mock.patch.multiple("PIL.Image", MAX_IMAGE_PIXELS=7), pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(whole))
        with pytest.raises(ImageError, match="truncated"):
            load_image(cut)
    assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    with Image.open(io.BytesIO(whole)) as image:
        image.load()
    assert load_image(whole).size == (96, 96)


@pytest.mark.filterwarnings("error")
def test_warnings_made_errors_cost_no_picture():
    data = frames("MPO")
    for mark, odd in ((b"MPF\0II*\0", b"MPF\0II*\1"), (b"MPF\0MM\0*", b"MPF\0MM\1*")):
        data = data.replace(mark, odd)  # what several phones write: Pillow warns, and reads the first view
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = Image.open(io.BytesIO(data))
    assert load_image(opened).tobytes() == load_image(data).tobytes()
    assert load_image(data).size == (16, 16)
    assert load_image(encoded(noise(), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")).size == (64, 64)


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
RAW = b"\nexif\n  34\n" + turned().tobytes().hex().encode()


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0key\0" + zlib.compress(XMP)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW)),
        chunk(b"tEXt", b"Raw profile type exif\0" + RAW),
    ],
    ids=["xmp", "packed xmp", "packed raw profile", "raw profile"],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_turn_told_in_a_text_of_a_png(hostile, text, late):
    expected = noise(24).transpose(Image.Transpose.ROTATE_270)
    assert load_image(with_chunks(text, late=late)).tobytes() == expected.tobytes()


# ---- the pixel limit ------------------------------------------------------------------------------------------------


def test_a_photo_of_108_megapixels_is_read_in_reduced_size():
    photo = Image.new("L", (12000, 9000), 77)
    photo.paste(200, (0, 0, 6000, 9000))
    data = encoded(photo, "JPEG", quality=50)
    del photo
    picture = load_image(data)
    assert picture.size == (6000, 4500)
    assert abs(picture.getpixel((10, 10))[0] - 200) < 3
    assert abs(picture.getpixel((5990, 4490))[0] - 77) < 3
    with pytest.raises(ImageError, match="108,000,000 pixels, the limit is 100,000,000.*max_pixels"):
        load_image(data, max_pixels=100_000_000)


@pytest.mark.parametrize(("whole", "side"), [(64 * 64, 64), (64 * 64 - 1, 32), (1000, 16), (60, 8)])
def test_only_large_jpegs_are_reduced(monkeypatch, whole, side):
    monkeypatch.setattr(images, "WHOLE_PIXELS", whole)
    data = encoded(noise(), "JPEG")
    with Image.open(io.BytesIO(data)) as opened:
        for source in (data, opened):
            assert load_image(source).size == (side, side)
        assert opened.size == (64, 64)
    assert load_image(encoded(noise())).size == (64, 64)  # a PNG has no reduced size


def huge_icon() -> bytes:
    inner = huge_png(60000, 60000)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "ICO in it"])
def test_the_limit_holds_in_every_format(hostile, form):
    data = huge_icon() if form == "ICO in it" else encoded(noise(), form)
    limit = images.MAX_PIXELS if form == "ICO in it" else 64 * 64 - 1
    with pytest.raises(ImageError, match=r"pixels, the limit is [0-9,]+ .*max_pixels .*--max-pixels"):
        load_image(data, max_pixels=limit)
    if form != "ICO in it":
        assert load_image(data, max_pixels=64 * 64).size == (64, 64)


def test_a_bomb_takes_no_memory():
    """In a process of its own, whose peak is its own: nothing near the 10 GB that the header promises."""
    code = (
        "import resource, sys; from neucore_plugin.common.images import load_image\n"
        "data = sys.stdin.buffer.read(); load_image(data[-int(sys.argv[1]):])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_image(data[:-int(sys.argv[1])])\n"
        "except ValueError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    small = encoded(noise())
    text = zlib.compress(bytes(1 << 28))
    for bomb in (huge_png(60000, 60000), huge_icon(), with_chunks(chunk(b"zTXt", b"a\0\0" + text))):
        done = subprocess.run(
            [sys.executable, "-c", code, str(len(small))], input=bomb + small, capture_output=True, check=True
        )
        assert int(done.stdout.split()[-1]) < 64


# ---- which files are pictures ---------------------------------------------------------------------------------------


def test_hidden_files_are_never_pictures_and_links_are_followed_once(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for name in ("a.png", "b/B.JPG", "b/._B.JPG", "b/c/d.jfif", ".DS_Store", ".cache/e.png", "__MACOSX/b/._B.JPG"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    for name in ("f.jpe", "g.jp2", "h.avif", "i.tiff", "k.heic", "l.HEIF", "a.txt", "film.mp4", "page.ps", "README"):
        (root / name).write_bytes(b"?")
    (outside / "deep").mkdir(parents=True)
    (outside / "m.webp").write_bytes(b"?")
    (outside / "deep" / "n.gif").write_bytes(b"?")
    (root / "away").symlink_to(outside)  # followed
    (root / "again").symlink_to(outside / "deep")  # read under the first name that leads there
    (root / "b" / "up").symlink_to(root)  # a loop
    (outside / "deep" / "round").symlink_to(outside)
    (root / "o.png").symlink_to(root / "a.png")  # another name of a picture
    (root / "lost.png").symlink_to(root / "nowhere.png")
    (root / "self.png").symlink_to(root / "self.png")
    os.mkfifo(root / "pipe.png")
    found, left_out = find_images(root)
    names = "a.png again/n.gif away/m.webp b/B.JPG b/c/d.jfif f.jpe g.jp2 h.avif i.tiff o.png"
    assert [path.relative_to(root).as_posix() for path in found] == names.split()
    assert left_out == {
        "hidden": 4,
        "linked folders that are read elsewhere": 3,
        "links that lead nowhere": 2,
        "no files": 1,
        ".heic (install pillow-heif)": 1,
        ".heif (install pillow-heif)": 1,
        ".txt": 1,
        ".mp4": 1,
        ".ps": 1,
        "without suffix": 1,
    }
    assert told(left_out).startswith("left out: 4 hidden, 3 linked folders that are read elsewhere, 2 links that lead")
    assert told(left_out).endswith("and 2 more")
    assert told(find_images(outside)[0] and Counter()) == ""


def test_a_folder_that_is_not_there_is_told(tmp_path):
    found, left_out = find_images(tmp_path / "nowhere")
    assert found == []
    assert "cannot be read (No such file" in told(left_out)


def test_suffixes_are_those_that_pillow_decodes():
    suffixes = image_suffixes()
    assert {".jfif", ".jpe", ".jpg", ".png", ".apng", ".webp", ".tif", ".bmp", ".gif", ".jp2", ".mpo"} <= suffixes
    assert (".avif" in suffixes) == features.check("avif")
    # films, measurements, programs and what is written alone
    assert not {".mpg", ".h5", ".grib", ".eps", ".ps", ".pdf", ".wmf"} & suffixes


def test_postscript_is_not_run(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ImageError, match="no image that Pillow can read"):
        load_image(path)


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "without pillow-heif .install it"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "without pillow-heif .install it"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "without pillow-jxl-plugin"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X        ", "macOS's notes on another file"),
    ],
)
def test_a_file_of_another_kind_says_what_it_needs(tmp_path, start, told):
    path = tmp_path / "photo.jpg"  # as phones and senders name them
    path.write_bytes(start + bytes(200))
    with pytest.raises(ImageError, match=rf"photo\.jpg is no image that Pillow can read .*{told}"):
        load_image(path)


def test_a_format_that_a_plug_in_registers_is_read(tmp_path, monkeypatch):
    """As pillow-heif does: a format, how it is told, its suffixes."""
    Image.init()
    for table in ("ID", "OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, table, getattr(Image, table).copy())

    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self.fp.seek(16)
            inner = Image.open(io.BytesIO(self.fp.read()))
            self._mode, self._size, self._inner = inner.mode, inner.size, inner

        def load(self):
            self._inner.load()
            self._im = self._inner.im
            return super().load()

    Image.register_open("HEIF", Heif, lambda start: start[4:12] == b"ftypheic")
    Image.register_extensions("HEIF", [".heic", ".heif"])
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0" + encoded(noise(8)))
    found, left_out = find_images(tmp_path)
    assert ([path.name for path in found], left_out) == (["a.HEIC"], {})
    assert load_image(found[0]).tobytes() == noise(8).tobytes()
