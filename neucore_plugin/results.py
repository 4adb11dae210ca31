"""What an evaluation leaves behind: the table on the log, results.json, evaluation.json, report.html."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neucore_plugin.datasets.triplets import TripletDataset
from neucore_plugin.files import atomic_write, write_json
from neucore_plugin.images import load_image
from neucore_plugin.retrieval.metrics import RECALL_AT, SUBSET_AT, median_rank, recall_at
from neucore_plugin.retrieval.report import write_report

EXAMPLES = 4  # queries shown a split


def summary(ranks: torch.Tensor, subset_ranks: torch.Tensor | None = None) -> dict[str, float]:
    """R@K in percent, median rank and number of queries of ranks [Q]; R_subset@K of the ranks in the groups [Q]."""
    subset = {} if subset_ranks is None else recall_at(subset_ranks, SUBSET_AT, name="R_subset")
    return {**recall_at(ranks, RECALL_AT), **subset, "median_rank": float(median_rank(ranks)), "queries": len(ranks)}


def table_lines(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The result table as text: one line a split and row; R_subset@K only where a row has it."""
    columns = [f"R@{k}" for k in RECALL_AT]
    held = {name for rows in results.values() for values in rows.values() for name in values}
    subset = [name for name in (f"R_subset@{k}" for k in SUBSET_AT) if name in held]
    heads = " ".join([*(f"{name:>6}" for name in columns), *subset])
    lines = [f"{'split':<12} {'query':<11} {heads}  median  queries"]
    for split, rows in results.items():
        for row, values in rows.items():
            recalls = " ".join(f"{values[name]:6.2f}" for name in columns)
            recalls += "".join(f" {values[name]:10.2f}" if name in values else f" {'–':>10}" for name in subset)
            lines.append(f"{split:<12} {row:<11} {recalls} {values['median_rank']:7.1f} {values['queries']:8d}")
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
    results = {split: found["table"] for split, found in evaluated.items()}
    per_change = {split: found["per_change"] for split, found in evaluated.items()}
    run_folder, shared_folder = Path(run_folder), Path(shared_folder)
    logging.info(
        "\n".join(["results, percent; gallery: the split's own list, reference removed", *table_lines(results)])
    )
    files = [run_folder / "evaluation.json", run_folder / "results.json", shared_folder / "results.json"]
    write_json(files[0], {"results": results, "per_change": per_change, **provenance})
    for path in files[1:]:
        write_json(path, results)
    if report:
        page = run_folder / "report.html"
        datasets = [found["dataset"] for found in evaluated.values()]
        write_report(
            page,
            title=f"NEUCORE on {', '.join(sorted({dataset.name for dataset in datasets}))}",
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
        "rank": int(found["ranks"]["neucore"][index]),
        "targets": list(triplet.targets),
        "target": {"id": ids[target], "path": paths[target]},
        "retrieved": [
            {"id": ids[place], "path": paths[place], "score": score, "correct": place in right}
            for place, score in zip(top, found["top_scores"][index].tolist(), strict=True)
        ],
        "maps": maps or None,
    }
