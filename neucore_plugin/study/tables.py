"""The tables of a study as Markdown, from what study.json holds; those of README and docs are made of them too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neucore_plugin.common.text import visible

Summary = Mapping[str, Any]
COSTS = "A step's milliseconds were taken alone, the minutes of a training while others ran; both are processor time."
_NAMES = {"neucore": "NEUCORE", "text_only": "text only", "image_only": "image only"}


def metrics_shown(summary: Summary) -> list[str]:
    """The metric of the goals, and R@10 beside it where it was counted."""
    first = summary["metric"]
    there = {name for row in summary["rows"].values() for part in row["results"].values() for name in part}
    return [first, *(["R@10"] if "R@10" in there and first != "R@10" else [])]


def value(found: Mapping[str, Any] | None, bold: bool = False) -> str:
    """`64.9 ± 1.2`, `64.9` of one seed alone, `–` where there is none."""
    if not found or found.get("mean") is None:
        return "–"
    mean = f"{found['mean']:.1f}"
    spread = found.get("spread")
    return f"{f'**{mean}**' if bold else mean}{'' if spread is None else f' ± {spread:.1f}'}"


def signed(number: float | None) -> str:
    """`+1.2`."""
    return "–" if number is None else f"{number:+.1f}"


@dataclass(frozen=True)
class Table:
    """Cells as Markdown has them: `**64.9**` is bold."""

    head: list[str]
    rows: list[list[str]]

    @property
    def lines(self) -> list[str]:
        """The table in Markdown; a bar within a cell would end it."""
        cells = [[visible(cell).replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return [lines[0], f"|{'---|' * len(self.head)}", *lines[1:]]


def of(row: Mapping[str, Any], split: str, metric: str) -> Mapping[str, Any] | None:
    """{"mean", "spread", "values"} of a row; None where it has none."""
    return row["results"].get(split, {}).get(metric)


def _cell(row: Mapping[str, Any], split: str, metrics: Sequence[str], best: Mapping[str, Any]) -> str:
    shown = []
    for metric in metrics:
        found = of(row, split, metric)
        shown.append(value(found, bold=bool(found) and found["mean"] == best.get((split, metric))))
    return " / ".join(shown)


def _best(rows: Mapping[str, Any], splits: Sequence[str], metrics: Sequence[str]) -> dict[tuple[str, str], float]:
    best = {}
    for split in splits:
        for metric in metrics:
            means = [found["mean"] for row in rows.values() if (found := of(row, split, metric))]
            if means:
                best[split, metric] = max(means)
    return best


def rows_of(summary: Summary, kind: str) -> dict[str, Any]:
    """{name: row} of methods, ablations or curves, in the study's order."""
    return {name: row for name, row in summary["rows"].items() if row["kind"] == kind}


def methods_table(summary: Summary) -> Table:
    """A row a method: what it costs, and each split's metrics; the best of each in bold."""
    metrics, splits, rows = metrics_shown(summary), list(summary["splits"]), rows_of(summary, "method")
    best = _best(rows, splits, metrics)
    costs = any(row.get("step_ms") for row in rows.values())
    head = ["method", "parameters", *(["ms a step", "epochs", "minutes"] if costs else []), *splits]
    lines = []
    for name, row in rows.items():
        minutes = row.get("training_seconds") and row["training_seconds"] / 60
        cost = [_number(row.get("step_ms")), _number(row.get("length")), _number(minutes)] if costs else []
        cells = [_cell(row, split, metrics, best) for split in splits]
        lines.append([_label(name), _millions(row.get("parameters")), *cost, *cells])
    return Table(head, lines)


def partial_table(summary: Summary) -> Table:
    """A row a split: the main method, and the same model with one half of each query left out."""
    metrics, main = metrics_shown(summary), summary.get("job") or summary["rows"][summary["main"]]
    parts = list(main["partial"])
    shown = " / ".join(metrics)
    name = _NAMES.get(summary["main"], summary["main"])
    head = ["split", "queries", f"{name} {shown}", *(f"{_NAMES.get(part, part)} {shown}" for part in parts)]
    lines = []
    for split, about in summary["splits"].items():
        sides = {name: {"results": found} for name, found in (("", main["results"]), *main["partial"].items())}
        best = _best(sides, [split], metrics)
        meaning = f": {about['meaning']}" if about.get("meaning") else ""
        cells = [_cell(side, split, metrics, best) for side in sides.values()]
        lines.append([f"{split}{meaning}", f"{about['queries']:,}", *cells])
    return Table(head, lines)


