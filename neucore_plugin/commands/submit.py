"""neucore submit: files for the test servers of CIRR and CIRCO, and a check of such a file made elsewhere."""

import argparse
import os
from pathlib import Path
from typing import Any

from neucore_plugin.commands import train
from neucore_plugin.common.errors import ConfigError

HELP = "write and check the files for the test servers of CIRR and CIRCO"
SPLITS = {"cirr": "test1", "circo": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME with a config and a checkpoint, or --check FILE."""
    parser.add_argument("name", choices=tuple(SPLITS), help="the data set")
    train.add_arguments(parser, required=False)
    parser.add_argument(
        "--checkpoint", help="what training wrote: .../checkpoint_best.pth; not for a method that trains nothing"
    )
    parser.add_argument("--split", help="test1 (CIRR) or test (CIRCO) by default; val to try it out")
    parser.add_argument(
        "--out", type=Path, default=Path("output/submission"), help="folder (default output/submission)"
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help="check this file; nothing is computed")
    parser.add_argument("--root", type=Path, help="with --check: the data set's root, to compare ids and names")


def run(arguments: argparse.Namespace) -> None:
    """Write or check. Raises ConfigError and DataError; what has problems is not written."""
    from neucore_plugin.evaluation import submission

    split = arguments.split or SPLITS[arguments.name]
    if arguments.check is not None:
        compared = _split(arguments, split)
        found = submission.check(arguments.check, compared, (arguments.name, split))
        if compared is None:
            found += f" ({'image ids' if arguments.name == 'circo' else 'pair ids and image names'} were not compared)"
        print(f"{arguments.check}: good: {found}")
        return
    if not arguments.cfg_path:
        raise ConfigError("give --cfg-path and --checkpoint to make the files, or --check FILE to check one")
    dataset, model, task = _load(arguments, split)
    for path, content in _contents(arguments, dataset, model, task, split):
        submission.write(path, content, (dataset.triplets, dataset.gallery))
        print(f"{path}: good: {submission.check(path, (dataset.triplets, dataset.gallery), (arguments.name, split))}")


def _split(arguments: argparse.Namespace, split: str) -> Any:
    """Triplets and gallery to compare with, where the annotations are at hand; images are not needed."""
    from neucore_plugin.datasets.published import catalogue

    reader = catalogue.READERS[arguments.name]
    allowed = [part for part in reader.splits if part != "train"]
    if split not in allowed:
        raise ConfigError(f"{reader.title} has no split {split!r} to submit; allowed: {', '.join(allowed)}")
    if not arguments.root and not os.environ.get(reader.root_variable):
        print("no --root: form, lengths, repeats and the number of queries are checked, not which pairs and images")
        return None
    return catalogue.load(arguments.name, arguments.root, [split], missing="ignore")[1][split]


def _load(arguments: argparse.Namespace, split: str) -> tuple[Any, Any, Any]:
    from neucore_plugin import launch
    from neucore_plugin.config import loading

    options = [*loading.dotlist(arguments.options), ("run.evaluate", True)]
    if arguments.checkpoint is not None:
        options.append(("model.checkpoint", arguments.checkpoint))
    cfg, task = launch.prepared(arguments.cfg_path, options)
    if list(cfg.datasets_cfg) != [arguments.name]:
        raise ConfigError(f"{arguments.cfg_path}: describes {', '.join(cfg.datasets_cfg)}, not {arguments.name} alone")
    dataset = task.build_split(cfg, arguments.name, split)
    model = task.build_model(cfg).to(cfg.run_cfg.device).eval()
    arguments.out.mkdir(parents=True, exist_ok=True)
    task.prepare(model, {arguments.name: {split: dataset}}, cfg, arguments.out)
    return dataset, model, task


def _contents(arguments: argparse.Namespace, dataset: Any, model: Any, task: Any, split: str) -> list[tuple[Path, Any]]:
    from neucore_plugin.evaluation import submission

    ids, count = dataset.gallery.ids, submission.LENGTHS["recall"]
    whole, groups = task.evaluator.rank_for_submission(model, dataset, count, submission.LENGTHS["recall_subset"])
    queries = [triplet.query_id for triplet in dataset.triplets]
    rankings = {query: [ids[place] for place in row] for query, row in zip(queries, whole, strict=True)}
    if arguments.name == "circo":
        return [(arguments.out / f"circo_{split}.json", submission.circo_content(rankings))]
    subset = {query: [ids[place] for place in row] for query, row in zip(queries, groups, strict=True)}
    return [
        (arguments.out / f"cirr_{split}_recall.json", submission.cirr_content("recall", rankings)),
        (arguments.out / f"cirr_{split}_recall_subset.json", submission.cirr_content("recall_subset", subset)),
    ]
