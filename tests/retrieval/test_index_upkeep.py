"""An index kept in step with its pictures, compacted, verified; and what lies in its files is refused."""

import json
import os
import shutil
import sqlite3

import numpy as np
import pytest
import torch
from colour_model import NAMES, ColourModel, draw, names

from neucore_plugin.common.errors import DataError, FileError
from neucore_plugin.common.files import sha256_file
from neucore_plugin.retrieval import upkeep
from neucore_plugin.retrieval.index import GalleryIndex


@pytest.fixture
def stored(folder, tmp_path):
    """Three units of the five pictures."""
    return GalleryIndex.build(ColourModel(), folder, out=tmp_path / "index", unit_size=2, progress=False)


def units_of(index):
    return sorted((index.folder / "units").glob("*.json"))


def same(found, expected):
    assert found.names == expected.names
    for key, value in expected.encodings.items():
        assert torch.equal(found.encodings[key], value)
    hits, wanted = found.search(text="red", k=None), expected.search(text="red", k=None)
    assert [(hit.name, hit.score) for hit in hits] == [(hit.name, hit.score) for hit in wanted]


# ---- sync -----------------------------------------------------------------------------------------------------------


def test_sync_encodes_only_what_differs(stored, folder):
    draw(folder / "new.png", (9, 200, 9))
    (folder / "blue.png").unlink()
    (folder / "green.png").rename(folder / "more" / "grün.png")
    draw(folder / "red.png", (200, 1, 1), size=(9, 9))
    os.utime(folder / "more" / "Grey.JPG", ns=(5, 5))
    stored.model.encoded.clear()
    done = stored.sync(progress=False)
    assert (done.added, done.changed, done.moved) == (["new.png"], ["red.png"], ["more/grün.png"])
    assert (done.removed, done.touched, done.unchanged) == (["blue.png", "green.png"], ["more/Grey.JPG"], 1)
    assert stored.model.encoded == [2]
    fresh = GalleryIndex.build(ColourModel(), folder, dtype=torch.float16, progress=False)
    opened = GalleryIndex.open(stored.folder, ColourModel())
    assert sorted(opened.names) == sorted(fresh.names) == sorted(stored.names)
    for name in fresh.names:
        row, wanted = (index.candidates(torch.tensor([index.position(name)])) for index in (opened, fresh))
        assert torch.equal(row["fg"], wanted["fg"])
    stored.model.encoded.clear()
    again = GalleryIndex.open(stored.folder, stored.model).sync(folder, progress=False)
    assert again.unchanged == 5 and stored.model.encoded == []
    assert not (again.added or again.changed or again.moved or again.touched or again.removed)


