"""Line charts (learning curves) and interval charts (means or differences with their uncertainty) as SVG text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from neucore_plugin.report.charts import CHART_STYLE, legend_width

LINE_STYLE = """
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round}
.chart .l0{stroke:var(--s0)}.chart .l1{stroke:var(--s1)}.chart .l2{stroke:var(--s2)}.chart .l3{stroke:var(--s3)}
.chart .l4{stroke:var(--s4)}.chart .zero{stroke:var(--soft);stroke-width:1.5}
.chart .span{stroke:var(--s0);stroke-width:2.5}.chart .faint .span{stroke:var(--s2)}
.chart .faint .s0{fill:var(--s2)}.chart .seed{fill:none;stroke:var(--soft)}
"""
_COLOURS, _DASHES = 5, ("", "6 3", "2 3", "8 3 2 3")  # a sixth series is told from the first by its dashes
_WIDTH, _PLOT, _LEFT, _RIGHT, _FLOOR = 520, 190, 46, 14, 40
_ROW, _NUMBERS = 26, 150


@dataclass(frozen=True)
class Panel:
    """A line chart: {name: [(x, y)]}; whole: x counts (epochs, iterations); mark: an x to point out, and its name."""

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    percent: bool = False
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class Interval:
    """A row of an interval chart. single: values of which `value` is the mean; faint: not to be relied on."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    single: Sequence[float] = ()
    faint: bool = False


