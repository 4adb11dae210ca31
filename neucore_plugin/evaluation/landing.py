"""Do concepts land where the pictures change? Needs pairs of pictures that are alike but for the change.

h, w the grid of the image tokens; Q queries.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neucore_plugin.common.files import sha256_text
from neucore_plugin.datasets.triplets import collate
from neucore_plugin.evaluation.ranking import Evaluated

QUERIES = 100  # of each kind of change, chosen by a hash
DIFFERS = 0.1  # of the range of values: what two pixels are apart at least to count as changed
_BATCH = 50
SIDES = {"reference": "reference", "candidate": "target"}  # key of a map -> what it is called in the results


def changed_region(reference: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Two pictures [3,H,W] -> of each cell of the grid the share of its pixels that differ, [h,w] in [0,1]."""
    both = torch.stack([reference, target])
    apart = (reference - target).abs().amax(0) > DIFFERS * (both.max() - both.min())
    return F.adaptive_avg_pool2d(apart.float()[None], grid)[0]


def share_inside(values: Tensor, region: Tensor) -> float:
    """Share of the mass of a map [h,w] that lies in a region [h,w]; a map without mass says nothing: as a uniform one.

    A cell that is changed in part counts in that part, so that a uniform map has the mean of the region.
    """
    mass = values.sum()
    return float((values * region).sum() / mass) if mass > 0 else float(region.mean())


def chosen_queries(found: Evaluated) -> dict[str, list[int]]:
    """{kind of change: queries whose region is known, by a hash of their names}."""
    places: dict[str, list[int]] = {}
    triplets = found.dataset.triplets
    for place in sorted(range(len(triplets)), key=lambda n: sha256_text(f"region {triplets[n].query_id}")):
        if triplets[place].in_place:
            places.setdefault(triplets[place].change, []).append(place)
    return {change: places[change][:QUERIES] for change in sorted(places)}


@torch.inference_mode()
def located(found: Evaluated, model: Any, places: list[int]) -> list[tuple[Tensor, list[dict[str, Any]]]]:
    """Of each query the region [h,w] and its maps in reference and target; none where the model has no maps."""
    dataset, result = found.dataset, []
    triplets = [dataset.triplets[place] for place in places]
    for start in range(0, len(triplets), _BATCH):
        part = triplets[start : start + _BATCH]
        sides = [
            collate([dataset.images.load(name) for name in names])
            for names in zip(*((t.reference, t.targets[0]) for t in part), strict=True)
        ]
        # One that reads no tokens has no maps, whatever it is given.
        kinds = [next(kind for kind in ("tokens", "image", "pooled") if kind in side) for side in sides]
        given = [side[kind].to(model.device) for kind, side in zip(kinds, sides, strict=True)]
        maps = model.concept_maps(
            given[0], [dataset.texts[place] for place in places[start : start + _BATCH]], given[1]
        )
        for triplet, entries in zip(part, maps, strict=True):
            if entries:
                pixels = [dataset.images.pixels(name) for name in (triplet.reference, triplet.targets[0])]
                result.append((changed_region(*pixels, tuple(entries[0]["reference"].shape)), entries))
    return result


def landing(found: Evaluated, model: Any) -> dict[str, dict[str, float]]:
    """{kind of change: {"queries", "uniform", "reference", "target"}}: percent of a concept map's mass that lies where
    the pictures differ, mean over a query's concepts, then over queries; empty where maps or regions are not known.

    "uniform": of a map that is the same everywhere. A model without a map of the target has no "target".
    """
    told = {}
    for change, places in chosen_queries(found).items():
        queries = [(region, entries) for region, entries in located(found, model, places) if region.any()]
        if not queries:
            continue
        row = {"queries": len(queries), "uniform": _percent([float(region.mean()) for region, _ in queries])}
        for side, name in SIDES.items():
            if queries[0][1][0][side] is not None:
                shares = [[share_inside(entry[side], region) for entry in entries] for region, entries in queries]
                row[name] = _percent([sum(one) / len(one) for one in shares])
        told[change] = row
    return told


def _percent(shares: list[float]) -> float:
    return 100.0 * sum(shares) / len(shares)
