"""From the folders of finished trials to one table: means, spreads, differences, costs, goals. Plain values throughout.

Percent everywhere. A spread is the standard deviation over seeds; an interval comes from the paired bootstrap over
queries (`evaluation/significance.py`), each query having its mean over the seeds that both sides have.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import write_json
from neucore_plugin.config.study import GoalsSchema
from neucore_plugin.evaluation.significance import paired_bootstrap, spread
from neucore_plugin.evaluation.stored import StoredRun, read_run
from neucore_plugin.study import tables
from neucore_plugin.study.page import write_pages
from neucore_plugin.study.plan import Plan, Trial
from neucore_plugin.study.running import record_of

FORMAT = "neucore-study-1"
_METRIC = re.compile(r"(R|R_subset|mAP)@\d+|median_rank")
Runs = Mapping[str, Mapping[int, StoredRun]]  # {row: {seed: run}}
Finished = tuple[Trial, Mapping[str, Any]]  # with its trial.json


def write_summary(plan: Plan, trials: Sequence[Trial], times: Mapping[str, Any]) -> dict[str, Any] | None:
    """Write study.json and the pages of what is finished; None where nothing is.

    trials: those of the whole study, wanted now or not.
    """
    found: dict[str, dict[int, StoredRun]] = {}
    records, missing = {}, []
    for trial in trials:
        record = record_of(trial)
        if record is None:
            missing.append(trial.title)
        else:
            try:
                found.setdefault(trial.row, {})[trial.seed] = read_run(trial.folder / record["run_folder"])
            except DataError as error:
                raise DataError(f"{error}; or delete {trial.folder}, and the trial is run again") from error
            records.setdefault(trial.row, []).append((trial, record))
    if not found:
        return None
    summary = summarise(plan, found, records, missing, times)
    write_json(plan.folder / "study.json", summary)
    write_pages(plan.folder, summary)
    return summary


def summarise(
    plan: Plan,
    runs: Runs,
    records: Mapping[str, Sequence[Finished]],
    missing: Sequence[str],
    times: Mapping[str, Any],
) -> dict[str, Any]:
    """All that study.json holds."""
    metric = plan.study.goals.metric
    names = [row for kind in ("method", "ablation", "curve") for row in plan.rows(kind)]
    rows = {row: _row(runs[row], records[row], times, metric) for row in names if row in runs}
    first = next(iter(next(iter(runs.values())).values()))
    splits = _splits(runs)
    methods = [row for row in plan.rows("method") if row in runs]
    summary = {
        "format": FORMAT,
        "title": plan.name,
        "command": plan.command,
        "main": plan.main,
        "metric": metric,
        "seeds": plan.seeds,
        "minutes": plan.minutes,
        "versions": first.provenance.get("versions"),
        "threads": first.provenance.get("threads"),
        "missing": list(missing),
        "splits": splits,
        "rows": rows,
    }
    shown = tables.metrics_shown(summary)
    others = [row for row in methods if row != plan.main]
    summary["differences"] = [
        {"split": split, "metric": name, "against": best, **compared(runs[plan.main], runs[best], split, name)}
        for split in splits
        for name in shown
        if plan.main in runs and (best := _best(rows, others, split, name)) is not None
        and tables.of(rows[plan.main], split, name)
    ]  # fmt: skip
    summary["ablations"] = {
        row: {
            split: {"cost": found.pop("mean"), **found}
            for split in splits
            if (found := compared(runs[plan.main], runs[row], split, metric))["mean"] is not None
        }
        for row in (plan.rows("ablation") if plan.main in runs else ())
        if row in runs
    }
    summary["goals"] = goals(plan.study.goals, summary, plan.rows("ablation"))
    return summary


def _row(
    runs: Mapping[int, StoredRun], records: Sequence[Finished], times: Mapping[str, Any], metric: str
) -> dict[str, Any]:
    trial, record = records[0]
    stored = list(runs.values())
    own: dict[str, Any] = {}
    partial: dict[str, dict[str, Any]] = {}
    for split in stored[0].results:
        for number, name in enumerate(stored[0].results[split]):
            place = own if number == 0 else partial.setdefault(name, {})
            place[split] = _means([run.results.get(split, {}).get(name, {}) for run in stored])
    step = times.get(trial.pace, {}).get("step")
    trained = [entry["training_seconds"] for _, entry in records if entry.get("training_seconds")]
    return {
        "kind": trial.kind,
        "method": trial.method,
        "seeds": sorted(runs),
        "parameters": record.get("parameters"),
        "length": record.get("max_epoch") or record.get("max_iters"),
        "step_ms": None if step is None else round(1000 * step, 2),
        "training_seconds": round(float(np.mean(trained)), 1) if trained else None,
        "results": own,
        "partial": partial,
        "curve": _curve(stored, metric),
        "folders": [str(Path("trials", *entry.folder.parts[-2:])) for entry, _ in records],
    }


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{metric: {"mean", "spread", "values"}} of one row of several runs."""
    names = [name for name in found[0] if _METRIC.fullmatch(name) and all(name in one for one in found)]
    values = {name: [float(one[name]) for one in found] for name in names}
    return {
        name: {"mean": _round(np.mean(one)), "spread": _round(spread(one)), "values": [_round(v) for v in one]}
        for name, one in values.items()
    }


