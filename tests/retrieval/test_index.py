"""GalleryIndex: building, searching, saving and loading, with a tiny model whose score is known in closed form."""

import io
import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from colour_model import COLOURS, NAMES, ColourModel, draw, names
from PIL import Image

from neucore_plugin import cli
from neucore_plugin.common.errors import DataError, ImageError
from neucore_plugin.retrieval import encoding, gallery
from neucore_plugin.retrieval.index import GalleryIndex, Hit


def test_build_from_a_folder(built, folder):
    assert built.names == NAMES
    assert built.paths == [(folder / name).resolve() for name in NAMES]
    assert len(built) == 5
    assert "red.png" in built
    assert built.failures == []
    assert built.model.encoded == [2, 2, 1]
    torch.testing.assert_close(built.encodings["fg"][4], torch.tensor(COLOURS["red"]) / 255)  # no dropout
    assert built.encodings["fg"].dtype == torch.float32


def test_modes_of_the_model_are_restored(folder):
    model = ColourModel()
    GalleryIndex.build(model, folder, progress=False).search(text="red", k=1)
    assert model.training
    assert model.noise.training
    assert not model.frozen.training  # model.train() would have switched it on


def test_batches_do_not_matter(folder):
    one = GalleryIndex.build(ColourModel(), folder, batch_size=1, progress=False)
    all_ = GalleryIndex.build(ColourModel(), folder, batch_size=64, progress=False, workers=1)
    assert one.names == all_.names
    for key in ("fg", "bg"):
        assert torch.equal(one.encodings[key], all_.encodings[key])


def test_build_from_files_and_from_names(folder):
    files = [folder / "red.png", str(folder / "more" / "Grey.JPG")]
    assert GalleryIndex.build(ColourModel(), files, progress=False).names == ["red.png", "more/Grey.JPG"]
    named = GalleryIndex.build(ColourModel(), {"b": files[0], "a": files[1]}, progress=False)
    assert named.names == ["b", "a"]
    assert names(named.search(text="red", k=2)) == ["b", "a"]


def test_unreadable_images_are_listed(folder, caplog):
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    (folder / "aa.jpg").write_text("not an image")
    with caplog.at_level(logging.WARNING):
        index = GalleryIndex.build(ColourModel(), folder, batch_size=2, progress=False)
    assert index.names == NAMES
    assert [failure.name for failure in index.failures] == ["aa.jpg", "broken.png"]
    assert all(failure.reason for failure in index.failures)
    assert "2 of 7 images could not be read" in caplog.text
    assert "broken.png" in caplog.text
    torch.testing.assert_close(index.encodings["fg"][4], torch.tensor(COLOURS["red"]) / 255)  # rows stay in step


def test_search_is_the_models_score(built, folder):
    hits = built.search(text="red", k=5)
    expected = {}
    for name, colour in zip(NAMES, ("blue", "green", "grey", "pink", "red"), strict=True):
        with Image.open(folder / name) as image:
            mean = np.asarray(image.convert("RGB"), dtype=np.float64).mean((0, 1)) / 255
        expected[name] = -float(np.linalg.norm(mean - np.array(COLOURS["red"]) / 255))
        assert np.allclose(mean, np.array(COLOURS[colour]) / 255, atol=0.03)
    assert names(hits) == sorted(expected, key=lambda name: -expected[name])
    for rank, hit in enumerate(hits, start=1):
        assert isinstance(hit, Hit)
        assert hit.rank == rank
        assert hit.score == pytest.approx(expected[hit.name], abs=1e-4)  # cdist near zero
        assert hit.path == folder.resolve() / hit.name


def test_reference_is_left_out(built, folder, tmp_path, monkeypatch):
    assert "red.png" not in names(built.search("red.png", k=4))
    assert names(built.search("red.png", k=1, exclude_reference=False)) == ["red.png"]
    assert "red.png" not in names(built.search(folder / "red.png", k=4))
    assert "red.png" not in names(built.search(str(folder / "more" / ".." / "red.png"), "blue", k=4))
    (tmp_path / "link").symlink_to(folder)
    assert "red.png" not in names(built.search(tmp_path / "link" / "red.png", k=4))
    monkeypatch.chdir(folder / "more")
    assert "more/Grey.JPG" not in names(built.search("Grey.JPG", k=4))  # a file here, not a name
    outside = draw(tmp_path / "outside.png", "red")
    assert names(built.search(outside, k=5))[0] == "red.png"  # not in the gallery: nothing to leave out


def test_pictures_in_memory(built):
    red = Image.new("RGB", (5, 5), COLOURS["red"])
    assert names(built.search(red, k=1)) == ["red.png"]
    clear = Image.new("RGBA", (5, 5), (255, 0, 0, 0))  # fully transparent: white
    assert names(built.search(clear, k=1)) == ["more/deep/pink.webp"]
    assert names(built.search(Image.new("L", (5, 5), 90), k=1)) == ["more/Grey.JPG"]


def test_search_many_equals_one_by_one(built, monkeypatch):
    monkeypatch.setattr("neucore_plugin.retrieval.queries._BATCH", 2)
    monkeypatch.setattr(gallery.Gallery.blocks, "__defaults__", (2,))
    queries = [("red.png", "blue"), (None, "green"), ("blue.png", None)]
    queries += [("green.png", "  "), ("more/Grey.JPG", "red"), (None, "pink"), ("red.png", "green")]
    together = built.search_many(queries, k=3)
    assert len(together) == len(queries)
    for query, hits in zip(queries, together, strict=True):
        assert names(hits) == names(built.search(*query, k=3))
    assert names(together[3]) == names(built.search("green.png", k=3))  # a blank text is none


def test_equal_pictures_keep_gallery_order(tmp_path):
    for name in ("c.png", "a.png", "b.png"):
        draw(tmp_path / name, "red")
    built = GalleryIndex.build(ColourModel(), tmp_path, progress=False)
    assert names(built.search(text="blue", k=3)) == ["a.png", "b.png", "c.png"]
    assert names(built.search("b.png", k=2)) == ["a.png", "c.png"]


def test_add_and_remove(built, folder):
    extra = draw(folder / "new" / "white.png", (255, 255, 255))
    assert built.add([extra], progress=False) == ["new/white.png"]
    assert built.names[-1] == "new/white.png"
    assert names(built.search(text="red green blue", k=1)) == ["new/white.png"]
    built.remove(["red.png", "blue.png"])
    assert built.names == ["green.png", "more/Grey.JPG", "more/deep/pink.webp", "new/white.png"]
    assert names(built.search("new/white.png", "red", k=3))[0] == "more/deep/pink.webp"
    torch.testing.assert_close(built.encodings["fg"][0], torch.tensor(COLOURS["green"]) / 255)
    fresh = GalleryIndex.build(ColourModel(), {name: folder / name for name in built.names}, progress=False)
    assert torch.equal(fresh.encodings["bg"], built.encodings["bg"])
    built.remove("green.png")
    assert len(built) == 3


def test_failed_add_changes_nothing(built, folder):
    (folder / "broken.png").write_bytes(b"x")
    with pytest.raises(DataError, match="none of the 1 images could be read"):
        built.add([folder / "broken.png"], progress=False)
    assert built.names == NAMES
    assert len(built.encodings["fg"]) == 5


class DivergedModel(ColourModel):
    def encode_image(self, pixels):
        return {"fg": pixels.mean((2, 3)) * 1e6}


BAD_SOURCES = [
    (lambda f: f / "nowhere", "nowhere' does not exist"),
    (lambda f: f / "red.png", "is a file; give a list of files"),
    (lambda f: [], "empty list"),
    (lambda f: [f / "red.png", f / "more" / ".." / "red.png"], "given twice: 'red.png'"),
    (lambda f: [f / "notes.txt"], "none of the 1 images could be read"),
    (lambda f: [f / "gone.png"], "gone.png does not exist"),
    (lambda f: {}, "empty mapping"),
]


@pytest.mark.parametrize(("source", "message"), BAD_SOURCES, ids=[message[:20] for _, message in BAD_SOURCES])
def test_bad_sources(folder, source, message):
    with pytest.raises(DataError, match=message):
        GalleryIndex.build(ColourModel(), source(folder), progress=False)


def test_folder_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"no images in .*looked for \.bmp, \.gif"):
        GalleryIndex.build(ColourModel(), tmp_path)


def test_bad_settings(folder, built):
    with pytest.raises(DataError, match="batch_size=0"):
        GalleryIndex.build(ColourModel(), folder, batch_size=0)
    with pytest.raises(DataError, match=r"float32 or torch.float16"):
        GalleryIndex.build(ColourModel(), folder, dtype=torch.bfloat16)
    with pytest.raises(DataError, match="'fg' holds NaN or infinite numbers; store float32"):
        GalleryIndex.build(DivergedModel(), folder, dtype=torch.float16, progress=False)
    with pytest.raises(DataError, match="twice in the index: 'a'"):
        GalleryIndex(["a", "a"], ["x", "y"], built.encodings)


BAD_QUERIES = [
    ({}, "neither image nor text"),
    ({"text": " "}, "neither image nor text"),
    ({"text": "red", "k": 0}, "k=0"),
    ({"image": "rad.png"}, "'rad.png' is neither a file nor a name in the index. Did you mean 'red.png'?"),
]


