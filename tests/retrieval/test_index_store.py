"""Saving and loading an index: round trip, cuts, moved pictures, other models, damage and hostile manifests."""

import errno
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from colour_model import NAMES, ColourModel, draw, names
from earlier_index import save_earlier
from factor_model import FactorModel, random_index

from neucore_plugin.common.errors import DataError, ImageError
from neucore_plugin.common.files import sha256_file
from neucore_plugin.retrieval.encoding import fingerprint_of
from neucore_plugin.retrieval.index import GalleryIndex


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load(folder, tmp_path, dtype):
    (folder / "aa.jpg").write_text("not an image")
    built = GalleryIndex.build(ColourModel(), folder, progress=False, dtype=dtype)
    built.save(tmp_path / "index")
    loaded = GalleryIndex.load(tmp_path / "index", ColourModel())
    assert loaded.names == built.names
    assert loaded.paths == built.paths
    assert loaded.failures == built.failures
    assert loaded.model_fingerprint == "colours-1"
    for key, value in built.encodings.items():
        assert value.dtype == dtype
        assert torch.equal(loaded.encodings[key], value)
    assert loaded.search("red.png", "green", k=3) == built.search("red.png", "green", k=3)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["keys"] == {"fg": [3], "bg": [3]}
    (unit,) = (tmp_path / "index" / "units").glob("*.json")
    assert json.loads(unit.read_text())["count"] == 5
    assert np.load(unit.with_suffix("") / "fg.npy", allow_pickle=False).shape == (5, 3)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="lists the memory maps of Linux")
def test_loading_maps_the_files(built, tmp_path):
    built.save(tmp_path / "index")
    loaded = GalleryIndex.open(tmp_path / "index")
    (file,) = (tmp_path / "index").glob("units/*/fg.npy")
    before = file.read_bytes()
    loaded.encodings["fg"].zero_()  # copy on write
    assert file.read_bytes() == before
    with open("/proc/self/maps") as maps:
        assert str(file) in maps.read()


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_saving_again_replaces_and_tidies(built, tmp_path):
    folder = tmp_path / "index"
    built.save(folder)
    first = files(folder)
    built.remove("red.png")
    # What a killed saver left goes too, what was never an index's stays.
    mine = {"fg-2.npy", "units/notes.json", "units/1/fg.npy"}
    left = ("units/00000007-a1a2b3c4/fg.npy", "units/.00000007-a1a2b3c4.json.0a.tmp", ".manifest.json.0a.tmp")
    for name in (*mine, *left):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    built.save(folder)
    assert GalleryIndex.load(folder).names == NAMES[:4]
    assert len(files(folder) - mine) == 5  # manifest, unit, its two arrays and rows
    assert (files(folder) - mine) & first == {"manifest.json"}


def test_changes_of_an_opened_index_are_kept_at_once(built, folder, tmp_path):
    built.save(tmp_path / "index")
    opened = GalleryIndex.open(tmp_path / "index", ColourModel())
    opened.remove("red.png")
    draw(folder / "new.png", "pink")
    assert opened.add([folder / "new.png"], progress=False) == ["new.png"]
    opened.save(tmp_path / "index")
    again = GalleryIndex.open(tmp_path / "index", ColourModel())
    assert again.names == opened.names == [*NAMES[:4], "new.png"]
    assert again.search(text="red", k=5) == opened.search(text="red", k=5)
    assert again.position("new.png") == 5 and len(again) == 5 and again.stored == 6
    again.save(tmp_path / "copy")
    assert GalleryIndex.load(tmp_path / "copy").stored == 5


@pytest.mark.parametrize("cut", ["write_manifest", "sha256_file", "rows_file.write"])
def test_a_save_cut_short_leaves_the_earlier_index(built, tmp_path, monkeypatch, cut):
    folder = tmp_path / "index"
    built.save(folder)
    built.remove("red.png")

    def killed(path, *args, **kwargs):
        raise KeyboardInterrupt

    before = files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(f"neucore_plugin.retrieval.units.{cut}", killed)
        with pytest.raises(KeyboardInterrupt):
            built.save(folder)
    assert GalleryIndex.load(folder).names == NAMES
    assert files(folder) == before
    built.save(folder)
    assert GalleryIndex.load(folder).names == NAMES[:4]


