"""neucore study: many trainings as one table, methods x seeds, ablations, learning curves."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neucore_plugin.commands import positive, train

if TYPE_CHECKING:
    from neucore_plugin.study.plan import Plan, Trial

HELP = "run a study of many trainings (methods x seeds, ablations), and write its tables and plots"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study file, and which part of it to run."""
    parser.add_argument(
        "--cfg-path",
        required=True,
        metavar="YAML",
        help="study file, or the name of a shipped one, such as study_emoji",
    )
    train.add_options(parser)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="methods, ablations, curves to run now")
    parser.add_argument("--seeds", nargs="+", type=_seed, default=[], metavar="N", help="in place of the study's seeds")
    parser.add_argument("--quick", action="store_true", help="the study's smaller form, in the subfolder quick")
    parser.add_argument("--out", type=Path, metavar="DIR", help="in place of study.output_dir")
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="trainings at a time, one thread each (default: one a core; one where they train on a GPU)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and how long it takes; train nothing")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**31 - 1}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Run what is left of the study, write its summary. Returns 1 where a trial failed. Raises NeucoreError."""
    from neucore_plugin.study import running
    from neucore_plugin.study.plan import make_plan

    plan = make_plan(
        arguments.cfg_path,
        arguments.options,
        arguments.only,
        list(dict.fromkeys(arguments.seeds)),
        arguments.quick,
        arguments.out,
    )
    wanted = [trial for trial in plan.trials if trial.row in plan.wanted]
    with running.study_folder(plan):
        # with `minutes` the lengths, and so what is finished, follow from the times
        times = running.stored_times(plan)
        open_ = [trial for trial in running.with_lengths(plan, times) if running.record_of(trial) is None]
        rows = {trial.row for trial in open_} & plan.wanted
        times = running.measure(plan, [trial for trial in wanted if trial.row in rows])
        trials = [trial for trial in running.with_lengths(plan, times) if trial.row in plan.wanted]
        jobs = arguments.jobs or _jobs(times)
        if arguments.dry_run:
            print("\n".join(_plan_lines(plan, trials, times, jobs)))
            return 0
        try:
            outcome = running.run_trials(plan, trials, times, jobs)
        finally:
            _summarise(plan, times)
    for title, why in outcome.failed.items():
        print(f"failed: {title} ({why})", file=sys.stderr)
    return 1 if outcome.failed else 0


def _jobs(times: dict) -> int:
    on_gpu = any(not str(found["device"]).startswith("cpu") for found in times.values())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if on_gpu else cores


def _plan_lines(plan: "Plan", trials: Sequence["Trial"], times: dict, jobs: int) -> list[str]:
    """What would be run, a line a row, and how long it takes."""
    from neucore_plugin.study.display import duration
    from neucore_plugin.study.running import expected_seconds, record_of

    budget = f"{plan.minutes:g} minutes of processor time a training" if plan.minutes else "the epochs of the config"
    lines = [f"{plan.name}: {len(trials)} trials in {plan.folder}, {jobs} at a time; {budget}"]
    total, unknown = 0.0, False
    for row in dict.fromkeys(trial.row for trial in trials):
        of_row = [trial for trial in trials if trial.row == row]
        open_ = [trial for trial in of_row if record_of(trial) is None]
        each = expected_seconds(of_row[0], times)
        unknown |= bool(open_) and each is None
        total += len(open_) * (each or 0.0)
        run = of_row[0].checked["run"]
        length = f"{run['max_epoch']} epochs" if run.get("max_epoch") else f"{run['max_iters']} iterations"
        cost = "could not be timed" if each is None else f"about {duration(each)} each"
        seeds = ", ".join(str(trial.seed) for trial in of_row)
        done = f", {len(of_row) - len(open_)} finished" if len(open_) < len(of_row) else ""
        lines.append(f"  {row} ({of_row[0].kind}): seeds {seeds}; {length}; {cost}{done}")
    estimate = "unknown" if unknown else duration(total / max(1, jobs))
    return [*lines, f"left to run: about {estimate} on {jobs} free core{'s' if jobs > 1 else ''}"]


def _summarise(plan: "Plan", times: dict) -> None:
    from neucore_plugin.study import running, tables
    from neucore_plugin.study.summary import write_summary

    summary = write_summary(plan, running.with_lengths(plan, times), times)
    if summary is None:
        return
    print("\n".join([*tables.methods_table(summary).lines, "", *tables.goals_list(summary)]))
    names = ", ".join(str(plan.folder / name) for name in ("study.html", "study.md", "study.json"))
    print(f"written: {names}", file=sys.stderr)
