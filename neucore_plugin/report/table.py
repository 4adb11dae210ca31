"""The result table: its columns, and the table as text."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from neucore_plugin.common.errors import DataError

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