def test_same_size_and_new_time_is_decided_by_the_content(stored, folder):
    before = (folder / "red.png").stat()
    other = draw(folder.parent / "other.png", (251, 0, 0))
    assert other.stat().st_size == before.st_size
    shutil.copyfile(other, folder / "red.png")
    os.utime(folder / "red.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert stored.sync(progress=False).changed == ["red.png"]


def test_sync_keeps_attributes_and_leaves_other_folders_alone(folder, tmp_path):
    draw(tmp_path / "else" / "white.png", (255, 255, 255))
    (folder / "all.jsonl").write_text('{"path": "red.png", "price": 3}\n{"path": "blue.png", "price": 4}\n')
    index = GalleryIndex.build(ColourModel(), folder / "all.jsonl", out=tmp_path / "index", progress=False)
    index.add([tmp_path / "else" / "white.png"], progress=False)
    (folder / "red.png").rename(folder / "more" / "red.png")
    draw(folder / "blue.png", (1, 1, 240), size=(9, 9))
    done = index.sync(progress=False)
    assert (done.moved, done.changed, done.removed) == (["more/red.png"], ["blue.png"], ["red.png"])
    assert index.attributes(index.position("more/red.png")) == {"price": 3}
    assert index.attributes(index.position("blue.png")) == {"price": 4}
    assert any(name.endswith("else/white.png") for name in index.names)
    sub = index.sync(folder / "more", progress=False)
    assert not sub.removed and sub.unchanged == 3  # what lies beside the folder is not asked for


def test_sync_keeps_the_names_of_a_list(folder, tmp_path):
    (folder / "a.csv").write_text("path,name,price\nred.png,Red one,3\ngreen.png,Green one,4\nblue.png,,5\n")
    index = GalleryIndex.build(ColourModel(), folder / "a.csv", out=tmp_path / "index", progress=False)
    (folder / "a.csv").unlink()
    done = index.sync(progress=False)
    assert (done.added, done.unchanged) == (["more/Grey.JPG", "more/deep/pink.webp"], 3)
    assert not done.moved and not done.removed
    (folder / "green.png").rename(folder / "moved.png")
    shutil.copy(folder / "moved.png", folder / "z-copy.png")
    draw(folder / "red.png", (200, 1, 1), size=(9, 9))
    done = index.sync(progress=False)
    assert (done.changed, done.moved, done.removed) == (["Red one"], ["Green one", "z-copy.png"], [])
    found = GalleryIndex.open(tmp_path / "index", index.model)
    known = {row.name: (row.path, row.attributes.get("price")) for _, row in found.rows()}
    assert known["Red one"] == ("red.png", 3) and known["Green one"] == ("moved.png", 4)
    assert len(known) == len(found) == 6 and found.verify()["problems"] == []


def test_a_gallery_that_moved_as_a_whole_is_found_again(stored, folder, tmp_path):
    folder.rename(tmp_path / "moved")
    stored.model.encoded.clear()
    done = stored.sync(tmp_path / "moved", progress=False)
    assert done.unchanged == 5 and stored.model.encoded == []
    opened = GalleryIndex.open(stored.folder, ColourModel())
    assert opened.root == (tmp_path / "moved").resolve() and all(path.is_file() for path in opened.paths)


def test_a_folder_above_the_root_is_compared_with_the_pictures_below_it(stored, folder, tmp_path):
    draw(tmp_path / "beside.png", (1, 2, 3))
    done = stored.sync(tmp_path, progress=False)
    assert done.unchanged == 5 and len(done.added) == 1 and done.added[0].endswith("beside.png")
    assert stored.verify()["problems"] == [] and len(stored) == 6


def test_another_folder_takes_no_pictures_of_a_drive_that_is_away(stored, folder, tmp_path):
    folder.rename(tmp_path / "away")
    draw(tmp_path / "other" / "red.png", (200, 1, 1), size=(9, 9))  # a name that is there as well
    done = stored.sync(tmp_path / "other", progress=False)
    assert not done.removed and len(done.added) == 1
    (tmp_path / "away").rename(folder)
    opened = GalleryIndex.open(stored.folder, ColourModel())
    assert opened.root == folder.resolve() and len(opened) == 6
    assert opened.sync(progress=False).unchanged == 5


def test_a_file_with_the_name_that_a_list_gave_another_is_refused(folder, tmp_path):
    (folder / "a.csv").write_text("path,name\nred.png,blue.png\n")
    index = GalleryIndex.build(ColourModel(), folder / "a.csv", out=tmp_path / "index", progress=False)
    with pytest.raises(DataError, match="other pictures of the index have the names of 'blue.png'"):
        index.sync(progress=False)
    assert GalleryIndex.open(tmp_path / "index").names == ["blue.png"]


def test_a_new_picture_that_cannot_be_read_is_noted_once(stored, folder):
    (folder / "bad.png").write_text("no image")
    for _ in range(2):
        index = GalleryIndex.open(stored.folder, ColourModel())
        assert index.sync(progress=False).failures == ["bad.png"]
        assert [failure.name for failure in GalleryIndex.open(stored.folder).failures] == ["bad.png"]
    assert len(units_of(stored)) == 4
    draw(folder / "more.png", (1, 2, 3))
    added = stored.add([folder / "bad.png", folder / "more.png"], progress=False, unit_size=1)
    assert added == ["more.png"] and [failure.name for failure in stored.failures] == ["bad.png"]


def test_a_drive_that_is_not_there_empties_no_index(stored, folder):
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="is no folder"):
        stored.sync(progress=False)
    folder.mkdir()
    with pytest.raises(DataError, match="no images in"):
        stored.sync(progress=False)
    assert GalleryIndex.open(stored.folder).names == NAMES


