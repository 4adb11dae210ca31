"""Kinds of values that pydantic lacks, and what a key may hold in words."""

import json
import re
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen, MultipleOf
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Tag
from pydantic.fields import FieldInfo


class Allowed(str):
    """Stands beside a type: what its values are, in words."""


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a text."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


def _none_twice(value: list[Any]) -> list[Any]:
    if len(set(value)) < len(value):
        raise ValueError("a name stands twice")
    return value


Real = Annotated[float, BeforeValidator(_number)]
Probability = Annotated[Real, Ge(0), Lt(1)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]
NoneTwice = AfterValidator(_none_twice)
Names = Annotated[list[Text], NoneTwice]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$"), Allowed("auto, cpu, cuda, cuda:N or mps")]
_FACTORS = "a mapping of parameter group to a factor of at least 0, such as {backbone_image: 0.1}"
Factors = Annotated[dict[str, Annotated[Real, Ge(0)]], Allowed(_FACTORS)]
Settings = Annotated[dict[str, Any], Allowed("a mapping")]  # of another program: it checks them itself
THREE = Len(3, 3)
Channels = Annotated[list[Real], THREE]


# --- what is allowed, in words ---------------------------------------------------------------------------------------

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text that is not empty"}
_BOUNDS = {Ge: "at least {0.ge}", Le: "at most {0.le}", Gt: "greater than {0.gt}", Lt: "less than {0.lt}"}


def allowed(field: FieldInfo) -> str:
    """What a key may hold, such as `a whole number of at least 1`; that it may be null is not said."""
    kind, metadata = bare(field.annotation, field.metadata)
    if text := next((str(one) for one in metadata if isinstance(one, Allowed)), None):
        return text
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with the keys {', '.join(kind.model_fields)}"
    if field.title:  # an encoder
        return "a mapping with `name`"
    if choices := choices_of(kind):
        return f"one of {', '.join(sorted(choices))}"
    if kind in _KINDS:
        return f"{_KINDS[kind]} {_range(metadata)}".rstrip()
    inner, bounds = bare(get_args(kind)[0])
    if inner is float:
        return f"a list of three numbers {_range(bounds)}".rstrip()
    least = next((f"at least {one.min_length} " for one in metadata if isinstance(one, MinLen)), "")
    among = f", among {', '.join(choices_of(inner))}" if choices_of(inner) else ""
    return f"a list of {least}names, none twice{among}"


def choices_of(kind: Any) -> list[str]:
    """The values of a Literal, or of one beside bool, as yaml writes them; the tags of a union; none of other types."""
    if get_origin(kind) in (Union, UnionType):
        return [word for one in get_args(kind) for word in (("false", "true") if one is bool else choices_of(one))]
    if get_origin(kind) is Annotated:
        return [one.tag for one in get_args(kind) if isinstance(one, Tag)]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def bare(kind: Any, metadata: Iterable[Any] = ()) -> tuple[Any, list[Any]]:
    """A type without `| None` and `Annotated`, and everything that is annotated to it."""
    found = list(metadata)
    while True:
        if get_origin(kind) is Annotated:
            kind, *notes = get_args(kind)
            found += [one for note in notes for one in (note.metadata if isinstance(note, FieldInfo) else [note])]
        elif get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind) and len(get_args(kind)) == 2:
            kind = next(one for one in get_args(kind) if one is not NoneType)
        else:
            return kind, found


def members(kind: Any) -> list[Any]:
    """The alternatives of a type, without `Annotated`; NoneType is one."""
    if get_origin(kind) is Annotated:
        return members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for one in get_args(kind) for member in members(one)]
    return [kind]


def is_text(kind: Any) -> bool:
    """Whether the values of a type without alternatives are texts, or some of them."""
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _range(metadata: Iterable[Any]) -> str:
    bounds = [_BOUNDS[type(one)].format(one) for one in metadata if type(one) in _BOUNDS]
    text = " and ".join(bounds)
    multiple = [f", a multiple of {one.multiple_of}" for one in metadata if isinstance(one, MultipleOf)]
    return "".join([f"of {text}" if text.startswith("at") else text, *multiple])


def shortened(value: Any) -> str:
    """A value as JSON, of at most 80 letters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
