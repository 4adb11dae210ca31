"""Filters on what is known of each picture: `category == "dress" and price < 50`.

A filter is a tree of the seven classes below: as a condition of SQLite (`condition`), as a function of one picture
(`matches`), or, for another database, as whatever its translator makes of the tree. All mean the same:

- A comparison is true or false, never unknown. An attribute that is absent, null or an empty list is missing; every
  comparison with it is false, that with null true. `not` turns what it stands before.
- Values are compared with their own kind: texts with texts (by code point), numbers with numbers, true with true.
- An attribute that is a list is compared by its elements: one that fits is enough. `"red" in tags` asks for an
  element of a list, or for a part of a text.
"""

import ast
import json
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neucore_plugin.common.errors import DataError, did_you_mean, first_few

OWN = ("name", "path")  # what every picture has: its name in the index, and its file below the index's root
MAX_LENGTH, MAX_PARTS, MAX_DEPTH = 20_000, 200, 20  # characters, comparisons, levels: SQLite's bounds lie further off
ORDERS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_WORDS = {"true": True, "false": False, "null": None}
_EXAMPLE = "write comparisons such as: category == \"dress\" and price < 50 and not ('red' in tags)"

Value = str | int | float | bool


@dataclass(frozen=True)
class Field:
    """What is compared: ("price",), ("shop", "city") of nested attributes; own: the picture's name or path."""

    keys: tuple[str, ...]
    own: bool = False

    def __str__(self) -> str:
        return ".".join(self.keys)


@dataclass(frozen=True)
class OneOf:
    """The field, or an element of it, equals one of the values."""

    field: Field
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Order:
    """The field, or an element of it, is `<`, `<=`, `>` or `>=` than a number or a text."""

    field: Field
    sign: str
    value: str | int | float


@dataclass(frozen=True)
class Contains:
    """The field is a list with this element, or a text with this part."""

    field: Field
    value: Value


@dataclass(frozen=True)
class Present:
    """The field is neither absent nor null nor an empty list."""

    field: Field


@dataclass(frozen=True)
class Not:
    """The part is false."""

    part: "Filter"


@dataclass(frozen=True)
class And:
    """All parts are true."""

    parts: tuple["Filter", ...]


@dataclass(frozen=True)
class Or:
    """One part is true."""

    parts: tuple["Filter", ...]


Filter = OneOf | Order | Contains | Present | Not | And | Or


# ---- from its text --------------------------------------------------------------------------------------------------


