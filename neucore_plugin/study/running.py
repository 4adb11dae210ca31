"""Run the trials of a plan: probes first, then all at once over processes; what is finished is skipped."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from neucore_plugin.common.errors import ConfigError, DataError, FileError, NeucoreError, first_few
from neucore_plugin.common.files import atomic_write, lock, open_lock, read_json, write_json
from neucore_plugin.config.loading import as_yaml
from neucore_plugin.config.run import LENGTHS
from neucore_plugin.study.display import Display, duration, last_lines
from neucore_plugin.study.plan import CONFIG, Plan, Trial
from neucore_plugin.study.worker import BLAS, LOG, RECORD, context, run_probe, run_trial

TIMES = "timing.json"  # what the probes of this machine found, by pace
_NUMBERS = ("step", "round", "validation", "setup")
_SHOWN = 12  # last lines of a failed trial's log
_PATIENCE = 10.0  # seconds between asking a process to end and ending it


@dataclass
class Outcome:
    """What became of the trials that were wanted: titles of those done now, finished before, failed (with why)."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def record_of(trial: Trial) -> dict[str, Any] | None:
    """What trial.json says, where the trial is finished by the very config that it has now; else None."""
    try:
        record = read_json(trial.folder / RECORD, dict)
        same = record.get("fingerprint") == trial.fingerprint
        return record if same and (trial.folder / str(record["run_folder"]) / "results.json").is_file() else None
    except (DataError, KeyError):
        return None


def stored_times(plan: Plan) -> dict[str, dict[str, Any]]:
    """{pace: what its probe found}, of this study so far. Raises DataError for a file that is none of ours."""
    path, remedy = plan.folder / TIMES, "delete it: it is measured anew"
    found = read_json(path, dict, remedy) if path.exists() else {}
    for entry in found.values():
        numbers = [entry.get(key) for key in _NUMBERS] if isinstance(entry, dict) else [None]
        if not all(type(number) in (int, float) and number >= 0 for number in numbers) or not entry["round"]:
            raise DataError(f"{path}: holds no times as a probe finds them; {remedy}")
    return found


def with_lengths(plan: Plan, times: dict[str, dict[str, Any]]) -> list[Trial]:
    """The plan's trials; with `minutes` each lasts as many epochs (iterations) as its probe says fit, one at least."""
    if plan.minutes is None:
        return plan.trials
    return [trial.lasting(_fitting(trial, times[trial.pace], plan.minutes)) if trial.pace in times else trial
            for trial in plan.trials]  # fmt: skip


def _fitting(trial: Trial, times: dict[str, Any], minutes: float) -> int:
    steps = minutes * 60 / max(times["step"], 1e-6)
    iterations = LENGTHS[trial.checked["run"]["runner"]][0] == "max_iters"
    return max(1, round(steps if iterations else steps / times["round"]))


def expected_seconds(trial: Trial, times: dict[str, dict[str, Any]]) -> float | None:
    """Processor time of a trial, from its probe."""
    found, run = times.get(trial.pace), trial.checked["run"]
    if found is None:
        return None
    rounds = run["max_epoch"] or run["max_iters"] / found["round"]
    tests = len(run["test_splits"])
    a_round = found["round"] * found["step"] + found["validation"]
    return found["setup"] + rounds * a_round + tests * found["validation"]


