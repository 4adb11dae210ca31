"""Several stored runs side by side: means, spread over seeds, and paired differences to one of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neucore_plugin.common.errors import ConfigError, DataError, first_few, nearest
from neucore_plugin.config.compare import config_differences
from neucore_plugin.evaluation import significance
from neucore_plugin.evaluation.stored import StoredRun, read_run
from neucore_plugin.report import metric_columns, row_label

_TOLD = 3  # settings that tell groups apart in a name
_IDENTITY = {
    "protocol": "another protocol",
    "queries": "other queries",
    "gallery": "another gallery",
    "every": "other queries kept",
}


class Group:
    """Runs that are compared as one: the same config but for the seed, or the same name given.

    Attributes: name, runs.
    """

    def __init__(self, name: str | None, run: StoredRun) -> None:
        self.given, self.name, self.runs = name, name or "", [run]

    @property
    def seeds(self) -> list[int | None]:
        """run.seed of each run."""
        return [run.section("run").get("seed") for run in self.runs]

    def takes(self, name: str | None, run: StoredRun) -> bool:
        """Whether a run belongs here: its name is the same; without names, all but the seed is and the seed is new."""
        if name is not None or self.given is not None:
            return name == self.given
        seed = run.section("run").get("seed")
        return bool(run.config) and seed not in self.seeds and _differences(self.runs[0], run) == ["run.seed"]

    def means(self, split: str, metric: str) -> list[float]:
        """The metric of each run."""
        return [float(run.results[split][run.row(split)][metric]) for run in self.runs]

    def values(self, split: str, metric: str) -> Any:
        """Values of single queries, as `significance` takes them; None where a run kept none."""
        kept = [run.values(split, metric) for run in self.runs]
        if any(parts is None for parts in kept):
            return None
        return [np.stack(part) for part in zip(*kept, strict=True)]


def read_groups(given: Sequence[str], apart: bool = False) -> list[Group]:
    """Runs, each a path or NAME=path -> groups, in the order of their first runs. apart: each run by itself.

    Raises DataError for what is no run, ConfigError where one is given twice.
    """
    groups: list[Group] = []
    seen: dict[Path, str] = {}
    for text in given:
        name, mark, path = text.partition("=")
        if not mark or Path(text).exists():
            name, path = None, text
        elif not name:
            raise ConfigError(f"{text!r}: the name before = is empty; give RUN or NAME=RUN")
        run = read_run(path)
        if not run.evaluated:
            raise DataError(f"{path}: the run is not finished; `neucore report {path}` shows how it stands")
        place = run.folder.resolve()
        if place in seen:
            raise ConfigError(f"{text}: is the same run as {seen[place]}; give each once")
        seen[place] = text
        group = next((group for group in groups if not apart and group.takes(name, run)), None)
        if group is not None:
            group.runs.append(run)
        else:
            groups.append(Group(name, run))
    _name(groups)
    return groups


def compare(
    groups: Sequence[Group],
    baseline: str | None = None,
    splits: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The comparison as plain values, for JSON.

    {"baseline": name, "groups": [{"name", "runs", "seeds"}], "notes": [], "splits": {split: {metric: {group: entry}}}};
    an entry holds "mean", "values" (of the runs), "spread" (their standard deviation), and, where the ranks of all runs
    were kept, "interval" (95 %, over queries); of a group other than the baseline also "difference", and with ranks its
    "difference_interval", "p", and "p_holm": corrected for all tests of that metric, over groups and splits.

    splits, metrics: of those that all runs have, these; all where None. Raises ConfigError for names that are not
    there, and for runs that share no split; DataError where a split has other queries, another gallery or protocol.
    """
    runs = [run for group in groups for run in group.runs]
    notes: list[str] = []
    chosen = _splits(runs, splits, notes)
    for split in chosen:
        _check_same(runs, split, notes)
    shared = metric_columns({s: runs[0].results[s] for s in chosen})
    for run in runs:
        own = {s: {run.row(s): run.results[s][run.row(s)]} for s in chosen}
        shared = [name for name in shared if name in metric_columns(own)]
    wanted = list(metrics or shared)
    if unknown := [name for name in wanted if name not in shared]:
        raise ConfigError(f"metric {unknown[0]!r} is not in all runs.{nearest(unknown[0], shared)}")
    names = [group.name for group in groups]
    if baseline is not None and baseline not in names:
        raise ConfigError(f"--baseline {baseline!r} is none of the runs.{nearest(baseline, names)}")
    base = groups[names.index(baseline) if baseline else 0]
    found: dict[str, Any] = {split: {} for split in chosen}
    for metric in wanted:
        tested = []
        for split in chosen:
            if not all(metric in run.results[split][run.row(split)] for run in runs):
                continue
            entries = {group.name: _entry(group, base, split, metric) for group in groups}
            found[split][metric] = entries
            tested += [entry for entry in entries.values() if "p" in entry]
        for entry, corrected in zip(tested, significance.holm([entry["p"] for entry in tested]), strict=True):
            entry["p_holm"] = corrected
    without = [str(run.path) for run in runs if any(run.asked(split) is None for split in chosen)]
    if without:
        notes.append(
            f"no ranks of single queries in {first_few(without)}: evaluated before they were kept. Means alone are "
            "compared there; evaluate again for intervals and p"
        )
    if len(groups) == 1 and len(runs) > 1:
        notes.append("all runs are seeds of one config; --apart compares them with each other")
    listed = [{"name": g.name, "runs": [str(run.path) for run in g.runs], "seeds": g.seeds} for g in groups]
    return {"baseline": base.name, "groups": listed, "notes": notes, "splits": found}