def test_a_picture_that_became_unreadable_is_reported(stored, folder):
    (folder / "red.png").write_text("no image any more")
    done = stored.sync(progress=False)
    assert done.failures == ["red.png"]
    opened = GalleryIndex.open(stored.folder)
    assert opened.names == NAMES[:4] and [failure.name for failure in opened.failures] == ["red.png"]


# ---- compaction -----------------------------------------------------------------------------------------------------


def test_a_compacted_index_is_the_same_and_smaller(stored, folder, tmp_path):
    draw(folder / "new" / "white.png", (255, 255, 255))
    stored.add([folder / "new" / "white.png"], progress=False)
    stored.remove(["green.png", "more/Grey.JPG"])
    stored.remove("new/white")
    stored.add([folder / "new" / "white.png"], progress=False)
    shutil.copytree(stored.folder, tmp_path / "before")
    reader = GalleryIndex.open(stored.folder, ColourModel())  # maps the units that are deleted
    stored.compact()
    before = GalleryIndex.open(tmp_path / "before", ColourModel())
    same(GalleryIndex.load(stored.folder, ColourModel()), before)
    same(stored, before)
    same(reader, before)
    assert reader.search("red.png", k=2) and reader.position("blue") == 0
    assert stored.stored == len(stored) == 4
    assert stored.verify(ColourModel())["problems"] == []
    assert len([path for path in (stored.folder / "units").iterdir() if path.is_dir()]) == 1
    with pytest.raises(DataError, match="compacted or saved anew since it was opened"):
        reader.remove("red.png")
    stored.remove("red.png")
    again = stored.compact()[1]
    assert again == len(units_of(stored)) and GalleryIndex.load(stored.folder).names == stored.names
    built = GalleryIndex.build(ColourModel(), {"x": folder / "red.png"}, progress=False)
    assert "x" in built.names


def test_a_build_goes_on_after_a_compaction(folder, tmp_path):
    options = {"out": tmp_path / "index", "unit_size": 2, "progress": False}
    index = GalleryIndex.build(ColourModel(), folder, share=(0, 2), **options)
    index.compact()
    model = ColourModel()
    found = GalleryIndex.build(model, folder, **options)
    assert model.encoded == [2] and sorted(found.names) == NAMES
    assert found.info()["planned_units_done"] == 3


@pytest.mark.parametrize("cut", ["units.put", "units.delete"])
def test_a_compaction_cut_short_changes_nothing(stored, folder, monkeypatch, cut):
    stored.remove("green.png")
    expected = GalleryIndex.open(stored.folder, ColourModel())

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"neucore_plugin.retrieval.upkeep.{cut}", killed)
        with pytest.raises(KeyboardInterrupt):
            upkeep.compact(stored.folder)
    same(GalleryIndex.load(stored.folder, ColourModel()), expected)
    stored.compact()
    same(stored, expected)


def test_units_stay_within_their_size(stored, monkeypatch):
    monkeypatch.setattr(upkeep, "SAVED", 4)
    assert stored.compact() == (3, 2)
    assert [part.count for part in stored.parts] == [4, 1] and stored.names == NAMES
    assert stored.compact() == (2, 2)


# ---- a full drive ---------------------------------------------------------------------------------------------------