def line_chart_svg(panel: Panel) -> str:
    """The panel as SVG; all last values stand in the description, for readers who hear the picture."""
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in panel.lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    spoken = "; ".join(f"{name} {points[-1][1]:.4g} at {panel.x} {points[-1][0]:g}" for name, points in lines.items())
    names, rows, x_of_name, used = list(lines), 0, [], 8.0
    for name in names:  # the legend wraps
        wide = legend_width(name)
        if used > 8 and used + wide > _WIDTH:
            rows, used = rows + 1, 8.0
        x_of_name.append((used, rows))
        used += wide
    top = 34 + 20 * rows
    height = top + _PLOT + _FLOOR
    parts = [_opening(_WIDTH, height, panel.title, spoken)]
    if not lines:
        return "\n".join([*parts, "</svg>"]) + "\n"
    x_ticks = _ticks(min(xs), max(xs), 8, whole=True)
    y_ticks = [0, 25, 50, 75, 100] if panel.percent else _ticks(min(0.0, *ys), max(ys), 5)
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (x - x_low) / (x_high - x_low)
        return across, top + _PLOT * (1 - (y - y_low) / (y_high - y_low))

    for tick in y_ticks:
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{tick:g}", "end", 11, "soft"))
    for tick in x_ticks:
        parts.append(_text(place(tick, y_low)[0], top + _PLOT + 16, f"{tick:,g}", "middle", 11, "soft"))
    parts.append(_text((_LEFT + _WIDTH) / 2, height - 6, panel.x, "middle", 11.5, "soft"))
    if panel.mark and x_low <= panel.mark[0] <= x_high:
        x = place(panel.mark[0], y_low)[0]
        anchor = "start" if x < _WIDTH / 2 else "end"
        parts.append(f'<line class="zero" stroke-dasharray="3 3" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" '
                     f'y2="{top + _PLOT}"/>')  # fmt: skip
        parts.append(_text(x + (5 if anchor == "start" else -5), top + _PLOT - 6, panel.mark[1], anchor, 11, "soft"))
    for number, (name, points) in enumerate(lines.items()):
        colour, dashes = number % _COLOURS, _DASHES[number // _COLOURS % len(_DASHES)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(f'<polyline class="line l{colour}"{dashed} points="{drawn}"/>')
        for point in points if len(points) <= 40 else points[-1:]:
            x, y = place(*point)
            told = escape(f"{name}: {point[1]:.4g} at {panel.x} {point[0]:g}")
            parts.append(f'<circle class="s{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{told}</title></circle>')
        x, row = x_of_name[number]
        y = 15 + 20 * row
        parts.append(f'<line class="line l{colour}"{dashed} x1="{x}" y1="{y}" x2="{x + 16}" y2="{y}"/>')
        parts.append(_text(x + 21, y + 4, name, "start", 12.5))
    return "\n".join([*parts, "</svg>"]) + "\n"


def interval_chart_svg(title: str, rows: Sequence[Interval], zero: bool = False) -> str:
    """A row each: the value as a dot on its interval, figures at the right. zero: differences, around a zero line."""
    left = 8 + min(230.0, max(legend_width(row.name) - 24 for row in rows))
    ends = [v for row in rows for v in (row.value, row.low, row.high, *row.single) if v is not None]
    ticks = _ticks(min([*ends, 0.0] if zero else ends), max([*ends, 0.0] if zero else ends), 6)
    height, right = 14 + _ROW * len(rows) + 18, _WIDTH - _NUMBERS
    told = [f"{row.name} {_figures(row, zero)}" for row in rows]
    parts = [_opening(_WIDTH, height, title, "; ".join(told))]

    def place(value: float) -> float:
        return left + (right - left) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    floor = 10 + _ROW * len(rows)
    for tick in ticks:
        x, kind = place(tick), "zero" if zero and tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" y1="8" x2="{x:.1f}" y2="{floor}"/>')
        parts.append(_text(x, floor + 16, f"{tick:g}", "middle", 11, "soft"))
    for number, row in enumerate(rows):
        y = 8 + _ROW * (number + 0.5)
        name = row.name if legend_width(row.name) - 24 <= 230 else row.name[:30] + "…"
        parts.append(f'<g class="{"faint" if row.faint else "sure"}"><title>{escape(told[number])}</title>')
        parts.append(_text(left - 12, y + 4, name, "end", 12.5))
        if row.low is not None and row.high is not None:
            parts.append(f'<line class="span" x1="{place(row.low):.1f}" y1="{y}" x2="{place(row.high):.1f}" y2="{y}"/>')
        parts += [f'<circle class="seed" cx="{place(v):.1f}" cy="{y}" r="3"/>' for v in row.single]
        parts.append(f'<circle class="s0" cx="{place(row.value):.1f}" cy="{y}" r="4.5"/>')
        parts.append(_text(right + 12, y + 4, _figures(row, zero), "start", 11.5, "soft"))
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def standalone(svg: str) -> str:
    """A chart of a page as a picture of its own: with its style and a background."""
    ground = ".ground{fill:#fff}@media (prefers-color-scheme:dark){.ground{fill:#151a23}}"
    style = f'<style>{CHART_STYLE}{LINE_STYLE}{ground}</style><rect class="ground" width="100%" height="100%" rx="8"/>'
    head, _, rest = svg.partition("<title>")
    return f"{head}{style}<title>{rest}"


def _figures(row: Interval, signed: bool) -> str:
    sign = "+" if signed else ""
    interval = "" if row.low is None or row.high is None else f" [{row.low:{sign}.1f}, {row.high:{sign}.1f}]"
    return f"{row.value:{sign}.2f}{interval}"


def _opening(width: float, height: float, title: str, spoken: str) -> str:
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(f"{title}. {spoken}")}"><title>{escape(title)}</title>'
    )


def _text(x: float, y: float, text: str, anchor: str, size: float, kind: str = "") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<text{shown} x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers from at or under `low` to at or over `high`; whole: whole ones, within."""
    if high - low < 1e-9:  # one value alone
        low, high = (low, high) if whole else (low - 0.5, high + 0.5)
    span = max(high - low, 1.0) if whole else high - low
    step = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) <= most)
    if whole:
        step = max(1.0, step)
        first = math.ceil(low / step)
        return [n * step for n in range(first, math.floor(high / step) + 1)] or [low]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last += first == last
    return [round(n * step, 10) for n in range(first, last + 1)]