def _entry(group: Group, base: Group, split: str, metric: str) -> dict[str, Any]:
    means = group.means(split, metric)
    ours, theirs = group.values(split, metric), base.values(split, metric)
    entry: dict[str, Any] = {"mean": float(np.mean(means)), "values": means, "spread": significance.spread(means)}
    if ours is not None:
        alone = significance.bootstrap(ours)
        entry["interval"] = [alone.low, alone.high]
    if group is not base:
        entry["difference"] = entry["mean"] - float(np.mean(base.means(split, metric)))
        if ours is not None and theirs is not None:
            paired = significance.paired_bootstrap(ours, theirs)
            entry |= {"difference_interval": [paired.low, paired.high], "p": paired.p}
    return entry


def _splits(runs: Sequence[StoredRun], wanted: Sequence[str] | None, notes: list[str]) -> list[str]:
    held = [[split for split, rows in run.results.items() if rows] for run in runs]
    shared = [split for split in held[0] if all(split in others for others in held)]
    for split in wanted or ():
        missing = next((run for run, own in zip(runs, held, strict=True) if split not in own), None)
        if missing is not None:
            own = held[runs.index(missing)]
            raise ConfigError(f"{missing.path} has no split {split!r}.{nearest(split, own)}")
    if wanted:
        return list(dict.fromkeys(wanted))
    if not shared:
        told = "; ".join(f"{run.path}: {first_few(own)}" for run, own in zip(runs, held, strict=True))
        raise ConfigError(f"the runs have no split in common ({told}), so there is nothing to compare")
    if dropped := sorted({split for own in held for split in own} - set(shared)):
        notes.append(f"not in all runs, so left out: {', '.join(dropped)}")
    return shared


def _check_same(runs: Sequence[StoredRun], split: str, notes: list[str]) -> None:
    """DataError where a split of two runs asks, ranks or counts something else."""
    first = runs[0]
    for run in runs[1:]:
        why = _why_other(first, run, split)
        if why:
            raise DataError(
                f"{run.path} and {first.path} cannot be compared on {split}: {why}. Evaluate both alike, or choose "
                "other splits with --splits"
            )
    unknown = [str(run.path) for run in runs if _data(run, split) is None and run.asked(split) is None]
    if unknown and len(runs) > 1:
        note = f"{first_few(unknown)}: the file does not tell queries and gallery, only their number was compared"
        if note not in notes:
            notes.append(note)


def _why_other(one: StoredRun, other: StoredRun, split: str) -> str:
    ours, theirs = (run.results[split][run.row(split)] for run in (one, other))
    if ours.get("protocol") != theirs.get("protocol"):
        names = [row.get("protocol") or "standard" for row in (theirs, ours)]
        return f"another protocol ({names[0]}, not {names[1]})"
    if ours["queries"] != theirs["queries"]:
        return f"other queries ({theirs['queries']:,}, not {ours['queries']:,})"
    asked = one.asked(split), other.asked(split)
    if all(asked):
        return next((text for key, text in _IDENTITY.items() if asked[0][key] != asked[1][key]), "")
    data = _data(one, split), _data(other, split)
    return "other queries, texts, answers or another gallery" if None not in data and data[0] != data[1] else ""


def _data(run: StoredRun, split: str) -> Any:
    """The fingerprint of a split's data, as evaluation.json has it."""
    found = run.provenance.get("data")
    return found.get(split) if isinstance(found, dict) else None


def _differences(one: StoredRun, other: StoredRun) -> list[str]:
    """Keys of the config that differ."""
    return [line.partition(":")[0] for line in config_differences(one.config, other.config)]


def settings_that_differ(groups: Sequence[Group]) -> dict[str, str]:
    """{key: the value of each group, in order}, of all keys in which first runs differ."""
    firsts = [group.runs[0] for group in groups]
    if not all(run.config for run in firsts):
        return {}
    keys = dict.fromkeys(key for run in firsts[1:] for key in _differences(firsts[0], run))
    return {key: " · ".join(f"{g.name}: {_setting(g.runs[0], key) or '–'}" for g in groups) for key in keys}


def _name(groups: Sequence[Group]) -> None:
    """Names that tell the groups apart: the method, the settings that differ, else the folder."""
    unnamed = [group for group in groups if group.given is None]
    methods = [next((group.runs[0].row(split) for split in group.runs[0].results), "") for group in unnamed]
    for group, method in zip(unnamed, methods, strict=True):
        run = group.runs[0]
        alike = [other.runs[0] for other, its in zip(unnamed, methods, strict=True) if its == method]
        keys = {key for other in alike if other.config and run.config for key in _differences(run, other)}
        keys -= {"run.seed"} if keys != {"run.seed"} else set()
        told = [(key, value) for key in sorted(keys) if (value := _setting(run, key)) is not None]
        settings = [f"{key.rpartition('.')[2]}={value}" for key, value in told] if len(keys) <= _TOLD else []
        group.name = ", ".join([row_label(method or "model"), *settings])
    names = [group.name for group in groups]
    for group in unnamed:
        if names.count(group.name) > 1:
            group.name = f"{group.name} ({group.runs[0].folder.resolve().name})"
    for number, group in enumerate(groups):
        if any(other.name == group.name for other in groups[:number]):
            group.name = f"{group.name} #{number + 1}"


def _setting(run: StoredRun, key: str) -> str | None:
    """The value of a dotted key as text; None where the config lacks it."""
    value: Any = run.config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return "null" if value is None else str(value)[:40]