def parse(text: str) -> Filter:
    """The tree of a filter. Raises DataError: what is not understood, and what may be written."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"an empty filter; {_EXAMPLE}")
    if len(text) > MAX_LENGTH:
        raise DataError(f"a filter of {len(text)} characters; at most {MAX_LENGTH} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's own compiler, about backslashes and `is`
            tree = ast.parse(text.strip(), mode="eval").body
        found = _read(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, DataError):
            raise DataError(f"filter {_shown(text)}: {error}; {_EXAMPLE}") from None
        reason = "too deeply nested" if isinstance(error, RecursionError | MemoryError) else _syntax(text, error)
        raise DataError(f"filter {_shown(text)}: {reason}; {_EXAMPLE}") from None
    if (count := sum(1 for _ in leaves(found))) > MAX_PARTS:
        raise DataError(
            f"a filter of {count} comparisons; at most {MAX_PARTS} are taken (`in` takes many values as one)"
        )
    return found


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _syntax(text: str, error: Exception) -> str:
    if "&&" in text or "||" in text or re.search(r"\b(AND|OR|NOT)\b", text):
        return "not understood; write `and`, `or`, `not`"
    if re.search(r"(?<![=<>!])=(?!=)", text):
        return "not understood; write == for equal"
    place = getattr(error, "offset", None)
    return f"not understood at character {place} ({error.msg})" if place else "not understood"


def _read(node: ast.expr, depth: int = 1) -> Filter:
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(node, ast.BoolOp):
        return (And if isinstance(node.op, ast.And) else Or)(tuple(_read(value, depth + 1) for value in node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return Not(_read(node.operand, depth + 1))
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        parts = [_comparison(*item) for item in zip(sides, node.ops, sides[1:], strict=False)]
        return parts[0] if len(parts) == 1 else And(tuple(parts))
    if (field := _field(node)) is not None and not field.own:
        return OneOf(field, (True,))  # `sale and price < 50`
    raise DataError(f"{_source(node)} is no comparison")


def _comparison(left: ast.expr, sign: ast.cmpop, right: ast.expr) -> Filter:
    field, other = _field(left), _field(right)
    if field is not None and other is not None:
        raise DataError(
            f"{_source(left)} and {_source(right)} are both names of attributes; put a text in quotes: "
            f'{_source(left)} == "{_source(right)}"'
        )
    if field is None and other is None:
        raise DataError(f"{_source(left)} is compared with {_source(right)}, and neither is the name of an attribute")
    if isinstance(sign, ast.In | ast.NotIn):
        found, base = (
            (Contains(other, _value(left)), other) if field is None else (_one_of(field, _values(right)), field)
        )
        return found if isinstance(sign, ast.In) else _other_than(base, found)
    if isinstance(sign, ast.Is | ast.IsNot):
        raise DataError("`is` compares nothing here; write == or !=")
    value = _value(right if field is not None else left, null=isinstance(sign, ast.Eq | ast.NotEq))
    if isinstance(sign, ast.Eq):
        return _one_of(field or other, (value,))
    if isinstance(sign, ast.NotEq):
        return (
            Present(field or other) if value is None else _other_than(field or other, OneOf(field or other, (value,)))
        )
    if isinstance(value, bool):
        raise DataError(f"{str(value).lower()} has no order; compare it by == or !=")
    text = _SIGNS[type(sign)]
    return Order(field, text, value) if field is not None else Order(other, _TURNED[text], value)


def _one_of(field: Field, values: tuple[Value | None, ...]) -> Filter:
    """Null as one of the values stands for a missing attribute."""
    known = tuple(value for value in values if value is not None)
    missing = Not(Present(field))
    if len(known) == len(values):
        return OneOf(field, known)
    return Or((OneOf(field, known), missing)) if known else missing


def _other_than(field: Field, found: Filter) -> Filter:
    return And((Present(field), Not(found)))


def _field(node: ast.expr) -> Field | None:
    """None: a value. `attributes["unit price"]` says any name, `attributes["name"]` one that is not the picture's."""
    keys: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            keys.append(node.attr)
        elif isinstance(node, ast.Subscript):
            if not isinstance(node.slice, ast.Constant) or not isinstance(node.slice.value, str):
                raise DataError(f"{_source(node)}: in brackets stands an attribute's name in quotes")
            keys.append(node.slice.value)
        else:
            break
        node = node.value
    if not isinstance(node, ast.Name) or (not keys and node.id in _WORDS):
        if keys:
            raise DataError(f"{_source(node)} is not the name of an attribute")
        return None
    if node.id != "attributes" or not keys:
        keys.append(node.id)
        if node.id in OWN:
            if len(keys) > 1:
                raise DataError(
                    f'{node.id} is a text without parts; of an attribute of that name: attributes["{node.id}"]'
                )
            return Field((node.id,), own=True)
    if any('"' in key for key in keys):
        raise DataError('the name of an attribute with " in it cannot be filtered by')
    return Field(tuple(reversed(keys)))


def _value(node: ast.expr, null: bool = False) -> Any:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        node, sign = node.operand, -1 if isinstance(node.op, ast.USub) else 1
        if not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
            raise DataError(f"{_source(node)} is no number")
    value = _WORDS.get(node.id, ...) if isinstance(node, ast.Name) else getattr(node, "value", ...)
    if isinstance(node, ast.Name | ast.Constant):
        if value is None and null:
            return None
        if type(value) in (str, bool):
            return value
        if type(value) in (int, float):
            return _number(sign * value)
    raise DataError(f"{_source(node)} is no value here; a value is a text in quotes, a number, true or false")


