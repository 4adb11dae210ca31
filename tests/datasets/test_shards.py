"""Shards read by place: what goes in comes out; interrupted writing; training from them."""

import errno
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from places import ROOT
from shards_case import write
from torch.utils.data import DataLoader, DistributedSampler

from neucore_plugin import cli
from neucore_plugin.common.errors import DataError, FileError
from neucore_plugin.common.images import check_images, load_image
from neucore_plugin.datasets.feature_cache import content_fingerprints
from neucore_plugin.datasets.shards import reader, writer
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset


def test_everything_comes_back(data, written):
    paths, splits = data
    images, found, _ = reader.read_shards(written)
    assert list(images) == list(paths)
    for name, image in images.items():
        assert image.read() == paths[name].read_bytes()
        assert load_image(image).tobytes() == load_image(paths[name]).tobytes()
    for split, (triplets, gallery) in splits.items():
        assert found[split][0] == triplets and found[split][1].ids == gallery.ids
    assert len(list(written.glob("*.tar"))) > 2
    assert content_fingerprints(list(images.values())) == content_fingerprints(list(paths.values()))
    assert check_images(list(images.values())) == []
    assert reader.verify(written, progress=False) == len(paths)
    assert pickle.loads(pickle.dumps(images[next(iter(images))])) == next(iter(images.values()))


def test_every_field_of_a_triplet_survives(tmp_path, data):
    paths = dict(list(data[0].items())[:3])
    a, b, c = paths
    full = Triplet("1", a, "é 😀", (b, c), "x", (a, b, c), ((b, 0.5), (c, -1.0)), ("one", "two"))
    gallery = Gallery(tuple(paths), tuple(paths.values()))
    writer.write_shards(tmp_path / "out", "x", paths, {"val": ([full], gallery)}, progress=False)
    assert reader.read_shards(tmp_path / "out")[1]["val"][0] == [full]


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


def test_no_more_descriptors_than_the_cache_holds(data, tmp_path):
    """A shard an image: each is opened, old ones are closed again. Processes may open about 1,000 files."""
    path = next(iter(data[0].values()))
    paths = {f"n{number}": path for number in range(300)}
    gallery = Gallery(tuple(paths), tuple(paths.values()))
    writer.write_shards(tmp_path / "out", "x", paths, {"val": ([], gallery)}, max_bytes=1, progress=False)
    images, *_ = reader.read_shards(tmp_path / "out")
    assert len({image.shard for image in images.values()}) == 300
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert check_images(list(images.values())) == []
    assert {image.read() for image in images.values()} == {path.read_bytes()}
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 128


def test_a_folder_written_anew_is_read_anew(data, tmp_path):
    out = write(data, tmp_path / "out").parent
    images, *_ = reader.read_shards(out)
    assert all(image.read() for image in images.values())
    shutil.rmtree(out)
    turned = (dict(reversed(data[0].items())), data[1])
    write(turned, out)
    images, *_ = reader.read_shards(out)
    assert all(image.read() == data[0][name].read_bytes() for name, image in images.items())


