"""What runs left behind, read again: results, ranks of single queries, the log. Light: neither torch nor the host.

`ranks.json` pairs the queries of one run with those of another:
{"format", "means": {split: [splits that it is the mean of]}, "splits": {split: {"protocol", "queries", "gallery" (what
was asked and ranked, as sha256), "count", "every", "rows": {row: {"rank": [...], ...}}}}}; of a split with more than
`MOST` queries every n-th is kept, the same in every run.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import parse_json, read_json, sha256_text, write_json
from neucore_plugin.evaluation.significance import hits
from neucore_plugin.report import check_results

RANKS, EXAMPLES = "ranks.json", "examples.json"
MOST = 100_000  # queries of a split whose ranks are kept: half a megabyte a row
_FORMAT = "neucore-ranks-1"
_AGAIN = "evaluate again"


def write_ranks(path: Path, evaluated: Mapping[str, Any], means: Mapping[str, list[str]]) -> None:
    """Write ranks.json of {split: Evaluated}; `means`: the splits that a mean of the results is made of."""
    splits = {}
    for split, found in evaluated.items():
        dataset = found.dataset
        every = -(-len(dataset) // MOST)
        asked = (repr((t.query_id, t.reference, t.targets, t.members, t.soft)) for t in dataset.triplets)
        splits[split] = {
            "protocol": dataset.protocol.name,
            "queries": sha256_text("\n".join(asked)),
            "gallery": dataset.gallery.fingerprint,
            "count": len(dataset),
            "every": every,
            "rows": {row: found.kept(row, range(0, len(dataset), every)) for row in found.rows},
        }
    write_json(path, {"format": _FORMAT, "means": dict(means), "splits": splits}, indent=None)


@dataclass(frozen=True)
class StoredRun:
    """A run, or an evaluation, as its files tell it.

    path: as it was given. folder: the run's own folder. results: {split: {row: metrics}}; of a run that is not finished
    those of its last validation, and evaluated is False. provenance: what evaluation.json says besides. record:
    run.json. log: the entries of log.txt. ranks: ranks.json; empty for runs that kept none.
    """

    path: Path
    folder: Path
    results: dict[str, dict[str, dict[str, Any]]]
    per_change: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[str, Any] = field(default_factory=dict)
    evaluated: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """The run's config; empty where no file tells it."""
        return self.provenance.get("config") or self.record.get("config") or {}

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config, such as run."""
        return self.config.get(name) or {}

    def row(self, split: str) -> str:
        """The model's own row of a split, its first."""
        return next(iter(self.results[split]), "")

    def parts(self, split: str) -> list[str]:
        """The splits of ranks.json that a result is made of: itself, or those that it is the mean of."""
        return self.ranks.get("means", {}).get(split, [split])

    def asked(self, split: str) -> dict[str, Any] | None:
        """What was asked and ranked: {"protocol", "queries", "gallery", ...}; None where no rank was kept."""
        parts = [self.ranks.get("splits", {}).get(part) for part in self.parts(split)]
        if not all(parts):
            return None
        return {key: [part[key] for part in parts] for key in ("protocol", "queries", "gallery", "count", "every")}

    def values(self, split: str, metric: str) -> list[np.ndarray] | None:
        """Percent of each query [Q], one array a split that the result is made of; None where they were not kept."""
        if self.asked(split) is None:
            return None
        rows = [self.ranks["splits"][part]["rows"].get(self.row(split)) for part in self.parts(split)]
        found = [None if row is None else _values(row, metric) for row in rows]
        return None if any(part is None for part in found) else found


def _values(row: Mapping[str, Any], metric: str) -> np.ndarray | None:
    kind, _, k = metric.partition("@")
    if metric in row.get("values", {}):
        return np.asarray(row["values"][metric], dtype=np.float64)
    ranks = row.get({"R": "rank", "R_subset": "subset_rank"}.get(kind, ""))
    return None if ranks is None or not k.isdecimal() else hits(ranks, int(k))


def read_run(path: str | Path) -> StoredRun:
    """A run's folder, or an output folder: then the run whose results it has, else the newest one in it.

    Raises DataError where there is nothing, or what is there is damaged.
    """
    path = Path(path)
    folder = _own_folder(path)
    record = read_json(folder / "run.json", dict, _AGAIN) if (folder / "run.json").is_file() else {}
    _check_config(record, folder / "run.json")
    log = _log(folder / "log.txt")
    found = next((file for name in ("evaluation.json", "results.json") if (file := folder / name).is_file()), None)
    if found is None:
        results = _last_validation(log, record)
        if not results and not any("train_loss" in entry for entry in log):
            raise DataError(
                f"{path}: neither evaluation.json nor results.json is there; `neucore evaluate` writes them"
                + ("" if not record else f". The run (status: {record.get('status')}) has logged nothing yet")
            )
        check_results(results, folder / "log.txt")
        return StoredRun(path, folder, results, record=record, log=log, evaluated=False)
    content = read_json(found, dict, f"it is no result file: {_AGAIN}")
    content = content if "results" in content else {"results": content}
    results, per_change = content.pop("results"), content.pop("per_change", None) or {}
    check_results(results, found)
    check_results(per_change, found)
    _check_config(content, found)
    ranks = _ranks(folder / RANKS, results) if (folder / RANKS).is_file() else {}
    return StoredRun(path, folder, results, per_change, content, record, log, ranks)