@contextlib.contextmanager
def study_folder(plan: Plan) -> Iterator[None]:
    """Make the folder; keep a second `neucore study` out of it. Raises ConfigError."""
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"study.output_dir: {FileError.of(error, plan.folder)}") from error
    handle = open_lock(plan.folder / ".lock")
    try:
        lock(handle, without=f"let no other study run in {plan.folder}")
    except BlockingIOError:
        raise ConfigError(f"{plan.folder} is in use by another `neucore study`; wait for it, or give --out") from None
    else:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def measure(plan: Plan, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Probe each pace among `trials` that was not probed yet, one at a time; the feature caches are filled by it.

    Returns all times. A probe that fails is left out: the trial itself will tell why, but where no probe succeeds, an
    error of ours is raised at once with what the log says.
    """
    times = stored_times(plan)
    todo = {trial.pace: trial for trial in reversed(trials) if trial.pace not in times}
    if not todo:
        return times
    display, failed = Display(len(todo), 1, "probe"), []
    with contextlib.closing(display), TemporaryDirectory(prefix="neucore-study-") as scratch, _Pool(1) as pool:
        for trial in reversed(todo.values()):
            config = Path(scratch) / "probe.yaml"
            _write_config(trial, config)
            log = Path(scratch) / f"{trial.pace[:12]}.log"
            job = pool.start(run_probe, str(config), str(log))
            while not pool.ended():
                display.show([(f"timing {trial.row}, and preparing its features", log)], None)
            if job.message is None:
                failed.append(f"{trial.row}: {job.why()}\n{last_lines(log, _SHOWN)}")
                display.finished(f"{trial.row} cannot be timed: {job.why()}", None)
                continue
            times[trial.pace] = {"row": trial.row, **job.message}
            write_json(plan.folder / TIMES, times)
            step = f"{1000 * job.message['step']:.1f} ms a step"
            display.finished(f"{trial.row}: {step}, {job.message['round']} steps a round", None)
    if failed and len(failed) == len(todo) and not any(trial.pace in times for trial in trials):
        raise NeucoreError(f"no trial of the study can begin; the first says:\n{failed[0]}")
    return times


def run_trials(plan: Plan, trials: Sequence[Trial], times: dict[str, dict[str, Any]], jobs: int) -> Outcome:
    """Run all trials that are not finished, `jobs` at a time; a failure stops none of the others."""
    outcome = Outcome(skipped=[trial.title for trial in trials if record_of(trial) is not None])
    waiting = [trial for trial in trials if trial.title not in outcome.skipped]
    if not waiting:
        return outcome
    jobs = min(jobs, len(waiting))
    pace = _Pace(times)
    display = Display(len(waiting), jobs)
    if outcome.skipped:
        display.say(f"finished already: {first_few(outcome.skipped, 6)}")
    running: dict[Any, Trial] = {}
    with contextlib.closing(display), _Pool(jobs) as pool:
        while waiting or running:
            while waiting and len(running) < jobs:
                trial = waiting.pop(0)
                _write_config(trial, trial.folder / CONFIG)
                running[pool.start(run_trial, str(trial.folder / CONFIG), _record(trial, jobs))] = trial
            left = pace.left(waiting, [(trial, job.age) for job, trial in running.items()], jobs)
            display.show([(trial.title, trial.folder / LOG) for trial in running.values()], left)
            for job in pool.ended():
                trial = running.pop(job)
                left = pace.left(waiting, [(other, one.age) for one, other in running.items()], jobs)
                if job.code == 0 and record_of(trial) is not None:
                    pace.seen(trial, job.age)
                    outcome.done.append(trial.title)
                    display.finished(f"{trial.title}: finished in {duration(job.age)}", left)
                else:
                    log = trial.folder / LOG
                    outcome.failed[trial.title] = job.why()
                    why = f"{trial.title}: FAILED, {job.why()}; {log} ends with\n{last_lines(log, _SHOWN)}"
                    display.finished(why, left)
    return outcome


def _record(trial: Trial, jobs: int) -> dict[str, Any]:
    run = trial.checked["run"]
    length = {key: run[key] for key in ("max_epoch", "max_iters") if run.get(key)}
    named = {"row": trial.row, "kind": trial.kind, "seed": trial.seed, "jobs": jobs}
    return {"fingerprint": trial.fingerprint, **named, **length}


def _write_config(trial: Trial, path: Path) -> None:
    head = f"# {trial.title}: written by `neucore study`; `neucore train --cfg-path` of this file repeats the trial.\n"
    with atomic_write(path, "w") as stream:
        stream.write(head + as_yaml(trial.content))


class _Pace:
    """How long is left: the probes' estimates, corrected by what finished trials took."""

    def __init__(self, times: dict[str, dict[str, Any]]) -> None:
        self.times, self._ratios, self._took = times, [], {}

    def seen(self, trial: Trial, seconds: float) -> None:
        self._took.setdefault(trial.row, []).append(seconds)
        if expected := expected_seconds(trial, self.times):
            self._ratios.append(seconds / expected)

    def _seconds(self, trial: Trial) -> float | None:
        if took := self._took.get(trial.row):
            return sum(took) / len(took)
        expected = expected_seconds(trial, self.times)
        ratio = sum(self._ratios) / len(self._ratios) if self._ratios else 1.0
        return None if expected is None else expected * ratio

    def left(self, waiting: Sequence[Trial], running: Sequence[tuple[Trial, float]], jobs: int) -> float | None:
        whole = [self._seconds(trial) for trial in waiting]
        rest = [None if (one := self._seconds(trial)) is None else max(0.0, one - age) for trial, age in running]
        known = [one for one in (*whole, *rest) if one is not None]
        if not known or len(known) < len(whole) + len(rest):
            return None
        return max(sum(known) / max(1, jobs), max(known))


# --- processes --------------------------------------------------------------------------------------------------------


class _Job:
    """One process, and what it sent."""

    def __init__(self, process: Any, ours: connection.Connection) -> None:
        self.process, self.connection, self.began, self._age = process, ours, time.monotonic(), None
        self.message: Any = None

    @property
    def age(self) -> float:
        return self._age if self._age is not None else time.monotonic() - self.began

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def why(self) -> str:
        if self.code is not None and self.code < 0:
            with contextlib.suppress(ValueError):
                return f"ended by signal {-self.code} ({signal.Signals(-self.code).name})"
        return f"exit code {self.code}"

    def close(self) -> None:
        self._age = self.age
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll():
                self.message = self.connection.recv()
        self.process.join()
        self.connection.close()


class _Pool:
    """Processes of which none outlives this one: not an error, not Ctrl-C, not a SIGTERM, not even a kill."""

    def __init__(self, size: int) -> None:
        self.size, self._jobs, self._before = size, [], None

    def __enter__(self) -> "_Pool":
        self._threads = {name: os.environ.get(name) for name in BLAS}
        os.environ.update(dict.fromkeys(BLAS, "1"))  # before the server starts: processes have its environment
        self.context = context()
        with contextlib.suppress(ValueError):  # not the main thread
            self._before = signal.signal(signal.SIGTERM, _stop)
        return self

    def start(self, target: Any, *arguments: Any) -> _Job:
        """A process that runs target(*arguments, its end of a connection)."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=target, args=(*arguments, theirs))
        process.start()
        theirs.close()
        self._jobs.append(_Job(process, ours))
        return self._jobs[-1]

    def ended(self, wait: float = 0.5) -> list[_Job]:
        """Those that have ended by now, or within `wait` seconds."""
        connection.wait([job.process.sentinel for job in self._jobs], wait)
        found = [job for job in self._jobs if not job.process.is_alive()]
        for job in found:
            self._jobs.remove(job)
            job.close()
        return found

    def __exit__(self, *_: Any) -> None:
        # A second Ctrl-C must not leave half of them.
        handlers = {}
        with contextlib.suppress(ValueError):
            handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for job in self._jobs:
                job.process.terminate()
            until = time.monotonic() + _PATIENCE
            for job in self._jobs:
                job.process.join(max(0.0, until - time.monotonic()))
                if job.process.is_alive():
                    job.process.kill()
                job.close()
        finally:
            if self._before is not None:
                handlers[signal.SIGTERM] = self._before
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for name, value in self._threads.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt
