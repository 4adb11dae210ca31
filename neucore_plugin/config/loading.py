"""Config files: reading, options, package defaults, and a check that reports everything wrong at once.

Knows neither torch nor lavis. `Config` behaves like `lavis.common.config.Config`.
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from neucore_plugin.common.errors import ConfigError, FileError, nearest
from neucore_plugin.config.compare import config_fingerprint, leaves
from neucore_plugin.config.crosschecks import cross_checks
from neucore_plugin.config.data import DATASET_SCHEMAS, DEFAULT_PROCESSORS, PROCESSOR_SCHEMAS, PreprocessSchema
from neucore_plugin.config.encoders import pixels_of, reads_raw
from neucore_plugin.config.kinds import is_text, members, shortened
from neucore_plugin.config.model import BackboneSchema, NeucoreSchema
from neucore_plugin.config.run import RUNNERS, TASKS, RunSchema
from neucore_plugin.config.section import Problems, Section
from neucore_plugin.config.sections import MODEL_SCHEMAS, Tables, package_tables
from neucore_plugin.config.shipped import find_config

log = logging.getLogger(__name__)
Option = str | tuple[str, Any]  # key=value as typed, or a key and its value
Options = Iterable[Option]
DEFAULT_TYPE = "embedded"
SECTIONS = ("model", "datasets", "run", "preprocess")


def _preprocess(augment: str = "none", *, _root_: Any) -> DictConfig:
    """`preprocess` of a model type: our processors, with the pixels of the image encoder that its file names."""
    given = OmegaConf.select(_root_, "model.backbone", default=OmegaConf.create())
    backbone = BackboneSchema.model_validate(OmegaConf.to_container(given, resolve=True)).model_dump()
    image = {**DEFAULT_PROCESSORS["vis_processor"]["eval"], **pixels_of(backbone["image"])}
    sides = {"train": {**image, "augment": augment}, "eval": image}
    captions = merge({"text_processor": DEFAULT_PROCESSORS["text_processor"]}, _caption_defaults(backbone))
    return OmegaConf.create({"vis_processor": sides, **captions})


def _caption_defaults(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """`text_processor` of both sides, for the text encoder of a section `model.backbone`."""
    return {"text_processor": {side: {"clean": not reads_raw(backbone)} for side in ("train", "eval")}}


# The host's load_model_and_preprocess reads a model type's file by itself, with OmegaConf.
_renamed = "replace" in inspect.signature(OmegaConf.register_resolver).parameters  # in 2.4
_register = OmegaConf.register_resolver if _renamed else OmegaConf.register_new_resolver
_register("neucore.preprocess", _preprocess, replace=True)


class Config:
    """A checked config; the attributes of the host's own class, and `fingerprint`."""

    def __init__(self, content: Mapping[str, Any], source: str | None = None) -> None:
        self.config = OmegaConf.create(escaped(dict(content)))
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
        log.info(
            "the config, completed:\n%s",
            as_yaml(self.to_dict(), width=120, default_flow_style=None).rstrip(),
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
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise ConfigError(f"config file {FileError.of(error, path)}") from error
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(f"config file {path} cannot be read: {reason}{_literally(reason)}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"config file {path} must be a mapping with the keys {', '.join(SECTIONS[:3])}")
    return content


def dotlist(options: Options | None) -> list[Option]:
    """`--options` as a list of key=value; both `a.b=c` and the host's pair form `a.b c` are understood.

    A (key, value) stays as it is: its value is not read, but taken.
    """
    tokens, result = list(options or ()), []
    while tokens:
        token = tokens.pop(0)
        if isinstance(token, tuple):
            result.append(token)
            continue
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


def with_options(content: dict[str, Any], options: Options | None) -> dict[str, Any]:
    """The content of a config with `--options` laid over it. Raises ConfigError."""
    chosen, option = OmegaConf.create(), "${}"
    try:
        for option in dotlist(options):
            key, value = option if isinstance(option, tuple) else _read_option(option)
            if value is _YAML:
                chosen = OmegaConf.merge(chosen, OmegaConf.from_dotlist([option]))
                continue
            if isinstance(value, str) and re.fullmatch(r"(['\"]).*\1", value, re.DOTALL):
                log.warning("--options: %s: the quotes are taken as part of the text; the shell needs one pair", option)
            value = escaped(value)
            for part in reversed(key.split(".")):
                value = {part: value}
            chosen = OmegaConf.merge(chosen, value)
        option = " ".join(str(option) for option in dotlist(options) if "${" in option)
        chosen = OmegaConf.to_container(chosen, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(f"--options: {option!r} cannot be read: {reason}{_literally(reason)}") from error
    content = merge(content, chosen)  # at once: their order does not matter
    if open_keys := [key for key, value in leaves(content).items() if value == "???"]:
        raise ConfigError(f"{', '.join(open_keys)}: ??? stands for a value that is still to be given; give it")
    return content


_YAML = object()


def _read_option(option: str) -> tuple[str, Any]:
    """Key and value of key=value. A text stands as it is given, whatever it looks like; null, where a key takes it.

    In a list of texts the items are texts. What has another type, or no schema, is read as YAML: `_YAML`.
    """
    key, _, text = option.partition("=")
    first, *path = key.split(".")
    kinds: list[Any] = {"run": [RunSchema], "preprocess": [PreprocessSchema]}.get(first, [])
    if first == "model":
        kinds = list(MODEL_SCHEMAS.values())
    elif first == "datasets" and path:
        kinds = [DATASET_SCHEMAS[name] for name in path[:1] if name in DATASET_SCHEMAS]
        del path[0]
    for part in path:
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        fields = [kind.model_fields[part] for kind in sections if part in kind.model_fields]
        kinds = [kind for field in fields for kind in members(field.annotation)]
    if text == "null" and NoneType in kinds:
        return key, None
    if any(get_origin(kind) is list and is_text(members(get_args(kind)[0])[0]) for kind in kinds):
        return key, yaml.load(text, yaml.BaseLoader)
    if not any(map(is_text, kinds)):
        return key, _YAML
    others = [kind for kind in kinds if not is_text(kind)]  # of bool | Literal["bf16"]
    value = yaml.safe_load(text) if {bool, int, float} & set(others) else text
    return key, value if type(value) in others else text


def escaped(value: Any) -> Any:
    """Plain containers as OmegaConf, or a yaml, would say them: ${ in a text is no interpolation there."""
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def as_yaml(content: Mapping[str, Any], **style: Any) -> str:
    """The config file that says `content`."""
    return yaml.dump(escaped(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)


class _Dumper(yaml.SafeDumper):
    """Quotes 1e3, which is no number for PyYAML but is one for OmegaConf."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _text)


def _literally(reason: str) -> str:
    return " (a ${ that is no interpolation is written \\${)" if "nterpolation" in reason or "${" in reason else ""


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


# --- completing and checking ------------------------------------------------------------------------------------------


def load_config(
    path: str | Path,
    options: Options | None = None,
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
    content = with_options(read_yaml(path), options)
    model, run, eval_pixels = content.get("model"), content.get("run"), {}
    if section_of and isinstance(run, Mapping) and run.get("evaluate") is True and isinstance(model, Mapping):
        source = model.get("checkpoint")
        header = section_of(source, model) if isinstance(source, str) else None
        if header:
            given = {key: value for key, value in model.items() if key not in ("arch", "model_type", "method")}
            stored = (
                stored_section(header["config"]) if header["config"].get("arch") in MODEL_SCHEMAS else header["config"]
            )
            content["model"] = merge(stored, given)
            eval_pixels = header.get("image_processor") or {}
    return Config(check(content, tables or package_tables(), str(path), eval_pixels), str(path))


def check(
    content: Mapping[str, Any], tables: Tables, source: str, eval_pixels: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The checked, completed content; `source` is named in the error. eval_pixels: the eval processor's defaults."""
    problems = Problems(tables.processors, MODEL_SCHEMAS)
    for key in content:
        if key == "study":
            problems.add(key, "this file describes a study of many trainings; run it with `neucore study --cfg-path`")
        elif key not in SECTIONS:
            problems.add(str(key), f"unknown section.{nearest(str(key), SECTIONS)}")
    for key in SECTIONS[:3]:
        if key not in content:
            problems.add(key, "this section is required but not given")
    result: dict[str, Any] = {"model": {}, "datasets": {}, "run": {}}
    preprocess = {}
    if "model" in content:
        result["model"], preprocess = _model(problems, content["model"], tables)
    if "datasets" in content:
        backbone = result["model"].get("backbone") or {}
        image = backbone.get("image")
        if image and tables.own_pixels and not problems.lines:
            image.update(tables.own_pixels(image))
        pixels = pixels_of(image) if isinstance(image, Mapping) else {}
        read = {"vis_processor": {"train": pixels, "eval": {**pixels, **(eval_pixels or {})}}}
        result["datasets"] = _datasets(problems, content["datasets"], tables, {**read, **_caption_defaults(backbone)})
    if "run" in content:
        result["run"] = _run(problems, content["run"], tables)
    if preprocess := merge(preprocess, content.get("preprocess") or {}):
        result["preprocess"] = _completed(problems, "preprocess", preprocess, PreprocessSchema)
    problems.add_conflicts(cross_checks(result, tables))
    problems.raise_all(f"config {source}")
    return result


def model_defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section completed by the defaults of its type and checked, as plain containers. Raises ConfigError."""
    tables = package_tables()
    problems = Problems(tables.processors, MODEL_SCHEMAS)
    model, _ = _model(problems, {"arch": "neucore", **section}, tables)
    problems.raise_all("the model section")
    return model


def stored_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section that a checkpoint holds, completed and checked. Raises ConfigError.

    A key that it lacks is younger than it and gets the schema's default, which means what was before, not its type's.
    """
    problems = Problems(package_tables().processors, MODEL_SCHEMAS)
    schema = MODEL_SCHEMAS.get(section.get("arch", "neucore"), NeucoreSchema)
    model = _completed(problems, "model", merge({"backbone": _encoders()}, {"arch": "neucore", **section}), schema)
    problems.raise_all("the model section")
    return model


def stored_pixels(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of its image processor, completed and checked: its arguments. Raises ConfigError."""
    problems = Problems(package_tables().processors)
    found = _completed(problems, "image_processor", settings, PROCESSOR_SCHEMAS["cir_image"])
    problems.raise_all("the image processor")
    return {key: value for key, value in found.items() if key not in ("name", "augment")}


def dataset_defaults(name: str, section: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A data set's section completed and checked, as plain containers; another's as it is. Raises ConfigError."""
    tables = package_tables()
    problems = Problems(tables.processors)
    completed = _dataset(problems, name, section or {}, {}) if name in DATASET_SCHEMAS else dict(section or {})
    problems.raise_all(f"section datasets.{name}")
    return completed


def _completed(problems: Problems, key: str, given: Any, schema: type[Section]) -> dict[str, Any]:
    """`given` with defaults filled in; what is wrong becomes a problem and is replaced by its default."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        problems.add(key, f"got {shortened(given)}; allowed: a mapping")
        return {}
    with problems.at(*key.split(".")):
        return schema.model_validate(dict(given), context=problems).model_dump(warnings=False)


def _model(problems: Problems, given: Any, tables: Tables) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checked section `model` and the default `preprocess` of its type."""
    if not isinstance(given, Mapping):
        return _completed(problems, "model", given, NeucoreSchema), {}
    arch = given.get("arch")
    if not problems.name("model.arch", arch, tables.models, "known model"):
        arch, given = "neucore", {**given, "arch": "neucore"}
    schema, types = MODEL_SCHEMAS.get(arch), tables.models.get(arch) or {}
    model_type = given.get("model_type") or (DEFAULT_TYPE if schema else None)
    defaults: dict[str, Any] = {}
    if problems.name("model.model_type", model_type, types, f"model type of {arch}"):
        defaults = read_yaml(types[model_type])
    section = defaults.get("model") or {}
    if schema is None:
        return {**merge(section, given), "model_type": model_type}, defaults.get("preprocess") or {}
    if section.get("arch") not in (None, arch):  # the file of another model of ours is shared
        section = {key: value for key, value in known_settings(section, schema).items() if key not in schema.unshared}
    merged = {**merge(merge({"backbone": _encoders()}, section), given), "model_type": model_type}
    return _completed(problems, "model", merged, schema), defaults.get("preprocess") or {}


def _encoders() -> dict[str, Any]:
    """The names of the default encoders, as a section `model.backbone`."""
    return BackboneSchema().model_dump(include={"image": {"name"}, "text": {"name"}})


def known_settings(section: Mapping[str, Any], schema: type[Section]) -> dict[str, Any]:
    """What of a default section `schema` has too; of its sections, which another model may have longer, the same."""
    kept = {key: value for key, value in section.items() if key in schema.model_fields}
    for key, value in kept.items():
        inner = schema.model_fields[key].annotation
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, Section):
            kept[key] = known_settings(value, inner)
    return kept


def _datasets(problems: Problems, given: Any, tables: Tables, read: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Checked section `datasets`; `read`: what the processors' sides get where the file does not say otherwise."""
    if not isinstance(given, Mapping) or not given:
        problems.add("datasets", f"got {shortened(given)}; allowed: a mapping of at least one data set")
        return {}
    checked = {}
    for name, section in given.items():
        key = f"datasets.{name}"
        if not problems.name(key, name, tables.datasets, "known data set"):
            continue
        if section is not None and not isinstance(section, Mapping):
            problems.add(key, f"got {shortened(section)}; allowed: a mapping")
            continue
        files, kind = tables.datasets[name], (section or {}).get("type", "default")
        defaults = {}
        if files and problems.name(f"{key}.type", kind, files, f"type of {name}"):
            defaults = (read_yaml(files[kind]).get("datasets") or {}).get(name) or {}
        checked[name] = merge(defaults, section or {})
        if name in DATASET_SCHEMAS:
            checked[name] = _dataset(problems, name, checked[name], read)
    return checked


def _dataset(
    problems: Problems, name: str, given: Mapping[str, Any], read: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    defaults = merge({"build_info": {}, **DEFAULT_PROCESSORS}, read)
    return _completed(problems, f"datasets.{name}", merge(defaults, given), DATASET_SCHEMAS[name])


def _run(problems: Problems, given: Any, tables: Tables) -> dict[str, Any]:
    if isinstance(given, Mapping):
        runner = given.get("runner", RUNNERS[0])
        known = problems.name("run.runner", runner, tables.runners, "known runner")
        hosts = known and runner not in RUNNERS
        problems.name("run.task", given.get("task", None if hosts else TASKS[0]), tables.tasks, "known task")
        if hosts:
            return dict(given)  # the host's own runner: its keys are its own affair
        given = given if known else {**given, "runner": RUNNERS[0]}
    return _completed(problems, "run", given, RunSchema)
