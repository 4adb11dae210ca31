"""Trials in processes of their own: skipped, resumed, failed, stopped. Those of the quick tests train nothing."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import study_case as case

from neucore_plugin import cli
from neucore_plugin.common.errors import ConfigError, DataError, NeucoreError
from neucore_plugin.study import display, running
from neucore_plugin.study.plan import make_plan


@pytest.fixture
def light(monkeypatch):
    """Processes that train nothing, and need no host; forked, which is quick."""
    monkeypatch.setattr(running, "run_trial", case.quick_trial)
    monkeypatch.setattr(running, "run_probe", case.quick_probe)
    monkeypatch.setattr(running, "context", lambda: multiprocessing.get_context("fork"))


@pytest.fixture
def study(tiny_config, tmp_path):
    return lambda **parts: case.write_study(tmp_path, tiny_config(), **parts)


def behave(plan, name: str, how: str) -> Path:
    path = plan.folder / "behave" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(how)
    return path


def started(plan) -> list[str]:
    """Names of the trials in the order in which they began."""
    found = [path.name.rpartition("-") for path in (plan.folder / "started").iterdir()]
    return [name for name, _, _ in sorted(found, key=lambda part: int(part[2]))]


def test_all_trials_run_once_and_finished_ones_are_skipped(light, study, capfd):
    plan = make_plan(study())
    outcome = running.run_trials(plan, plan.trials, {}, jobs=2)
    assert sorted(outcome.done) == sorted(trial.title for trial in plan.trials) and not outcome.failed
    assert "4/4" in capfd.readouterr().err
    for trial in plan.trials:
        assert running.record_of(trial)["seed"] == trial.seed
        assert "threads 1" in (trial.folder / "trial.log").read_text()
    again = running.run_trials(plan, plan.trials, {}, jobs=2)
    assert again.done == [] and len(again.skipped) == 4 and len(started(plan)) == 4
    # Another config of one method: its trials alone run again.
    other = make_plan(study(methods={"neucore": {"run.init_lr": 0.1}, "tirg": case_tirg()}))
    assert [trial.title for trial in other.trials if running.record_of(trial)] == ["tirg, seed 1", "tirg, seed 2"]
    assert sorted(running.run_trials(other, other.trials, {}, jobs=2).done) == ["neucore, seed 1", "neucore, seed 2"]
    # Results that have gone are no finished trial.
    (other.trials[0].folder / "run" / "results.json").unlink()
    assert running.record_of(other.trials[0]) is None


def case_tirg() -> dict:
    return {"model.arch": "cir_baseline", "model.method": "tirg"}


def test_trials_that_fail_are_told_and_stop_no_other(light, study, capfd):
    plan = make_plan(study())
    error, kill = behave(plan, "neucore-seed-1", "error"), behave(plan, "tirg-seed-2", "kill")
    outcome = running.run_trials(plan, plan.trials, {}, jobs=2)
    assert sorted(outcome.done) == ["neucore, seed 2", "tirg, seed 1"]
    assert outcome.failed == {"neucore, seed 1": "exit code 3", "tirg, seed 2": "ended by signal 9 (SIGKILL)"}
    said = capfd.readouterr().err
    assert "neucore, seed 1: FAILED, exit code 3" in said and "ValueError: planted" in said
    for path in (error, kill):
        path.unlink()
    assert sorted(running.run_trials(plan, plan.trials, {}, jobs=1).done) == ["neucore, seed 1", "tirg, seed 2"]


def test_a_process_that_says_all_is_well_without_results_has_failed(light, study, monkeypatch):
    monkeypatch.setattr(running, "run_trial", case.quick_probe)
    plan = make_plan(study(seeds=[1]))
    assert set(running.run_trials(plan, plan.trials, {}, jobs=1).failed) == {"neucore, seed 1", "tirg, seed 1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_ends_all_processes(light, study, number):
    plan = make_plan(study())
    for row in ("neucore", "tirg"):
        behave(plan, f"{row}-seed-1", "hang")
    before = signal.getsignal(signal.SIGTERM)
    pids = []

    def stop(_self, texts, _left):
        pids[:] = [child.pid for child in multiprocessing.active_children()]
        if len(texts) == 2 and (plan.folder / "started").is_dir() and len(started(plan)) == 2:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(display.Display, "show", stop)
        with_ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        with pytest.raises(KeyboardInterrupt):
            running.run_trials(plan, plan.trials, {}, jobs=2)
        signal.signal(signal.SIGINT, with_ctrl_c)
    assert len(pids) == 2 and multiprocessing.active_children() == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert signal.getsignal(signal.SIGTERM) is before and [t for t in plan.trials if running.record_of(t)] == []


def test_probes_are_kept_and_give_every_method_the_same_time(light, study, capfd):
    plan = make_plan(study(minutes=10))
    times = running.measure(plan, plan.trials)
    assert {found["row"]: found["step"] for found in times.values()} == {"neucore": 0.2, "tirg": 0.1}
    lengths = {trial.title: trial.checked["run"]["max_epoch"] for trial in running.with_lengths(plan, times)}
    assert lengths == {"neucore, seed 1": 30, "neucore, seed 2": 30, "tirg, seed 1": 60, "tirg, seed 2": 60}
    tirg = running.with_lengths(plan, times)[1]
    assert running.expected_seconds(tirg, times) == pytest.approx(2 + 60 * (100 * 0.1 + 1) + 2 * 1)
    capfd.readouterr()
    assert running.measure(plan, plan.trials) == times and capfd.readouterr().err == ""
    # A time of less than an epoch still trains one; iterations need not be whole epochs.
    short = make_plan(study(minutes=0.01))
    assert {trial.checked["run"]["max_epoch"] for trial in running.with_lengths(short, times)} == {1}
    by_step = {
        "run.runner": "runner_cir_iter",
        "run.max_iters": 5,
        "run.iters_per_inner_epoch": 2,
        "run.max_epoch": None,
    }
    counted = make_plan(study(minutes=1, options=by_step))
    times = running.measure(counted, counted.trials)
    assert {trial.checked["run"]["max_iters"] for trial in running.with_lengths(counted, times)} == {300, 600}


DAMAGED = ["[]", "{", '{"a": 1}']
DAMAGED += [f'{{"a": {{"step": {s}, "round": {r}, "validation": 1, "setup": 1}}}}' for s, r in (('"x"', 1), (1, 0))]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_times_are_told(study, text):
    plan = make_plan(study())
    plan.folder.mkdir()
    (plan.folder / "timing.json").write_text(text)
    with pytest.raises(DataError, match="timing.json.*delete it"):
        running.stored_times(plan)


def test_where_no_method_can_begin_the_reason_is_told_at_once(light, study, monkeypatch):
    monkeypatch.setattr(running, "run_probe", case.failing_probe)
    plan = make_plan(study())
    plan.folder.mkdir()
    with pytest.raises(NeucoreError, match=r"(?s)no trial of the study can begin.*error: no such folder"):
        running.measure(plan, plan.trials)


def test_two_studies_do_not_share_a_folder(study):
    plan = make_plan(study())
    with running.study_folder(plan), pytest.raises(ConfigError, match="in use by another"):  # noqa: SIM117
        with running.study_folder(plan):
            pass
    plan.folder.rename(plan.folder.with_name("away"))
    plan.folder.write_text("")
    with pytest.raises(ConfigError, match="study.output_dir"), running.study_folder(plan):
        pass


def test_how_long_is_left():
    class Trial:
        def __init__(self, row, pace):
            self.row, self.pace = row, pace
            self.checked = {"run": {"max_epoch": 10, "max_iters": None, "test_splits": []}}

    fast, slow = Trial("fast", "f"), Trial("slow", "s")
    probe = {"step": 0.1, "round": 10, "validation": 0.0, "setup": 0.0}
    pace = running._Pace({"f": probe, "s": {**probe, "step": 0.3}})
    assert pace.left([fast, slow], [], 2) == pytest.approx(30)  # the longer one ends last
    assert pace.left([fast, fast], [(slow, 25.0)], 1) == pytest.approx(10 + 10 + 5)
    pace.seen(fast, 20.0)  # twice what the probe said
    assert pace.left([fast], [], 1) == pytest.approx(20) and pace.left([slow], [], 1) == pytest.approx(60)
    assert running._Pace({}).left([fast], [], 1) is None


def test_dry_run_prints_the_plan_and_trains_nothing(light, study, capsys):
    path = study(minutes=1, ablations={"one step": {"model.fusion.clauses": 1}})
    assert cli.main(["study", "--cfg-path", str(path), "--dry-run", "--jobs", "2", "--only", "tirg", "one step"]) == 0
    out = capsys.readouterr().out
    assert "4 trials" in out and "1 minutes of processor time" in out and "neucore (method)" not in out
    assert "tirg (method): seeds 1, 2; 6 epochs; about 0:01:10 each" in out
    assert "left to run: about 0:02:17 on 2 free cores" in out
    assert not (path.parent / "out" / "trials").exists()


def test_last_lines_of_a_log_are_printable(tmp_path):
    log = tmp_path / "trial.log"
    log.write_bytes(b"x" * 5000 + b"\n10:20:30 [INFO] a \x1b[31mred\n\n\xff half\n")
    assert display.last_lines(log, 1, plain=True) == "\ufffd half"
    assert display.last_lines(log, 2).splitlines()[0] == "10:20:30 [INFO] a \\x1b[31mred"
    assert display.last_lines(tmp_path / "none", 3) == ""


# --- the real thing ---------------------------------------------------------------------------------------------------


def command(path: Path, *more: str, **options) -> subprocess.Popen:
    argv = [sys.executable, "-W", "ignore", "-m", "neucore_plugin", "study", "--cfg-path", str(path), *more]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_a_study_from_scratch_killed_resumed_and_equal_to_runs_of_their_own(study, tmp_path):
    """Two methods, two seeds, real trainings; one method of three cannot be trained, which the exit code says."""
    from neucore_plugin.weights import checkpoint

    bad = {**case_tirg(), "run.init_lr": 1e30, "run.warmup_steps": 0}
    path = study(methods={"neucore": None, "tirg": case_tirg(), "bad": bad}, options={"run.max_epoch": 3})
    first = command(path, "--jobs", "2", "--only", "neucore", "tirg")
    folder = tmp_path / "out" / "trials" / "neucore" / "seed-1"
    until = time.monotonic() + 400
    while not list(folder.glob("*/checkpoint_last.pth")) and time.monotonic() < until and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    [begun] = folder.glob("*/run.json")
    time.sleep(2)  # its processes end with it
    assert json.loads(begun.read_text())["status"] == "running" and not (folder / "trial.json").exists()

    second = command(path, "--jobs", "2")
    out, err = second.communicate(timeout=900)
    assert second.returncode == 1, err
    assert "bad, seed 1: FAILED" in err and "error: the loss is" in err and "failed: bad, seed 2" in err
    assert list(folder.glob("*/run.json")) == [begun]  # the killed one went on
    assert json.loads((folder / "trial.json").read_text())["resumed"] is True
    assert "| NEUCORE |" in out and "`tirg`" in out and "`bad`" not in out
    summary = json.loads((tmp_path / "out" / "study.json").read_text())
    assert summary["rows"]["tirg"]["seeds"] == [1, 2] and summary["missing"] == ["bad, seed 1", "bad, seed 2"]
    assert [len(row["curve"]["val"]) for row in summary["rows"].values()] == [3, 3]

    # A process of its own, by the file that the study wrote, gives the same weights and ranks.
    own = tmp_path / "own"
    trial = tmp_path / "out" / "trials" / "neucore" / "seed-1" / "trial.yaml"
    argv = [sys.executable, "-W", "ignore", "-m", "neucore_plugin", "train", "--cfg-path", str(trial), "--options",
            f"run.output_dir={own}"]  # fmt: skip
    subprocess.run(argv, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    weights = []
    for place in (begun.parent, next(own.glob("*/run.json")).parent):
        weights.append(checkpoint.fingerprint(checkpoint.load(place / "checkpoint_best.pth")["model"]))
        weights.append((place / "ranks.json").read_text())
    assert weights[:2] == weights[2:]


@pytest.mark.slow
def test_ctrl_c_ends_the_trials_and_keeps_what_is_finished(study, tmp_path):
    process = command(study(options={"run.max_epoch": 500}), "--jobs", "2", start_new_session=True)
    folders = [tmp_path / "out" / "trials" / row / "seed-1" for row in ("neucore", "tirg")]
    until = time.monotonic() + 400
    while not all(list(f.glob("*/checkpoint_last.pth")) for f in folders) and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in err and "Traceback" not in err, err
    until = time.monotonic() + 30
    while (left := alive_in(process.pid)) and time.monotonic() < until:
        time.sleep(0.2)
    assert left == []


def alive_in(group: int) -> list[str]:
    """Commands of the processes of a group, but for those that nobody has buried yet."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            state, _, member = rest.split()[:3]
            found += [name] if int(member) == group and state != "Z" else []
    return found