def test_an_index_of_an_earlier_version_opens(built, tmp_path):
    folder = save_earlier(built, tmp_path / "index")
    before = files(folder)
    opened = GalleryIndex.open(folder, ColourModel())
    assert opened.names == NAMES and opened.paths == built.paths
    assert opened.search("red.png", "green", k=3) == built.search("red.png", "green", k=3)
    opened.remove("red.png")
    assert files(folder) == before and GalleryIndex.load(folder).names == NAMES  # never written
    opened.save(folder)  # becomes one of today's
    assert GalleryIndex.load(folder).names == NAMES[:4]
    assert not files(folder) & (before - {"manifest.json"})


@pytest.mark.parametrize("locks", [True, False])
def test_savers_at_once_never_mix(tmp_path, monkeypatch, locks):
    """Names and vectors of each saver carry its number; a reader sees one saver's, and never none."""
    if not locks:
        monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    folder, rounds = tmp_path / "index", 5

    def index(saver, count):
        names = [f"{saver}-{place}" for place in range(count)]
        encodings = {"fg": torch.full((count, 2), float(saver)), "bg": torch.full((count, 1), float(saver))}
        return GalleryIndex(names, names, encodings, model_fingerprint="m")

    def write(saver):
        for _ in range(rounds):
            index(saver, 3 + saver).save(folder)
        return True

    def read(_):
        seen = []
        while not all(saver.done() for saver in savers):
            found = GalleryIndex.load(folder)
            assert len(found) == 3 + int(found.name(0)[0])
            seen.append((found.name(0)[0], int(found.encodings["fg"][0, 0]), int(found.encodings["bg"][0, 0])))
        return seen

    index(0, 3).save(folder)
    with ThreadPoolExecutor(5) as pool:
        savers = [pool.submit(write, saver) for saver in range(1, 4 if locks else 2)]
        found = [seen for reader in [pool.submit(read, number) for number in range(2)] for seen in reader.result()]
        assert all(saver.result() for saver in savers)
    assert found
    assert all(name == str(fg) == str(bg) for name, fg, bg in found)
    assert len(files(folder)) == 5


def test_first_save_cut_short_is_no_index(built, tmp_path, monkeypatch):
    monkeypatch.setattr("neucore_plugin.retrieval.units.sha256_file", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        built.save(tmp_path / "index")
    with pytest.raises(DataError, match="saving was never finished"):
        GalleryIndex.load(tmp_path / "index")


def test_moved_pictures(built, folder, tmp_path):
    built.save(tmp_path / "index")
    folder.rename(tmp_path / "elsewhere")
    loaded = GalleryIndex.load(tmp_path / "index", ColourModel(), root=tmp_path / "elsewhere")
    assert all(path.is_file() for path in loaded.paths)
    assert "red.png" not in names(loaded.search("red.png", k=4))
    with pytest.raises(ImageError, match=r"red\.png"):
        GalleryIndex.load(tmp_path / "index", ColourModel()).search("red.png", k=1)


def test_another_model_is_refused(built, tmp_path):
    built.save(tmp_path / "index")
    message = "built by model colours-1, but the model given is colours-2.*build the index again"
    with pytest.raises(DataError, match=message):
        GalleryIndex.load(tmp_path / "index", ColourModel("colours-2"))
    loaded = GalleryIndex.load(tmp_path / "index")
    with pytest.raises(DataError, match="colours-2"):
        loaded.attach(ColourModel("colours-2"))
    with pytest.raises(DataError, match="without a model"):
        loaded.search(text="red")
    with pytest.raises(DataError, match="without a model"):
        loaded.add([tmp_path / "x.png"])
    loaded.attach(ColourModel())
    assert names(loaded.search(text="red", k=1)) == ["red.png"]


def test_the_processor_is_part_of_the_fingerprint():
    model = ColourModel()

    class Processor:
        fingerprint = "stretch:64"

        def __call__(self, image):
            return torch.zeros(3, 4, 4)

    plain = fingerprint_of(model)
    model.image_processor = Processor()
    assert plain == "colours-1"
    assert fingerprint_of(model) == "colours-1 stretch:64"
    assert fingerprint_of(object()) is None


def stored_file(folder, key):
    """The file of an encoding, of the ids, or the manifest."""
    return next(path for path in folder.iterdir() if path.name.startswith((f"{key}-", f"{key}.")))


def damage(folder, key, change):
    path = stored_file(folder, key)
    path.write_bytes(change(path.read_bytes()))


def edit(folder, **fields):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.update(fields)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replaced(folder, array):
    """As an attacker would: another array, and the manifest made to agree with it."""
    path = stored_file(folder, "fg")
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array, allow_pickle=True)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder, files={**files, path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}})


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


