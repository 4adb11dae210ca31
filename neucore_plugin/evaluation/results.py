"""What an evaluation leaves behind: the table on the log, results.json, evaluation.json, report.html."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neucore_plugin.common.files import atomic_write, write_json
from neucore_plugin.common.images import load_image
from neucore_plugin.datasets.protocols import describe
from neucore_plugin.datasets.triplets import TripletDataset
from neucore_plugin.evaluation.metrics import (
    PRECISION_AT,
    RECALL_AT,
    SUBSET_AT,
    mean_average_precision,
    median_rank,
    recall_at,
    soft_recall_at,
)
from neucore_plugin.report.charts import row_label
from neucore_plugin.report.page import write_report

EXAMPLES = 4  # queries shown a split


def summary(found: Mapping[str, Any], row: str, chosen: Sequence[bool] | None = None) -> dict[str, float]:
    """Metrics in percent of one row of what the task's `evaluation` gave; `chosen`: of these queries alone.

    R@K and median rank; R_subset@K where the queries have groups; soft weights and mAP@K where the protocol asks.
    """
    dataset, ranks = found["dataset"], found["ranks"][row]
    keep = torch.ones(len(ranks), dtype=torch.bool) if chosen is None else torch.tensor(chosen)
    subset = recall_at(found["subset_ranks"][row][keep], SUBSET_AT, name="R_subset") if found["subset_ranks"] else {}
    values = recall_at(ranks[keep], RECALL_AT)
    places = keep.nonzero()[:, 0].tolist()
    if found.get("soft"):
        graded = [found["soft"][row][place] for place in places]
        weights = [weight for _, _, weight in graded]
        values = soft_recall_at([one for one, _, _ in graded], weights, RECALL_AT)
        subset = subset and soft_recall_at([group for _, group, _ in graded], weights, SUBSET_AT, name="R_subset")
    values |= subset
    if found.get("best"):
        targets = [dataset.target_positions(place) for place in places]
        best = found["best"][row][keep]
        values |= mean_average_precision(
            best, targets, [k for k in dataset.protocol.precision_at if k <= best.shape[1]]
        )
    return {**values, "median_rank": float(median_rank(ranks[keep])), "queries": len(places)}


def with_means(evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The tables by split, each row with its protocol; after the splits of a family (FashionIQ) their mean."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    families: dict[str, list[str]] = {}
    for split, found in evaluated.items():
        dataset = found["dataset"]
        name = getattr(dataset.protocol, "name", None)
        extra = {} if name in (None, "standard") else {"protocol": name}
        if dataset.left_out.get("skipped_queries") or dataset.left_out.get("missing_images"):
            extra |= {key: dataset.left_out[key] for key in ("missing_images", "skipped_queries")}
        results[split] = {row: {**values, **extra} for row, values in found["table"].items()}
        if dataset.family:
            families.setdefault(f"{dataset.family}@{name}", []).append(split)
    first: set[str] = set()
    for family, splits in families.items():
        if len(splits) > 1:
            base = family.split("@")[0]
            title = base if base not in first else family
            first.add(base)
            results[title] = {row: _mean([results[split][row] for split in splits]) for row in results[splits[0]]}
    return results


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of the metrics, sum of the counts."""
    counts = ("queries", "missing_images", "skipped_queries")
    mean: dict[str, Any] = {}
    for key, value in rows[0].items():
        if isinstance(value, str):
            mean[key] = value
        elif all(key in row for row in rows):
            total = sum(row[key] for row in rows)
            mean[key] = total if key in counts else total / len(rows)
    return mean


