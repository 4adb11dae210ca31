"""Bar charts of recalls as SVG text: inside the report, or alone as a picture for a README."""

from collections.abc import Mapping, Sequence
from html import escape

from neucore_plugin.common.errors import DataError
from neucore_plugin.report.table import Results

# One rule set for the page and for a chart that stands alone; colours keep apart for colour-blind readers and in grey.
CHART_STYLE = """
.chart{--s0:#2563d9;--s1:#e59a2f;--s2:#8f98a8;--s3:#2a9d76;--s4:#b3478c;--ink:#1b2230;--soft:#5d6779;--line:#dfe3ea}
.chart text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;fill:var(--ink)}
.chart .soft{fill:var(--soft)}.chart .grid{stroke:var(--line);stroke-width:1}
.chart .s0{fill:var(--s0)}.chart .s1{fill:var(--s1)}.chart .s2{fill:var(--s2)}.chart .s3{fill:var(--s3)}
.chart .s4{fill:var(--s4)}
@media (prefers-color-scheme:dark){.chart{--s0:#6ea0ff;--s1:#f0b25c;--s2:#8590a5;--s3:#4cc49a;--s4:#de7cba;
--ink:#e8ecf3;--soft:#a3adbf;--line:#343d4d}}
"""
_LABELS = {"neucore": "NEUCORE", "tirg": "TIRG", "artemis": "ARTEMIS", "combiner": "Combiner"}
_COLOURS = 5
_BAR, _GAP, _GROUP_GAP = 27, 3, 26
_LEFT, _PLOT, _TOP, _BOTTOM = 34, 150, 42, 30
_LEGEND = 30

Group = tuple[str, Sequence["float | None"]]


def row_label(name: str) -> str:
    """How a result row is called on a page: `text_only` -> `text only`."""
    return _LABELS.get(name, name.replace("_", " "))


def results_chart_svg(results: Results, metrics: Sequence[str] = ("R@1", "R@10")) -> str:
    """A standalone SVG picture of results {split: {row: {"R@1": percent}}}: a panel a metric, a group a split.

    DataError when there is nothing to draw.
    """
    rows = list(dict.fromkeys(row for rows in results.values() for row in rows))
    panels = [
        (f"{metric} (%)", [(split, [_value(results[split], row, metric) for row in rows]) for split in results])
        for metric in metrics
    ]
    return bar_chart_svg(panels, [row_label(row) for row in rows], "Recall by split", standalone=True)


def split_chart_svg(split: str, rows: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> str:
    """The chart of one split for the report: a group a metric, a bar a result row."""
    groups = [(metric, [_value(rows, row, metric) for row in rows]) for metric in metrics]
    return bar_chart_svg([("percent of queries", groups)], [row_label(row) for row in rows], split)


def bar_chart_svg(
    panels: Sequence[tuple[str, Sequence[Group]]], series: Sequence[str], title: str, standalone: bool = False
) -> str:
    """Panels under each other, each with groups of bars from 0 to 100; a value None leaves its place empty.

    All numbers stand in the description as well, for readers who hear the picture. standalone: with its own style and
    background; otherwise the page brings CHART_STYLE.
    """
    if not series or not panels or not all(groups for _, groups in panels):
        raise DataError("no results to draw; give at least one split with one row of recalls")
    group = len(series) * (_BAR + _GAP) - _GAP
    legend = [8 + sum(map(legend_width, series[:number])) for number in range(len(series) + 1)]
    bars = max(len(groups) for _, groups in panels) * (group + _GROUP_GAP)
    width, height = max(_LEFT + bars + 6, legend[-1]), _LEGEND + len(panels) * (_TOP + _PLOT + _BOTTOM)
    spoken = "; ".join(
        f"{name}, {label}: " + ", ".join(f"{row} {_text(value)}" for row, value in zip(series, values, strict=True))
        for name, groups in panels
        for label, values in groups
    )
    parts = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(f"{title}. {spoken}")}">',
        f"<title>{escape(title)}</title><desc>{escape(spoken)}</desc>",
    ]
    if standalone:
        ground = ".ground{fill:#fff}@media (prefers-color-scheme:dark){.ground{fill:#151a23}}"
        parts.append(f'<style>{CHART_STYLE}{ground}</style><rect class="ground" width="100%" height="100%" rx="8"/>')
    for number, name in enumerate(series):
        x = legend[number]
        parts.append(f'<rect class="s{number % _COLOURS}" x="{x}" y="10" width="12" height="12" rx="3"/>')
        parts.append(f'<text x="{x + 17}" y="20" font-size="12.5">{escape(name)}</text>')
    for number, (name, groups) in enumerate(panels):
        parts += _panel(name, groups, series, _LEGEND + number * (_TOP + _PLOT + _BOTTOM), width, group)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(name: str, groups: Sequence[Group], series: Sequence[str], top: int, width: int, group: int) -> list[str]:
    floor = top + _TOP + _PLOT
    parts = [f'<text class="soft" x="8" y="{top + 16}" font-size="12">{escape(name)}</text>']
    for mark in (0, 25, 50, 75, 100):
        y = floor - _PLOT * mark / 100
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:g}" x2="{width - 6}" y2="{y:g}"/>')
        parts.append(f'<text class="soft" x="{_LEFT - 6}" y="{y + 4:g}" font-size="11" text-anchor="end">{mark}</text>')
    for number, (label, values) in enumerate(groups):
        left = _LEFT + _GROUP_GAP / 2 + number * (group + _GROUP_GAP)
        for place, value in enumerate(values):
            x = left + place * (_BAR + _GAP)
            tall = 0.0 if value is None else _PLOT * min(max(value, 0.0), 100.0) / 100
            spoken = f"{label}, {series[place]}: {_text(value)}"
            parts.append(
                f'<rect class="s{place % _COLOURS}" x="{x:g}" y="{floor - tall:.1f}" width="{_BAR}" '
                f'height="{tall:.1f}" rx="2"><title>{escape(spoken)}</title></rect>'
            )
            parts.append(
                f'<text x="{x + _BAR / 2:g}" y="{floor - tall - 4:.1f}" font-size="11" text-anchor="middle">'
                f"{_text(value)}</text>"
            )
        parts.append(
            f'<text x="{left + group / 2:g}" y="{floor + 18}" font-size="12.5" text-anchor="middle">'
            f"{escape(label)}</text>"
        )
    return parts


def legend_width(name: str) -> float:
    """Points taken by a legend entry: a generous guess, as nothing here can measure text."""
    return 38 + sum(9.5 if letter.isupper() or ord(letter) > 0x2E80 else 7 for letter in name)


def _value(rows: Mapping[str, Mapping[str, float]], row: str, metric: str) -> float | None:
    value = rows.get(row, {}).get(metric)
    return None if value is None or value != value else float(value)  # NaN equals not even itself


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return "100" if value >= 99.95 else f"{value:.1f}"
