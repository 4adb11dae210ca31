"""What the process of one trial does: the main flow of `neucore train`, timed, its output in a file.

Each trial has a process of its own, forked from a server that has imported the host once: no state of one trial
reaches another, and none pays for the import.
"""

import contextlib
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from neucore_plugin.common.errors import NeucoreError, explained

LOG = "trial.log"
RECORD = "trial.json"  # written last: a trial that has it is finished
PROBED = 24  # steps of a probe
_UNTIMED = 4  # of them at the start: caches, buffers and threads settle
_GRACE = 5.0  # seconds that a process has to leave by itself
BLAS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def context() -> Any:
    """Processes that are forked from a server, which has imported the host; anew where a system has no forks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["neucore_plugin.task", "neucore_plugin.launch"])
    return found


def run_trial(config: str, record: dict[str, Any], connection: Connection) -> None:
    """Train and test what the yaml `config` says, in a process of its own; `record` and the times go to trial.json."""
    folder = Path(config).parent

    def job() -> None:
        from neucore_plugin import launch
        from neucore_plugin.common.files import write_json
        from neucore_plugin.training.run_folder import LAST

        clock, runners, began = _StepClock(), [], time.time()

        def started(runner: Any) -> None:
            runners.append(runner)
            clock.watch(runner)

        launch.run(config, started=started)
        [runner] = runners
        path = Path(runner.output_dir)
        found = {
            **record,
            "run_folder": path.name,
            "seconds": round(time.time() - began, 1),
            "cpu_seconds": round(time.process_time(), 1),
            "parameters": sum(p.numel() for p in runner.bare_model.parameters() if p.requires_grad),
            "iterations": runner.progress.iteration or None,
            "resumed": runner.folder.continued,  # then the times are of its last part
            **clock.summary(runner.progress.iteration),
        }
        write_json(folder / RECORD, found)
        (path / LAST).unlink(missing_ok=True)  # two thirds of the room; nothing goes on from here

    _alone(job, folder / LOG, connection)


def run_probe(config: str, log: str, connection: Connection) -> None:
    """Fill the feature caches of a config, time a few steps and a validation, leave nothing else behind.

    Sends {"step": seconds of processor time, "round": batches an epoch, "validation", "setup", "device"}.
    """

    def job() -> None:
        from neucore_plugin import launch

        clock, began, found = _StepClock(PROBED), time.process_time(), {}

        def started(runner: Any) -> None:
            found["round"], found["device"], found["runner"] = runner.round_iters, str(runner.device), runner
            clock.watch(runner)

        with TemporaryDirectory(prefix="neucore-probe-") as folder:
            options = [("run.output_dir", folder), ("run.resume", "never"), ("run.report", False)]
            with contextlib.suppress(_Enough):
                launch.run(config, options, started=started)
            runner = found.pop("runner")
            found["setup"] = (clock.first or time.process_time()) - began
            before = time.process_time()
            for split in runner.run.valid_splits[:1]:
                runner.eval_epoch(split, 0)
            found["validation"] = time.process_time() - before
        connection.send({**found, "step": (clock.summary(0)["step_ms"] or 0) / 1000})

    _alone(job, Path(log), connection)


class _Enough(Exception):
    """A probe has seen as many steps as it wants."""


class _StepClock:
    """Processor time of a step: from the beginning of one to that of the next, loader and optimiser included."""

    def __init__(self, enough: int | None = None) -> None:
        self.enough, self.first = enough, None
        self._times: list[float] = []
        self._last: tuple[int, float] | None = None

    def watch(self, runner: Any) -> None:
        """Look on while the runner's task makes its steps; what they compute stays as it is."""
        step: Callable[..., Any] = runner.task.train_step

        def seen(model: Any, samples: Any) -> Any:
            now, place = time.process_time(), runner.progress.iteration
            self.first = self.first or now
            # not across a round's end, where a validation lies between
            if self._last and self._last[0] == place - 1 and place % runner.round_iters:
                self._times.append(now - self._last[1])
            self._last = (place, now)
            if self.enough and len(self._times) >= self.enough:
                raise _Enough
            return step(model=model, samples=samples)

        runner.task.train_step = seen

    def summary(self, iterations: int) -> dict[str, Any]:
        """{"step_ms": the median, "training_seconds": mean times `iterations`}; None where no step was seen."""
        times = self._times[_UNTIMED:] or self._times
        if not times:
            return {"step_ms": None, "training_seconds": None}
        whole = statistics.fmean(times) * iterations
        return {"step_ms": round(statistics.median(times) * 1000, 3), "training_seconds": round(whole, 2)}


def _alone(job: Callable[[], None], log: Path, connection: Connection) -> None:
    """Run `job` with its output in `log`, on one thread, and end with its exit code.

    When the study has gone, however it ended, so does this process: its end of the connection closes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a Ctrl-C the study tells
    with open(log, "a", encoding="utf-8", errors="backslashreplace") as stream:
        for target in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                target.flush()
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    code = 0
    try:
        import torch

        torch.set_num_threads(1)
        job()
    except NeucoreError as error:
        code = _said(error)
    except (MemoryError, RuntimeError) as error:
        if (reason := explained(error)) is None:
            traceback.print_exc()
            code = 1
        else:
            code = _said(reason)
    except Exception:
        traceback.print_exc()
        code = 1
    sys.exit(code)


def _leave(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)  # not by the signal itself: locks and loaders' processes are cleared away


def _said(error: NeucoreError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _end_with(connection: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(128 + signal.SIGTERM)
