"""Two gloo processes: they agree with each other and with one process that has the whole batch."""

from pathlib import Path

import numpy as np
import pytest
import runner_case as case
import torch

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.weights import checkpoint

# Two processes with batches of 2 see what one process sees with batches of 4. No dropout: its masks are per process.
PLAIN = {"max_epoch": 2, "dropout": 0.0}


@pytest.mark.parametrize("more", [{"accum_grad_iters": 1}, {"accum_grad_iters": 2}, {"grad_cache_chunk": 1}])
def test_two_processes_equal_one(tmp_path, more):
    run = {**PLAIN, **more}
    seen = case.in_group(tmp_path, case.train_in_group, tmp_path / "two", {**run, "batch_size_train": 2})
    assert seen[0]["metrics"] == seen[1]["metrics"]
    assert seen[0]["folder"] == seen[1]["folder"]
    assert [seen[rank]["finished"] for rank in (0, 1)] == [1, 0]  # one process writes the results
    assert len(list((tmp_path / "two").iterdir())) == 1
    task = case.TinyTask()
    runner = case.make_runner(
        tmp_path / "one",
        task=task,
        model=case.TinyModel(dropout=0.0),
        **{k: v for k, v in run.items() if k != "dropout"},
    )
    metrics = runner.train()
    batches = zip(seen[0]["indices"], seen[1]["indices"], strict=True)
    assert [sorted(a + b) for a, b in batches] == [sorted(batch) for batch in task.train_indices]
    assert seen[0]["seen"] == seen[1]["seen"] == task.seen == {"dev": list(range(7)), "test": list(range(8))}
    for name, value in runner.bare_model.state_dict().items():
        assert np.array_equal(seen[0]["state"][name], seen[1]["state"][name])
        torch.testing.assert_close(torch.from_numpy(seen[0]["state"][name]), value, rtol=1e-4, atol=1e-6)
    assert metrics["test"]["agg_metrics"] == pytest.approx(seen[0]["metrics"]["test"]["agg_metrics"], rel=1e-4)
    logs = [(Path(folder) / "log.txt").read_text().count("\n") for folder in (seen[0]["folder"], runner.output_dir)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("ema_decay", [None, 0.8])
def test_a_killed_group_resumes_exactly(tmp_path, ema_decay):
    run = {**case.ITERS, "batch_size_train": 2, "ema_decay": ema_decay}
    whole = case.in_group(tmp_path, case.train_in_group, tmp_path / "whole", run)
    case.in_group(tmp_path, case.train_in_group, tmp_path / "killed", run, 7, killed=True)
    resumed = case.in_group(tmp_path, case.train_in_group, tmp_path / "killed", run)
    for rank in (0, 1):
        for name, value in whole[rank]["state"].items():
            assert np.array_equal(resumed[rank]["state"][name], value), name
        assert resumed[rank]["metrics"] == whole[rank]["metrics"]
        assert len(resumed[rank]["indices"]) == 13 - 6  # from the checkpoint within the round
    one, other = (case.final_state(found[0]["folder"]) for found in (whole, resumed))
    assert one == other
    stored = checkpoint.load(Path(whole[0]["folder"]) / "checkpoint_last.pth")
    assert len(stored["rng"]) == 2
    alone = case.make_runner(tmp_path, **{**run, "resume": whole[0]["folder"]})
    alone.folder.write(status="running")  # as if it had not come to its end
    with pytest.raises(ConfigError, match="processes was 2, is 1"):
        alone.train()


def test_a_failure_of_the_main_process_reaches_all(tmp_path):
    (tmp_path / "out").touch()  # a file where the run folder should go
    seen = case.in_group(tmp_path, case.train_in_group, tmp_path / "out", PLAIN)
    assert all(isinstance(error, ConfigError) and "run.output_dir: " in str(error) for error in seen)
