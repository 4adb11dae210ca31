"""Pictures as bytes, for the tests of reading them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

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


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


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
