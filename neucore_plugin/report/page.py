"""One HTML file with everything in it: result tables, charts, retrieved pictures, concept maps. Nothing is fetched.

Pictures are embedded as small PNG or JPEG data; all text passes the template's escaping.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from neucore_plugin.common.files import atomic_write
from neucore_plugin.common.images import Picture
from neucore_plugin.common.names import name_of
from neucore_plugin.report.charts import CHART_STYLE, row_label, split_chart_svg
from neucore_plugin.report.curves import LINE_STYLE, Interval, Panel, interval_chart_svg, line_chart_svg
from neucore_plugin.report.examples import Examples, tile
from neucore_plugin.report.pictures import LARGE, Pictures
from neucore_plugin.report.pictures import heat_overlay as heat_overlay
from neucore_plugin.report.table import (
    Results,
    difference_text,
    interval_text,
    mean_text,
    metric_columns,
    p_text,
    significant,
)

log = logging.getLogger(__name__)


def write_report(
    path: str | Path,
    title: str,
    results: Results,
    examples: "Iterable[Mapping[str, Any]] | Examples | None" = None,
    settings: Mapping[str, Any] | None = None,
    credit: str | None = None,
    per_change: Results | None = None,
    fit: str = "pad",
    curves: Sequence[Panel] = (),
    notice: str = "",
) -> list[str]:
    """Write the report; returns the pictures that could not be shown (an empty frame stands for each).

    results: {split: {row: {"R@1": percent, ..., "median_rank": .., "queries": n}}}; per_change: {split: {change: ...}}.
    examples: dicts with split, query_id, reference (path), caption, change, rank (None: not ranked), targets (ids),
    retrieved (dicts of id, path, score, correct), target (dict of id, path) and maps: None or dicts of concept,
    reference [h,w] and candidate [h,w] in [0,1], the candidate being the first retrieved picture; where they have them
    reference_name and the name of a target or retrieved picture, shown in place of its id; pick: why an example is
    shown ("sample", which is what is taken for granted, "best", "worst"). Or an `Examples`, made of such earlier.
    settings: nested mapping, shown as a table. fit: how the image processor makes pictures square ("pad", "crop" or
    "stretch"), so that maps lie where they belong. curves: panels of the training. notice: a line under the title.
    """
    made = examples if isinstance(examples, Examples) else Examples.of(examples or (), fit, credit)
    metrics = metric_columns(results)
    recalls = [name for name in metrics if name.startswith("R@")]
    columns = [*metrics, "median_rank", "queries"]
    examples_by_split = made.in_order([*results, *(per_change or {})])
    landed = []
    for split, picks in examples_by_split:  # each card that has maps is numbered, to be linked
        for card in picks["sample"]:
            card["at"] = 0
        with_maps = [card for card in picks["sample"] if card["maps"]]
        landed += [(split, with_maps, picks["region"])] if with_maps or picks["region"] else []
    for number, card in enumerate((card for _, *both in landed for cards in both for card in cards), start=1):
        card["at"] = number
    drawn = [(split, rows) for split, rows in results.items() if rows]
    page = {
        "kind": "report",
        "title": title,
        "columns": columns,
        "subset": any(name.startswith("R_subset@") for name in metrics),
        "results": [(_title(split, rows), _table(rows, columns, best=True)) for split, rows in drawn],
        "charts": [(split, Markup(split_chart_svg(split, rows, recalls))) for split, rows in drawn if recalls],
        "changes": [(split, _table(rows, columns)) for split, rows in (per_change or {}).items() if rows],
        "examples": examples_by_split,
        "landed": landed,
        "inside": [(split, lines) for split, rows in drawn if (lines := list(_inside(rows)))],
        "robust": [line for split, rows in drawn for line in _robust(split, rows)],
        "settings": list(_flat(settings or {})),
        "curves": [(panel.title, Markup(line_chart_svg(panel))) for panel in curves],
        "notice": notice,
    }
    return _write(path, page, made.missing, credit or made.credit)


def comparison_page(
    path: str | Path, title: str, found: Mapping[str, Any], curves: Sequence[Panel] = (), settings: Any = None
) -> None:
    """Write a comparison (see `evaluation.comparison.compare`) with its plots; curves: panels with a line a group."""
    base, splits = found["baseline"], []
    for split, metrics in found["splits"].items():
        rows = []
        for group in found["groups"]:
            own = {metric: entries[group["name"]] for metric, entries in metrics.items()}
            cells = [
                {
                    "mean": mean_text(entry),
                    "difference": difference_text(entry) if "difference" in entry else "",
                    "interval": interval_text(entry.get("difference_interval")) if "p" in entry else "",
                    "p": p_text(entry["p_holm"]) if "p" in entry else "",
                    "sure": significant(entry),
                }
                for entry in own.values()
            ]
            rows.append({"name": group["name"], "runs": len(group["runs"]), "cells": cells})
        charts = []
        for metric, entries in list(metrics.items())[:1]:
            means, differences = [], []
            for name, entry in entries.items():
                single = entry["values"] if len(entry["values"]) > 1 else ()
                means.append(Interval(name, entry["mean"], *entry.get("interval", (None, None)), single))
                if "difference" in entry:
                    ends = entry.get("difference_interval", (None, None))
                    differences.append(Interval(name, entry["difference"], *ends, (), not significant(entry)))
            charts.append((metric, Markup(interval_chart_svg(f"{split}, {metric}", means))))
            if differences:
                chart = interval_chart_svg(f"{split}, {metric} less {base}", differences, zero=True)
                charts.append((f"{metric} less that of {base}", Markup(chart)))
        splits.append({"name": split, "metrics": list(metrics), "rows": rows, "charts": charts})
    page = {
        "kind": "compare",
        "title": title,
        "baseline": base,
        "groups": found["groups"],
        "notes": found["notes"],
        "splits": splits,
        "tested": any("p" in e for ms in found["splits"].values() for es in ms.values() for e in es.values()),
        "curves": [(panel.title, Markup(line_chart_svg(panel))) for panel in curves],
        "settings": list(_flat(settings or {})),
    }
    _write(path, page, [], None)


def study_page(
    path: str | Path,
    title: str,
    sections: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    goals: Sequence[Mapping[str, Any]],
    runs: Sequence[tuple[str, Sequence[str]]],
    settings: Any = None,
) -> None:
    """Write the page of a study.

    sections: dicts of name, title, note, head, rows (cells, `**` around what is bold) and charts [(title, SVG)].
    goals: dicts of goal, met (true, false or None), by, detail. runs: (row, folders beside the page) to be linked.
    """
    parts = [
        {
            **section,
            "rows": [[_bold(cell) for cell in row] for row in section["rows"]],
            "charts": [(name, Markup(svg)) for name, svg in section["charts"]],
        }
        for section in sections
    ]
    page = {"kind": "study", "title": title, "parts": parts, "notes": notes, "goals": goals, "runs": runs}
    _write(path, {**page, "settings": list(_flat(settings or {}))}, [], None)


def _bold(cell: str) -> Markup:
    """Markdown's bold as HTML, all else escaped."""
    pieces = enumerate(cell.replace("`", "").split("**"))
    return Markup("").join(Markup("<strong>{}</strong>").format(text) if n % 2 else text for n, text in pieces)