def _values(node: ast.expr) -> tuple[Any, ...]:
    if not isinstance(node, ast.List | ast.Tuple | ast.Set):
        raise DataError(f'{_source(node)}: after `in` stands a list, such as ("red", "blue"), or an attribute\'s name')
    return tuple(_value(item, null=True) for item in node.elts)


def _source(node: ast.expr) -> str:
    try:
        return _shown(ast.unparse(node))[1:-1]
    except (ValueError, RecursionError):
        return "a part of it"


def leaves(tree: Filter) -> Iterator[OneOf | Order | Contains | Present]:
    """The comparisons of a tree."""
    if isinstance(tree, And | Or):
        for part in tree.parts:
            yield from leaves(part)
    elif isinstance(tree, Not):
        yield from leaves(tree.part)
    else:
        yield tree


# ---- of one picture -------------------------------------------------------------------------------------------------


def matches(tree: Filter, name: str, path: str, attributes: Mapping[str, Any]) -> bool:
    """Whether a picture passes."""
    if isinstance(tree, And | Or):
        return (all if isinstance(tree, And) else any)(matches(part, name, path, attributes) for part in tree.parts)
    if isinstance(tree, Not):
        return not matches(tree.part, name, path, attributes)
    value: Any = {"name": name, "path": path} if tree.field.own else attributes
    for key in tree.field.keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    elements = value if isinstance(value, list | tuple) else [value]
    if isinstance(tree, Present):
        return bool(elements) and not _missing(value)
    if isinstance(tree, OneOf):
        return any(_equal(element, wanted) for element in elements for wanted in tree.values)
    if isinstance(tree, Order):
        return any(_kind(one) == _kind(tree.value) and ORDERS[tree.sign](_number(one), tree.value) for one in elements)
    if isinstance(value, str):
        return isinstance(tree.value, str) and tree.value in value
    return isinstance(value, list | tuple) and any(_equal(element, tree.value) for element in elements)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _equal(one: Any, other: Any) -> bool:
    return _kind(one) == _kind(other) is not None and _number(one) == other


def _kind(value: Any) -> type | None:
    """str, bool, and float for both sorts of numbers; None: nothing is equal to it."""
    if isinstance(value, bool | str):
        return type(value)
    return float if isinstance(value, int | float) and not _missing(value) else None


def _number(value: Any) -> Any:
    """Whole numbers beyond 64 bits are read as fractions, as SQLite does."""
    if not isinstance(value, int) or -(2**63) <= value < 2**63:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


# ---- of a table of SQLite -------------------------------------------------------------------------------------------

Select = Callable[
    [str, list[Any]], list[tuple[Any, ...]]
]  # asks one table of rows: SQL and its parameters -> the answer


def rows_passing(tree: Filter, select: Select) -> list[int]:
    """Numbers of the rows that pass, in order."""
    sql, values = condition(tree)
    return [row for (row,) in select(f"SELECT row FROM rows WHERE {sql} ORDER BY row", values)]


def check_attributes(tree: Filter, tables: Sequence[Select]) -> None:
    """Raise DataError, with the nearest name, for an attribute that no row of any table has."""
    for field in dict.fromkeys(leaf.field for leaf in leaves(tree) if not leaf.field.own):
        there = "SELECT 1 FROM rows WHERE json_type(attributes, ?1) IS NOT NULL LIMIT 1"
        if any(select(there, [_json_path(field.keys)]) for select in tables):
            continue
        for level in (field.keys[:-1], ()):
            if names := _names(level, tables):
                hint = did_you_mean(str(field), names)
                raise DataError(f"no picture has an attribute {str(field)!r}.{hint} There are: {first_few(names, 20)}")
        raise DataError(f"no picture has an attribute {str(field)!r}, or any other; filter by {' or '.join(OWN)}")


