"""Shards: what goes in comes out, by place and as a stream; interrupted writing; hostile and damaged folders."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import write_shapes
from torch.utils.data import DataLoader

from neucore_plugin import cli
from neucore_plugin.datasets import folder, shards
from neucore_plugin.datasets.triplets import Gallery, Triplet
from neucore_plugin.errors import DataError, ImageError
from neucore_plugin.features import content_fingerprints
from neucore_plugin.images import check_images, load_image


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_shapes(tmp_path_factory.mktemp("shapes") / "root")
    paths = folder.images(root)
    return paths, {split: folder.load_split(root, split, paths) for split in ("train", "val")}


def write(data, out: Path, **options) -> Path:
    paths, splits = data
    settings = {"max_bytes": 12_000, "workers": 2, "progress": False} | options
    return shards.write_shards(out, "folder", paths, splits, **settings)


@pytest.fixture
def written(data, tmp_path) -> Path:
    return write(data, tmp_path / "out").parent


def edit_index(out: Path, change) -> None:
    path = out / shards.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_everything_comes_back(data, written):
    paths, splits = data
    images, found = shards.read_shards(written)
    assert list(images) == list(paths)
    for name, image in images.items():
        assert image.read() == paths[name].read_bytes()
        assert load_image(image).tobytes() == load_image(paths[name]).tobytes()
    for split, (triplets, gallery) in splits.items():
        assert found[split][0] == triplets and found[split][1].ids == gallery.ids
    assert len(list(written.glob("*.tar"))) > 2
    assert content_fingerprints(list(images.values()), False) == content_fingerprints(list(paths.values()), False)
    assert check_images(list(images.values()), progress=False) == []
    assert shards.verify(written, progress=False) == len(paths)
    assert pickle.loads(pickle.dumps(images[next(iter(images))])) == next(iter(images.values()))


def test_every_field_of_a_triplet_survives(tmp_path, data):
    paths = dict(list(data[0].items())[:3])
    a, b, c = paths
    full = Triplet("1", a, "é 😀", (b, c), "x", (a, b, c), ((b, 0.5), (c, -1.0)), ("one", "two"))
    gallery = Gallery(tuple(paths), tuple(paths.values()))
    shards.write_shards(tmp_path / "out", "x", paths, {"val": ([full], gallery)}, progress=False)
    assert shards.read_shards(tmp_path / "out")[1]["val"][0] == [full]


def test_the_archives_are_webdatasets(written, data):
    """An ordinary webdataset reader finds the same bytes; equal content gives equal files."""
    import webdataset

    found = []
    for path in sorted(written.glob("*.tar")):
        stages = (webdataset.SimpleShardList(str(path)), webdataset.tarfile_to_samples())
        found += [sample["png"] for sample in webdataset.DataPipeline(*stages)]
    assert found == [path.read_bytes() for path in data[0].values()]
    again = write(data, written.parent / "again", workers=1).parent
    for path in written.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_stream_gives_each_image_once(written, data, workers):
    loader = DataLoader(shards.stream(written), batch_size=None, num_workers=workers)
    found = {}
    for sample in loader:
        assert sample["name"] not in found
        found[sample["name"]] = sample["bytes"]
    assert found == {name: path.read_bytes() for name, path in data[0].items()}


def test_writing_continues_where_it_was_stopped(data, tmp_path, monkeypatch):
    done = []
    original = shards._write_shard

    def stop_after_two(path, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        return original(path, *arguments)

    out = tmp_path / "out"
    monkeypatch.setattr(shards, "_write_shard", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        write(data, out, workers=1)
    with pytest.raises(DataError, match="its writing was interrupted"):
        shards.read_shards(out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(kept) == 2
    monkeypatch.undo()
    write(data, out)
    assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert shards.verify(out, progress=False) == len(data[0])
    assert not list(out.glob("shard-*.json")) and not (out / "writing.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    write(data, out)  # a second time: nothing is written again
    assert times == {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    with pytest.raises(DataError, match="holds shards of other images, splits or settings"):
        write(data, out, max_bytes=30_000)


def test_a_folder_of_other_things_is_left_alone(data, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="is not empty and holds no shards of ours"):
        write(data, tmp_path)
    paths, splits = data
    with pytest.raises(DataError, match="1 images have no file, such as gone.png"):
        shards.write_shards(tmp_path / "out", "x", {**paths, "gone": Path("gone.png")}, splits)
    assert not (tmp_path / "out").exists()


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
        shards.read_shards(written)
    assert message in str(caught.value)


def test_a_truncated_shard_is_told_and_never_short(written):
    path = written / "shard-00001.tar"
    size = path.stat().st_size
    images, _ = shards.read_shards(written)
    os.truncate(path, 2000)
    with pytest.raises(DataError, match=rf"shard-00001.tar has 2,000 bytes, not {size:,}"):
        shards.read_shards(written)
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
        shards.verify(written, progress=False)
    assert cli.main(["shards", "--verify", "--out", str(written)]) == 2
    assert "its content has changed" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


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
        list(shards.stream(written))
    assert not (tmp_path / "exploded").exists() and sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize("given", ["pipe:cat x", "http://x/y", "s3://bucket"])
def test_only_folders_are_read(given):
    with pytest.raises(DataError, match="shards are read from a folder"):
        shards.read_shards(given)


def test_names_are_labels(tmp_path, data):
    """A data set may call its images what it likes: no such path is made."""
    path = next(iter(data[0].values()))
    paths = {"../../evil": path, "/etc/passwd": path, "a b/é": path}
    gallery = Gallery(tuple(paths), tuple(paths.values()))
    split = [Triplet("1", "../../evil", "x", ("/etc/passwd",))]
    shards.write_shards(tmp_path / "deep" / "out", "x", paths, {"val": (split, gallery)}, progress=False)
    images, found = shards.read_shards(tmp_path / "deep" / "out")
    assert list(images) == list(paths) and found["val"][0] == split
    assert sorted(os.listdir(tmp_path)) == ["deep"] and os.listdir(tmp_path / "deep") == ["out"]


def test_the_command_writes_what_training_reads(tmp_path, shapes_root, capsys, tiny_config):
    from neucore_plugin import host

    out = tmp_path / "tars"
    assert cli.main(["shards", "folder", "--root", str(shapes_root), "--out", str(out), "--max-mb", "1"]) == 0
    assert "24 images, " in capsys.readouterr().out
    losses = {}
    for kind, root in (("images", shapes_root), ("shards", out)):

        def change(config, kind=kind, root=root):
            config["datasets"]["folder"].update(data_type=kind, build_info={"root": str(root)})
            config["run"].update(output_dir=str(tmp_path / kind), runner="runner_cir_iter", num_workers=2, report=False)
            config["run"].update(max_iters=6, iters_per_inner_epoch=3, cache_dir=str(tmp_path / f"{kind}-cache"))

        host.run(tiny_config(change, f"{kind}.yaml"))
        log = next((tmp_path / kind).rglob("log.txt")).read_text().splitlines()
        losses[kind] = [json.loads(line)["train_loss"] for line in log if "train_loss" in line]
    assert losses["images"] == losses["shards"] and len(losses["images"]) == 2
    assert torch.tensor(losses["images"]).isfinite().all()