def _curve(runs: Sequence[StoredRun], metric: str) -> dict[str, list[dict[str, Any]]]:
    """{validation split: [{"iteration", "mean", "spread"}]} after each round, of the seeds that have it."""
    points: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for entry in run.log:
            for key, value in entry.items():
                split = key.removesuffix(f"_{metric}")
                if split != key and isinstance(entry.get("epoch"), int) and isinstance(value, int | float):
                    points.setdefault(split, {}).setdefault(int(entry["iteration"]), []).append(float(value))
    return {
        split: [
            {"iteration": at, "mean": _round(np.mean(values)), "spread": _round(spread(values))}
            for at, values in sorted(found.items())
        ]
        for split, found in points.items()
    }


def _splits(runs: Runs) -> dict[str, dict[str, Any]]:
    """{split: {"queries"}}; all runs were asked the same, else DataError."""
    splits: dict[str, dict[str, Any]] = {}
    asked: dict[str, tuple[str, Any]] = {}
    for row, of_row in runs.items():
        for seed, run in of_row.items():
            for split, found in run.results.items():
                splits.setdefault(split, {"queries": next(iter(found.values()))["queries"]})
                this = run.asked(split)
                name, other = asked.setdefault(split, (f"{row}, seed {seed}", this))
                if this != other:
                    raise DataError(
                        f"{split}: {name} and {row}, seed {seed} were asked different queries, or of different "
                        "galleries: the data changed between them. Delete the older of their folders and run the "
                        "study again"
                    )
    return splits


def _best(rows: Mapping[str, Any], names: Iterable[str], split: str, metric: str) -> str | None:
    """The row with the highest mean."""
    means = {name: found["mean"] for name in names if name in rows and (found := tables.of(rows[name], split, metric))}
    return max(means, key=lambda name: means[name], default=None)


def compared(ours: Mapping[int, StoredRun], theirs: Mapping[int, StoredRun], split: str, metric: str) -> dict[str, Any]:
    """{"mean": how much higher ours is, "spread": the larger of both, "seeds", "low", "high", "p"}: of the seeds that
    both have. The last three are null where the queries' ranks were not kept."""
    seeds = sorted(set(ours) & set(theirs))
    sides = [[_metric(side[seed], split, metric) for seed in seeds] for side in (ours, theirs)]
    nothing = {"mean": None, "spread": None, "seeds": seeds, "low": None, "high": None, "p": None}
    if not seeds or any(value is None for side in sides for value in side):
        return nothing
    spreads = [spread(side) for side in sides]
    found = {
        **nothing,
        "mean": _round(np.mean(sides[0]) - np.mean(sides[1])),
        "spread": None if None in spreads else _round(max(spreads)),
    }
    kept = [[side[seed].values(split, metric) for seed in seeds] for side in (ours, theirs)]
    if all(values is not None for side in kept for values in side):
        stacked = [[np.stack(parts) for parts in zip(*side, strict=True)] for side in kept]
        estimate = paired_bootstrap(*stacked)
        found |= {"low": _round(estimate.low), "high": _round(estimate.high), "p": round(estimate.p, 5)}
    return found


def _metric(run: StoredRun, split: str, metric: str) -> float | None:
    found = run.results.get(split)
    return None if not found else next(iter(found.values())).get(metric)


def goals(wanted: GoalsSchema, summary: Mapping[str, Any], ablations: Sequence[str]) -> list[dict[str, Any]]:
    """A line a goal: {"goal", "met": true, false, or null: cannot be told yet, "by": points short, "detail"}."""
    lines = []
    metric = summary["metric"]
    leads = {found["split"]: found for found in summary["differences"] if found["metric"] == metric}
    for split, least in wanted.ahead.items():
        found = leads.get(split)
        what = f"at least {least:g} points above" if least else "not below"
        mean = found and found["mean"]
        against = f" ({signed(mean)} to {found['against']})" if found else ""
        lines.append(_goal(f"{split}: {metric} {what} the best other method", mean, least, against))
        if wanted.spreads:
            wide = found and found["spread"]
            needed = None if wide is None else wanted.spreads * wide
            detail = "" if needed is None else f" (spread {wide:.1f})"
            goal = f"{split}: this lead above {wanted.spreads:g} spreads"
            lines.append(_goal(goal, mean, needed, detail, above=True))
    if wanted.removal_costs is not None:
        for name in ablations:
            found = summary["ablations"].get(name, {})
            costs = {split: one["cost"] for split, one in found.items() if split in wanted.ahead}
            split = max(costs, key=lambda key: costs[key], default=None)
            detail = "" if split is None else f" ({signed(costs[split])} on {split})"
            what = f"{name}: costs {wanted.removal_costs:g} or more points on one of {', '.join(wanted.ahead)}"
            lines.append(_goal(what, costs.get(split), wanted.removal_costs, detail))
    return lines


signed = tables.signed


def _goal(goal: str, value: float | None, least: float | None, detail: str, above: bool = False) -> dict[str, Any]:
    if value is None or least is None:
        return {"goal": goal, "met": None, "by": None, "detail": detail}
    met = value > least if above else value >= least
    return {"goal": goal, "met": bool(met), "by": 0.0 if met else _round(least - value), "detail": detail}


def _round(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)