def test_writing_continues_where_it_was_stopped(data, tmp_path, monkeypatch):
    done = []
    original = writer._write_shard

    def stop_after_two(path, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        return original(path, *arguments)

    out = tmp_path / "out"
    monkeypatch.setattr(writer, "_write_shard", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        write(data, out, workers=1)
    with pytest.raises(DataError, match="its writing was interrupted"):
        reader.read_shards(out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(kept) == 2
    monkeypatch.undo()
    write(data, out)
    assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert reader.verify(out, progress=False) == len(data[0])
    assert not list(out.glob("shard-*.json")) and not (out / "writing.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    write(data, out)  # a second time: nothing is written again
    assert times == {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    with pytest.raises(DataError, match="holds shards of other images, splits or settings"):
        write(data, out, max_bytes=30_000)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from neucore_plugin.datasets import folder
from neucore_plugin.datasets.shards import reader, writer
root, out = map(Path, sys.argv[1:])
paths = folder.images(root)
original, count = Path.read_bytes, 0

def read_bytes(path):
    global count
    count += path.suffix == ".png"
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path)

Path.read_bytes = read_bytes
splits = {split: folder.load_split(root, split, paths) for split in ("train", "val")}
writer.write_shards(out, "folder", paths, splits, max_bytes=12_000, workers=1, progress=False)
"""


def test_a_killed_process_leaves_nothing_half_done(data, tmp_path):
    paths, _ = data
    out = tmp_path / "out"
    root = next(folder for folder in next(iter(paths.values())).parents if (folder / "train.json").is_file())
    done = subprocess.run([sys.executable, "-c", KILLED, str(root), str(out)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert kept and list(out.glob(".shard-*.tmp"))  # the shard that was being written
    write(data, out)
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}
    fresh = write(data, tmp_path / "fresh").parent
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in fresh.iterdir()
    }


def touched_copy(data, root: Path) -> tuple[dict, dict]:
    """The data set with image files of its own, so that a test may change one."""
    paths, splits = data
    root.mkdir()
    copies = {name: root / f"{number}.png" for number, name in enumerate(paths)}
    for name, copy in copies.items():
        copy.write_bytes(paths[name].read_bytes())
    return copies, {
        split: (triplets, Gallery(gallery.ids, tuple(copies[name] for name in gallery.ids)))
        for split, (triplets, gallery) in splits.items()
    }


def alter(path: Path) -> None:
    """Other bytes of the same number, and an old time: only the bytes tell."""
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    os.utime(path, (1, 1))


def test_an_image_that_changed_since_is_noticed(data, tmp_path, monkeypatch):
    mine = touched_copy(data, tmp_path / "images")
    first = next(iter(mine[0].values()))
    out = write(mine, tmp_path / "out").parent
    os.utime(first)  # touched, but the same
    write(mine, out)
    alter(first)
    with pytest.raises(DataError, match=r"0\.png has changed since; give another --out"):
        write(mine, out)
    original = writer.write_json

    def stop_before_the_index(path, *arguments, **options):
        if path.name == reader.INDEX:
            raise KeyboardInterrupt
        original(path, *arguments, **options)

    monkeypatch.setattr(writer, "write_json", stop_before_the_index)
    with pytest.raises(KeyboardInterrupt):
        write(mine, tmp_path / "second")
    monkeypatch.undo()
    alter(first)
    write(mine, tmp_path / "second")  # an interrupted call takes over what is as it was, no more
    images, *_ = reader.read_shards(tmp_path / "second")
    assert all(image.read() == mine[0][name].read_bytes() for name, image in images.items())


def test_a_folder_that_cannot_be_locked(data, tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    out = tmp_path / "out"
    out.mkdir()
    other = out / ".shard-00000.tar.1a2b3c4d.tmp"  # of another process, perhaps
    other.touch()
    write(data, out)
    assert f"let no other process write shards into {out}" in caplog.text
    assert other.exists()
    monkeypatch.undo()
    write(data, out)
    assert not other.exists()


def test_what_cannot_be_written_is_told(data, tmp_path, monkeypatch):
    paths, splits = data
    out, first = tmp_path / "out", next(iter(paths))
    with writer._alone(tmp_path), pytest.raises(DataError, match="another process writes shards here"):
        write(data, tmp_path)
    with pytest.raises(DataError, match="there are no images"):
        writer.write_shards(out, "x", {}, {"val": ([], Gallery((), ()))})
    with pytest.raises(DataError, match="splits \\['../x'\\]: names of letters"):
        writer.write_shards(out, "x", paths, {"../x": splits["val"]})
    with pytest.raises(DataError, match="splits \\[\\]: names of letters"):
        writer.write_shards(out, "x", paths, {})
    with pytest.raises(DataError, match="'val' names 1 images that are not given, such as"):
        writer.write_shards(out, "x", {k: v for k, v in paths.items() if k != first}, {"val": ([], splits["val"][1])})
    with pytest.raises(DataError, match="1 images have no file"):
        writer.write_shards(out, "x", {**paths, "\ud83d": Path("\ud83d")}, splits)
    with pytest.raises(DataError, match="max_bytes 0, workers 2: give at least 1"):
        write(data, out, max_bytes=0)
    for no_file in (tmp_path, Path("gone.png")):
        with pytest.raises(DataError, match=f"1 images have no file, such as {no_file}"):
            writer.write_shards(out, "x", {**paths, "gone": no_file}, splits)
    assert not out.exists()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"No space left on device; free space there.*\. What is finished is kept"):
        write(data, out)
    assert not list(out.glob("*.tar"))


def test_a_folder_of_other_things_is_left_alone(data, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="is not empty and holds no shards of ours"):
        write(data, tmp_path)


def test_what_was_left_out_is_remembered(data, tmp_path, caplog):
    paths, splits = data
    left_out = {"val": {"missing_images": 3, "skipped_queries": 5, "files": ["a.png"]}}
    writer.write_shards(tmp_path / "out", "x", paths, splits, progress=False, left_out=left_out)
    *_, found = reader.read_shards(tmp_path / "out")
    assert "when val was written: 3 images have no file; 5 queries are left out" in caplog.text
    listing = str(tmp_path / "out" / "triplets-val.json")
    expected = {"val": {"missing_images": 3, "skipped_queries": 5, "listed_in": listing}}
    assert found == expected
    assert json.loads(Path(listing).read_text())["left_out"] == left_out["val"]


def test_two_processes_see_each_query_once_in_the_order_of_the_folder(written, data):
    """Map-style: sampler, workers and seed decide the order, not where the images lie."""

    def seen(sources, splits, rank: int) -> list:
        pixels = torchvision.transforms.functional.pil_to_tensor
        triplets, gallery = splits["train"]
        dataset = TripletDataset("folder", "train", triplets, gallery, ImageStore(sources, pixels), train=True)
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, seed=3, drop_last=True)
        sampler.set_epoch(1)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=2, collate_fn=dataset.collater)
        return [
            (query, image.tobytes())
            for batch in loader
            for query, image in zip(batch["query_id"], batch["target_image"].numpy(), strict=True)
        ]

    parts = [seen(*reader.read_shards(written)[:2], rank) for rank in (0, 1)]
    assert parts == [seen(*data, rank) for rank in (0, 1)]
    queries = [query for part in parts for query, _ in part]
    total = len(data[1]["train"][0])
    assert len(set(queries)) == len(queries) == total - total % 2


def test_the_command_writes_references_outside_the_gallery(shapes_root, tmp_path, capsys):
    """A split that ranks a few images only still needs the pictures that its queries start from."""
    root = tmp_path / "root"
    shutil.copytree(shapes_root, root)
    entries = json.loads((root / "val.json").read_text())
    right = sorted({entry["target"] for entry in entries})
    (root / "gallery.val.json").write_text(json.dumps(right[:3]))
    entries = [entry for entry in entries if entry["target"] in right[:3]]
    (root / "val.json").write_text(json.dumps(entries))
    assert {entry["reference"] for entry in entries} - set(right[:3])
    out = tmp_path / "out"
    assert cli.main(["shards", "folder", "--root", str(root), "--out", str(out), "--splits", "val"]) == 0
    images, found, _ = reader.read_shards(out)
    assert set(images) == set(right[:3]) | {entry["reference"] for entry in entries}
    assert found["val"][1].ids == tuple(right[:3])


def test_the_command_writes_what_training_reads(tmp_path, shapes_root, capsys, tiny_config):
    from neucore_plugin import launch

    out = tmp_path / "tars"
    assert cli.main(["shards", "folder", "--root", str(shapes_root), "--out", str(out), "--max-mb", "1"]) == 0
    assert "24 images, " in capsys.readouterr().out
    found = {}
    for kind, root in (("images", shapes_root), ("shards", out)):

        def change(config, kind=kind, root=root):
            info = {"root": str(root), "max_train": 24, "max_eval": 6}
            config["datasets"]["folder"].update(data_type=kind, build_info=info)
            config["run"].update(output_dir=str(tmp_path / kind), max_epoch=1, num_workers=1, report=False)
            config["run"].update(cache_features=False, test_splits=["val"])

        launch.run(tiny_config(change, f"{kind}.yaml"))
        (log,) = (tmp_path / kind).rglob("log.txt")
        losses = [float(json.loads(line).get("train_loss", 0)) for line in log.read_text().splitlines()]
        found[kind] = (json.loads((tmp_path / kind / "results.json").read_text()), losses)
    assert found["images"] == found["shards"] and max(found["images"][1]) > 0


def test_the_benchmark_reads_every_image_in_each_form(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    place = ROOT / "benchmarks" / "data.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_data", place)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.BATCH = 4
    paths = benchmark.generate(tmp_path / "images", 40)
    benchmark.write_forms(tmp_path, paths, 90_000)
    for form in benchmark.FORMS:
        loader = benchmark.open_form(form, tmp_path)
        _, _, found = benchmark.seconds(loader, 1)
        assert found == 40 and len(loader) == 10, form
        shape = next(iter(loader))["target_tokens" if form == "cached" else "target_image"].shape
        assert shape == ((4, 49, 320) if form == "cached" else (4, 3, 224, 224))
