"""The page of one run, from what its folder holds: finished, under way, or an evaluation alone."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neucore_plugin.evaluation.comparison import Group, settings_that_differ
from neucore_plugin.evaluation.stored import EXAMPLES, StoredRun
from neucore_plugin.report import Examples, Panel, row_label, write_report
from neucore_plugin.report import comparison_page as write_comparison

_METRIC = re.compile(r"(.+?)_((?:R|R_subset|mAP)@\d+)")
_PANELS = 4  # validation splits that are drawn


def run_page(run: StoredRun, path: str | Path, title: str, examples: Examples | None = None) -> None:
    """Write the page. examples: those of the folder where not given."""
    kept = run.folder / EXAMPLES
    if examples is None:
        examples = Examples.read(kept) if kept.is_file() else Examples([], [], None)
    settings = run.provenance or {"config": run.config}
    told = {"curves": learning_curves(run), "notice": standing(run)}
    write_report(path, title, run.results, examples, settings, per_change=run.per_change, **told)


def comparison_page(groups: Sequence[Group], found: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of a comparison: with the validation curves of each group's first run, and the settings that
    differ."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}  # {panel: {group: points}}
    axes: dict[str, str] = {}
    for group in groups:
        for panel in learning_curves(group.runs[0]):
            for metric, points in panel.lines.items() if panel.percent else ():
                title = f"{panel.title.partition(':')[0]}: validation {metric}"
                lines.setdefault(title, {})[group.name] = list(points)
                axes[title] = panel.x
    shown = next(iter(next(iter(found["splits"].values()), {})), "R@1")
    curves = [
        Panel(title, axes[title], of_group, percent=True)
        for title, of_group in lines.items()
        if title.endswith(f" {shown}") and len(of_group) > 1
    ]
    methods = " and ".join(group.name for group in groups) if len(groups) <= 2 else f"{len(groups)} methods compared"
    write_comparison(path, methods, found, curves[:_PANELS], settings_that_differ(groups))


def run_title(run: StoredRun) -> str:
    """What a run is called on a page: its method, its data sets, its folder."""
    method = next((run.row(split) for split in run.results), "") or "results"
    names = ", ".join(sorted(run.section("datasets")))
    return f"{row_label(method)}{f' on {names}' if names else ''}: {run.folder.resolve().name}"


def standing(run: StoredRun) -> str:
    """One sentence on a run that has no evaluation yet; "" for one that has."""
    if run.evaluated:
        return ""
    rounds = [entry["epoch"] for entry in run.log if isinstance(entry.get("epoch"), int) and "train_loss" in entry]
    wanted = run.section("run").get("max_epoch")
    done = f"{max(rounds) + 1} of {wanted} epochs" if rounds and wanted else f"{max(rounds, default=-1) + 1} rounds"
    results = "the results below are those of the last validation" if run.results else "nothing was validated yet"
    return f"Not finished (status: {run.record.get('status')}): {done} are trained; {results}."


def learning_curves(run: StoredRun) -> list[Panel]:
    """Losses, and the metrics of each validation split, over epochs (or iterations)."""
    by_epoch = run.section("run").get("runner") != "runner_cir_iter"
    losses: dict[str, list[tuple[float, float]]] = {}
    metrics: dict[str, dict[str, list[tuple[float, float]]]] = {}
    best: dict[str, int] = {}
    where: dict[int, float] = {}  # of a round, its place on the axis
    for entry in run.log:
        epoch, iteration = entry.get("epoch"), entry.get("iteration")
        if type(epoch) is not int or not isinstance(iteration, int | float):
            continue
        x = where[epoch] = float(epoch + 1 if by_epoch else iteration)
        for key, value in entry.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if key.startswith("train_loss"):
                losses.setdefault(key.removeprefix("train_").replace("_", " "), []).append((x, value))
            elif found := _METRIC.fullmatch(key):
                metrics.setdefault(found[1], {}).setdefault(found[2], []).append((x, value))
            elif key.endswith("_best_epoch"):
                best[key.removesuffix("_best_epoch")] = int(value)
    axis = "epoch" if by_epoch else "iteration"
    panels = [Panel("Training loss, mean of each round", axis, losses)] if losses else []
    for split in list(metrics)[:_PANELS]:
        mark = (where[best[split]], "best") if best.get(split) in where else None
        panels.append(Panel(f"{split}: percent of queries", axis, metrics[split], percent=True, mark=mark))
    return panels
