"""One HTML file with everything in it: result tables, charts, retrieved pictures, concept maps. Nothing is fetched.

Pictures are embedded as small PNG or JPEG data; all text passes the template's escaping.
"""

import base64
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps

from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.files import atomic_write
from neucore_plugin.common.images import Picture, load_image
from neucore_plugin.common.names import name_of
from neucore_plugin.report.charts import CHART_STYLE, row_label, split_chart_svg
from neucore_plugin.report.table import Results, metric_columns

_THUMB = 192  # pixels at the longer side: sharp at 96 points on a dense screen
_LARGE = 320
_JPEG_QUALITY = 85

log = logging.getLogger(__name__)


def write_report(
    path: str | Path,
    title: str,
    results: Results,
    examples: Iterable[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    credit: str | None = None,
    per_change: Results | None = None,
    fit: str = "pad",
) -> list[str]:
    """Write the report; returns the pictures that could not be shown (an empty frame stands for each).

    results: {split: {row: {"R@1": percent, ..., "median_rank": .., "queries": n}}}; per_change: {split: {change: ...}}.
    examples: dicts with split, query_id, reference (path), caption, change, rank (None: not ranked), targets (ids),
    retrieved (dicts of id, path, score, correct), target (dict of id, path) and maps: None or dicts of concept,
    reference [h,w] and candidate [h,w] in [0,1], the candidate being the first retrieved picture. settings: nested
    mapping, shown as a table. fit: how the image processor makes pictures square ("pad", "crop" or "stretch"), so that
    maps lie where they belong.
    """
    pictures = _Pictures(fit)
    order = [*results, *(per_change or {})]
    metrics = metric_columns(results)
    recalls = [name for name in metrics if name.startswith("R@")]
    columns = [*metrics, "median_rank", "queries"]
    groups: dict[str, list[dict[str, Any]]] = {split: [] for split in order}
    for example in examples or ():
        groups.setdefault(str(example["split"]), []).append(_example(example, pictures))
    drawn = [(split, rows) for split, rows in results.items() if rows]
    page = {
        "kind": "report",
        "title": title,
        "columns": columns,
        "subset": any(name.startswith("R_subset@") for name in metrics),
        "results": [(_title(split, rows), _table(rows, columns, best=True)) for split, rows in drawn],
        "charts": [(split, Markup(split_chart_svg(split, rows, recalls))) for split, rows in drawn if recalls],
        "changes": [(split, _table(rows, columns)) for split, rows in (per_change or {}).items() if rows],
        "examples": [(split, cards) for split, cards in groups.items() if cards],
        "settings": list(_flat(settings or {})),
    }
    return _write(path, page, pictures, credit)


def search_page(
    path: str | Path,
    reference: Picture | None,
    caption: str | None,
    hits: Iterable[Any],
    title: str = "Search",
    credit: str | None = None,
) -> list[str]:
    """Write one query with its results; returns the pictures that could not be shown.

    hits: objects with name, path and score, best first.
    """
    pictures = _Pictures("pad")
    retrieved = [{"id": hit.name, "path": hit.path, "score": hit.score} for hit in hits]
    name = name_of(Path(reference).name) if isinstance(reference, str | os.PathLike) else ""
    page = {
        "kind": "search",
        "title": title,
        "reference": pictures.thumb(reference, _LARGE) if reference is not None else None,
        "reference_name": name,
        "caption": caption or "",
        "hits": [_tile(rank, item, pictures) for rank, item in enumerate(retrieved, start=1)],
    }
    return _write(path, page, pictures, credit)


class _Pictures:
    """Makes embedded pictures, and keeps a list of those that could not be read."""

    def __init__(self, fit: str):
        self.fit = fit
        self.missing: list[str] = []
        self._made: dict[tuple[str | int, int], str | None] = {}

    def thumb(self, picture: Picture, size: int = _THUMB) -> str | None:
        """A data address, or None where the picture cannot be read."""
        key = (id(picture) if _in_memory(picture) else str(picture), size)
        if key not in self._made:
            image = self._open(picture)
            if image:
                image.thumbnail((size, size), Image.Resampling.LANCZOS)
            self._made[key] = _data_address(image) if image else None
        return self._made[key]

    def heat(self, picture: Picture, values: torch.Tensor) -> str | None:
        """The picture as the model saw it, square, with a map [h,w] in [0,1] laid over it."""
        image = self._open(picture)
        return _data_address(heat_overlay(image, values, fit=self.fit)) if image else None

    def _open(self, picture: Picture) -> Image.Image | None:
        try:
            return load_image(picture)
        except ImageError as error:  # the page is still wanted
            name = "a picture given in memory" if _in_memory(picture) else str(picture)
            if name not in self.missing:
                self.missing.append(name)
                log.debug("no thumbnail of %s: %s", name, error)
            return None


def _in_memory(picture: Picture) -> bool:
    return isinstance(picture, Image.Image | bytes | bytearray | memoryview | io.IOBase)


def heat_overlay(image: Image.Image, values: torch.Tensor, size: int = _THUMB, fit: str = "pad") -> Image.Image:
    """A map [h,w] in [0,1] (clamped; NaN counts as 0) over an RGB image made square as `fit` says; side `size`."""
    if fit in ("pad", "released"):
        image = ImageOps.pad(image, (max(image.size),) * 2, color="white")
    if fit == "released":
        image = ImageOps.crop(image, image.width // 16)  # the centre, 7/8 of the side
    elif fit == "crop":
        image = ImageOps.fit(image, (min(image.size),) * 2)
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    grid = torch.as_tensor(values).detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    heat = np.asarray(Image.fromarray(grid.numpy()).resize((size, size), Image.Resampling.BILINEAR))[..., None]
    grey = np.asarray(ImageOps.grayscale(image), dtype=np.float32)[..., None]
    base = 0.45 * np.asarray(image, dtype=np.float32) + 0.55 * (
        0.6 * grey + 0.4 * 255
    )  # paler, so that heat stands out
    stops = [np.interp(heat, (0, 0.5, 1), channel) for channel in ((255, 250, 190), (221, 122, 10), (80, 20, 40))]
    alpha = 0.78 * heat**0.8
    mixed = (1 - alpha) * base + alpha * np.concatenate(stops, axis=-1)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _data_address(image: Image.Image) -> str:
    """PNG or JPEG, whichever is smaller: drawings come out as the one, photographs as the other."""
    kinds = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": _JPEG_QUALITY, "optimize": True})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        kinds[kind] = stream.getvalue()
    kind = min(kinds, key=lambda name: len(kinds[name]))
    return f"data:image/{kind};base64,{base64.b64encode(kinds[kind]).decode('ascii')}"


def _tile(rank: int, item: Mapping[str, Any], pictures: _Pictures) -> dict[str, Any]:
    score = item.get("score")
    return {
        "rank": rank,
        "name": str(item["id"]),
        "picture": pictures.thumb(item["path"]),
        "score": "" if score is None else f"{float(score):.3f}",
        "correct": bool(item.get("correct")),
    }


def _example(example: Mapping[str, Any], pictures: _Pictures) -> dict[str, Any]:
    retrieved = list(example["retrieved"])
    shown = [_tile(rank, item, pictures) for rank, item in enumerate(retrieved, start=1)]
    rank, target = example["rank"], example.get("target")
    beyond = target is not None and (rank is None or rank > len(shown))
    first = retrieved[0] if retrieved else None
    maps = [
        {
            "concept": str(item["concept"]),
            "reference": pictures.heat(example["reference"], item["reference"]),
            "candidate": pictures.heat(first["path"], item["candidate"]) if first else None,
        }
        for item in example.get("maps") or ()
    ]
    return {
        "query_id": str(example["query_id"]),
        "reference": pictures.thumb(example["reference"], _LARGE),
        "caption": str(example["caption"]),
        "change": str(example.get("change") or ""),
        "rank": rank,
        "several": len(example.get("targets") or ()) > 1,
        "retrieved": shown,
        "target": {"name": str(target["id"]), "picture": pictures.thumb(target["path"])} if beyond else None,
        "maps": maps,
        "candidate": str(first["id"]) if first else "",
    }


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


def _write(path: str | Path, page: dict[str, Any], pictures: _Pictures, credit: str | None) -> list[str]:
    engine = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    chart_style = Markup(CHART_STYLE)
    template = engine.get_template("report.html.j2")
    text = template.render(**page, credit=credit, missing=pictures.missing, chart_style=chart_style)
    with atomic_write(path, "w") as stream:
        stream.write(text)
    if pictures.missing:
        log.warning("%d pictures could not be read; %s shows empty frames for them", len(pictures.missing), path)
    return pictures.missing
