"""Kill and resume: SIGKILLs of child processes at chosen batches and writes; then folders and evaluation only."""

import errno
import logging
import os
import signal
from functools import cache

import pytest
import runner_case as case

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.training.checkpointer import Checkpointer

KINDS = {
    **case.KINDS,
    "averaged": {**case.ITERS, "ema_decay": 0.8},
    "cached": {**case.ITERS, "grad_cache_chunk": 3},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """kind -> final state and metrics of a training that was never stopped."""

    @cache
    def train(kind: str) -> tuple[dict, dict]:
        runner = case.make_runner(tmp_path_factory.mktemp(f"whole-{kind}"), **KINDS[kind])
        metrics = runner.train()
        state = case.final_state(runner.output_dir)
        assert (state["average"] is None) == (kind != "averaged")
        return state, metrics

    return train


def assert_same_end(folder, metrics, expected) -> None:
    assert case.final_state(folder) == expected[0]
    assert metrics == expected[1]


# Order of the renames, epochs: 0 config.yaml, 1 run.json, best and last of each epoch (2 to 7), 8 test_metrics.json,
# 9 results.json, 10 test_metrics.json, 11 run.json. iters: 2 last within the round, 3 best, 4 last, 5 last within, ...
KILLS = [
    ("epochs", {"batch": 3}),  # before any checkpoint
    ("epochs", {"batch": 8}),
    ("epochs", {"rename": 1}),  # the folder has no record yet
    ("epochs", {"rename": 4}),  # while the best is written
    ("epochs", {"rename": 4, "after": True}),  # between best and last
    ("epochs", {"rename": 5}),
    ("epochs", {"rename": 7, "after": True}),  # trained, not tested
    ("epochs", {"rename": 9, "after": True}),  # tested, not marked as finished
    ("iters", {"batch": 3}),
    ("iters", {"batch": 7}),  # in the middle of a round and of an epoch of the data
    ("iters", {"batch": 12}),
    ("iters", {"rename": 2}),
    ("iters", {"rename": 3, "after": True}),
    ("iters", {"rename": 8, "after": True}),
    ("averaged", {"batch": 7}),
    ("averaged", {"rename": 3, "after": True}),
    ("averaged", {"rename": 8, "after": True}),
    ("cached", {"batch": 7}),
]


def check_kill(expected: tuple[dict, dict], root, kind: str, where: dict, workers: int = 0) -> None:
    run = {**KINDS[kind], "num_workers": workers}
    assert case.run_child(case.train_and_die, root, run, **where) == -signal.SIGKILL
    runner = case.make_runner(root, **run)
    assert_same_end(runner.output_dir, runner.train(), expected)
    assert not list(runner.output_dir.glob(".*.tmp"))
    assert len(list(root.iterdir())) == (2 if where == {"rename": 1} else 1)


@pytest.mark.parametrize(
    ("kind", "where"), KILLS, ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value
)
def test_killed_and_resumed_equals_never_stopped(uninterrupted, tmp_path, kind, where):
    check_kill(uninterrupted(kind), tmp_path, kind, where)


@pytest.mark.parametrize("kind", case.KINDS)
def test_killed_and_resumed_with_workers(uninterrupted, tmp_path, kind):
    check_kill(uninterrupted(kind), tmp_path, kind, {"batch": 7}, workers=2)


def test_killed_twice(uninterrupted, tmp_path):
    for where in ({"batch": 5}, {"batch": 2}, {"rename": 3, "after": True}):
        assert case.run_child(case.train_and_die, tmp_path, case.ITERS, **where) == -signal.SIGKILL
    runner = case.make_runner(tmp_path, **case.ITERS)
    assert_same_end(runner.output_dir, runner.train(), uninterrupted("iters"))


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", case.KINDS)
def test_killed_at_every_single_write(uninterrupted, tmp_path_factory, kind, after):
    expected, number = uninterrupted(kind), 2
    while True:
        root = tmp_path_factory.mktemp("killed")
        code = case.run_child(case.train_and_die, root, case.KINDS[kind], rename=number, after=after)
        if code == 0:
            break
        runner = case.make_runner(root, **case.KINDS[kind])
        assert_same_end(runner.output_dir, runner.train(), expected)
        number += 1
    assert number > 10


def test_every_checkpoint_in_a_round_continues_exactly(tmp_path_factory, tmp_path, monkeypatch):
    """Each state that is ever written, taken up by hand: no off-by-one anywhere."""
    run = {**case.ITERS, "checkpoint_every_iters": 1, "accum_grad_iters": 1}
    runner, states, save = case.make_runner(tmp_path, **run), [], Checkpointer._save

    def keep(*args, **kwargs):
        save(*args, **kwargs)
        states.append({path.name: path.read_bytes() for path in runner.output_dir.iterdir() if path.is_file()})

    monkeypatch.setattr(Checkpointer, "_save", keep)
    metrics = runner.train()
    expected = (case.final_state(runner.output_dir), metrics)
    assert len(states) == 13 + 4  # every iteration, and the best of each round
    for state in states[::3]:
        root = tmp_path_factory.mktemp("copy")
        (root / "job").mkdir()
        for name, content in state.items():
            (root / "job" / name).write_bytes(content)
        again = case.make_runner(root, **run)
        assert_same_end(again.output_dir, again.train(), expected)


def test_resume_by_path_and_its_errors(tmp_path):
    case.run_child(case.train_and_die, tmp_path, case.EPOCHS, batch=8)
    folder = tmp_path / "job"
    last = folder / "checkpoint_last.pth"
    with pytest.raises(ConfigError, match=r"another config(.|\n)*run\.init_lr: 0\.02 -> 0\.5") as error:
        case.make_runner(tmp_path, resume=str(folder), init_lr=0.5, log_freq=7, num_workers=1)
    assert "log_freq" not in str(error.value)
    assert "num_workers" not in str(error.value)
    with pytest.raises(ConfigError, match="is no training run"):
        case.make_runner(tmp_path, resume=str(tmp_path / "nothing"))
    (folder / "checkpoint_best.pth").touch()
    with pytest.raises(ConfigError, match=r"no checkpoint_last\.pth.*model\.checkpoint"):
        case.make_runner(tmp_path, resume=str(folder / "checkpoint_best.pth"))
    (folder / "checkpoint_best.pth").unlink()
    fewer = case.make_datasets(train=21)
    with pytest.raises(ConfigError, match="training samples was 22, is 21"):
        case.make_runner(tmp_path, resume=str(last), datasets=fewer).train()
    changed = case.TinyModel()
    changed.encoder.linear.weight.data[0] += 1
    with pytest.raises(CheckpointError, match=r"frozen weights that are not those of the training: encoder\.linear"):
        case.make_runner(tmp_path, resume=str(last), model=changed).train()
    case.make_runner(tmp_path, resume=str(last), log_freq=7).train()  # harmless keys may differ
    assert [entry.name for entry in tmp_path.iterdir()] == ["job"]


def test_a_finished_run_is_not_trained_again(tmp_path, caplog):
    first = case.make_runner(tmp_path)
    metrics = first.train()
    task = case.TinyTask()
    with caplog.at_level(logging.INFO):
        assert case.make_runner(tmp_path, task=task).train() == metrics
    assert (task.train_indices, task.seen, task.prepared) == ([], {}, 0)
    assert str(tmp_path / "job") in caplog.text
    (first.output_dir / "results.json").unlink()  # what the task wrote is gone: test again, still without training
    model = case.TinyModel(seed=99)
    model.encoder.load_state_dict(first.bare_model.encoder.state_dict())
    assert case.make_runner(tmp_path, task=task, model=model).train() == metrics
    assert task.train_indices == []
    assert (first.output_dir / "results.json").exists()
    new = case.make_runner(tmp_path, resume="never")
    assert new.output_dir.name == "job-2"
    assert not new.folder.continued
    assert case.make_runner(tmp_path, init_lr=0.01).output_dir.name == "job-3"  # auto looks for the same config only


def test_a_run_that_is_under_way_is_left_alone(tmp_path):
    runner = case.make_runner(tmp_path)
    assert case.run_child(case.expect_other_process, tmp_path) == 0
    runner.train()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_run_on_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", lockf)
    runner = case.make_runner(tmp_path)
    rest = runner.output_dir / ".checkpoint_last.pth.1a2b3c4d.tmp"
    rest.touch()
    runner.train()
    assert f"let no other process train in {runner.output_dir}" in caplog.text
    assert rest.exists()  # another process may be writing it


# ---- folders, evaluation only ---------------------------------------------------------------


def test_folders_are_relative_to_the_current_directory_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runners = [case.make_runner("out/here", resume="never") for _ in range(3)]
    assert [runner.output_dir for runner in runners] == [
        tmp_path / "out" / "here" / name for name in ("job", "job-2", "job-3")
    ]


def test_evaluate_only_writes_elsewhere_and_keeps_the_best(tmp_path):
    trained = case.make_runner(tmp_path)
    metrics = trained.train()
    best = trained.output_dir / "checkpoint_best.pth"
    content = best.read_bytes()
    frozen = trained.bare_model.encoder.state_dict()
    for number, resume in enumerate(("auto", str(trained.output_dir), str(best))):
        task, model = case.TinyTask(), case.TinyModel(seed=99)
        model.encoder.load_state_dict(frozen)
        runner = case.make_runner(tmp_path, task=task, model=model, evaluate=True, resume=resume)
        assert runner.evaluate(skip_reload=True) == metrics
        assert runner.output_dir == tmp_path / f"job-{number + 2}"
        assert task.finished[0][1]["checkpoint"]["path"] == str(best)
        assert not (runner.output_dir / "checkpoint_best.pth").exists()
        assert task.train_indices == []
    assert best.read_bytes() == content
    as_built = case.make_runner(tmp_path, model=case.TinyModel(seed=99), evaluate=True, resume="never").train()
    assert as_built != metrics
    assert case.make_runner(tmp_path).output_dir == trained.output_dir  # evaluations are never continued
