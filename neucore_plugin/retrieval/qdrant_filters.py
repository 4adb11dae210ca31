"""Filters in Qdrant's own conditions; they mean what `filters` says they mean. The payload is that of qdrant_server.

An order of texts (`name < "m"`) is the one comparison that Qdrant does not know.
"""

import math
import re
from typing import Any

from neucore_plugin.common.errors import DataError
from neucore_plugin.retrieval import filters

_EXACT = 2**53  # whole numbers beyond it are not told apart by ranges, which are of float64
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def condition(tree: filters.Filter) -> Any:
    """A tree -> one condition. DataError: an order of texts."""
    from qdrant_client import models

    if isinstance(tree, filters.And):
        return models.Filter(must=[condition(part) for part in tree.parts])
    if isinstance(tree, filters.Or):
        return models.Filter(should=[condition(part) for part in tree.parts])
    if isinstance(tree, filters.Not):
        return models.Filter(must_not=[condition(tree.part)])
    key = _key(tree.field)
    if isinstance(tree, filters.Present):
        return models.Filter(must_not=[models.IsEmptyCondition(is_empty=models.PayloadField(key=key))])
    if isinstance(tree, filters.OneOf):
        return _equal(key, tree.values)
    if isinstance(tree, filters.Order):
        if isinstance(tree.value, str):
            raise DataError(
                f"filter {tree.field} {tree.sign} {tree.value!r:.80}: Qdrant has no order of texts; compare numbers, "
                "or search the index itself"
            )
        name = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[tree.sign]
        return models.FieldCondition(key=key, range=models.Range(**{name: _finite(tree.value)}))
    elements = f"{key}[]"  # of lists only
    inside = [_equal(elements, (tree.value,))]
    if isinstance(tree.value, str):
        none = models.IsEmptyCondition(is_empty=models.PayloadField(key=elements))
        part = models.FieldCondition(key=key, match=models.MatchSubstring(substring=tree.value))
        inside.append(models.Filter(must=[none, part]))
    return models.Filter(should=inside)


def _equal(key: str, values: tuple[filters.Value, ...]) -> Any:
    from qdrant_client import models

    texts = [value for value in values if isinstance(value, str)]
    found = [models.FieldCondition(key=key, match=models.MatchAny(any=texts))] if texts else []
    for value in values:
        if isinstance(value, bool) or (isinstance(value, int) and abs(value) > _EXACT):
            found.append(models.FieldCondition(key=key, match=models.MatchValue(value=value)))
        elif not isinstance(value, str):  # 5 equals 5.0, which a match does not say
            number = _finite(value)
            found.append(models.FieldCondition(key=key, range=models.Range(gte=number, lte=number)))
    return models.Filter(should=found) if found else models.HasIdCondition(has_id=[])


def payload_key(*path: str) -> str:
    """A path in the payload, as Qdrant writes it; no part may hold a quotation mark."""
    return ".".join(key if _PLAIN.fullmatch(key) else f'"{key}"' for key in path)


def _key(field: filters.Field) -> str:
    return payload_key(*field.keys) if field.own else payload_key("attributes", *field.keys)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise DataError(f"filter: the number {value} is too large for Qdrant")
    return float(value)