@pytest.mark.parametrize(("query", "message"), BAD_QUERIES, ids=[message[:24] for _, message in BAD_QUERIES])
def test_bad_queries(built, query, message):
    with pytest.raises(DataError, match=message):
        built.search(**query)


def test_bad_names(built, folder):
    with pytest.raises(DataError, match=r"no image 'gren.png' in the index \(5 images\). Did you mean 'green.png'"):
        built.remove(["gren.png"])
    with pytest.raises(DataError, match=r"already in the index: 'red\.png'"):
        built.add([folder / "red.png"])
    with pytest.raises(DataError, match="would remove all 5"):
        built.remove(NAMES)
    with pytest.raises(DataError, match="no queries"):
        built.search_many([])
    (folder / "notes.png").write_text("no image")
    with pytest.raises(ImageError, match=r"notes\.png"):
        built.search(folder / "notes.png", k=1)


def test_reading_ahead_is_bounded(tmp_path, monkeypatch):
    """At most two batches are in memory: the one being encoded and the next."""
    for number in range(12):
        draw(tmp_path / f"{number:02d}.png", "red")
    opened, seen = [], []
    real = encoding.load_for
    monkeypatch.setattr(encoding, "load_for", lambda processor, path: opened.append(path) or real(processor, path))

    class Counting(ColourModel):
        def encode_image(self, pixels):
            seen.append(len(opened))
            return super().encode_image(pixels)

    GalleryIndex.build(Counting(), tmp_path, batch_size=3, progress=False)
    assert len(opened) == 12
    assert all(count <= 3 * (number + 2) for number, count in enumerate(seen))


@pytest.mark.parametrize(
    "given", ["path", "bytes", "bytearray", "memory", "stream", "file", "opened", "loaded", "copy"]
)
def test_a_reference_is_the_same_query_however_it_is_given(built, tmp_path, given):
    path = tmp_path / "turned.png"
    picture = Image.new("RGBA", (9, 9), (250, 0, 0, 60))
    picture.putpixel((0, 0), (0, 0, 230, 255))
    picture.save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    loaded = Image.open(path)
    loaded.load()
    sources = {
        "path": path,
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "memory": memoryview(path.read_bytes()),
        "stream": io.BytesIO(path.read_bytes()),
        "file": open(path, "rb"),  # noqa: SIM115
        "opened": Image.open(path),
        "loaded": loaded,
        "copy": loaded.copy(),
    }
    expected = built.search(str(path), "green", k=5)
    for _ in range(2):  # a stream is read from its start again
        assert built.search(sources[given], "green", k=5) == expected
    sources["file"].close()


def test_an_opened_file_of_the_gallery_is_left_out_as_its_path_is(built, folder):
    expected = built.search(folder / "red.png", "blue", k=4)
    with open(folder / "red.png", "rb") as stream, Image.open(folder / "red.png") as opened:
        assert built.search(stream, "blue", k=4) == built.search(opened, "blue", k=4) == expected
        with Image.open(stream) as of_stream, Image.open(os.fsencode(folder / "red.png")) as by_bytes:
            assert built.search(of_stream, "blue", k=4) == built.search(by_bytes, "blue", k=4) == expected
    assert len(built.search((folder / "red.png").read_bytes(), "blue", k=5)) == 5  # bytes have no name


@pytest.mark.parametrize("given", [np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), 7, ["red.png"]])
def test_what_is_no_picture_is_refused(built, given):
    with pytest.raises(ImageError, match=rf"given as {type(given).__name__}: give a path"):
        built.search(given, "blue", k=1)


def test_every_image_is_found(built, folder, tmp_path):
    outside = draw(tmp_path / "outside.png", "pink")
    assert len(names(built.search(outside, "red", k=None))) == 5
    assert len(names(built.search(text="red", k=None))) == 5
    assert sorted(names(built.search("red.png", k=None))) == sorted(set(NAMES) - {"red.png"})
    assert built.search(outside, "red", k=None)[:3] == built.search(outside, "red", k=3)
    mixed = built.search_many([("red.png", None), (outside, None), ("blue.png", "red")], k=None)
    assert [len(hits) for hits in mixed] == [4, 5, 4]
    assert mixed[1] == built.search(outside, k=None)  # whatever is asked beside it
    alone = GalleryIndex.build(ColourModel(), [folder / "red.png"], progress=False)
    assert alone.search(folder / "red.png", k=None) == []


