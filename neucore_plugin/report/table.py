"""The result table: its columns, and the table as text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.text import visible

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # {split: {row: {"R@1": percent, "median_rank", ...}}}

_KINDS = ("R", "R_subset", "mAP")


def metric_columns(results: Results) -> list[str]:
    """The metrics that any row has, as R@1, R@5, R_subset@1, mAP@5."""
    names = {name for rows in results.values() for values in rows.values() for name in values}
    metrics = [match for name in names if (match := re.fullmatch(rf"({'|'.join(_KINDS)})@(\d+)", name))]
    return [match[0] for match in sorted(metrics, key=lambda match: (_KINDS.index(match[1]), int(match[2])))]


def check_results(results: Any, source: Any) -> None:
    """DataError that names the file, the split and the row, where something is no table as `Results`."""
    for split, rows in _items(results, source, "its results"):
        for row, values in _items(rows, source, f"split {split!r}"):
            place = f"split {split!r}, row {row!r}"
            found = dict(_items(values, source, place))
            numbers = [found.get("median_rank"), *(found[name] for name in metric_columns({split: {row: found}}))]
            if not all(isinstance(number, int | float) for number in numbers) or type(found.get("queries")) is not int:
                raise DataError(f"{source}: is no result file: {place} lacks its numbers; evaluate again")


def _items(value: Any, source: Any, place: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise DataError(f"{source}: is no result file: {place} must be a JSON object; evaluate again")
    return value.items()


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """A comparison (see `evaluation.comparison.compare`) as text: of each split the means, then the differences."""
    groups = {entry["name"]: len(entry["runs"]) for entry in found["groups"]}
    labels = {name: visible(name) + (f" ({count} runs)" if count > 1 else "") for name, count in groups.items()}
    first = max(14, *(len(label) + 2 for label in labels.values()))
    lines: list[str] = []
    for split, metrics in found["splits"].items():
        lines += [f"{visible(split):<{first}}" + "".join(f"{metric:>16}" for metric in metrics)]
        for name, label in labels.items():
            cells = [mean_text(entries[name]) for entries in metrics.values()]
            lines.append(f"  {label:<{first - 2}}" + "".join(f"{cell:>16}" for cell in cells))
        for name, label in labels.items():
            own = [entries[name] for entries in metrics.values()]
            if all("difference" not in entry for entry in own):
                continue
            lines.append(f"  {label} - {labels[found['baseline']]}")
            rows = {"difference": [difference_text(e) for e in own]}
            if any("p" in entry for entry in own):
                rows["95 %"] = [interval_text(e.get("difference_interval")) for e in own]
                rows["p (Holm)"] = [p_text(e.get("p_holm")) for e in own]
            for title, cells in rows.items():
                lines.append(f"    {title:<{first - 4}}" + "".join(f"{cell:>16}" for cell in cells))
        lines.append("")
    return [*lines, *(f"note: {visible(note)}" for note in found["notes"])]


def mean_text(entry: Mapping[str, Any]) -> str:
    """64.90, or 64.90 ±0.41 with the standard deviation over seeds."""
    return f"{entry['mean']:.2f}" + ("" if entry["spread"] is None else f" ±{entry['spread']:.2f}")


def difference_text(entry: Mapping[str, Any]) -> str:
    """+1.20, with a star where it is significant; "–" for the baseline."""
    return f"{entry['difference']:+.2f}{'*' if significant(entry) else ''}" if "difference" in entry else "–"


def interval_text(ends: Sequence[float] | None) -> str:
    """[-0.30, +2.70]."""
    return f"[{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else "–"


def p_text(p: float | None) -> str:
    """0.031; <0.001 below that."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def significant(entry: Mapping[str, Any]) -> bool:
    """Whether a difference is real by its corrected p."""
    return entry.get("p_holm", 1.0) < 0.05


def table_lines(results: Results) -> list[str]:
    """The result table as text, one line a split and row; "–" where a row lacks a metric that others have."""
    wide = {name: 6 if name.startswith("R@") else 10 for name in metric_columns(results)}
    splits = max([12, *(len(split) for split in results)])
    names = max([11, *(len(row) for rows in results.values() for row in rows)])
    protocols = any("protocol" in values for rows in results.values() for values in rows.values())
    head = " ".join([f"{'split':<{splits}} {'query':<{names}}", *(f"{name:>{width}}" for name, width in wide.items())])
    lines = [f"{head}  median  queries{'  protocol' if protocols else ''}"]
    for split, rows in results.items():
        for row, values in rows.items():
            cells = [f"{values[n]:{w}.2f}" if n in values else f"{'–':>{w}}" for n, w in wide.items()]
            line = " ".join([f"{split:<{splits}} {row:<{names}}", *cells])
            line += f" {values['median_rank']:7.1f} {values['queries']:8d}"
            line += f"  {values['protocol']}" if "protocol" in values else ""
            lines.append(line + (f" ({values['skipped_queries']} skipped)" if values.get("skipped_queries") else ""))
    return lines
