"""Order, shards and seeds of the batches."""

import logging

import pytest
import runner_case as case
import torch

from neucore_plugin.common import randomness
from neucore_plugin.common.errors import DataError
from neucore_plugin.training.loaders import BatchLoader


def test_loader_orders_and_shards():
    data = case.Points(23)
    whole = BatchLoader(data, 4, shuffle=True, seed=1)
    parts = [BatchLoader(data, 2, shuffle=True, seed=1, rank=rank, world=2) for rank in range(2)]
    for epoch in (0, 1, 5):
        for loader in (whole, *parts):
            loader.set_position(epoch)
        together = [sorted(a["index"] + b["index"]) for a, b in zip(*parts, strict=True)]
        assert together == [sorted(batch["index"]) for batch in whole]  # as one process with the whole batch
        assert len(together) == len(whole) == 5
    whole.set_position(5, start=3)
    assert [batch["index"] for batch in whole] == [batch["index"] for batch in all_batches(whole, 5)][3:]
    for world in (1, 2, 3, 5):
        shards = [
            [i for batch in BatchLoader(data, 4, rank=r, world=world) for i in batch["index"]] for r in range(world)
        ]
        assert [shard == list(range(r, 23, world)) for r, shard in enumerate(shards)] == [True] * world
    assert list(BatchLoader(case.Points(1), 4, rank=1, world=2)) == []


def all_batches(loader, epoch):
    loader.set_position(epoch)
    return list(loader)


def test_making_samples_does_not_disturb_the_generators():
    randomness.seed_everything(1)
    before = randomness.random_state()
    loader = BatchLoader(case.Points(9), 2, shuffle=True, seed=1)
    loader.set_position(2)
    first = [batch["x"] for batch in loader]
    after = randomness.random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, [batch["x"] for batch in loader], strict=True))
    loader.set_position(3)
    assert not torch.equal(first[0], next(iter(loader))["x"])


def test_small_training_split(caplog):
    with caplog.at_level(logging.WARNING):
        loader = BatchLoader(case.Points(3), 8, shuffle=True, name="train split")
    assert "train split has 3 samples: batches hold 3, not 8" in caplog.text
    assert [len(batch["index"]) for batch in loader] == [3]
    with pytest.raises(DataError, match="train split has 3 samples for 4 processes"):
        BatchLoader(case.Points(3), 8, shuffle=True, name="train split", world=4)


class Broken(case.Points):
    def __getitem__(self, index):
        raise DataError("picture 17 is broken")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_arrive_without_a_traceback_in_the_text(workers):
    with pytest.raises(DataError) as error:
        list(BatchLoader(Broken(4), 2, num_workers=workers))
    assert str(error.value) == "picture 17 is broken"


def test_several_training_sets_are_joined(tmp_path):
    datasets = {**case.make_datasets(), "more": {"train": case.Points(10, 7)}}
    task = case.TinyTask()
    runner = case.make_runner(tmp_path, task=task, datasets=datasets, max_epoch=1)
    runner.train()
    assert len(task.train_indices) == 8
    assert runner.config.run_cfg.max_epoch == 1
    assert datasets["more"]["train"].epoch == 0
    again = case.make_runner(tmp_path, datasets=datasets, max_epoch=2, resume="never")
    again.train()
    assert datasets["more"]["train"].epoch == datasets["points"]["train"].epoch == 1
