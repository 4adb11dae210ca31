"""Config files: reading, options, package defaults, and a check that reports everything wrong at once.

Knows neither torch nor lavis. `Config` behaves like `lavis.common.config.Config`.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.config.compare import config_fingerprint
from neucore_plugin.config.crosschecks import cross_checks
from neucore_plugin.config.data import PreprocessSchema
from neucore_plugin.config.encoders import BACKBONE_SCHEMAS, pixels_of
from neucore_plugin.config.model import NeucoreSchema
from neucore_plugin.config.run import OUR_RUNNERS, OUR_TASKS, RunSchema
from neucore_plugin.config.sections import DATASET_SCHEMAS, MODEL_SCHEMAS, PROCESSOR_SCHEMAS, Tables
from neucore_plugin.config.shipped import CONFIGS, find_config

DEFAULT_TYPES = {"neucore": "embedded", "cir_baseline": "embedded"}
SECTIONS = ("model", "datasets", "run", "preprocess")
# Keys of the host that are called otherwise here, or that people take from elsewhere.
KNOWN_BY_OTHER_NAMES = {
    "resume_ckpt_path": "resume",
    "epochs": "max_epoch",
    "lr": "init_lr",
    "batch_size": "batch_size_train",
    "pretrained": "checkpoint",
    "finetuned": "checkpoint",
}


def package_tables() -> Tables:
    """What this package alone knows, without the host."""
    models = {path.stem: str(path) for path in sorted((CONFIGS / "models").glob("*.yaml"))}
    datasets = {path.stem: {"default": str(path)} for path in sorted((CONFIGS / "datasets").glob("*.yaml"))}
    shared = {name: path for name, path in models.items() if not name.startswith("official_")}
    return Tables(models={"neucore": models, "cir_baseline": shared}, datasets=datasets)


class Config:
    """A checked config; the attributes of the host's own class, and `fingerprint`."""

    def __init__(self, content: Mapping[str, Any], source: str | None = None) -> None:
        self.config = OmegaConf.create(dict(content))
        self.source = source

    run_cfg = property(lambda self: self.config.run, doc="Section `run`.")
    datasets_cfg = property(lambda self: self.config.datasets, doc="Section `datasets`.")
    model_cfg = property(lambda self: self.config.model, doc="Section `model`.")

    @property
    def run(self) -> RunSchema:
        """Section `run` as a validated object, for our runners; what a process notes in it (rank, gpu) is left out."""
        content = self.to_dict()["run"]
        return RunSchema.model_validate({key: content[key] for key in RunSchema.model_fields if key in content})

    def get_config(self) -> Any:
        """The whole as an OmegaConf mapping."""
        return self.config

    def to_dict(self) -> dict[str, Any]:
        """The whole as plain containers."""
        return OmegaConf.to_container(self.config, resolve=True)

    def pretty_print(self) -> None:
        """Write the completed config to the log, as the yaml that would say the same."""
        logging.info(
            "the config, completed:\n%s",
            yaml.safe_dump(self.to_dict(), sort_keys=False, width=120, default_flow_style=None).rstrip(),
        )

    def fingerprint(self) -> str:
        """sha256 of everything that decides what a run computes; folders, logging and workers are left out."""
        return config_fingerprint(self.to_dict())


# --- reading ----------------------------------------------------------------------------------------------------------


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A config file, or the shipped one of that name, as plain containers.

    Raises ConfigError where it is missing, no YAML, or no mapping.
    """
    path = find_config(path)
    try:
        content = OmegaConf.load(path)
        content = OmegaConf.to_container(content, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} cannot be read: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"config file {path} must be a mapping with the keys {', '.join(SECTIONS[:3])}")
    return content


def dotlist(options: Iterable[str] | None) -> list[str]:
    """`--options` as a list of key=value; both `a.b=c` and the host's pair form `a.b c` are understood."""
    tokens, result = [str(token) for token in options or ()], []
    while tokens:
        token = tokens.pop(0)
        if "=" not in token:
            if not tokens:
                raise ConfigError(f"--options: {token!r} has no value; write {token}=VALUE")
            token = f"{token}={tokens.pop(0)}"
        key = token.partition("=")[0]
        if not all(part.strip() for part in key.split(".")) or key.split(".")[0] not in SECTIONS:
            raise ConfigError(
                f"--options: {token!r}: a key begins with {', '.join(s + '.' for s in SECTIONS)} as in run.seed=1"
            )
        result.append(token)
    return result