def table_lines(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The result table as text: one line a split and row; R_subset@K only where a row has it."""
    columns = [f"R@{k}" for k in RECALL_AT]
    held = {name for rows in results.values() for values in rows.values() for name in values}
    subset = [name for name in (f"R_subset@{k}" for k in SUBSET_AT) if name in held]
    subset += [name for name in (f"mAP@{k}" for k in PRECISION_AT) if name in held]
    heads = " ".join([*(f"{name:>6}" for name in columns), *(f"{name:>10}" for name in subset)])
    wide = max([12, *(len(split) for split in results)])
    named = max([11, *(len(row) for rows in results.values() for row in rows)])
    head = f"{'split':<{wide}} {'query':<{named}} {heads}  median  queries"
    lines = [head + ("  protocol" if "protocol" in held else "")]
    for split, rows in results.items():
        for row, values in rows.items():
            recalls = " ".join(f"{values[name]:6.2f}" for name in columns)
            recalls += "".join(f" {values[name]:10.2f}" if name in values else f" {'–':>10}" for name in subset)
            line = f"{split:<{wide}} {row:<{named}} {recalls} {values['median_rank']:7.1f} {values['queries']:8d}"
            skipped = f" ({values['skipped_queries']} skipped)" if values.get("skipped_queries") else ""
            lines.append(f"{line}{'  ' + values['protocol'] if 'protocol' in values else ''}{skipped}")
    return lines


def write_results(
    evaluated: Mapping[str, Mapping[str, Any]],
    model: Any,
    run_folder: str | Path,
    shared_folder: str | Path,
    provenance: Mapping[str, Any],
    report: bool = True,
) -> list[Path]:
    """Write all files into the run folder, results.json and report.html also one level up, and the table to the log.

    Returns the paths.

    evaluated: {split: {"dataset", "ranks": {row: [Q]}, "top": [Q,10], "table", "per_change"}}, as the task keeps it.
    """
    results = with_means(evaluated)
    presets = {split: found["dataset"].protocol for split, found in evaluated.items()}
    provenance = {
        **provenance,
        "protocols": {split: describe(preset) for split, preset in presets.items() if preset is not None},
        "left_out": {split: found["dataset"].left_out for split, found in evaluated.items()},
    }
    per_change = {split: found["per_change"] for split, found in evaluated.items()}
    run_folder, shared_folder = Path(run_folder), Path(shared_folder)
    lines = [f"protocol {preset.name}: {preset.summary}" for preset in dict.fromkeys(presets.values()) if preset]
    logging.info("\n".join(["results, percent", *lines, *table_lines(results)]))
    files = [run_folder / "evaluation.json", run_folder / "results.json", shared_folder / "results.json"]
    write_json(files[0], {"results": results, "per_change": per_change, **provenance})
    for path in files[1:]:
        write_json(path, results)
    if report:
        page = run_folder / "report.html"
        datasets = [found["dataset"] for found in evaluated.values()]
        write_report(
            page,
            title=f"{row_label(model.title)} on {', '.join(sorted({dataset.name for dataset in datasets}))}",
            results=results,
            examples=[example for found in evaluated.values() for example in _examples(found, model)],
            settings=provenance,
            credit=" · ".join(sorted({dataset.credit for dataset in datasets if dataset.credit})) or None,
            per_change=per_change,
            fit=model.image_processor.fit,
        )
        with open(page, "rb") as source, atomic_write(shared_folder / "report.html") as copy:
            shutil.copyfileobj(source, copy)
        files += [page, shared_folder / "report.html"]
    logging.info("written:\n%s", "\n".join(f"  {path}" for path in files))
    return files


def show_finished(run_folder: str | Path, shared_folder: str | Path) -> None:
    """The table of a finished run on the log, and copies of its results.json and report.html one level up."""
    for name in ("results.json", "report.html"):
        if (Path(run_folder) / name).is_file():
            with open(Path(run_folder) / name, "rb") as source, atomic_write(Path(shared_folder) / name) as copy:
                shutil.copyfileobj(source, copy)
    results = json.loads((Path(run_folder) / "results.json").read_text(encoding="utf-8"))
    logging.info("\n".join(["results, percent", *table_lines(results), f"page: {Path(shared_folder) / 'report.html'}"]))


def _examples(found: Mapping[str, Any], model: Any) -> list[dict[str, Any]]:
    """A few queries of a split, chosen by a hash of their names, with concept maps."""
    dataset: TripletDataset = found["dataset"]
    order = sorted(
        range(len(dataset)), key=lambda index: hashlib.sha256(dataset.triplets[index].query_id.encode()).digest()
    )
    return [_example(dataset, index, found, model) for index in order[:EXAMPLES]]


def _example(dataset: TripletDataset, index: int, found: Mapping[str, Any], model: Any) -> dict[str, Any]:
    triplet, ids, paths = dataset.triplets[index], dataset.gallery.ids, dataset.gallery.paths
    right = set(dataset.target_positions(index))
    top: Sequence[int] = found["top"][index].tolist()
    reference = dataset.images.paths[triplet.reference]
    target = dataset.target_positions(index)[0]
    with torch.inference_mode():
        pixels = [model.image_processor(load_image(path))[None].to(model.device) for path in (reference, paths[top[0]])]
        maps = model.concept_maps(pixels[0], [dataset.texts[index]], pixels[1])[0]
    return {
        "split": dataset.split,
        "query_id": triplet.query_id,
        "reference": reference,
        "caption": dataset.texts[index],
        "change": triplet.change,
        "rank": int(found["ranks"][found["title"]][index]),
        "targets": list(triplet.targets),
        "target": {"id": ids[target], "path": paths[target]},
        "retrieved": [
            {"id": ids[place], "path": paths[place], "score": score, "correct": place in right}
            for place, score in zip(top, found["top_scores"][index].tolist(), strict=True)
        ],
        "maps": maps or None,
    }