def test_a_full_drive_is_one_error_and_leaves_what_was_there(stored, folder):
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    for number in range(60):
        draw(folder / f"n{number}.png", (number, 0, 0))
    extra = sorted(folder.glob("n*.png"))
    before = {path: path.read_bytes() for path in stored.folder.rglob("*") if path.is_file()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for room in (100, 3_000, 9_000):  # in the arrays, in the rows
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises((FileError, DataError, OSError)) as caught:
                stored.add(extra, progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert isinstance(caught.value, FileError), caught.value
        assert {path: path.read_bytes() for path in stored.folder.rglob("*") if path.is_file()} == before
    signal.signal(signal.SIGXFSZ, handler)
    assert GalleryIndex.load(stored.folder).names == NAMES
    assert len(stored.add(extra, progress=False)) == 60


# ---- what lies ------------------------------------------------------------------------------------------------------


def edited(path, **changes):
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | changes))


def unit(folder):
    return sorted((folder / "units").glob("*.json"))[0]


def rows(folder, *statements):
    """Another database, and the unit made to agree with it."""
    path = unit(folder).with_suffix("") / "rows.sqlite"
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    agree(folder, path)


def agree(folder, path):
    files = json.loads(unit(folder).read_text())["files"]
    files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    edited(unit(folder), files=files)


def array(folder, content):
    path = unit(folder).with_suffix("") / "fg.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    agree(folder, path)


def linked(folder, name):
    path = unit(folder).with_suffix("") / name
    shutil.move(path, folder.parent / "secret")
    path.symlink_to(folder.parent / "secret")


def link_unit(folder):
    place = unit(folder).with_suffix("")
    shutil.move(place, folder.parent / "secret")
    place.symlink_to(folder.parent / "secret")


def replace_each_other(folder, count):
    paths = sorted((folder / "units").glob("*.json"))[:count]
    for path, other in zip(paths, [*paths[1:], paths[0]], strict=True):
        edited(path, replaces=[other.stem])


HUGE = 10**18
LIES = [
    (lambda f: (f / "manifest.json").write_text("{"), "no valid JSON"),
    (lambda f: edited(f / "manifest.json", format="other-1"), "has format 'other-1'"),
    (lambda f: edited(f / "manifest.json", extra=1), "does not say what"),
    (lambda f: edited(f / "manifest.json", model=3), "does not say what"),
    (lambda f: edited(f / "manifest.json", dtype=["float16"]), "does not say what"),
    (lambda f: edited(f / "manifest.json", keys={"../../etc": [3]}), "does not say what"),
    (lambda f: edited(f / "manifest.json", keys={"fg": [HUGE], "bg": [3]}), "does not say what"),
    (lambda f: edited(f / "manifest.json", keys={"fg": [True], "bg": [3]}), "does not say what"),
    (lambda f: edited(f / "manifest.json", keys={"fg": [4], "bg": [3]}), "does not hold 2 encodings"),
    (lambda f: edited(f / "manifest.json", keys={"fg": [3]}), "names other files"),
    (lambda f: edited(f / "manifest.json", dtype="float32"), "does not hold 2 encodings"),
    (lambda f: edited(f / "manifest.json", plan={"units": -1, "sha256": "0" * 64}), "does not say what"),
    (lambda f: edited(unit(f), count=3), "does not hold 3 encodings"),
    (lambda f: edited(unit(f), count=HUGE), "names other files, units or numbers"),
    (lambda f: edited(unit(f), count=-1), "names other files, units or numbers"),
    (lambda f: edited(unit(f), count="2"), "names other files, units or numbers"),
    (lambda f: edited(unit(f), files={"../../secret.npy": {"bytes": 1, "sha256": "0" * 64}}), "names other files"),
    (lambda f: edited(unit(f), replaces=["../../secret"]), "names other files, units"),
    (lambda f: edited(unit(f), replaces=[unit(f).stem]), "names other files, units"),
    (lambda f: edited(unit(f), removes={"..": [0]}), "names other files, units"),
    (lambda f: edited(unit(f), removes={unit(f).stem: [-1]}), "names other files, units"),
    (lambda f: edited(unit(f), removes={unit(f).stem: [2]}), "removes row 2 of .* which has fewer"),
    (lambda f: edited(unit(f), removes={unit(f).stem: [0.5]}), "names other files, units"),
    (lambda f: edited(unit(f), failures=[{"name": "a"}]), "names other files, units"),
    (lambda f: edited(unit(f), more={}), r"unknown keys or lacks some \(more\)"),
    (lambda f: edited(unit(f), index=7), "does not say which index"),
    (lambda f: unit(f).write_text(unit(f).read_text().replace('"count": 2', '"count": NaN')), "NaN is no number"),
    (lambda f: (unit(f).with_suffix("") / "fg.npy").unlink(), r"fg\.npy is missing"),
    (lambda f: (unit(f).with_suffix("") / "rows.sqlite").write_bytes(b"x"), r"rows\.sqlite is not the file"),
    (lambda f: array(f, b"PK\3\4" + bytes(99)), "no .npy matrix"),
    (lambda f: array(f, np.array([[print] * 3] * 2, dtype=object)), "does not hold 2 encodings"),
    (lambda f: array(f, np.zeros((2, 3), np.float64)), "does not hold 2 encodings"),
    (lambda f: linked(f, "fg.npy"), "is a link"),
    (lambda f: linked(f, "rows.sqlite"), "is a link"),
    (link_unit, "is a link"),
    (lambda f: replace_each_other(f, 2), "replace each other"),
    (lambda f: replace_each_other(f, 3), "replace each other"),
]


