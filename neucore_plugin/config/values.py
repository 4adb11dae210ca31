"""Kinds of values that a config may hold: each gives exactly one error, which says what is allowed."""

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator
from pydantic_core import PydanticCustomError

from neucore_plugin.common.errors import nearest

_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


class Section(BaseModel):
    """Base of every schema: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


# --- kinds of values: each gives exactly one error, which says what is allowed ---------------------------------------


def refuse(allowed: str, hint: str = "") -> PydanticCustomError:
    """The error of a value that is not `allowed`; `hint` names the nearest valid one."""
    return PydanticCustomError("not_allowed", "{allowed}{hint}", {"allowed": allowed, "hint": hint})


def _within(value: float, low: float | None, high: float | None, above: float | None, below: float | None) -> bool:
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _range(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    bounds = (("at least", low), ("at most", high), ("greater than", above), ("less than", below))
    text = " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)
    return f"of {text}" if text.startswith("at") else text


def whole(low: int | None = None, high: int | None = None, multiple: int = 1) -> Any:
    """A whole number within bounds; neither a truth value nor a text nor 2.0."""
    allowed = f"a whole number {_range(low, high, None, None)}".rstrip()
    allowed += f", a multiple of {multiple}" if multiple > 1 else ""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not _within(value, low, high, None, None):
            raise refuse(allowed)
        if value % multiple:
            raise refuse(allowed)
        return value

    return Annotated[int, PlainValidator(check)]


def real(
    low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A finite number within bounds; also a text such as "1e-4", which YAML 1.1 does not read as a number."""
    allowed = f"a number {_range(low, high, above, below)}".rstrip()

    def check(value: Any) -> float:
        if isinstance(value, str) and _SCIENTIFIC.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise refuse(allowed)
        if not _within(value, low, high, above, below):
            raise refuse(allowed)
        return float(value)

    return Annotated[float, PlainValidator(check)]


def choice(*values: Any) -> Any:
    """One of `values`; 1 is not true."""
    words = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            raise _not_among(value, words)
        return value

    return Annotated[Any, PlainValidator(check)]


def _not_among(value: Any, words: Iterable[str]) -> PydanticCustomError:
    hint, _, allowed = nearest(str(value), words).rpartition(" Allowed: ")
    return refuse(f"one of {allowed.rstrip('.')}", f".{hint}" if hint else "")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise refuse("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise refuse("a text that is not empty")
    return value


def words(among: Iterable[str] | None = None, at_least: int = 0) -> Any:
    """A list of texts, none twice, optionally each among given ones."""
    known = None if among is None else tuple(among)
    allowed = "a list of names, none twice" if not at_least else f"a list of at least {at_least} names, none twice"

    def check(value: Any) -> list[str]:
        if not isinstance(value, list) or len(value) < at_least or not all(isinstance(one, str) for one in value):
            raise refuse(allowed + (f", among {', '.join(known)}" if known else ""))
        if len(set(value)) < len(value):
            raise refuse(allowed)
        for one in value:
            if known is not None and one not in known:
                raise _not_among(one, known)
        return value

    return Annotated[list[str], PlainValidator(check)]


def triple(low: float | None = None, above: float | None = None) -> Any:
    """Three numbers, one a colour channel."""

    def check(value: Any) -> list[float]:
        good = isinstance(value, list) and len(value) == 3
        good = good and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
        if not good or not all(_within(one, low, None, above, None) for one in value):
            raise refuse(f"a list of three numbers {_range(low, None, above, None)}".rstrip())
        return [float(one) for one in value]

    return Annotated[list[float], PlainValidator(check)]


def device_name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise refuse("auto, cpu, cuda or cuda:N")
    return value


def factors(value: Any) -> dict[str, float]:
    allowed = "a mapping of parameter group to a factor of at least 0, such as {backbone_image: 0.1}"
    if not isinstance(value, dict):
        raise refuse(allowed)
    factors = {}
    for name, factor in value.items():
        if isinstance(factor, str) and _SCIENTIFIC.fullmatch(factor.strip()):
            factor = float(factor)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise refuse(allowed)
        factors[str(name)] = float(factor)
    return factors


Flag = Annotated[bool, PlainValidator(_flag)]
Text = Annotated[str, PlainValidator(_text)]
Probability = real(low=0, below=1)
