"""How a training step grows with gallery, batch, concepts and tokens: times, and plots of them.

    python benchmarks/growth.py --plots growth    # also growth/gallery.svg, batch.svg, concepts.svg, tokens.svg
    python benchmarks/growth.py --quick           # few small sizes; seconds

One size grows at a time, the others are those of `step.py`; so are the forms, the features and the way of measuring:
"default", and "paper", whose blocks compare every token of an image with every other. In the table the largest size's
step stands against the smallest's in proportion: a ratio of 1 or more means that nothing grows faster than the size.
What grows with the square of the batch is its own scores, beside those of the gallery.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import step
import torch
from machine import Row, peak, table

FORMS = {
    "default": "default type",
    "paper": "embedded_paper",
}  # {form of `step.py`: what the table and the plots call it}
AXES = {  # {size of `step.Sizes`: what it counts, sizes, quick sizes}
    "gallery": ("training images", (500, 1000, 2000, 4000, 8000), (500, 2000)),
    "batch": ("pairs of a batch", (16, 32, 64, 128, 256), (16, 64)),
    "concepts": ("concepts of the vocabulary", (250, 500, 1000, 2000, 4000), (250, 1000)),
    "tokens": ("tokens of an image", (16, 36, 64, 100, 196), (16, 64)),
}
Curves = dict[str, dict[str, list[tuple[int, float]]]]


def curves(quick: bool) -> Curves:
    """{axis: {form: [(size, processor seconds of a step)]}}; the sizes of an axis take turns."""
    found: Curves = {}
    for axis, (_, sizes, small) in AXES.items():
        sizes, start = (small, replace(step.Sizes(), batch=16)) if quick else (sizes, step.Sizes())
        found[axis] = {}
        for form in FORMS:
            steps = {size: step.stepper(form, replace(start, **{axis: size})) for size in sizes}
            for _ in range(3 if quick else 8):
                for measured in steps.values():
                    measured.measure()
            found[axis][form] = [(size, measured.cpu) for size, measured in steps.items()]
    return found


def draw(found: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], folder: Path) -> None:
    """A line chart an axis, milliseconds over the size."""
    from neucore_plugin.report import Panel, line_chart_svg, standalone

    folder.mkdir(parents=True, exist_ok=True)
    for axis, by_form in found.items():
        lines = {f"{FORMS[form]}, ms": [(size, cpu * 1e3) for size, cpu in points] for form, points in by_form.items()}
        panel = Panel(f"Training step by {axis}, milliseconds", AXES[axis][0], lines)
        (folder / f"{axis}.svg").write_text(standalone(line_chart_svg(panel)), encoding="utf-8")


def rows(quick: bool, plots: str | None = None) -> list[Row]:
    """Of the table of all benchmarks; plots: a folder for the charts."""
    found = curves(quick)
    if plots:
        draw(found, Path(plots))
    made = []
    for axis, by_form in found.items():
        for form, ((first, least), *_, (last, most)) in by_form.items():
            what = f"training step, {FORMS[form]}, {last:,} {AXES[axis][0]}"
            times = last / first
            made.append(Row(what, most, f"{times:g} times that of {first:,}", times * least, peak()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few small sizes")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the curves there")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = curves(given.quick)
    for axis, by_form in found.items():
        lines = [[AXES[axis][0], *(f"{size:,}" for size, _ in next(iter(by_form.values())))]]
        lines += [
            [f"{FORMS[form]}, ms", *(f"{cpu * 1e3:.1f}" for _, cpu in points)] for form, points in by_form.items()
        ]
        print(table(lines))
    if given.plots:
        draw(found, given.plots)


if __name__ == "__main__":
    main()
