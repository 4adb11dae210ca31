"""How much of the truth the first stage keeps, measured on a gallery.

Letters: Q queries, G gallery images.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.retrieval import queries
from neucore_plugin.retrieval.encoding import evaluating
from neucore_plugin.retrieval.nearest import NEAREST, TINY, Factors, Parts, unit
from neucore_plugin.retrieval.qdrant_edge import CANDIDATES, EdgeCache, opened

_STEP = 16384  # images scored at a time


def recall(
    index: Any, asked: Sequence[queries.Query] = (), sample: int = 100, top: int = 50
) -> dict[str, float] | None:
    """Measured share of the true `top` images that are among the candidates of the first stage, as searches use it.

    {"made": of made-up queries near `sample` images of the gallery, "asked": of the given ones, where some are}. None
    where there is no cache that fits. Every image is scored, so it takes as long as that many exact searches.
    """
    if not len(index) or (cache := opened(index)) is None:
        return None
    alive = torch.arange(index.stored) if index.alive is None else index.alive.nonzero().flatten()
    some = alive[torch.linspace(0, len(alive) - 1, min(sample, len(alive)), dtype=torch.float64).long()]
    with torch.inference_mode(), evaluating(index.model):
        groups = {"made": near(index.model.gallery_factors(index.candidates(some)))}
        if asked:
            encoded = queries.encode(index.model, asked, index.reference)
            groups["asked"] = [[(w, index.model.query_factors(part)) for w, part in one.parts] for one in encoded]
        return {name: _recall(index, cache, group, min(top, len(alive))) for name, group in groups.items()}


def _recall(index: Any, cache: EdgeCache, group: list[Parts], top: int) -> float:
    best = torch.full((len(group), top), -torch.inf)
    where = torch.zeros(len(group), top, dtype=torch.long)
    for start, block in index.blocks(_STEP):
        factors = index.model.gallery_factors({key: value.float() for key, value in block.items()})
        found = scores(group, factors)
        if index.alive is not None:
            found.masked_fill_(~index.alive[start : start + found.shape[1]], -torch.inf)
        places = torch.arange(start, start + found.shape[1]).expand(len(group), -1)
        best, order = torch.cat([best, found], dim=1).topk(top, dim=1)
        where = torch.cat([where, places], dim=1).gather(1, order)
    kept = [torch.isin(true, cache.nearest(parts, CANDIDATES)) for true, parts in zip(where, group, strict=True)]
    return torch.stack(kept).double().mean().item()


def scores(parts: Sequence[Parts], gallery: Factors) -> Tensor:
    """The scores themselves, [Q,G], of Q queries against `gallery_factors` of G images."""
    owner = torch.tensor([number for number, query in enumerate(parts) for _ in query])
    weights = torch.tensor([weight for query in parts for weight, _ in query])
    flat = [factors for query in parts for _, factors in query]
    rows = {key: torch.cat([factors[key].float().cpu() for factors in flat]) for key in flat[0]}  # [P,D], [P,T,D]
    each: Tensor | float = rows["cosines"] @ gallery["cosines"].T if "cosines" in rows else 0.0
    if "weighted" in rows:
        for weighted, squares in zip(rows["weighted"].unbind(1), rows["squares"].unbind(1), strict=True):
            squared = squares @ gallery["squares"].T
            term = weighted @ gallery["weighted"].T * squared.clamp(min=TINY).rsqrt()
            each = each + torch.where(squared > TINY, term, 0.0)
    if "change" in rows:
        at_reference = (rows["change"] * rows["origin"]).sum(dim=1, keepdim=True)
        distance = 2 + NEAREST - 2 * rows["origin"] @ gallery["units"].T
        each = each + (rows["change"] @ gallery["units"].T - at_reference) * distance.rsqrt()
    return torch.zeros(len(parts), each.shape[1]).index_add_(0, owner, each.cpu() * weights[:, None])


def near(gallery: Factors, seed: int = 0) -> list[Parts]:
    """Made-up queries [G] near images given by their `gallery_factors`: half noise, attention drawn at random."""
    made = torch.Generator().manual_seed(seed)

    def blurred(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=made) / x.shape[1] ** 0.5
        return x.float().cpu() + x.float().cpu().norm(dim=1, keepdim=True) * noise

    factors: dict[str, Tensor] = {}
    if "cosines" in gallery:
        factors["cosines"] = blurred(gallery["cosines"])
    if "weighted" in gallery:
        attention = torch.randn(gallery["weighted"].shape, generator=made).softmax(dim=1)
        factors["weighted"] = (unit(blurred(gallery["weighted"])) * attention)[:, None]  # [G,1,D]
        factors["squares"] = attention.square()[:, None]
    if "units" in gallery:
        factors["change"] = unit(torch.randn(gallery["units"].shape, generator=made))
        factors["origin"] = unit(blurred(gallery["units"]))
    count = len(next(iter(factors.values())))
    return [[(1.0, {key: value[row : row + 1] for key, value in factors.items()})] for row in range(count)]
