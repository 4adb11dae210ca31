"""The generated pages of the reference: read from the schemas, the parsers and the yamls, so that they cannot drift.

mkdocs calls `on_files` (see `hooks` in mkdocs.yml) when the site is built; nothing of it is committed. Needs neither
torch nor lavis. The pages about Python names are made by mkdocstrings from the docstrings.
"""

import argparse
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from neucore_plugin import cli
from neucore_plugin.config import data, sections
from neucore_plugin.config.encoders import BACKBONE_SCHEMAS
from neucore_plugin.config.run import RunSchema
from neucore_plugin.config.study import StudySchema

ROOT = Path(__file__).resolve().parent.parent
BOUNDS = {"ge": "at least {}", "gt": "greater than {}", "le": "at most {}", "lt": "less than {}"}
BOUNDS |= {"multiple_of": "a multiple of {}", "min_length": "{} or more of them", "max_length": "no more than {}"}
SIMPLE = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "any"}


# --- config keys ------------------------------------------------------------------------------------------------------


def config_page() -> str:
    """Every key of every schema, one table a section."""
    parts = [
        "# Config keys",
        "Made from the schemas in `neucore_plugin/config/` when this site was built. A key that is not here is an "
        "error, reported with the nearest name. How a yaml is put together: [Write a config](../howto/configs.md).",
    ]
    for arch, schema in sections.MODEL_SCHEMAS.items():
        parts += [f"## model, arch {arch}", _text(schema), table(schema, "model")]
    for side, schemas in BACKBONE_SCHEMAS.items():
        parts.append(f"## model.backbone.{side}")
        parts.append(f"One table for each `name`: {', '.join(f'`{name}`' for name in schemas)}.")
        for name, schema in schemas.items():
            parts += [f"### {side} encoder {name}", _text(schema), table(schema, f"model.backbone.{side}")]
    parts += ["## run", _text(RunSchema), table(RunSchema, "run")]
    for name, schema in data.DATASET_SCHEMAS.items():
        parts += [f"## datasets.{name}", _text(schema), table(schema, f"datasets.{name}")]
    parts += [
        "## study",
        _text(StudySchema),
        "Of a study file, which `neucore study` runs.",
        table(StudySchema, "study"),
    ]
    parts.append("## Processors")
    parts.append("Below `datasets.<name>.vis_processor.train`, `.eval` and the same of `text_processor`.")
    for name, schema in data.PROCESSOR_SCHEMAS.items():
        parts += [f"### {name}", _text(schema), table(schema, "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(schema: type[BaseModel], prefix: str) -> str:
    """Rows of `key | value | default | what it does`, with the keys of plain nested sections in place."""
    rows = ["| key | value | default | what it does |", "|---|---|---|---|"]
    rows += [f"| {' | '.join(row)} |" for row in _rows(schema, prefix)]
    return "\n".join(rows)


def _plain(text: str) -> str:
    """Text that stands in a table as it is; what it has in backticks stays code."""
    return re.sub(r"`[^`]*`|[|<*]", lambda found: found[0] if found[0][0] == "`" else f"&#{ord(found[0])};", text)


def _rows(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in schema.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        nested = section_in(field.annotation)
        if nested is not None and not field.description:
            yield from _rows(nested, key)
            continue
        yield f"`{key}`", allowed(field.annotation, field.metadata), _default(field), _plain(field.description or "")
        if nested is not None:
            yield from _rows(nested, key)


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds, where it is just one (not a choice of several by `name`)."""
    found = [one for one in _members(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]
    return found[0] if len(found) == 1 else None


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def allowed(annotation: Any, metadata: Any = ()) -> str:
    """A type and its bounds in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    said = [one for one in metadata if isinstance(one, str)]  # the schema's own words
    if origin is typing.Annotated:
        return allowed(inner[0], (*inner[1:], *metadata))
    if said:
        return said[-1]
    if origin in (typing.Union, types.UnionType):
        parts = [allowed(one, metadata if one is not type(None) else ()) for one in inner]
        return ", or ".join(dict.fromkeys(parts))
    if origin is typing.Literal:
        words = ", ".join(f"`{_yaml(value)}`" for value in inner)
        words = f"one of {words}" if len(inner) > 1 else words
    elif origin is list:
        words = f"list, each {allowed(inner[0])}"
    elif origin is dict or annotation is dict:
        words = "mapping"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        words = "section"
    else:
        words = SIMPLE.get(annotation, getattr(annotation, "__name__", str(annotation)))
    bounds = [text.format(value) for name, text in BOUNDS.items() for value in _bound(metadata, name)]
    return ", ".join([words, *bounds])


def _bound(metadata: Any, name: str) -> Iterator[Any]:
    for one in metadata:
        for part in getattr(one, "metadata", (one,)):  # pydantic's Field in an Annotated keeps its bounds there
            if getattr(part, name, None) is not None:
                yield getattr(part, name)


def _default(field: Any) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml(one)}' for key, one in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _text(schema: type[BaseModel]) -> str:
    own = schema.__dict__.get("__doc__")
    return " ".join((own or "").split())


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its usage and options, from the parsers themselves."""
    parts = [
        "# Commands",
        "Made from the argument parsers when this site was built; `neucore COMMAND --help` says the same.",
    ]
    parser = cli.build_parser()
    for name, command, text in _subcommands(parser):
        parts += _command(name, command, text, 2)
    parts += [
        "## python -m lavis.train, python -m lavis.evaluate",
        "The host's own command lines. They take the arguments of `neucore train` and `neucore evaluate`; "
        "`python -m neucore_plugin` is `neucore`.",
    ]
    return "\n\n".join(parts) + "\n"


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield f"{parser.prog} {name}", command, texts.get(name) or ""


def _command(name: str, command: argparse.ArgumentParser, text: str, level: int) -> list[str]:
    parts = [f"{'#' * level} {name}", f"{text[:1].upper()}{text[1:]}."]
    aside = argparse._HelpAction | argparse._SubParsersAction
    options = [one for one in command._actions if not isinstance(one, aside)]
    usage = " ".join(command.format_usage().removeprefix("usage: ").split())
    whole = re.sub(r"\[-.*?\](?= |$)", lambda option: option[0].replace(" ", "\0"), usage)  # no break within an option
    lines = textwrap.wrap(whole, 88, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    parts.append("```text\n" + "\n".join(lines).replace("\0", " ") + "\n```")
    if options:
        rows = ["| argument | what it does |", "|---|---|"]
        rows += [f"| {_argument(one)} | {_plain(one.help or '')} |" for one in options]
        parts.append("\n".join(rows))
    for entry in _subcommands(command):
        parts += _command(*entry, level + 1)
    return parts


def _argument(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    if action.choices:
        return f"{names}: {', '.join(f'`{choice}`' for choice in action.choices)}"
    value = action.metavar or (action.dest.upper() if action.option_strings and action.nargs != 0 else "")
    return f"{names} `{value}`" if action.option_strings and value else names


# --- shipped yamls ----------------------------------------------------------------------------------------------------


def yamls_page() -> str:
    """The yamls of projects/neucore and of configs/models, with what their first lines say."""
    parts = [
        "# Shipped configs",
        "`neucore configs` lists them, `--cfg-path NAME` takes one by its bare name, `neucore configs copy NAME` "
        "writes one to start from. The line beside each is the yaml's own first comment.",
        "## Runs",
        _listing(ROOT / "projects" / "neucore", "name"),
        "## Model types",
        "The values of `model.model_type`: defaults of the `model` section, in `neucore_plugin/configs/models/`.",
        _listing(ROOT / "neucore_plugin" / "configs" / "models", "model_type"),
    ]
    return "\n\n".join(parts) + "\n"


def _listing(folder: Path, head: str) -> str:
    rows = [f"| `{head}` | what it is |", "|---|---|"]
    for path in sorted(folder.glob("*.yaml")):
        comment = re.match(r"#\s*(.*)", path.read_text(encoding="utf-8"))
        rows.append(f"| `{path.stem}` | {_plain(comment[1]) if comment else ''} |")
    return "\n".join(rows)


PAGES = {"reference/config.md": config_page, "reference/commands.md": commands_page, "reference/yamls.md": yamls_page}


def on_files(files: Any, config: Any) -> Any:
    """The hook: generated pages join the site."""
    from mkdocs.structure.files import File

    for place, page in PAGES.items():
        files.append(File.generated(config, place, content=page()))
    return files
