"""What an evaluation leaves behind: the table on the log, results.json, evaluation.json, ranks.json, report.html."""

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import atomic_write, locked, read_json, sha256_text, write_json
from neucore_plugin.config.published import STANDARD
from neucore_plugin.datasets.triplets import LEFT_OUT, TripletDataset
from neucore_plugin.evaluation.landing import SIDES, chosen_queries, landing, located, share_inside
from neucore_plugin.evaluation.pages import run_page
from neucore_plugin.evaluation.ranking import Evaluated, QueryRanks
from neucore_plugin.evaluation.robustness import robustness
from neucore_plugin.evaluation.stored import EXAMPLES, RANKS, read_run, write_ranks
from neucore_plugin.report import Examples, check_results, row_label, table_lines
from neucore_plugin.retrieval.ranks import MISS

SAMPLE, EXTREMES = 4, 3  # queries shown a split: chosen by a hash; answered best, and worst


def with_means(evaluated: Mapping[str, Evaluated]) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, list[str]]]:
    """The tables by split, each row with its protocol; after the splits of a family (FashionIQ) their mean. Then the
    splits of each mean."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    families: dict[str, list[str]] = {}
    means: dict[str, list[str]] = {}
    for split, found in evaluated.items():
        dataset = found.dataset
        name = dataset.protocol.name
        extra = {} if name == STANDARD.name else {"protocol": name}
        extra |= {key: dataset.left_out[key] for key in LEFT_OUT if key in dataset.left_out}
        results[split] = {row: {**values, **extra} for row, values in found.table.items()}
        if dataset.family:
            families.setdefault(f"{dataset.family}@{name}", []).append(split)
    for family, splits in families.items():
        if len(splits) > 1:
            base = family.split("@")[0]
            title = family if base in results else base  # a family's first protocol has its bare name
            results[title] = {row: _mean([results[split][row] for split in splits]) for row in results[splits[0]]}
            means[title] = splits
    return results, means


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of the metrics, sum of the counts."""
    counts = ("queries", *LEFT_OUT)
    mean: dict[str, Any] = {}
    for key, value in rows[0].items():
        if isinstance(value, str):
            mean[key] = value
        elif all(key in row for row in rows):
            total = sum(row[key] for row in rows)
            mean[key] = total if key in counts else total / len(rows)
    return mean


def write_results(
    evaluated: Mapping[str, Evaluated],
    model: Any,
    run_folder: str | Path,
    shared_folder: str | Path,
    provenance: Mapping[str, Any],
    report: bool = True,
) -> list[Path]:
    """Write all files into the run folder, results.json and report.html also one level up, and the table to the log.

    Returns the paths. provenance: what evaluation.json and the page say of config, checkpoint, data, versions.
    """
    results, means = with_means(evaluated)
    for split, found in evaluated.items():
        further = {"robustness": robustness(found), "landing": landing(found, model)}
        results[split][found.title] |= {name: told for name, told in further.items() if told}
    protocols = {split: found.dataset.protocol for split, found in evaluated.items()}
    provenance = {
        **provenance,
        "protocols": {split: {"name": p.name, "summary": p.summary} for split, p in protocols.items()},
        "left_out": {split: found.dataset.left_out for split, found in evaluated.items()},
        "notices": {split: found.dataset.notices for split, found in evaluated.items()},
    }
    per_change = {split: found.per_change for split, found in evaluated.items()}
    run_folder, shared_folder = Path(run_folder), Path(shared_folder)
    lines = [f"protocol {protocol.name}: {protocol.summary}" for protocol in dict.fromkeys(protocols.values())]
    lines += [f"{split}: {notice}" for split, found in evaluated.items() for notice in found.dataset.notices]
    aspects = [line for split, found in evaluated.items() for line in _aspect_lines(split, found)]
    logging.info("\n".join(["results, percent", *lines, *table_lines(results), *aspects]))
    files = [run_folder / "evaluation.json", run_folder / "results.json", run_folder / RANKS]
    write_ranks(run_folder / RANKS, evaluated, means)
    write_json(files[0], {"results": results, "per_change": per_change, **provenance})
    write_json(files[1], results)
    copied = [files[1]]
    if report:
        page = run_folder / "report.html"
        datasets = [found.dataset for found in evaluated.values()]
        shown = Examples.of(
            [
                *(example for found in evaluated.values() for example in _examples(found, model)),
                *_region_examples(evaluated.values(), model),
            ],
            fit=model.image_processor.fit,
            credit=" · ".join(sorted({dataset.credit for dataset in datasets if dataset.credit})) or None,
        )
        shown.write(run_folder / EXAMPLES)
        title = f"{row_label(model.title)} on {', '.join(sorted({dataset.name for dataset in datasets}))}"
        run_page(read_run(run_folder), page, title, shown)
        files += [run_folder / EXAMPLES, page]
        copied.append(page)
    files += _copied(copied, shared_folder)
    logging.info("written:\n%s", "\n".join(f"  {path}" for path in files))
    return files