@pytest.mark.parametrize(("lie", "message"), LIES, ids=[f"{n} {message[:24]}" for n, (_, message) in enumerate(LIES)])
def test_a_manifest_or_a_unit_that_lies_is_one_error(stored, tmp_path, lie, message):
    secret = tmp_path / "secret.npy"
    secret.write_bytes(b"mine")
    lie(stored.folder)
    for opened in (GalleryIndex.open, lambda folder: GalleryIndex.open(folder).compact()):
        with pytest.raises(DataError, match=message):
            opened(stored.folder)
    assert secret.read_bytes() == b"mine"


BAD_ROWS = [
    (["CREATE VIEW v AS SELECT 1"], "tables are not those of an index"),
    (["CREATE TRIGGER t AFTER INSERT ON rows BEGIN SELECT 1; END"], "tables are not those of an index"),
    (["DELETE FROM rows WHERE row = 0"], "holds rows 1 to 1, not 2"),
    (["UPDATE rows SET attributes = '{\"a\": NaN}'"], "attributes: a: NaN is no number"),
    (["UPDATE rows SET attributes = '[1]'"], "attributes are no object"),
    (["UPDATE rows SET attributes = '{'"], "attributes: "),
    (["UPDATE rows SET name = 7"], "a row holds something else"),
    (["UPDATE rows SET path = NULL"], "a row holds something else"),
    (["UPDATE rows SET name = CAST(x'ff' AS BLOB)"], "a row holds something else"),
    (["UPDATE rows SET name = CAST(x'ff' AS TEXT)"], "damaged"),
    (
        ["PRAGMA writable_schema = ON", "UPDATE sqlite_master SET sql = CAST(x'ff' AS TEXT) WHERE name = 'by_file'"],
        "damaged",
    ),
]


@pytest.mark.parametrize(("statements", "message"), BAD_ROWS)
def test_rows_that_lie_are_one_error(stored, statements, message):
    rows(stored.folder, *statements)
    index = GalleryIndex.open(stored.folder, ColourModel())
    with pytest.raises(DataError, match=message):
        _ = index.names
    assert any(message.partition("|")[0][:8] in text or "damaged" in text for text in index.verify()["problems"])


