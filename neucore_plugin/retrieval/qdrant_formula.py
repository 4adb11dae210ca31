"""The score of a query as a formula that a Qdrant server computes for given points."""

from collections.abc import Collection
from typing import Any

import torch

from neucore_plugin.retrieval.nearest import NEAREST, FirstOrder, Parts


def scored(
    models: Any, parts: Parts, order: FirstOrder, beside: Collection[str], width: int, keep: Any, limit: int
) -> tuple[list[Any], Any]:
    """What is fetched for the points that `keep` allows, `limit` at most, and the score made of it.

    models: the module of the client's types. beside: names of the vectors other than `nearest`, whose width is given.
    """
    exactly = models.SearchParams(exact=True, quantization=models.QuantizationSearchParams(ignore=True))
    fetched: list[Any] = []
    defaults: dict[str, float] = {}

    def product(name: str, row: torch.Tensor) -> str:
        defaults[variable := f"$score[{len(fetched)}]"] = 0.0
        fetched.append(models.Prefetch(query=row.tolist(), using=name, filter=keep, limit=limit, params=exactly))
        return variable

    def fraction(over: Any, squared: Any) -> Any:
        root = models.SqrtExpression(sqrt=squared)
        return models.DivExpression(div=models.DivParams(left=over, right=root, by_zero_default=0.0))

    terms: list[Any] = []
    for weight, factors in parts:
        found: list[Any] = []
        if "cosines" in factors:
            name = "nearest" if order.squares is None or order.shared else "cosines"
            found.append(product(name, factors["cosines"][0].float()))
        pairs = zip(factors["weighted"][0], factors["squares"][0], strict=True) if "weighted" in factors else ()
        for weighted, squares in pairs:
            if bool(squares.any()):  # else a clause that the caption does not have
                found.append(fraction(product("weighted", weighted.float()), product("squares", squares.float())))
        if "change" in factors:
            change, origin = (factors[name][0].float() for name in ("change", "origin"))
            # The unit vectors stand by themselves, or at the beginning of what is looked up.
            name = "units" if "units" in beside else "nearest"
            beyond = (0, width - len(change) if name == "nearest" else 0)
            over, near = (product(name, torch.nn.functional.pad(row, beyond)) for row in (change, origin))
            distance = models.SumExpression(sum=[2.0 + NEAREST, models.MultExpression(mult=[-2.0, near])])
            found.append(fraction(models.SumExpression(sum=[over, -float(change @ origin)]), distance))
        terms.append(models.MultExpression(mult=[weight, models.SumExpression(sum=found)]))
    return fetched, models.FormulaQuery(formula=models.SumExpression(sum=terms), defaults=defaults)