def _with_options(content: dict[str, Any], options: Iterable[str] | None) -> dict[str, Any]:
    chosen = OmegaConf.create()
    for option in dotlist(options):
        try:
            chosen = OmegaConf.merge(chosen, OmegaConf.from_dotlist([option]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"--options: {option!r} cannot be read: {' '.join(str(error).split())}") from error
    return merge(content, OmegaConf.to_container(chosen, resolve=True))  # at once: their order does not matter


def merge(defaults: Any, given: Any) -> Any:
    """`given` over `defaults`, mappings key by key.

    A mapping that names another thing (`name: ...`) replaces the default whole: its settings would not fit.
    """
    if not isinstance(defaults, Mapping) or not isinstance(given, Mapping):
        return given
    if given.get("name") is not None and defaults.get("name") not in (None, given["name"]):
        return dict(given)
    return {
        **defaults,
        **{key: merge(defaults[key], value) if key in defaults else value for key, value in given.items()},
    }


# --- checking ---------------------------------------------------------------------------------------------------------


class Checker:
    """Collects problems, a line each: key path, what was given, what is allowed, the nearest name."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.bad: set[str] = set()

    def add(self, path: str, text: str) -> None:
        """Note a problem of the key `path`, once."""
        if f"{path}: {text}" not in self.problems:
            self.problems.append(f"{path}: {text}")
        self.bad.add(path)

    def name(self, path: str, given: Any, known: Iterable[str], what: str) -> bool:
        """Whether `given` is a known name; a problem otherwise."""
        known = tuple(known)
        if isinstance(given, str) and given in known:
            return True
        self.add(path, f"{given!r} is no {what}.{nearest(str(given), known)}")
        return False

    def section(self, path: str, given: Any, schema: type[BaseModel]) -> dict[str, Any]:
        """`given` with defaults filled in; what is wrong becomes a problem and is replaced by its default."""
        given = {} if given is None else given
        for _ in range(8):  # taking out what is wrong can only bring up what was hidden behind it
            try:
                return schema.model_validate(given).model_dump()
            except ValidationError as error:
                if not isinstance(given, Mapping):
                    self.add(path, f"got {given!r}; allowed: a mapping")
                    return {}
                wrong = [(item["loc"], item) for item in error.errors(include_url=False)]
                for loc, item in wrong:
                    self._explain(path, loc, item, schema)
                if all(item["type"] == "missing" for _, item in wrong):
                    return dict(given)
                for loc, item in wrong:
                    if item["type"] != "missing":
                        given = _without(given, loc)
        return dict(given)

    def _explain(self, path: str, loc: tuple, item: Mapping[str, Any], schema: type[BaseModel]) -> None:
        key = ".".join([path, *map(str, loc)])
        if item["type"] == "extra_forbidden":
            known = _keys_at(schema, loc[:-1])
            owner = _owner(schema, loc)
            if owner is not None:
                what = ", ".join(known)
                self.add(key, f"is a setting of {owner[0]}, not of {owner[1]}; take it out. Allowed here: {what}")
                return
            alias = KNOWN_BY_OTHER_NAMES.get(str(loc[-1]))
            hint = f" Did you mean {alias!r}?" if alias in known else nearest(str(loc[-1]), known)
            if "?" in hint:  # the list of all keys would only bury the one that is meant
                hint = hint[: hint.index("?") + 1]
            self.add(key, f"unknown key (given {_short(item['input'])}).{hint}")
        elif item["type"] == "missing":
            if key not in self.bad:  # else it is missing because its wrong value was taken out
                self.add(key, "is required but not given")
        elif item["type"] == "not_allowed":
            self.add(key, f"got {_short(item['input'])}; allowed: {item['msg']}")
        else:  # a scalar where a mapping stands
            keys = _keys_at(schema, loc)
            allowed = f"a mapping with the keys {', '.join(keys)}" if keys else item["msg"]
            self.add(key, f"got {_short(item['input'])}; allowed: {allowed}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _without(given: Mapping[str, Any], loc: tuple) -> dict[str, Any]:
    head, *rest = loc
    inner = given.get(head)
    if rest and isinstance(inner, Mapping):
        return {**given, head: _without(inner, tuple(rest))}
    return {key: value for key, value in given.items() if key != head}


def _keys_at(schema: Any, loc: tuple) -> list[str]:
    """Valid keys of the nested schema that `loc` leads to."""
    for part in loc:
        field_info = schema.model_fields.get(part)
        options = () if field_info is None else (field_info.annotation, *get_args(field_info.annotation))
        schema = next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if schema is None:
            return []
    return list(schema.model_fields)


def _owner(schema: Any, loc: tuple) -> tuple[str, str] | None:
    """(another model that has the key, the model of `schema`), where `schema` is a model's and another has it."""
    arch = next((name for name, one in MODEL_SCHEMAS.items() if one is schema), None)
    others = [
        name for name, one in MODEL_SCHEMAS.items() if arch and one is not schema and loc[-1] in _keys_at(one, loc[:-1])
    ]
    return (others[0], arch) if others else None


def _model(checker: Checker, given: Any, tables: Tables) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checked section `model` and the default `preprocess` of its type."""
    given = given if isinstance(given, Mapping) else checker.section("model", given, NeucoreSchema)
    arch = given.get("arch")
    if not checker.name("model.arch", arch, tables.models, "known model"):
        arch, given = "neucore", {**given, "arch": "neucore"}
    types, model_type = tables.models.get(arch) or {}, given.get("model_type") or DEFAULT_TYPES.get(arch)
    defaults: dict[str, Any] = {}
    if checker.name("model.model_type", model_type, types, f"model type of {arch}"):
        defaults = read_yaml(types[model_type])
    elif DEFAULT_TYPES.get(arch) in types:
        defaults, model_type = read_yaml(types[DEFAULT_TYPES[arch]]), DEFAULT_TYPES[arch]
    schema = MODEL_SCHEMAS.get(arch)
    section = defaults.get("model") or {}
    if schema is not None and section.get("arch") not in (None, arch):  # the file of another model of ours is shared
        section = _shared(section, schema)
    merged = {**merge(section, given), "model_type": model_type}
    if schema is not None:
        merged = checker.section("model", merged, schema)
        _backbone(checker, merged)
    return merged, defaults.get("preprocess") or {}


def _shared(section: Mapping[str, Any], schema: type[BaseModel]) -> dict[str, Any]:
    """What of a default section `schema` knows too, section by section; values without a schema of theirs whole."""
    kept = {}
    for key, value in section.items():
        inner = schema.model_fields[key].annotation if key in schema.model_fields else None
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, BaseModel):
            kept[key] = _shared(value, inner)
        elif inner is not None:
            kept[key] = value
    return kept


def _backbone(checker: Checker, model: dict[str, Any]) -> None:
    for side, known in BACKBONE_SCHEMAS.items():
        given = (model.get("backbone") or {}).get(side)
        path = f"model.backbone.{side}"
        if not isinstance(given, Mapping):
            checker.add(path, f"got {_short(given)}; allowed: a mapping with `name`")
        elif checker.name(f"{path}.name", given.get("name"), known, f"{side} encoder"):
            model["backbone"][side] = checker.section(path, given, known[given["name"]])


def _processors(checker: Checker, path: str, section: dict[str, Any], tables: Tables) -> None:
    for kind in ("vis_processor", "text_processor"):
        for side, given in (section.get(kind) or {}).items():
            where = f"{path}.{kind}.{side}"
            if given is None:
                continue
            if not isinstance(given, Mapping):
                checker.add(where, f"got {_short(given)}; allowed: a mapping with `name`")
            elif checker.name(f"{where}.name", given.get("name"), tables.processors, "known processor"):
                schema = PROCESSOR_SCHEMAS.get(given["name"])
                if schema is not None:
                    section[kind][side] = checker.section(where, given, schema)


def _datasets(checker: Checker, given: Any, tables: Tables, pixels: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Checked section `datasets`; `pixels`: what the processors' sides get where the file does not say otherwise."""
    if not isinstance(given, Mapping) or not given:
        checker.add("datasets", f"got {_short(given)}; allowed: a mapping of at least one data set")
        return {}
    checked = {}
    for name, section in given.items():
        path = f"datasets.{name}"
        if not checker.name(path, name, tables.datasets, "known data set"):
            continue
        if section is not None and not isinstance(section, Mapping):
            checker.add(path, f"got {_short(section)}; allowed: a mapping")
            continue
        files, kind = tables.datasets[name], (section or {}).get("type", "default")
        defaults = {}
        if files and checker.name(f"{path}.type", kind, files, f"type of {name}"):
            defaults = (read_yaml(files[kind]).get("datasets") or {}).get(name) or {}
        if name in DATASET_SCHEMAS:
            wanted = {side: {"name": "cir_image", **values} for side, values in pixels.items() if values}
            defaults = merge(defaults, {"vis_processor": wanted})
        checked[name] = merge(defaults, section or {})
        if name in DATASET_SCHEMAS:
            checked[name] = checker.section(path, checked[name], DATASET_SCHEMAS[name])
            _processors(checker, path, checked[name], tables)
    return checked


def load_config(
    path: str | Path,
    options: Iterable[str] | None = None,
    tables: Tables | None = None,
    section_of: Callable[[str, Mapping[str, Any]], dict[str, Any] | None] | None = None,
) -> Config:
    """Read, complete and check a config file; `options` are laid over it first.

    section_of: of a checkpoint and what the file says of the model: the checkpoint's {"config": its `model` section,
    "image_processor": settings}. With run.evaluate they stand in place of the defaults of a model type and of a data
    set's eval processor; arch, type and method are the checkpoint's.

    Raises one ConfigError with every problem of every section. Sections of the host's own models, data sets and
    runners are completed from their default files and passed through unchecked.
    """
    tables = tables or package_tables()
    content = _with_options(read_yaml(path), options)
    model, run, pixels = content.get("model"), content.get("run"), {}
    if section_of and isinstance(run, Mapping) and run.get("evaluate") is True and isinstance(model, Mapping):
        held = section_of(model["checkpoint"], model) if isinstance(model.get("checkpoint"), str) else None
        if held:
            said = {key: value for key, value in model.items() if key not in ("arch", "model_type", "method")}
            content["model"] = merge(held["config"], said)
            pixels = held.get("image_processor") or {}
    return Config(check(content, tables, str(path), pixels), str(path))


def check(
    content: Mapping[str, Any], tables: Tables, source: str, eval_pixels: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The checked, completed content; `source` is named in the error. eval_pixels: the eval processor's defaults."""
    checker = Checker()
    for key in content:
        if key not in SECTIONS:
            checker.add(str(key), f"unknown section.{nearest(str(key), SECTIONS)}")
    for key in SECTIONS[:3]:
        if key not in content:
            checker.add(key, "this section is required but not given")
    result: dict[str, Any] = {"model": {}, "datasets": {}, "run": {}}
    preprocess = {}
    if "model" in content:
        result["model"], preprocess = _model(checker, content["model"], tables)
    if "datasets" in content:
        image = (result["model"].get("backbone") or {}).get("image")
        pixels = pixels_of(image) if isinstance(image, Mapping) else {}
        sides = {"train": pixels, "eval": {**pixels, **(eval_pixels or {})}}
        result["datasets"] = _datasets(checker, content["datasets"], tables, sides)
    if "run" in content:
        result["run"] = _run(checker, content["run"], tables)
    preprocess = merge(preprocess, content.get("preprocess") or {})
    if preprocess:
        preprocess = checker.section("preprocess", preprocess, PreprocessSchema)
        _processors(checker, "preprocess", preprocess, tables)
        result["preprocess"] = preprocess
    cross_checks(checker, result, tables)
    if checker.problems:
        count = f"{len(checker.problems)} problem{'s' if len(checker.problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"config {source} has {count}:", *checker.problems]))
    return result


def _run(checker: Checker, given: Any, tables: Tables) -> dict[str, Any]:
    if isinstance(given, Mapping):
        runner = given.get("runner", "runner_cir")
        if checker.name("run.runner", runner, tables.runners, "known runner") and runner not in OUR_RUNNERS:
            checker.name("run.task", given.get("task"), tables.tasks, "known task")
            return dict(given)  # the host's own runner: its keys are its own affair
        checker.name("run.task", given.get("task", OUR_TASKS[0]), tables.tasks, "known task")
    return checker.section("run", given, RunSchema)


def model_defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section completed by the defaults of its type and checked, as plain containers. Raises ConfigError."""
    checker = Checker()
    model, _ = _model(checker, {"arch": "neucore", **section}, package_tables())
    if checker.problems:
        raise ConfigError("\n  ".join(["the model section has problems:", *checker.problems]))
    return model
