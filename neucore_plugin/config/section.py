"""Base of every part of the schema, and the problems that are gathered while pydantic validates.

Validated with `context=Problems(...)`, a section notes everything that is wrong with it, goes on with the default of
the key, and raises nothing; validated without, it raises pydantic's own errors.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.config.kinds import Allowed, allowed, bare, choices_of, shortened

# Keys of the host that are called otherwise here, or that people take from elsewhere.
KNOWN_BY_OTHER_NAMES = {
    "resume_ckpt_path": "resume",
    "epochs": "max_epoch",
    "lr": "init_lr",
    "batch_size": "batch_size_train",
    "pretrained": "checkpoint",
    "finetuned": "checkpoint",
}


class Problems:
    """What is wrong with a config, a line each: key, what was given, what is allowed, the nearest name.

    processors: known processors. models: {arch: schema}, to tell whose setting an unknown key is.
    """

    def __init__(self, processors: Iterable[str] = (), models: Mapping[str, type["Section"]] | None = None) -> None:
        self.processors, self.models = tuple(processors), models or {}
        self.lines: list[str] = []
        self.bad: set[str] = set()
        self._path: list[str] = []

    @contextmanager
    def at(self, *path: str) -> Iterator[None]:
        """What is validated within stands at `path`, below where it is now."""
        self._path += path
        try:
            yield
        finally:
            del self._path[len(self._path) - len(path) :]

    def key(self, *below: Any) -> str:
        """The whole key of where it is now, or of what stands `below`."""
        return ".".join([*self._path, *map(str, below)])

    def add(self, key: str, text: str) -> None:
        """Note a problem of `key`, once."""
        if f"{key}: {text}" not in self.lines:
            self.lines.append(f"{key}: {text}")
        self.bad.add(key)

    def add_conflicts(self, found: Iterable[tuple[str, str]]) -> None:
        """Note (key, text) pairs; not those that are in, or name, a key whose value has been replaced."""
        for key, text in list(found):
            named = (bad for bad in self.bad if "." in bad and re.search(rf"\b{re.escape(bad)}\b", text))
            if not any(f"{key}.".startswith(f"{bad}.") for bad in self.bad) and not any(named):
                self.lines.append(f"{key}: {text}")

    def name(self, key: str, given: Any, known: Iterable[str], what: str) -> bool:
        """Whether `given` is a known name; a problem otherwise."""
        known = tuple(known)
        if isinstance(given, str) and given in known:
            return True
        self.add(key, f"{given!r} is no {what}.{nearest(str(given), known)}")
        return False

    def unknown_key(self, key: str, given: Any, schema: type["Section"]) -> None:
        """Note a key that `schema` does not have: whose it is, or what it should be."""
        known, path = list(schema.model_fields), self.key(key)
        found = {arch: _below(model, self._path[1:]) for arch, model in self.models.items()}
        here = [arch for arch, section in found.items() if section is schema]
        owners = [arch for arch, section in found.items() if section is not None and key in section.model_fields]
        if self._path[0] == "model" and here and owners:
            what = ", ".join(known)
            return self.add(path, f"is a setting of {owners[0]}, not of {here[0]}; take it out. Allowed here: {what}")
        alias = KNOWN_BY_OTHER_NAMES.get(key)
        hint = f" Did you mean {alias!r}?" if alias in known else nearest(str(key), known)
        hint = re.sub(r"\? Allowed: .*", "?", hint)  # the list of all keys would only bury the one that is meant
        return self.add(path, f"unknown key (given {shortened(given)}).{hint}")

    def raise_all(self, what: str) -> None:
        """Raise one ConfigError with everything that was noted of `what`, if there is anything."""
        if self.lines:
            count = f"{len(self.lines)} problem{'s' if len(self.lines) > 1 else ''}"
            raise ConfigError("\n  ".join([f"{what} has {count}:", *self.lines]))


class Section(BaseModel):
    """A mapping with known keys, each with a default, a range and a description; a wrong type is never converted.

    unshared: keys that a model does not take from a file of defaults that it shares with another.
    """

    unshared: ClassVar[frozenset[str]] = frozenset()
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(key, text) for values that are right in themselves but do not go together."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _note_keys(cls, given: Any, info: ValidationInfo) -> Any:
        problems = info.context
        if problems is None or not isinstance(given, Mapping):
            return given
        for key, value in given.items():
            if key not in cls.model_fields:
                problems.unknown_key(key, value, cls)
        known = {key: value for key, value in given.items() if key in cls.model_fields}
        for key, field in cls.model_fields.items():
            if field.is_required() and key not in known:
                problems.add(problems.key(key), "is required but not given")
                known[key] = None
        return known

    @field_validator("*", mode="wrap")
    @classmethod
    def _note_value(cls, given: Any, handler: Any, info: ValidationInfo) -> Any:
        problems = info.context
        if problems is None:
            return handler(given)
        field = cls.model_fields[info.field_name]
        with problems.at(info.field_name):
            if problems.key() not in problems.bad:
                try:
                    return handler(given)
                except ValidationError as error:
                    below, text = _explained(given, field, error.errors(include_url=False))
                    problems.add(problems.key(*below), text)
        return None if field.is_required() else field.get_default(call_default_factory=True)

    @model_validator(mode="after")
    def _note_conflicts(self, info: ValidationInfo) -> "Section":
        problems = info.context
        if problems is None:
            if found := [": ".join(pair) for pair in self.conflicts()]:
                raise ValueError("; ".join(found))
        else:
            problems.add_conflicts((problems.key(key), text) for key, text in self.conflicts())
        return self


def _below(schema: type[Section], path: Iterable[str]) -> type[Section] | None:
    """The section of `schema` that `path` leads to."""
    for key in path:
        kind = bare(schema.model_fields[key].annotation)[0] if key in schema.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return None
        schema = kind
    return schema


def _explained(given: Any, field: FieldInfo, errors: list[Any]) -> tuple[tuple[str, ...], str]:
    """Keys below the field, and the problem's text."""
    names = (error for error in errors if error["type"] == "literal_error" and isinstance(error["input"], str))
    error = next(names, errors[-1])  # the first wrong name; of a union the last kind
    if error["type"].startswith("union_tag") and isinstance(given, Mapping):  # no name of an encoder
        name, known = given.get("name"), choices_of(bare(field.annotation)[0])
        return ("name",), f"{name!r} is no {field.title}.{nearest(str(name), known)}"
    text = f"got {shortened(given)}; allowed: {allowed(field)}"
    if isinstance(given, str) and re.search("[\0\ud800-\udfff]", given):
        text = f"got {given[:80]!a}; a null byte and bytes that are no UTF-8 are not allowed"
    kind, notes = bare(field.annotation, field.metadata)
    own_words = any(isinstance(note, Allowed) for note in notes)
    if error["type"] == "literal_error" and isinstance(error["input"], str) and not own_words:
        choices = choices_of(get_args(kind)[0] if get_origin(kind) is list else kind)
        hint, _, known = nearest(error["input"], choices).rpartition(" Allowed: ")
        text = f"got {shortened(given)}; allowed: one of {known.rstrip('.')}{'.' if hint else ''}{hint}"
    return (), text
