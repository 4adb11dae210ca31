"""Whole samples as a stream: what goes in comes out, once, in an order that (seed, epoch, readers) decides."""

import itertools
import json
import os
import shutil

import pytest
import stream_case as case
import torch

from neucore_plugin import cli
from neucore_plugin.common import randomness
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.datasets.shards import reader, stream, writer
from neucore_plugin.training.loaders import BatchLoader, StreamLoader

# ---- writing -------------------------------------------------------------------------------------------------------


def test_an_ordinary_webdataset_reader_finds_the_samples(whole, data):
    import webdataset

    paths, splits = data
    pattern = f"{whole}/train-{{00000..00015}}.tar"
    found = list(webdataset.DataPipeline(webdataset.SimpleShardList(pattern), webdataset.tarfile_to_samples()))
    triplets, _ = splits["train"]
    assert sorted(int(sample["__key__"]) for sample in found) == list(range(len(triplets)))
    for sample in found:
        triplet = triplets[int(sample["__key__"])]
        assert reader.triplet_of(json.loads(sample["json"])) == triplet
        assert sample["reference.png"] == paths[triplet.reference].read_bytes()
        assert sample["target.png"] == paths[triplet.targets[0]].read_bytes()


def test_what_is_evaluated_on_lies_beside_by_place(whole, data):
    paths, splits = data
    found = stream.open_stream(str(whole), "folder")
    assert found.evaluated["val"][0] == splits["val"][0] and found.evaluated["val"][1].ids == splits["val"][1].ids
    assert {name: image.read() for name, image in found.images.items()} == {n: p.read_bytes() for n, p in paths.items()}
    assert found.train["train"][0] == splits["train"][0]
    assert stream.open_stream(str(whole), wanted=["train"]).evaluated == {}
    assert stream.verify(whole, progress=False) == len(splits["train"][0])


def test_writing_continues_and_mends(data, whole, samples, monkeypatch):
    """A killed call leaves whole shards and no manifest; the same call gives the same bytes, also after damage."""
    before = {path: path.read_bytes() for path in samples.rglob("*") if path.is_file()}
    out, done, original = samples.parent / "again", [], writer._write_shard

    def stop_after_three(path, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path)
        return original(path, *arguments)

    monkeypatch.setattr(writer, "_write_shard", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        case.write(data, out, workers=1)
    monkeypatch.undo()
    with pytest.raises(DataError, match="its writing was interrupted"):
        stream.open_stream(str(out))
    kept = done[0].stat().st_ino
    case.write(data, out)
    assert done[0].stat().st_ino == kept
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == {
        path.relative_to(samples): content for path, content in before.items()
    }
    os.truncate(samples / "train-00004.tar", 700)
    with pytest.raises(DataError, match=r"train-00004.tar has 700 bytes"):
        stream.verify(samples, progress=False)
    case.write(data, samples)
    assert {path: path.read_bytes() for path in before} == before


def test_the_command_writes_and_verifies(shapes_root, tmp_path, capsys):
    command = ["shards", "folder", "--triplets", "--root", str(shapes_root), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert "data_type=stream" in capsys.readouterr().out
    assert cli.main(["shards", "--verify", "--out", str(tmp_path / "out")]) == 0
    assert "149 samples, all as they were written" in capsys.readouterr().out
    assert set(stream.open_stream(str(tmp_path / "out")).evaluated) == {"val", "test"}
    path = tmp_path / "out" / "eval" / "shard-00000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cli.main(["shards", "--verify", "--out", str(tmp_path / "out")]) == 2
    assert "eval/shard-00000.tar: its content has changed" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path / "val"), "--splits", "val"]) == 2
    assert "none begins with train" in capsys.readouterr().err
    assert not (tmp_path / "val").exists()


