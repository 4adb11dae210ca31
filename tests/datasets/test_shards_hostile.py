"""Shards that lie, are damaged or hostile: told at once, never read short, nothing in them run or written."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from shards_case import edit_index, write

from neucore_plugin import cli
from neucore_plugin.common.errors import DataError, ImageError
from neucore_plugin.common.images import load_image
from neucore_plugin.datasets.shards import reader, writer
from neucore_plugin.datasets.triplets import Gallery, Triplet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(format="other"), "has the format 'other'"),
        (lambda i: i.pop("shards"), "lacks its lists of shards and splits"),
        (lambda i: i["shards"][0].update(file="../x.tar"), "'../x.tar' is no shard of this folder"),
        (lambda i: i["shards"][0].update(file="/etc/passwd"), "'/etc/passwd' is no shard of this folder"),
        (lambda i: i["shards"][0].update(file="pipe:touch x"), "is no shard of this folder"),
        (lambda i: i["shards"][0].update(file="shard-99999.tar"), "shard-99999.tar is missing"),
        (lambda i: i["shards"][0]["images"][0].update(offset=10**12), "has no place of its own"),
        (lambda i: i["shards"][0]["images"][0].update(offset=-5), "has no place of its own"),
        (lambda i: i["shards"].append(i["shards"][0]), "shard-00000.tar is listed twice"),
        (lambda i: i.update(shards=[], splits={}), "lists no images"),
        (lambda i: i["shards"][0]["images"][0].update(offset=True), "has no place of its own"),
        (lambda i: i["shards"][0]["images"][0].update(size="7"), "has no place of its own"),
        (lambda i: i["shards"][0]["images"][1].update(offset=512), "has no place of its own"),
        (lambda i: i["shards"][1]["images"][0].update(name=i["shards"][0]["images"][0]["name"]), "is listed twice"),
        (lambda i: i["splits"].update({"../x": i["splits"]["val"]}), "is no name of a split"),
        (lambda i: i["splits"]["val"].update(sha256="0"), "triplets-val.json: was altered"),
    ],
)
def test_an_index_that_lies_is_refused(written, change, message):
    edit_index(written, change)
    with pytest.raises(DataError) as caught:
        reader.read_shards(written)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("reference"),
        lambda entry: entry.update(extra=1),
        lambda entry: entry.update(caption=7),
        lambda entry: entry.update(targets="a"),
        lambda entry: entry.update(members=[1]),
        lambda entry: entry.update(soft=[["a"]]),
        lambda entry: entry.update(soft=[["a", "b"]]),
        lambda entry: entry.update(captions=None),
    ],
)
def test_a_triplet_of_another_form_is_refused_even_with_its_sum(written, change):
    path = written / "triplets-val.json"
    plain = json.loads(path.read_text())
    change(plain["triplets"][0])
    path.write_text(json.dumps(plain))
    with pytest.raises(DataError, match="was altered since it was written"):
        reader.read_shards(written)
    edit_index(written, lambda index: index["splits"]["val"].update(sha256=reader.split_sum(plain)))
    with pytest.raises(
        DataError,
        match=r"triplets-val.json: triplet 0(: [a-z]+: | has fields)",
    ):
        reader.read_shards(written)


def test_shards_of_another_data_set(written):
    assert reader.read_shards(written, "folder")
    with pytest.raises(DataError, match="holds shards of 'folder', not of 'cirr'"):
        reader.read_shards(written, "cirr")


@pytest.mark.parametrize("zeros", [512, 3000])
def test_a_stream_is_never_silently_short(written, zeros):
    """A shard of the right size whose end is zeros is a whole tar file for tarfile: it only holds fewer members."""
    path = written / "shard-00001.tar"
    images, _ = reader.read_shards(written)
    last = [image for image in images.values() if image.shard == str(path)][-1]
    raw = bytearray(path.read_bytes())
    raw[last.offset - 512 : last.offset - 512 + zeros] = bytes(zeros)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"shard-00001.tar: ends after \d of \d images|no whole tar file"):
        list(reader.stream(written))
    with pytest.raises(DataError, match="its content has changed"):
        reader.verify(written, progress=False)


def test_a_truncated_shard_is_told_and_never_short(written):
    path = written / "shard-00001.tar"
    size = path.stat().st_size
    images, _ = reader.read_shards(written)
    os.truncate(path, 2000)
    with pytest.raises(DataError, match=rf"shard-00001.tar has 2,000 bytes, not {size:,}"):
        reader.read_shards(written)
    last = [image for image in images.values() if image.shard == str(path)][-1]
    with pytest.raises(DataError, match="is truncated: it ends before image"):
        last.read()
    with pytest.raises(ImageError, match="shard-00001.tar"):
        load_image(last)


def test_changed_bytes_are_found_by_verify(written, capsys):
    path = written / "shard-00000.tar"
    raw = bytearray(path.read_bytes())
    raw[600] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="its content has changed"):
        reader.verify(written, progress=False)
    assert cli.main(["shards", "--verify", "--out", str(written)]) == 2
    assert "its content has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.update(triplets=5),
        lambda plain: plain.update(left_out=[1]),
        lambda plain: plain.update(left_out={"missing_images": "many"}),
    ],
)
def test_a_split_of_another_form_is_refused_even_with_its_sum(written, change):
    path = written / "triplets-val.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    edit_index(written, lambda index: index["splits"]["val"].update(sha256=reader.split_sum(plain)))
    for read in (reader.read_shards, reader.left_out):
        with pytest.raises(DataError, match="triplets-val.json: needs a list 'triplets', and counts"):
            read(written)


def flip(out: Path) -> None:
    raw = bytearray((out / "shard-00001.tar").read_bytes())
    raw[600] ^= 1
    (out / "shard-00001.tar").write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda out: os.truncate(out / "shard-00001.tar", 2000),
        lambda out: (out / "shard-00001.tar").unlink(),
        lambda out: (out / "triplets-val.json").write_text("{}"),
        lambda out: edit_index(out, lambda index: index.pop("shards")),
        lambda out: edit_index(out, lambda index: index["shards"][1].update(sha256="0")),
        lambda out: edit_index(out, lambda index: index["shards"][1]["images"][0].update(offset=1024)),
    ],
)
def test_the_same_command_mends_what_is_damaged(data, written, damage):
    """As the messages promise; what is whole is not written again."""
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    whole = (written / "shard-00000.tar").stat().st_ino
    damage(written)
    with pytest.raises(DataError):
        reader.verify(written, progress=False)
    index_is_whole = "shards" in json.loads((written / reader.INDEX).read_text())
    write(data, written)
    assert reader.verify(written, progress=False) == len(data[0])
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before
    assert (whole == (written / "shard-00000.tar").stat().st_ino) == index_is_whole


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_the_bomb_explodes_where_it_is_unpickled(tmp_path, monkeypatch):
    """Else the tests below would prove nothing; webdataset's own decoder does unpickle it."""
    import webdataset

    monkeypatch.chdir(tmp_path)
    decode = webdataset.autodecode.Decoder([])
    decode({"__key__": "0", "pyd": pickle.dumps(Bomb())})
    assert (tmp_path / "exploded").is_dir()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files_are_refused(written, kind):
    """A link named as an image: its target is not followed."""
    path = written / "shard-00000.tar"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("000000.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    path.write_bytes(stream.getvalue())
    shard = {"file": path.name, "bytes": path.stat().st_size, "images": [{"name": "a", "offset": 512, "size": 0}]}
    edit_index(written, lambda index: index.update(shards=[shard], splits={}))
    with pytest.raises(DataError, match="which is no member of ours"):
        list(reader.stream(written))


def test_a_member_of_another_size_is_not_read(written):
    """A header that claims a terabyte is refused by the index before anything is read."""
    edit_index(written, lambda index: index["shards"][0]["images"][0].update(size=5))
    with pytest.raises(DataError, match="member 000000.png is not where the index says"):
        list(reader.stream(written))


@pytest.mark.parametrize(
    "name", ["000000.pyd", "000000.pkl", "x.pickle", "../000000.png", "/tmp/000000.png", "a/0.pth"]
)
def test_hostile_members_are_neither_decoded_nor_written(written, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = written / "shard-00000.tar"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo(name)
        data = pickle.dumps(Bomb())
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    path.write_bytes(stream.getvalue())
    image = {"name": "a", "offset": 512, "size": len(data)}
    shard = {"file": path.name, "bytes": path.stat().st_size, "images": [image]}
    edit_index(written, lambda index: index.update(shards=[shard], splits={}))
    with pytest.raises(DataError, match="which is no member of ours"):
        list(reader.stream(written))
    assert not (tmp_path / "exploded").exists() and sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize("given", ["pipe:cat x", "http://x/y", "s3://bucket"])
def test_only_folders_are_read(given):
    with pytest.raises(DataError, match="shards are read from a folder"):
        reader.read_shards(given)


def test_names_are_labels(tmp_path, data):
    """A data set may call its images what it likes: no such path is made."""
    path = next(iter(data[0].values()))
    paths = {"../../evil": path, "/etc/passwd": path, "a b/é": path}
    gallery = Gallery(tuple(paths), tuple(paths.values()))
    split = [Triplet("1", "../../evil", "x", ("/etc/passwd",))]
    writer.write_shards(tmp_path / "deep" / "out", "x", paths, {"val": (split, gallery)}, progress=False)
    images, found = reader.read_shards(tmp_path / "deep" / "out")
    assert list(images) == list(paths) and found["val"][0] == split
    assert sorted(os.listdir(tmp_path)) == ["deep"] and os.listdir(tmp_path / "deep") == ["out"]