def search_page(
    path: str | Path,
    reference: Picture | Sequence[Picture] | None,
    caption: str | Sequence[str] | None,
    hits: Iterable[Any],
    title: str = "Search",
    credit: str | None = None,
    without_images: Sequence[Picture] = (),
    without_texts: Sequence[str] = (),
    concepts: Sequence[tuple[str, Sequence[str]]] = (),
) -> list[str]:
    """Write one query with its results; returns the pictures that could not be shown.

    reference, caption: one, or several: a list of references, the turns of a dialogue. hits: objects with name, path
    and score, best first; where they have `terms`, a mapping, these are shown. without_images, without_texts: what the
    results should not be like. concepts: (text, the words of it taken as concepts).
    """
    pictures = Pictures("pad")

    def shown(several: Picture | Sequence[Picture] | None) -> list[tuple[str | None, str]]:
        """(picture, name) of each."""
        several = several if isinstance(several, list | tuple) else [several]
        given = [one for one in several if one is not None]
        names = [name_of(Path(one).name) if isinstance(one, str | os.PathLike) else "" for one in given]
        return [(pictures.thumb(one, LARGE), name) for one, name in zip(given, names, strict=True)]

    found = [
        {"id": hit.name, "path": hit.path, "score": hit.score, "terms": getattr(hit, "terms", None)} for hit in hits
    ]
    page = {
        "kind": "search",
        "title": title,
        "references": shown(reference),
        "captions": [text for text in ([caption] if isinstance(caption, str) else caption or ()) if text],
        "unlike": shown(list(without_images)),
        "unlike_texts": list(without_texts),
        "concepts": [(text, ", ".join(words)) for text, words in concepts],
        "hits": [tile(rank, item, pictures) for rank, item in enumerate(found, start=1)],
    }
    return _write(path, page, pictures.missing, credit)


