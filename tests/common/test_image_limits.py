"""Whole and cut files, whatever Pillow's switches say; the pixel limit; which files are pictures."""

import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from picture_case import FILES, chunk, encoded, frames, huge_png, noise, turned
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin, features

from neucore_plugin.common import images
from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.images import find_images, image_suffixes, load_image, told

# ---- whole and cut files, whatever Pillow's switches say -------------------------------------------------------------


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
