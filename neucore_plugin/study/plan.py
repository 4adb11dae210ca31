"""Which trials a study has: a whole, checked config for each, and the folder it runs in. Light: no torch."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.common.files import expanded, sha256_text
from neucore_plugin.config import loading
from neucore_plugin.config.compare import config_fingerprint, leaves
from neucore_plugin.config.run import LENGTHS
from neucore_plugin.config.sections import MODEL_SCHEMAS, Tables, package_tables
from neucore_plugin.config.shipped import find_config
from neucore_plugin.config.study import StudySchema, read_study

_OURS = ("run.seed", "run.output_dir", "run.resume", "run.evaluate")  # what a study sets by itself
CONFIG = "trial.yaml"  # beside a trial's results: what it trained by


@dataclass(frozen=True)
class Trial:
    """One training. `row`: the name it has in the tables, a method's, an ablation's or `METHOD, CURVE`."""

    row: str
    kind: str  # "method", "ablation" or "curve"
    method: str
    variant: str | None  # the curve's name
    seed: int
    content: dict[str, Any] = field(repr=False)  # the config as a file would say it
    checked: dict[str, Any] = field(repr=False)  # the same with all defaults
    folder: Path

    @property
    def title(self) -> str:
        """`tirg, seed 3`."""
        return f"{self.row}, seed {self.seed}"

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides what the training computes."""
        return config_fingerprint(self.checked)

    @property
    def pace(self) -> str:
        """sha256 of all that decides how long a step takes, and the epochs: the same for all seeds of a row."""
        lengths = ("seed", *(key for keys in LENGTHS.values() for key in keys))
        run = {key: value for key, value in self.checked["run"].items() if key not in lengths}
        return config_fingerprint({**self.checked, "run": run})

    def lasting(self, length: int) -> "Trial":
        """The same with another number of epochs (of iterations, where its runner counts those)."""
        key = LENGTHS[self.checked["run"]["runner"]][0]
        contents = ({**part, "run": {**part["run"], key: length}} for part in (self.content, self.checked))
        return replace(self, **dict(zip(("content", "checked"), contents, strict=True)))


@dataclass(frozen=True)
class Plan:
    """A study with all its trials in the order of their running, and those of them that are `wanted` now."""

    name: str
    study: StudySchema
    main: str
    seeds: list[int]
    minutes: float | None
    folder: Path
    trials: list[Trial]
    wanted: frozenset[str]  # rows
    command: str

    def rows(self, kind: str) -> list[str]:
        """The rows of a kind, in the study's order."""
        return list(dict.fromkeys(trial.row for trial in self.trials if trial.kind == kind))