def _inside(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[list[str]]:
    """Cells of the table of where concepts land: of each kind of change a line."""
    for values in rows.values():
        for change, row in (values.get("landing") or {}).items():
            even = row["uniform"]
            shares = [(row.get(side), even) for side in ("reference", "target")]
            cells = ["–" if share is None else f"{share:.1f} ({share / even:.2f} times)" for share, even in shares]
            yield [change, f"{row['queries']:,}", f"{even:.1f}", *cells]


def _robust(split: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterable[list[str]]:
    """Cells of the table of other wordings and near-twins: of a split a line."""
    for values in rows.values():
        if told := values.get("robustness"):
            asked, twins = told.get("wordings"), told.get("near_twins")
            cells = ["–"] * 6
            if asked:
                own, *others = (f"{value:.1f}" for value in asked["R@1"])
                cells[:4] = own, ", ".join(others), f"{asked['spread']:.1f}", f"{asked['changed']:.1f}"
            if twins:
                cells[4:] = f"{twins['among_5']:.1f}", f"{twins['ahead']:.1f}"
            yield [split, *cells]


def _title(split: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A split's name, with its protocol and what was skipped where a row says so."""
    values = next(iter(rows.values()))
    parts = [split] + ([f"protocol {values['protocol']}"] if values.get("protocol") else [])
    parts += [f"{values['skipped_queries']} queries skipped"] if values.get("skipped_queries") else []
    return " · ".join(parts)


def _table(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str], best: bool = False) -> list[dict[str, Any]]:
    """Rows of formatted cells; `best` marks the highest recall and the lowest median rank of each column."""
    table = []
    for name, values in rows.items():
        cells = []
        for column in columns:
            value = values.get(column)
            others = [v for v in (row.get(column) for row in rows.values()) if v is not None and v == v]
            top = min(others, default=None) if column == "median_rank" else max(others, default=None)
            mark = best and column != "queries" and len(others) > 1 and value == top
            text = _number(value, column)
            bar = round(value) if column.startswith("R") and text != "–" else 0
            cells.append({"text": text, "best": mark, "bar": bar})
        table.append({"name": row_label(name) if best else name or "(none)", "cells": cells})
    return table


def _number(value: float | None, column: str) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.2f}" if column.startswith(("R", "mAP")) else f"{value:,.1f}".removesuffix(".0")


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, text) of a nested mapping."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield name, ", ".join(map(str, value))
    elif name:
        yield name, "–" if value is None else str(value)


def _write(path: str | Path, page: dict[str, Any], missing: list[str], credit: str | None) -> list[str]:
    engine = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    chart_style = Markup(CHART_STYLE + LINE_STYLE)
    template = engine.get_template("report.html.j2")
    text = template.render(**page, credit=credit, missing=missing, chart_style=chart_style)
    with atomic_write(path, "w") as stream:
        stream.write(text)
    if missing:
        log.warning("%d pictures could not be read; %s shows empty frames for them", len(missing), path)
    return missing