def differences_table(summary: Summary) -> Table:
    """A row a split: the main method beside the best other one."""
    lines = []
    for found in summary["differences"]:
        lines.append([found["split"], found["metric"], _label(found["against"]), signed(found["mean"]),
                      _number(found["spread"]), _interval(found)])  # fmt: skip
    return Table(["split", "metric", "best other method", "difference", "spread", "95 % interval"], lines)


def ablations_table(summary: Summary) -> Table:
    """A row an ablation: the points that it costs, with their 95 % interval."""
    splits = list(summary["splits"])
    lines = []
    for name, costs in summary["ablations"].items():
        cells = [f"{signed(costs[split]['cost'])} {_interval(costs[split])}".rstrip(" –") if split in costs else "–"
                 for split in splits]  # fmt: skip
        lines.append([name, *cells])
    return Table(["left out", *splits], lines)


def curves_table(summary: Summary) -> Table:
    """A row a method and curve."""
    metrics, splits = metrics_shown(summary), list(summary["splits"])
    rows = rows_of(summary, "curve").items()
    return Table(["trial", *splits], [[name, *(_cell(row, s, metrics, {}) for s in splits)] for name, row in rows])


def goals_list(summary: Summary) -> list[str]:
    """A line a goal, as Markdown."""
    words = {True: "met", False: "**not met**", None: "open"}
    lines = []
    for goal in summary["goals"]:
        by = "" if goal["met"] in (True, None) else f" by {goal['by']:.1f}"
        lines.append(f"- {visible(goal['goal'])}: {words[goal['met']]}{by}{visible(goal['detail'])}")
    return lines


@dataclass(frozen=True)
class Section:
    """A part of the study's page: `name`, a heading, a line under it, a table."""

    name: str
    title: str
    note: str
    table: Table


def sections(summary: Summary) -> list[Section]:
    """The parts that this study has."""
    shown = " / ".join(metrics_shown(summary))
    note = f"{shown} in percent, mean ± standard deviation over seeds. {COSTS}"
    found = [Section("methods", "Methods", note, methods_table(summary))]
    if summary["rows"].get(summary["main"], {}).get("partial"):
        note = "The same model, with the image or the text of each query left out."
        found.append(Section("half", "Half a query", note, partial_table(summary)))
    if summary["differences"]:
        note = "The spread is the larger one of both methods'. Intervals: paired bootstrap over the queries."
        found.append(Section("differences", "Beside the best other method", note, differences_table(summary)))
    if summary["ablations"]:
        note = f"Points of {summary['metric']} that leaving it out costs, with the 95 % interval of the queries."
        found.append(Section("ablations", "What each part is worth", note, ablations_table(summary)))
    if rows_of(summary, "curve"):
        found.append(Section("curves", "Curves", "The first seed alone.", curves_table(summary)))
    return found


def page(summary: Summary) -> str:
    """The whole study as Markdown."""
    parts = [f"# {visible(summary['title'])}", "", *facts(summary), ""]
    for section in sections(summary):
        parts += [f"## {section.title}", "", section.note, "", *section.table.lines, ""]
    if summary["goals"]:
        parts += ["## Goals", "", *goals_list(summary), ""]
    return "\n".join(parts)


def facts(summary: Summary) -> list[str]:
    """What was run, and what of it is not there."""
    seeds = ", ".join(map(str, summary["seeds"]))
    budget = "the epochs of the config" if not summary["minutes"] else (
        f"{summary['minutes']:g} minutes of processor time a training, from which the epochs follow"
    )  # fmt: skip
    lines = [f"Made by `{visible(summary['command'])}`; seeds {seeds}; each training has {budget}."]
    if summary.get("note"):
        lines.append(f"{visible(summary['note'][:1].upper() + summary['note'][1:])}.")
    if summary["missing"]:
        rows: dict[str, list[str]] = {}
        for title in summary["missing"]:
            row, _, seed = title.rpartition(", seed ")
            rows.setdefault(row, []).append(seed)
        told = "; ".join(f"{row} (seed {', '.join(seeds)})" for row, seeds in rows.items())
        lines.append(f"Not there (not run, or failed): {visible(told)}.")
    return lines


def _label(name: str) -> str:
    return "NEUCORE" if name == "neucore" else f"`{name}`"


def _millions(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e6:.1f} M"


def _number(number: float | None) -> str:
    return "–" if number is None else f"{number:g}" if isinstance(number, int) else f"{number:.1f}"


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found.get("low"), found.get("high")
    return "–" if low is None or high is None else f"({low:+.1f} to {high:+.1f})"