def test_linked_folders_are_searched_and_what_is_left_out_is_counted(folder, tmp_path, caplog):
    draw(tmp_path / "elsewhere" / "white.jfif", (255, 255, 255))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "more" / "round").symlink_to(folder)
    (folder / "._red.png").write_bytes(b"\0\5\x16\7")
    with caplog.at_level(logging.WARNING):
        found = GalleryIndex.build(ColourModel(), folder, progress=False)
    assert found.names == sorted([*NAMES, "linked/white.jfif"])
    assert found.left_out == {"hidden": 3, ".txt": 1, "linked folders that are read elsewhere": 1}
    assert "left out: 3 hidden, 1 .txt, 1 linked folders" in caplog.text
    # the file itself, by its real place
    assert "linked/white.jfif" not in names(found.search(tmp_path / "elsewhere" / "white.jfif", k=5))
    listed = GalleryIndex.build(ColourModel(), sorted(folder.glob("*.png")), progress=False)
    assert (listed.names, listed.left_out) == (["blue.png", "green.png", "red.png"], {"hidden": 2})


class Sized(ColourModel):
    """As a checkpoint's model: its processor says how many pixels it takes."""

    def __init__(self):
        super().__init__()
        self.processor = SimpleNamespace(max_pixels=10**6)

    @property
    def image_processor(self):
        processor, plain = self.processor, super().image_processor

        class Processor:
            max_pixels = property(
                lambda _: processor.max_pixels, lambda _, value: setattr(processor, "max_pixels", value)
            )

            def __call__(self, image):
                return plain(image)

        return Processor()


def searched(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("neucore_plugin.load_model", lambda *_, **__: Sized())
    code = cli.main(["search", "--checkpoint", "best.pth", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_shows_every_image(folder, tmp_path, monkeypatch, capsys):
    outside = draw(tmp_path / "outside.png", "pink")
    code, out, err = searched(monkeypatch, capsys, "--folder", folder, "--image", outside)
    assert code == 0
    assert sorted(line.split()[-1] for line in out.splitlines()) == sorted(NAMES)
    assert "left out: 2 hidden, 1 .txt" in err
    _, out, _ = searched(monkeypatch, capsys, "--folder", folder, "--image", folder / "red.png", "-k", 9)
    assert sorted(line.split()[-1] for line in out.splitlines()) == sorted(set(NAMES) - {"red.png"})
    _, out, _ = searched(monkeypatch, capsys, "--folder", folder, "--text", "red", "-k", 2)
    assert len(out.splitlines()) == 2
    draw(tmp_path / "one" / "red.png", "red")
    code, out, err = searched(monkeypatch, capsys, "--folder", tmp_path / "one", "--image", "red.png")
    assert (code, out) == (2, "") and "holds no image but the reference" in err
    _, out, _ = searched(monkeypatch, capsys, "--folder", tmp_path / "one", "--text", "red")
    assert out.split()[-1] == "red.png"


def test_the_command_takes_a_pixel_limit(folder, monkeypatch, capsys):
    draw(folder / "wide.png", "red", size=(40, 10))
    _, out, err = searched(monkeypatch, capsys, "--folder", folder, "--text", "red", "--max-pixels", 399)
    assert "wide.png" not in out
    assert "left out wide.png" in err and "400 pixels, the limit is 399" in err and "--max-pixels" in err
    _, out, err = searched(monkeypatch, capsys, "--folder", folder, "--text", "red", "--max-pixels", 400)
    assert "wide.png" in out and "limit" not in err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("./red.png", "red.png"),
        ("RED.PNG", "red.png"),
        ("red", "red.png"),
        (" red.png", "red.png"),
        ("more\\grey.jpg", "more/Grey.JPG"),
        ("more//deep/pink", "more/deep/pink.webp"),
    ],
)
def test_a_name_is_found_in_another_spelling(built, folder, given, meant, tmp_path):
    assert built.search(given, "blue", k=4) == built.search(meant, "blue", k=4)
    if "\\" not in given and given == given.strip():  # of a file, the folders are those of the disk
        assert built.search(folder / given, "blue", k=4) == built.search(meant, "blue", k=4)
    built.save(tmp_path / "index")
    loaded = GalleryIndex.load(tmp_path / "index", model=ColourModel())
    loaded.remove(given)
    assert meant not in loaded and len(loaded) == 4


def test_a_name_that_may_mean_several_is_told(folder):
    draw(folder / "Red.png", "blue")
    index = GalleryIndex.build(ColourModel(), folder, progress=False)
    assert names(index.search("Red.png", k=1, exclude_reference=False)) == ["Red.png"]
    for ask in (index.search, index.remove, lambda name: index.search(folder / name)):
        with pytest.raises(DataError, match=r"'RED\.png' may mean 'Red\.png', 'red\.png'"):
            ask("RED.png")


@pytest.mark.parametrize("given", ["", ".", "..", "a\0b", "x" * 5000, "\ud83d.png", "~", "/"])
def test_what_is_no_name_is_one_error(built, given):
    with pytest.raises(DataError):
        built.search(given, "red")