def _aspect_lines(split: str, found: Evaluated) -> list[str]:
    """The protocol's metric for each kind of query, in one line."""
    metric = found.dataset.protocol.by_aspect
    values = [f"{kind} {row[metric]:.2f}" for kind, row in found.per_change.items() if metric in row]
    return [f"{split}: {metric} by aspect: {', '.join(values)}"] if values else []


def show_finished(run_folder: str | Path, shared_folder: str | Path) -> None:
    """The table of a finished run on the log, and copies of its results.json and report.html one level up."""
    stored, page = (Path(run_folder) / name for name in ("results.json", "report.html"))
    results = read_json(stored, dict, "evaluate again")
    check_results(results, stored)
    _copied([file for file in (stored, page) if file.is_file()], Path(shared_folder))
    logging.info("\n".join(["results, percent", *table_lines(results), f"page: {Path(shared_folder) / 'report.html'}"]))


def _copied(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Copies in `folder`; of two runs that end at the same time all are of the one or all of the other."""
    copies = [folder / path.name for path in paths]
    with locked(folder, without=f"two runs that end at the same time mix their results in {folder}"):
        for path, target in zip(paths, copies, strict=True):
            with open(path, "rb") as source, atomic_write(target) as copy:
                shutil.copyfileobj(source, copy)
    return copies


def _examples(found: Evaluated, model: Any) -> list[dict[str, Any]]:
    """A few queries of a split, chosen by a hash of their names, with concept maps; those answered best and worst."""
    triplets, ranks = found.dataset.triplets, found.rows[found.title]
    order = sorted(range(len(triplets)), key=lambda n: sha256_text(triplets[n].query_id))
    ranked = [n for n in order if ranks[n].rank != MISS]
    picks = {
        "sample": order[:SAMPLE],
        "best": sorted(ranked, key=lambda n: (ranks[n].rank, -_lead(ranks[n])))[:EXTREMES],
        "worst": sorted(ranked, key=lambda n: -ranks[n].rank)[:EXTREMES],
    }
    return [_example(found, index, model, pick) for pick, chosen in picks.items() for index in chosen]


def _region_examples(evaluated: Iterable[Evaluated], model: Any) -> list[dict[str, Any]]:
    """A query of each kind of change whose region is known: the region, and the concept maps in the right answer."""
    examples = []
    first: dict[str, tuple[Evaluated, list[int]]] = {}
    for found in evaluated:
        for change, places in chosen_queries(found).items():
            first.setdefault(change, (found, places))
    for found, places in first.values():
        for region, entries in located(found, model, places[:1]):
            example = _example(found, places[0], model, "region")
            maps: list[dict[str, Any]] = [{"concept": "what changes", "reference": region, "candidate": region}]
            for entry in entries:
                known = [entry[side] for side in SIDES if entry[side] is not None]
                inside = " and ".join(f"{100 * share_inside(values, region):.0f}" for values in known)
                maps.append({**entry, "concept": f"{entry['concept']}: {inside} % inside"})
            right = {**example["target"], "correct": True}
            examples.append({**example, "retrieved": [right], "maps": maps})
    return examples


def _lead(ranks: QueryRanks) -> float:
    """How far the first image's score is above the second's."""
    return ranks.top_scores[0] - ranks.top_scores[1] if len(ranks.top_scores) > 1 else 0.0


def _names(dataset: TripletDataset, ids: Sequence[str]) -> dict[str, str]:
    try:
        return dataset.names(ids)
    except DataError:  # what knows the names is not installed: the ids do
        return {}


def _example(found: Evaluated, index: int, model: Any, pick: str) -> dict[str, Any]:
    dataset, ranks = found.dataset, found.rows[found.title][index]
    triplet, ids, paths = dataset.triplets[index], dataset.gallery.ids, dataset.gallery.paths
    right = dataset.target_positions(index)
    reference = dataset.images.paths[triplet.reference]
    names = _names(dataset, [triplet.reference, ids[right[0]], *(ids[place] for place in ranks.top)])
    maps = None
    if pick == "sample":
        with torch.inference_mode():
            shown = (triplet.reference, ids[ranks.top[0]])
            pixels = [dataset.images.pixels(name)[None].to(model.device) for name in shown]
            maps = model.concept_maps(pixels[0], [dataset.texts[index]], pixels[1])[0]
    return {
        "split": dataset.split,
        "pick": pick,
        "query_id": triplet.query_id,
        "reference": reference,
        "reference_name": names.get(triplet.reference),
        "caption": dataset.texts[index],
        "change": triplet.change,
        "rank": None if ranks.rank == MISS else ranks.rank,
        "targets": list(triplet.targets),
        "target": {"id": ids[right[0]], "name": names.get(ids[right[0]]), "path": paths[right[0]]},
        "retrieved": [
            {
                "id": ids[place],
                "name": names.get(ids[place]),
                "path": paths[place],
                "score": score,
                "correct": place in right,
            }
            for place, score in zip(ranks.top, ranks.top_scores, strict=True)
        ],
        "maps": maps or None,
    }