def _names(level: tuple[str, ...], tables: Sequence[Select]) -> list[str]:
    listed = "SELECT DISTINCT key FROM rows, json_each(attributes, ?1) WHERE typeof(key) = 'text' LIMIT 1000"
    keys = {key for select in tables for (key,) in select(listed, [_json_path(level)])}
    return sorted(".".join((*level, key)) for key in keys)


def condition(tree: Filter) -> tuple[str, list[Any]]:
    """A condition on a table with the columns name, path and attributes (JSON or NULL), and its parameters ?1, ?2, ...

    Nothing of the filter's own text is in it. It is 1 or 0, never NULL.
    """
    values: list[Any] = []

    def bound(value: Any) -> str:
        """The parameter that stands for a value; half letters, which are no UTF-8, go as bytes."""
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                values.append(value.encode("utf-8", "surrogatepass"))
                return f"CAST(?{len(values)} AS TEXT)"
        values.append(value)
        return f"?{len(values)}"

    def sql(part: Filter) -> str:
        if isinstance(part, And | Or):
            sign = " AND " if isinstance(part, And) else " OR "
            return f"({sign.join(sql(one) for one in part.parts)})"
        if isinstance(part, Not):
            return f"(NOT {sql(part.part)})"
        return _own(part, bound) if part.field.own else _attribute(part, bound)

    return sql(tree), values


def _own(leaf: OneOf | Order | Contains | Present, bound: Callable[[Any], str]) -> str:
    column = f"CAST({leaf.field.keys[0]} AS TEXT)"
    if isinstance(leaf, Present):
        return "1"
    if isinstance(leaf, OneOf):
        return f"({column} IN ({', '.join(bound(value) for value in leaf.values if isinstance(value, str))}))"
    if not isinstance(leaf.value, str):
        return "0"
    if isinstance(leaf, Order):
        return f"({column} {leaf.sign} {bound(leaf.value)})"
    return f"(instr({column}, {bound(leaf.value)}) > 0)"


def _attribute(leaf: OneOf | Order | Contains | Present, bound: Callable[[Any], str]) -> str:
    place = bound(_json_path(leaf.field.keys))
    kind, value = f"json_type(attributes, {place})", f"json_extract(attributes, {place})"
    if isinstance(leaf, Present):
        length = f"json_array_length(attributes, {place})"
        return f"(CASE coalesce({kind}, 'null') WHEN 'null' THEN 0 WHEN 'array' THEN {length} > 0 ELSE 1 END)"
    if isinstance(leaf, Order):
        against = bound(leaf.value)

        def fits(kind: str, value: str) -> str:
            return f"({kind} IN {_KINDS[_kind(leaf.value)]} AND {value} {leaf.sign} {against})"

    else:
        wanted: dict[type, list[str]] = {}
        for one in leaf.values if isinstance(leaf, OneOf) else (leaf.value,):
            wanted.setdefault(_kind(one), []).append(bound(one))

        def fits(kind: str, value: str) -> str:
            each = (f"({kind} IN {_KINDS[of]} AND {value} IN ({', '.join(which)}))" for of, which in wanted.items())
            return f"({' OR '.join(each) or '0'})"

    element = f"EXISTS (SELECT 1 FROM json_each(attributes, {place}) AS item WHERE {fits('item.type', 'item.value')})"
    if isinstance(leaf, Contains):
        part = f"instr({value}, {bound(leaf.value)}) > 0" if isinstance(leaf.value, str) else "0"
        return f"(CASE {kind} WHEN 'array' THEN {element} WHEN 'text' THEN {part} ELSE 0 END)"
    return f"(CASE {kind} WHEN 'array' THEN {element} ELSE coalesce({fits(kind, value)}, 0) END)"


_KINDS = {str: "('text')", float: "('integer', 'real')", bool: "('true', 'false')"}  # json_type's names


def _json_path(keys: tuple[str, ...]) -> str:
    """In ASCII: SQLite before 3.45 compares a name with how the JSON spells it, and the rows' JSON is ASCII."""
    return "$" + "".join(f".{json.dumps(key)}" for key in keys)
