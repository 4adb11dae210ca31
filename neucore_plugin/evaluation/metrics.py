"""Metrics of ranks: recall, graded recall, mean average precision; in percent, one value a query in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from neucore_plugin.common.errors import DataError

SUBSET_AT = (1, 2, 3)


def recall_at(ranks: Sequence[int], ks: Sequence[int], name: str = "R") -> dict[str, float]:
    """{"R@1": percent of queries whose rank (from 1) is at most 1, ...}; `name` is the part before the @."""
    if not ranks:
        raise DataError("recall needs the rank of one query at least; none is given")
    return {f"{name}@{k}": 100.0 * sum(rank <= k for rank in ranks) / len(ranks) for k in ks}


def soft_recall_at(
    graded: Sequence[Sequence[tuple[int, float]]], ks: Sequence[int], name: str = "R"
) -> dict[str, float]:
    """{"R@1": percent, ...}: the mean over queries of the largest weight among the top k, 0 where none is there.

    graded: the (rank, weight) pairs of each query's graded answers; rank 0 = not ranked.
    """
    return {
        f"{name}@{k}": 100.0
        * sum(max([0.0, *(weight for rank, weight in answers if 1 <= rank <= k)]) for answers in graded)
        / len(graded)
        for k in ks
    }


def mean_average_precision(
    rankings: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], ks: Sequence[int]
) -> dict[str, float]:
    """{"mAP@5": percent, ...} of each query's best gallery positions and its right answers, one or more (CIRCO).

    AP@k: the sum over the places i <= k that hold a right answer of precision(i), over min(right answers, k).
    """
    right = [set(row) for row in targets]
    hits = torch.tensor(
        [[place in wanted for place in ranking] for ranking, wanted in zip(rankings, right, strict=True)]
    )
    totals = torch.tensor([len(wanted) for wanted in right])
    return {f"mAP@{k}": 100.0 * float(_average_precision(hits, totals, k).mean()) for k in ks}


def _average_precision(hits: Tensor, totals: Tensor, k: int) -> Tensor:
    """AP@k [Q] in 0..1 of hits [Q,>=k] and the number of right answers [Q], found or not."""
    if hits.shape[1] < k:
        raise DataError(f"AP@{k} needs rankings of {k} images, but these have {hits.shape[1]}")
    relevant = hits[:, :k].double()
    precision = relevant.cumsum(1) / torch.arange(1, k + 1, dtype=torch.float64)
    return (precision * relevant).sum(1) / totals.clamp(max=k)