def other_encodings(folder, shape, key="fg"):
    """Whole and in agreement with its sums, but not what the model makes."""
    keys = json.loads((folder / "manifest.json").read_text())["keys"]
    edited(folder / "manifest.json", keys={key: shape} | {name: keys[name] for name in keys if name != "fg"})
    for path in sorted((folder / "units").glob("*.json")):
        noted = json.loads(path.read_text())
        (path.with_suffix("") / "fg.npy").unlink()
        array = path.with_suffix("") / f"{key}.npy"
        np.save(array, np.ones((noted["count"], *shape), np.float16))
        del noted["files"]["fg.npy"]
        noted["files"][array.name] = {"bytes": array.stat().st_size, "sha256": sha256_file(array)}
        path.write_text(json.dumps(noted))


@pytest.mark.parametrize(("shape", "key"), [([4], "fg"), ([1], "fg"), ([], "fg"), ([2, 2], "fg"), ([3], "other")])
def test_encodings_that_the_model_never_makes(stored, shape, key):
    other_encodings(stored.folder, shape, key)
    index = GalleryIndex.open(stored.folder, ColourModel())
    with pytest.raises(DataError, match="the index holds encodings .* but its model makes .*'fg': "):
        index.search(text="red")
    assert ["the index holds encodings" in text for text in index.verify(ColourModel())["problems"]] == [True]


@pytest.mark.parametrize("place", [-5, 0, 2**62])
def test_pictures_in_what_is_no_shard_are_refused(stored, tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", stored.root / "blue.png"):
        rows(stored.folder, f"UPDATE rows SET path = '{path}', place = {place}, bytes = {1 << 40}")
        with pytest.raises(DataError, match="is no file|is truncated"):
            GalleryIndex.open(stored.folder, ColourModel()).search(image="blue.png")


def test_nothing_is_written_through_a_link(stored, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(stored.folder / "units")
    (stored.folder / "units").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a link"):
        GalleryIndex.open(stored.folder, ColourModel()).add(stored.root, progress=False)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_name_without_end_hinders_nothing(stored):
    rows(stored.folder, "UPDATE rows SET name = zeroblob(3000000) WHERE row = 0")
    with pytest.raises(DataError, match="no image 'rd.png' in the index .5 images..$|Did you mean 'red.png'"):
        GalleryIndex.open(stored.folder, ColourModel()).search(image=None, text="red", exclude=["rd.png"])


def test_verify_tells_every_kind_of_damage(stored, folder):
    assert stored.verify(ColourModel())["problems"] == []
    (problem,) = stored.verify(ColourModel("colours-2"))["problems"]
    assert "built by model colours-1, but the model given is colours-2" in problem
    path = units_of(stored)[1].with_suffix("") / "fg.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    (problem,) = GalleryIndex.open(stored.folder).verify()["problems"]
    assert f"{units_of(stored)[1].stem}/fg.npy is not the file that was saved" in problem
    path.write_bytes(good)
    array(stored.folder, np.full((2, 3), np.nan, np.float16))
    (problem,) = GalleryIndex.open(stored.folder).verify()["problems"]
    assert "fg.npy holds NaN" in problem


def test_two_writers_at_once_keep_both_and_a_name_twice_is_told(stored, folder):
    other = GalleryIndex.open(stored.folder, ColourModel())
    new = draw(folder / "new.png", "pink")
    stored.add([new], progress=False)
    other.add([new], progress=False)  # it was opened before
    found = GalleryIndex.open(stored.folder, ColourModel())
    assert found.names.count("new.png") == 2
    (problem,) = found.verify()["problems"]
    assert "names stand twice: 'new.png'" in problem


def test_what_is_held_in_memory_says_so(built):
    for call in (built.compact, built.verify):
        with pytest.raises(DataError, match="held in memory; save it first"):
            call()
    assert built.info()["images"] == 5 and names(built.search(text="red", k=1)) == ["red.png"]
