"""Shards that lie, are damaged or hostile: told at once, never read short, nothing in them run or written."""

import json
import os
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
    ("change", "message"),
    [
        *(
            (lambda plain, wrong=wrong: plain["triplets"][0].update(wrong), r"triplet 0 has (a wrong [a-z]+: |fields)")
            for wrong in (
                *({"extra": 1}, {"reference": None}, {"caption": 7}, {"targets": "a"}, {"members": [1]}),
                *({"soft": [["a"]]}, {"soft": [["a", "b"]]}, {"captions": None}),
            )
        ),
        (lambda plain: plain["triplets"][0].pop("reference"), "triplet 0 has a wrong reference: "),
        (lambda plain: plain.update(triplets=5), "needs a list 'triplets', and counts"),
        (lambda plain: plain.update(left_out=[1]), "needs a list 'triplets', and counts"),
        (lambda plain: plain.update(left_out={"missing_images": "many"}), "needs a list 'triplets', and counts"),
    ],
)
def test_a_split_of_another_form_is_refused_even_with_its_sum(written, change, message):
    path = written / "triplets-val.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(DataError, match="was altered since it was written"):
        reader.read_shards(written)
    edit_index(written, lambda index: index["splits"]["val"].update(sha256=reader.split_sum(plain)))
    with pytest.raises(DataError, match=f"triplets-val.json: {message}"):
        reader.read_shards(written)


def test_a_truncated_shard_is_told_and_never_short(written):
    path = written / "shard-00001.tar"
    size = path.stat().st_size
    images, *_ = reader.read_shards(written)
    os.truncate(path, 2000)
    with pytest.raises(DataError, match=rf"shard-00001.tar has 2,000 bytes, not {size:,}"):
        reader.read_shards(written)
    last = [image for image in images.values() if image.shard == str(path)][-1]
    with pytest.raises(DataError, match="is truncated: it ends before image"):
        last.read()
    with pytest.raises(ImageError, match="shard-00001.tar"):
        load_image(last)


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
def test_the_same_command_mends_what_is_damaged(data, written, damage, capsys):
    """As the messages promise; what is whole is not written again."""
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    whole = (written / "shard-00000.tar").stat().st_ino
    damage(written)
    with pytest.raises(DataError) as caught:
        reader.verify(written, progress=False)
    assert cli.main(["shards", "--verify", "--out", str(written)]) == 2
    assert str(caught.value) in capsys.readouterr().err
    index_is_whole = "shards" in json.loads((written / reader.INDEX).read_text())
    write(data, written)
    assert reader.verify(written, progress=False) == len(data[0])
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before
    assert (whole == (written / "shard-00000.tar").stat().st_ino) == index_is_whole


@pytest.mark.parametrize("given", ["pipe:cat x", "http://x/y", "s3://bucket"])
def test_only_folders_are_read(given):
    with pytest.raises(DataError, match="shards are read by place from a folder"):
        reader.read_shards(given)


def test_names_are_labels(tmp_path, data):
    """A data set may call its images what it likes: no such path is made."""
    path = next(iter(data[0].values()))
    paths = {"../../evil": path, "/etc/passwd": path, "a b/é": path}
    gallery = Gallery(tuple(paths), tuple(paths.values()))
    split = [Triplet("1", "../../evil", "x", ("/etc/passwd",))]
    writer.write_shards(tmp_path / "deep" / "out", "x", paths, {"val": (split, gallery)}, progress=False)
    images, found, _ = reader.read_shards(tmp_path / "deep" / "out")
    assert list(images) == list(paths) and found["val"][0] == split
    assert sorted(os.listdir(tmp_path)) == ["deep"] and os.listdir(tmp_path / "deep") == ["out"]