NO_ARRAYS = [
    b"",
    b"PK\3\4" + bytes(99),
    header("{'descr':\n"),
    header("(" * 9000),
    header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30}, 3)}}\n"),
]
DAMAGE = [
    (lambda f: damage(f, "fg", lambda b: b[:-4]), r"fg-\d+.npy is not the file that was saved"),
    (lambda f: damage(f, "fg", lambda b: b[:-1] + bytes([b[-1] ^ 1])), r"fg-\d+.npy is not the file that was saved"),
    (lambda f: damage(f, "ids", lambda b: b.replace(b"red", b"bed")), r"ids-\d+.json is not the file"),
    (lambda f: stored_file(f, "bg").unlink(), r"bg-\d+.npy is missing"),
    (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    (lambda f: damage(f, "manifest", lambda b: b[:50]), "no valid JSON"),
    (lambda f: edit(f, format="other-1"), "has format 'other-1'"),
    (lambda f: edit(f, count=6), "do not agree with its manifest of 6"),
    (lambda f: edit(f, encodings={"fg": "../secret-1.npy"}), "names files outside its folder"),
    (lambda f: edit(f, files={"../../x-1.npy": {"sha256": "", "bytes": 1}}), "names files outside its folder"),
    (lambda f: edit(f, model=3), "lacks fields"),
    (lambda f: replaced(f, np.array([print] * 5, dtype=object)), "cannot be read .*Python objects in dtype"),
    (lambda f: replaced(f, np.zeros((4, 3), dtype=np.float32)), "do not agree"),
    (lambda f: replaced(f, np.float32(3)), "cannot be read .*0-d"),
    *((lambda f, b=content: replaced(f, b), r"fg-\d+\.npy is no .npy matrix of numbers") for content in NO_ARRAYS),
    (lambda f: replaced(f, np.zeros((5, 3), dtype=np.int64)), "do not agree|int64"),
]


@pytest.mark.parametrize(("harm", "message"), DAMAGE, ids=[message[:30] for _, message in DAMAGE])
def test_damage_of_an_earlier_index_is_refused(built, tmp_path, harm, message):
    harm(save_earlier(built, tmp_path / "index"))
    with pytest.raises(DataError, match=message) as caught:
        GalleryIndex.load(tmp_path / "index")
    assert "build the index again" in str(caught.value)


def test_an_earlier_manifest_reaches_no_other_folder(built, tmp_path):
    """A manifest from elsewhere that agrees with itself, but names a file beside the index."""
    folder = save_earlier(built, tmp_path / "index")
    outside = tmp_path / "secret-1.npy"
    inside = stored_file(folder, "fg")
    inside.rename(outside)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace(inside.name, "../secret-1.npy"))
    with pytest.raises(DataError, match="names files outside its folder"):
        GalleryIndex.load(folder)
    with pytest.raises(DataError, match="names files outside its folder"):
        built.save(folder)  # which would remove the files of the earlier manifest
    assert outside.exists()


def test_foreign_folders_are_not_written_to(built, tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(DataError, match="format None"):
        built.save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        built.save(tmp_path / "file")
    with pytest.raises(DataError, match="file' is a file; build the index again"):
        GalleryIndex.load(tmp_path / "file")


@pytest.mark.parametrize("reads", [True, False])
def test_scores_of_half_precision_are_those_of_float32(tmp_path, reads):
    model = FactorModel()
    saved = random_index(tmp_path / "index", model)
    gallery = {key: value.half() for key, value in saved.encodings.items()}
    index = GalleryIndex(saved.names, saved.names, gallery, model)
    index.remove("0007.jpg")
    query, given = model.encode_query(None, ["wider, and blue"]), set()

    def score(query, gallery):
        given.update(value.dtype for value in gallery.values())
        return model.matching.score(query, gallery)

    model.score, model.scores_half = score, reads
    found = index.scores(query)
    assert given == {torch.float16 if reads else torch.float32}
    expected = model.matching.score(query, {key: value.float() for key, value in gallery.items()})
    expected[:, 7] = -torch.inf
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
