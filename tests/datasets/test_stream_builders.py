"""data_type: stream through the builders: the queries are those of the folder, whatever the protocol makes of them."""

import json
import shutil

import published_case
import pytest
import stream_case
import torch

from neucore_plugin import cli
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.training.loaders import StreamLoader


def queries(dataset, batches) -> dict:
    """{query id: all of a sample but numbers} of batches."""
    found = {}
    for batch in batches:
        for row, name in enumerate(batch["query_id"]):
            keys = batch.keys() - stream_case.NUMBERED - {"index", "query_id", "noise"}
            found[name] = {key: batch[key][row] for key in keys}
            found[name]["right"] = len(batch["right_keys"][row])
            assert dataset.triplets[int(batch["index"][row])].query_id == name
    return found


def assert_same(streamed, by_place) -> None:
    assert len(streamed) == len(by_place) and streamed.texts == by_place.texts
    assert [t.query_id for t in streamed.triplets] == [t.query_id for t in by_place.triplets]
    assert streamed.notices == by_place.notices
    one = queries(streamed, StreamLoader(streamed, 1))
    other = queries(by_place, [by_place.collater([by_place[index]]) for index in range(len(by_place))])
    assert one.keys() == other.keys()
    for name, sample in one.items():
        for key, value in sample.items():
            same = (
                torch.equal(value, other[name][key]) if isinstance(value, torch.Tensor) else value == other[name][key]
            )
            assert same, (name, key)


@pytest.mark.parametrize("protocol", ["neucore", "val"])
def test_fashioniq_asks_both_orders_of_a_pair_of_one_sample(tmp_path, protocol):
    root = published_case.write_fashioniq(tmp_path / "root")
    out = tmp_path / "out"
    assert cli.main(["shards", "fashioniq", "--triplets", "--root", str(root), "--out", str(out)]) == 0
    wanted = ["train", "val_dress"]
    by_place, streamed = (
        published_case.build("fashioniq", place, wanted, kind, protocol=[protocol])
        for place, kind in ((root, "images"), (out, "stream"))
    )
    assert streamed.keys() == by_place.keys()
    assert_same(streamed["train"], by_place["train"])
    assert streamed["val_dress"].fingerprint == by_place["val_dress"].fingerprint
    assert len(streamed["train"]) == 24 * (2 if protocol == "neucore" else 1)
    some = published_case.build("fashioniq", out, ["train"], "stream", protocol=[protocol], max_train=5)["train"]
    fewer = published_case.build("fashioniq", root, ["train"], protocol=[protocol], max_train=5)["train"]
    assert_same(some, fewer)
    half = published_case.build("fashioniq", f"{out}/train-{{00000..00003}}.tar", ["train"], "stream")["train"]
    assert 0 < len(half) < len(by_place["train"]) * 2
    assert len(queries(half, StreamLoader(half, 1))) == len(half)


def test_a_pair_of_an_image_with_itself_is_left_out_and_several_answers_stay_right(tmp_path, shapes_root):
    root = shutil.copytree(shapes_root, tmp_path / "root")
    entries = json.loads((root / "train.json").read_text())
    entries[3]["target"] = entries[3]["reference"]
    entries[4]["target"] = [entries[4]["target"], entries[5]["target"]]
    (root / "train.json").write_text(json.dumps(entries))
    out = tmp_path / "out"
    assert cli.main(["shards", "folder", "--triplets", "--root", str(root), "--out", str(out)]) == 0
    by_place, streamed = (
        published_case.build("folder", place, ["train"], kind)["train"]
        for place, kind in ((root, "images"), (out, "stream"))
    )
    assert "1 of 149 pairs have their reference as target" in streamed.notices[0]
    assert_same(streamed, by_place)


def test_a_stream_needs_a_root_and_only_data_sets_that_have_one_know_it():
    with pytest.raises(ConfigError, match=r"root is null; with data_type: stream .* `neucore shards --triplets` wrote"):
        published_case.build("cirr", None, ["train"], "stream")
