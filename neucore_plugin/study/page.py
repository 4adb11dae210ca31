"""The files of a study that people read: Markdown, one self-contained page, plots as SVG."""

from collections.abc import Iterator
from pathlib import Path

from neucore_plugin.common.files import atomic_write
from neucore_plugin.report import Interval, Panel, interval_chart_svg, line_chart_svg, row_label, standalone, study_page
from neucore_plugin.study import tables
from neucore_plugin.study.tables import Summary, of, rows_of

PLOTS = "plots"


def write_pages(folder: Path, summary: Summary) -> None:
    """Write study.md, study.html and plots/*.svg into the folder of a study."""
    with atomic_write(folder / "study.md", "w") as stream:
        stream.write(tables.page(summary))
    charts = list(_charts(summary))
    for name, _, _, svg in charts:
        with atomic_write(folder / PLOTS / f"{name}.svg", "w") as stream:
            stream.write(standalone(svg))
    sections = [
        {
            "name": section.name,
            "title": section.title,
            "note": section.note,
            "head": section.table.head,
            "rows": section.table.rows,
            "charts": [(title, svg) for _, name, title, svg in charts if name == section.name],
        }
        for section in tables.sections(summary)
    ]
    runs = [(row, folders) for row, found in summary["rows"].items() if (folders := found.get("folders"))]
    notes = [line.replace("`", "") for line in tables.facts(summary)]
    study_page(folder / "study.html", summary["title"], sections, notes, summary["goals"], runs, summary["versions"])


def _charts(summary: Summary) -> Iterator[tuple[str, str, str, str]]:
    """(name of the file, name of the section that it belongs to, title, SVG)."""
    metric, methods = summary["metric"], rows_of(summary, "method")
    for split in summary["splits"]:
        found = {name: value for name, row in methods.items() if (value := of(row, split, metric))}
        if found:
            title = f"{split}: {metric}, mean ± spread"
            yield f"methods-{split}", "methods", title, interval_chart_svg(title, [_dot(*one) for one in found.items()])
    for split in {split: None for row in methods.values() for split in row["curve"]}:
        lines = {
            row_label(name): [(point["iteration"], point["mean"]) for point in row["curve"][split]]
            for name, row in methods.items()
            if row["curve"].get(split)
        }
        panel = Panel(f"{split}: {metric} while training", "iteration", lines)
        yield f"training-{split}", "methods", panel.title, line_chart_svg(panel)
    leads = [found for found in summary["differences"] if found["metric"] == metric]
    if leads:
        title = f"{metric} above the best other method"
        rows = [Interval(f"{one['split']}, {one['against']}", one["mean"], one["low"], one["high"]) for one in leads]
        yield "differences", "differences", title, interval_chart_svg(title, rows, zero=True)
    for split in summary["splits"]:
        costs = {name: found[split] for name, found in summary["ablations"].items() if split in found}
        if costs:
            title = f"{split}: points of {metric} that it costs"
            rows = [Interval(name, one["cost"], one["low"], one["high"]) for name, one in costs.items()]
            yield f"ablations-{split}", "ablations", title, interval_chart_svg(title, rows, zero=True)


def _dot(name: str, value: dict) -> Interval:
    mean, spread, single = value["mean"], value["spread"], value["values"]
    if spread is None:
        return Interval(row_label(name), mean)
    return Interval(row_label(name), mean, mean - spread, mean + spread, single)
