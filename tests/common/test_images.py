"""Reading pictures: every file is an upright RGB picture or one error that names it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.images import check_images, load_image

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

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

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