def _own_folder(path: Path) -> Path:
    if any((path / name).is_file() for name in ("evaluation.json", "run.json")) or not path.is_dir():
        return path
    runs = [entry for entry in sorted(path.iterdir()) if (entry / "run.json").is_file()]
    copied = path / "results.json"
    if copied.is_file():  # a copy of the latest run's
        content = copied.read_bytes()
        runs = [run for run in runs if (file := run / "results.json").is_file() and file.read_bytes() == content]
    created = {run: time for run in runs if isinstance(time := _created(run), int | float)}
    return max(created, key=lambda run: (created[run], run.name), default=path)


def _created(run: Path) -> Any:
    try:
        return read_json(run / "run.json", dict).get("created")
    except DataError:  # of a neighbour: it is not the one that was asked for
        return None


def _check_config(content: Mapping[str, Any], file: Path) -> None:
    config = content.get("config") or {}
    sections = [config.get(name) or {} for name in ("run", "model", "datasets")] if isinstance(config, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise DataError(f"{file}: its config is none as a run writes it; {_AGAIN}")


def _log(path: Path) -> list[dict[str, Any]]:
    """The entries of log.txt; half a line, which a kill leaves, is none."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = parse_json(line)
            except ValueError:
                continue
            entries += [entry] if isinstance(entry, dict) else []
    return entries


def _last_validation(log: Iterable[Mapping[str, Any]], record: Mapping[str, Any]) -> dict[str, Any]:
    """{split: {row: metrics}} as of the last validation in the log."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    model = (record.get("config") or {}).get("model") or {}
    title = str(model.get("method") or model.get("arch") or "model")
    for entry in log:
        for key in entry:
            if key.endswith("_median_rank") and isinstance(entry.get("epoch"), int):
                split = key.removesuffix("_median_rank")
                numbers = {name.removeprefix(f"{split}_"): value for name, value in entry.items()}
                names = [name for name in numbers if "@" in name or name in ("median_rank", "queries")]
                results[split] = {title: {name: numbers[name] for name in names}}
    return results


def _ranks(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """ranks.json, checked: its shape, and that its means are those of the results."""
    content = read_json(path, dict, _AGAIN)
    if content.get("format") != _FORMAT:
        raise DataError(f"{path}: expected the format {_FORMAT}, given {content.get('format')!r}; {_AGAIN}")
    means, splits = content.get("means"), content.get("splits")
    wrong = not isinstance(means, dict) or not isinstance(splits, dict)
    wrong = wrong or not all(isinstance(parts, list) and parts for parts in means.values())
    wrong = wrong or not all(isinstance(part, str) and part in splits for parts in means.values() for part in parts)
    wrong = wrong or not all(_good_split(entry) for entry in splits.values())
    if wrong:
        raise DataError(f"{path}: is no file of ranks as an evaluation writes it; {_AGAIN}")
    for split, entry in splits.items():
        for row, kept in entry["rows"].items():
            for metric, told in results.get(split, {}).get(row, {}).items():
                values = _values(kept, metric)
                if values is not None and entry["every"] == 1 and abs(values.mean() - told) > 0.01:
                    raise DataError(
                        f"{path}: {split}, {row}: {metric} of its ranks is {values.mean():.2f}, of the results beside "
                        f"it {told:.2f}: it is of another evaluation; {_AGAIN}"
                    )
    return content


def _good_split(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("rows"), dict):
        return False
    count, every = entry.get("count"), entry.get("every")
    if not all(type(number) is int and number > 0 for number in (count, every)):
        return False
    if not all(isinstance(entry.get(key), str) for key in ("protocol", "queries", "gallery")):
        return False
    length = -(-count // every)
    for row in entry["rows"].values():
        if not isinstance(row, dict) or "rank" not in row or not isinstance(row.get("values", {}), dict):
            return False
        whole = [row[name] for name in ("rank", "subset_rank") if name in row]
        lists = [*whole, *row.get("values", {}).values()]
        if not all(isinstance(numbers, list) and len(numbers) == length for numbers in lists):
            return False
        if not all(type(rank) is int and rank >= 0 for ranks in whole for rank in ranks):
            return False
        if not all(type(value) in (int, float) for values in row.get("values", {}).values() for value in values):
            return False
    return True
