"""Reading pictures: every file is an upright RGB picture or one error that names it."""

import io
import mmap
import os
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_case import (
    FILES,
    RED,
    WHITE,
    chunk,
    encoded,
    half_transparent,
    huge_png,
    noise,
)
from PIL import Image, ImageFile

from neucore_plugin.common import images
from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.images import check_images, load_image


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