# ---- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "workers"), [*itertools.product((1, 2, 3), (0, 2)), (5, 0), (16, 0)])
def test_no_sample_comes_twice_and_all_processes_get_as_many_batches(whole, world, workers):
    """Also where the 16 shards are not a multiple of the processes, or of all the workers."""
    dataset = case.streamed(whole)
    loaders = [StreamLoader(dataset, 4, seed=3, num_workers=workers, rank=r, world=world) for r in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    orders = []
    for epoch in (0, 1):
        parts = []
        for loader in loaders:
            loader.set_position(epoch)
            parts.append(case.indices(loader))
            assert [len(batch) for batch in parts[-1]] == [4] * len(loader)
        flat = [index for part in parts for batch in part for index in batch]
        assert len(set(flat)) == len(flat)
        assert len(flat) >= len(dataset) - 4 * world * max(1, workers) - 10 * (-16 % (world * max(1, workers)))
        orders.append(flat)
    assert orders[0] != orders[1] != sorted(orders[1])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_order_is_that_of_seed_and_epoch_from_any_batch_on(whole, workers):
    first, again = (StreamLoader(case.streamed(whole), 6, seed=3, num_workers=workers) for _ in range(2))
    first.set_position(4)
    batches = list(first)
    for start in (0, 1, 5, len(first) - 1):
        again.set_position(4, start)
        rest = list(again)
        assert case.indices(rest) == case.indices(batches[start:])
        for one, other in zip(rest, batches[start:], strict=True):
            assert torch.equal(one["target_image"], other["target_image"])  # the noise is that of (seed, epoch, index)
    other = StreamLoader(case.streamed(whole), 6, seed=4, num_workers=workers)
    other.set_position(4)
    assert case.indices(other) != case.indices(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_done_before_a_stop_is_not_decoded(whole, workers, monkeypatch):
    dataset = case.streamed(whole)
    decode, path = type(dataset).decode, whole.parent / f"decoded-{workers}"

    def noted(self, index, sample):
        with path.open("a") as file:
            file.write(f"{index}\n")
        return decode(self, index, sample)

    monkeypatch.setattr(type(dataset), "decode", noted)
    loader = StreamLoader(dataset, 6, num_workers=workers)
    loader.set_position(1, start=15)
    seen = [index for batch in case.indices(loader) for index in batch]
    decoded = [int(line) for line in path.read_text().split()]
    assert len(seen) == 6 * (len(loader) - 15) and set(seen) <= set(decoded)
    assert len(decoded) <= len(seen) + 6 * 2 * max(1, workers)  # workers are a little ahead of the end


def test_a_sample_is_that_of_the_folder(whole, data):
    """Same noise too, as it follows from (seed, epoch, index); the generators of the training are left alone."""
    folder = BatchLoader(case.in_folder(data), 149, shuffle=True, seed=3)
    folder.set_position(2)
    (by_place,) = folder
    randomness.seed_everything(1)
    before = torch.get_rng_state()
    loader = StreamLoader(case.streamed(whole), 149, seed=3)
    loader.set_position(2)
    (found,) = loader
    assert torch.equal(torch.get_rng_state(), before)
    assert found.keys() == by_place.keys()
    place = {index: row for row, index in enumerate(by_place["index"].tolist())}
    for row, index in enumerate(found["index"].tolist()):
        for key in found.keys() - case.NUMBERED:
            one, other = found[key][row], by_place[key][place[index]]
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, key
    # Numbers of images differ; which are equal does not.
    keys = [torch.cat([batch["reference_key"], batch["target_key"]]) for batch in (found, by_place)]
    order = torch.tensor([place[index] for index in found["index"].tolist()])
    keys[1] = torch.cat([by_place["reference_key"][order], by_place["target_key"][order]])
    assert torch.equal(keys[0][:, None] == keys[0], keys[1][:, None] == keys[1])


def test_shards_are_read_by_pattern_list_and_folder(whole, tmp_path, monkeypatch):
    def held(root) -> list[int]:
        return sorted(number for file in stream.open_stream(str(root)).train["train"][1] for number in file.numbers)

    everything = held(whole)
    assert everything == list(range(149)) == held(f"{whole}/train-{{00000..00015}}.tar")
    low, high = f"{whole}/train-{{00000..00007}}.tar", f"{whole}/train-000{{08,09,10,11,12,13,14,15}}.tar"
    assert sorted(held(low) + held(high)) == everything == held(f"{low}::{high}")
    assert len(held(f"{whole}/train-00003.tar")) in (9, 10)
    strange = tmp_path / "a{1,2}::b $WDS_X"  # a folder whose name webdataset would expand
    shutil.copytree(whole, strange)
    assert held(strange) == everything
    assert len(StreamLoader(case.streamed(strange), 149)) == 1
    monkeypatch.chdir(whole.parent)
    assert held("out") == held("out/train-{00000..00015}.tar") == everything


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("{}/nowhere", "no such folder"),
        ("{}/train-{{00000..00003.tar", "a brace has no partner"),
        ("{}/train-{{00000..99999999}}.tar", "at most seven digits"),
        ("{}/train-00000.tar::/elsewhere/train-00001.tar", "names shards of 2 folders"),
        ("{}/train-00077.tar", "train-00077.tar is no shard of the splits that are read"),
        ("{}/../out/eval/shard-00000.tar", "these shards are read by place: data_type: shards"),
    ],
)
def test_a_root_that_cannot_be_read_is_told(whole, root, message):
    with pytest.raises((ConfigError, DataError), match=message):
        stream.open_stream(root.format(whole))
    with pytest.raises(DataError, match="hold whole samples: data_type: stream"):
        reader.read_shards(whole)


def test_too_few_shards_for_the_readers_are_told_before_training(whole):
    dataset = case.streamed(f"{whole}/train-{{00000..00002}}.tar")
    assert len(dataset) == 149 and len(dataset.sizes) == 3  # the texts of all queries; 28 of them in these shards
    with pytest.raises(DataError, match="in 3 shards, too few for 4 processes with 1 readers each and batches of 2"):
        StreamLoader(dataset, 2, world=4)
    with pytest.raises(DataError, match=r"too few .* write smaller shards \(--max-mb\)"):
        StreamLoader(dataset, 11, num_workers=3)
    assert len(StreamLoader(dataset, 9, num_workers=3)) == 3
    with pytest.raises(DataError, match="is a stream, which is read in its order"):
        dataset[0]
