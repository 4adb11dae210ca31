"""Metrics of ranks: recall, median rank, mean average precision; in percent."""

from collections.abc import Sequence

import torch
from torch import Tensor

from neucore_plugin.common.errors import DataError
from neucore_plugin.retrieval.ranks import Positions, _padded

RECALL_AT = (1, 5, 10, 50)
SUBSET_AT = (1, 2, 3)
PRECISION_AT = (5, 10, 25, 50)


def soft_recall_at(
    ranks: Sequence[Sequence[int]], weights: Sequence[Sequence[float]], ks: Sequence[int] = RECALL_AT, name: str = "R"
) -> dict[str, float]:
    """{"R@1": percent, ...}: the mean over queries of the largest weight among the top k, 0 where none is there.

    ranks, weights: of each query's graded answers, equally many; rank 0 = not ranked.
    """
    if not ranks or len(ranks) != len(weights):
        raise DataError(f"{len(ranks)} lists of ranks and {len(weights)} of weights; give both for each query")
    scores = {}
    for k in ks:
        best = [
            max((w for rank, w in zip(row, graded, strict=True) if 1 <= rank <= k), default=0.0)
            for row, graded in zip(ranks, weights, strict=True)
        ]
        scores[f"{name}@{k}"] = 100.0 * sum(max(0.0, value) for value in best) / len(best)
    return scores


def recall_at(ranks: Tensor, ks: Sequence[int] = RECALL_AT, name: str = "R") -> dict[str, float]:
    """{"R@1": percent of queries whose rank is at most 1, ...}; ranks [Q], 1-based. `name` is the part before the @."""
    _check_ranks(ranks)
    return {f"{name}@{k}": 100.0 * int((ranks <= k).sum()) / len(ranks) for k in ks}


def median_rank(ranks: Tensor) -> float:
    """The median of the ranks [Q]; of an even number of queries the mean of the middle two."""
    _check_ranks(ranks)
    ordered, middle = ranks.sort().values, len(ranks) // 2
    return float(ordered[middle]) if len(ranks) % 2 else (int(ordered[middle - 1]) + int(ordered[middle])) / 2


def hits_in(top: Tensor, targets: Positions) -> Tensor:
    """Bool [Q,k]: which places of the rankings `top` [Q,k] (gallery positions) hold a right answer.

    DataError where an image stands twice in one ranking: it would be counted twice.
    """
    ordered = top.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1).nonzero()
    if len(twice):
        raise DataError(f"query {int(twice[0])}: an image stands twice in its ranking; a ranking names each image once")
    highest = 1 + max((place for row in targets for place in row), default=0)
    wanted = _padded(targets, len(top), highest, "targets").to(top.device)
    return (top[:, :, None] == wanted[:, None, :]).any(2)


def average_precision_at(hits: Tensor, totals: Tensor, k: int) -> Tensor:
    """AP@k [Q] in 0..1, float64: sum over places i <= k of precision(i) x hit(i), over min(right answers, k) (CIRCO).

    hits: bool [Q,>=k] in ranking order; totals [Q]: how many right answers each query has in all (found or not).
    """
    if hits.shape[1] < k:
        raise DataError(f"AP@{k} needs rankings of {k} images, but these have {hits.shape[1]}")
    if bool((totals < 1).any()):
        raise DataError("a query without right answers has no average precision; leave it out of the split")
    relevant = hits[:, :k].double()
    precision = relevant.cumsum(1) / torch.arange(1, k + 1, dtype=torch.float64, device=hits.device)
    return (precision * relevant).sum(1) / totals.clamp(max=k)


def mean_average_precision(top: Tensor, targets: Positions, ks: Sequence[int] = PRECISION_AT) -> dict[str, float]:
    """{"mAP@5": percent, ...} of rankings `top` [Q,k] (gallery positions, reference already left out)."""
    hits = hits_in(top, targets)
    totals = torch.tensor([len(set(row)) for row in targets], device=top.device)
    return {f"mAP@{k}": 100.0 * float(average_precision_at(hits, totals, k).mean()) for k in ks}


def _check_ranks(ranks: Tensor) -> None:
    if ranks.ndim != 1 or len(ranks) == 0:
        raise DataError(f"ranks must be a vector with one rank for each query, not empty; given {tuple(ranks.shape)}")