def make_plan(
    path: str | Path,
    options: loading.Options | None = None,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    quick: bool = False,
    out: str | Path | None = None,
    tables: Tables | None = None,
) -> Plan:
    """The plan of a study file, or of the shipped one of that name.

    options: config keys as on the command line, laid over those of every trial. only: rows that are wanted, all
    where there are none. seeds: in place of the study's. quick: the study's smaller form, in a folder of its own.
    Raises one ConfigError with all that is wrong with the study or with the config of any trial.
    """
    source = find_config(path)
    study = read_study(source)
    options = loading.dotlist(options)
    small = study.quick if quick else None
    chosen = {
        part: {
            name: given or {}
            for name, given in getattr(study, part).items()
            if small is None or getattr(small, part) is None or name in getattr(small, part)
        }
        for part in ("methods", "ablations", "curves")
    }
    main = study.main or next(iter(study.methods))
    methods = chosen["methods"]
    folder = expanded(out or study.output_dir) / "quick" if quick else expanded(out or study.output_dir)
    base = loading.read_yaml(_base(source, study.base))
    rows: list[tuple[str, str, str, str | None, list[Mapping[str, Any]]]] = []
    rows += [(name, "method", name, None, [given]) for name, given in methods.items()]
    of_main = study.methods[main] or {}
    rows += [(name, "ablation", main, None, [of_main, given]) for name, given in chosen["ablations"].items()]
    rows += [
        (f"{name}, {curve}", "curve", name, curve, [given, change])
        for curve, change in chosen["curves"].items()
        for name, given in methods.items()
    ]
    _check_names([row[0] for row in rows])
    numbers = list(seeds) or (small and small.seeds) or study.seeds
    trials, problems = [], []
    for row, kind, method, variant, layers in rows:
        layers = [study.options, *layers, *([small.options] if small else [])]
        try:
            content = _content(base, layers, options)
            place = folder / "trials" / _slug(row)
            its_seeds = numbers[:1] if kind == "curve" else numbers
            seeded = [_seeded(content, seed, place / f"seed-{seed}") for seed in its_seeds]
            checked = loading.check(seeded[0], tables or package_tables(), f"of the trial {row}")
            if (runner := checked["run"].get("runner")) not in LENGTHS:
                raise ConfigError(f"the trial {row}: run.runner: got {runner!r}; a study needs {' or '.join(LENGTHS)}")
        except ConfigError as error:
            problems.append(str(error))
            continue
        for seed, one in zip(numbers, seeded, strict=False):
            run = {**checked["run"], "seed": seed, "output_dir": one["run"]["output_dir"]}
            trial = Trial(row, kind, method, variant, seed, one, {**checked, "run": run}, Path(run["output_dir"]))
            trials.append(trial)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    wanted = _wanted(only, [row[0] for row in rows])
    order = sorted(trials, key=lambda trial: numbers.index(trial.seed))  # a whole row of one seed each comes first
    command = ["neucore", "study", "--cfg-path", str(path), *(["--quick"] if quick else [])]
    command += ["--seeds", *map(str, seeds)] if seeds else []
    command += ["--options", *(f"{o[0]}={o[1]}" if isinstance(o, tuple) else o for o in options)] if options else []
    minutes = (small and small.minutes) or study.minutes
    return Plan(source.stem, study, main, list(numbers), minutes, folder, order, wanted, shlex.join(command))


def _base(source: Path, given: str) -> Path:
    beside = source.parent / given
    return beside if beside.is_file() else find_config(given)


def _slug(row: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", row).strip("-") or sha256_text(row)[:12]


def _check_names(rows: Iterable[str]) -> None:
    """Names that differ, if at all, in what no folder's name keeps would share a folder."""
    seen: dict[str, str] = {}
    for row in rows:
        other = seen.setdefault(_slug(row).lower(), row)
        if other != row:
            raise ConfigError(f"study: the names {other!r} and {row!r} give the same folder; rename one")


def _content(base: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], options: Sequence[Any]) -> dict[str, Any]:
    """The base with all layers, then the options, over it. A layer that changes the model keeps of the base's settings
    what the new one has as well."""
    content = dict(base)
    for layer in layers:
        flat = leaves(layer)
        if taken := [key for key in flat if key in _OURS]:
            raise ConfigError(f"study: {', '.join(taken)}: set by the study itself; leave it out")
        before, arch = content.get("model"), flat.get("model.arch")
        schema = MODEL_SCHEMAS.get(arch) if isinstance(arch, str) else None
        if schema and isinstance(before, Mapping) and before.get("arch") != arch:
            content["model"] = loading.known_settings(before, schema)
        content = loading.with_options(content, list(flat.items()))
    if taken := [option for option in options if str(option).partition("=")[0] in _OURS]:
        raise ConfigError(f"--options: {', '.join(map(str, taken))}: set by the study itself; see --seeds and --out")
    return loading.with_options(content, options)


def _seeded(content: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    run = content.get("run")
    if not isinstance(run, Mapping):
        raise ConfigError("study: the base has no section `run`, so there is nothing to train")
    ours = {"seed": seed, "output_dir": str(folder), "resume": "auto", "evaluate": False}
    return {**content, "run": {**run, **ours}}


def _wanted(only: Sequence[str], known: Sequence[str]) -> frozenset[str]:
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ConfigError(f"--only: {unknown[0]!r} is no row of this study.{nearest(unknown[0], known)}")
    return frozenset(only or known)
