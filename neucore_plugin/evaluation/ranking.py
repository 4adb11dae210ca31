"""What evaluation keeps of a query's scores, by the protocol of its data set, and the metrics of a split.

Nothing kept is as large as the gallery. B queries of a batch, G gallery images.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.datasets.triplets import TripletDataset
from neucore_plugin.evaluation.metrics import SUBSET_AT, mean_average_precision, recall_at, soft_recall_at
from neucore_plugin.retrieval.ranks import MISS, image_ranks, target_ranks, topk

SHOWN = 10  # retrieved images kept a query, for the report


@dataclass(frozen=True)
class QueryRanks:
    """Of one query. Ranks count from 1; places are gallery positions, best first.

    rank: of the best-placed right answer, or of the target alone where the protocol has mAP; `MISS` where that is the
    reference, which the protocol does not rank. subset_rank: the same within the query's group; None where not every
    query of the split has one. soft: (rank, rank in the group, weight)
    of each graded answer. best: as many places as mAP wants. top, top_scores: for the report.
    """

    rank: int
    subset_rank: int | None = None
    soft: tuple[tuple[int, int, float], ...] = ()
    best: tuple[int, ...] = ()
    top: tuple[int, ...] = ()
    top_scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """A split after its queries were ranked.

    rows: {row: ranks of each query, in the data set's order}; the first row is the model's own, called by its title,
    the others the same model that sees less of a query. wordings: of each further wording the same ranks.
    """

    dataset: TripletDataset
    rows: dict[str, list[QueryRanks]]
    wordings: Sequence[list[QueryRanks]] = ()

    @property
    def title(self) -> str:
        """Name of the model's own row."""
        return next(iter(self.rows))

    @cached_property
    def table(self) -> dict[str, dict[str, float]]:
        """{row: metrics}."""
        return {row: self._summary(row, range(len(found))) for row, found in self.rows.items()}

    @cached_property
    def per_change(self) -> dict[str, dict[str, float]]:
        """{kind of change: metrics of the model's own row}; empty where the data set names no kinds. A query counts for
        each of its kinds."""
        places: dict[str, list[int]] = {}
        for place, triplet in enumerate(self.dataset.triplets):
            for change in dict.fromkeys((triplet.change, *triplet.aspects)):
                places.setdefault(change, []).append(place)
        return {change: self._summary(self.title, places[change]) for change in sorted(places) if change}

    def metrics(self) -> dict[str, Any]:
        """The model's own metrics; beside them `agg_metrics`, the other rows by name, and "per_change".

        `agg_metrics`, which selects the best checkpoint, is the mean of what the protocol names; without one of R@1 and
        R@10, or with groups of R@5 and R_subset@1, which is CIRR's rule.
        """
        own, protocol = self.table[self.title], self.dataset.protocol
        chosen_by = ("R@5", "R_subset@1") if "R_subset@1" in own else ("R@1", "R@10")
        present = [name for name in protocol.select if name in own]  # a small gallery has no mAP@50
        if present and (len(present) == len(protocol.select) or protocol.precision_at):
            chosen_by = present
        others = {row: values for row, values in self.table.items() if row != self.title}
        metrics = {**own, "agg_metrics": sum(own[name] for name in chosen_by) / len(chosen_by), **others}
        return {**metrics, "per_change": self.per_change} if self.per_change else metrics

    def kept(self, row: str, places: Sequence[int]) -> dict[str, Any]:
        """What pairs the queries at `places` with those of another run: {"rank": [rank, 0 = not ranked], ...}.

        "subset_rank" likewise where the queries have groups; "values": percent by metric, a query each, of the metrics
        that do not follow from ranks alone.
        """
        found, protocol = [self.rows[row][place] for place in places], self.dataset.protocol
        kept: dict[str, Any] = {"rank": [0 if query.rank == MISS else query.rank for query in found]}
        if found[0].subset_rank is not None:
            kept["subset_rank"] = [0 if query.subset_rank == MISS else query.subset_rank for query in found]
        if protocol.soft or protocol.precision_at:
            alone = [self._summary(row, [place]) for place in places]
            kinds = ("R", "mAP") if protocol.soft else ("mAP",)
            names = [name for name in alone[0] if name.startswith(kinds)]
            kept["values"] = {name: [round(values[name], 4) for values in alone] for name in names}
        return kept

    def _summary(self, row: str, places: Sequence[int]) -> dict[str, float]:
        """Percent, of one row and the queries at `places`.

        R@K and median rank; R_subset@K where the queries have groups; soft weights and mAP@K where the protocol asks.
        """
        found, protocol = [self.rows[row][place] for place in places], self.dataset.protocol
        grouped = found[0].subset_rank is not None
        ranks = [query.rank for query in found]
        if protocol.soft:
            graded = [[(rank, weight) for rank, _, weight in query.soft] for query in found]
            values = soft_recall_at(graded, protocol.recall_at)
            in_group = [
                [(place, weight) for rank, place, weight in query.soft if rank <= (protocol.subset_top or rank)]
                for query in found
            ]
            values |= soft_recall_at(in_group, SUBSET_AT, "R_subset") if grouped else {}
        else:
            values = recall_at(ranks, protocol.recall_at)
            values |= recall_at([query.subset_rank for query in found], SUBSET_AT, "R_subset") if grouped else {}
        if protocol.precision_at:
            targets = [self.dataset.target_positions(place) for place in places]
            ks = [k for k in protocol.precision_at if k <= len(found[0].best)]
            values |= mean_average_precision([query.best for query in found], targets, ks)
        last = len(self.dataset.gallery.ids)  # a miss lies behind all others
        median = statistics.median(min(rank, last) for rank in ranks)
        return {**values, "median_rank": float(median), "queries": len(ranks)}


class Ranking:
    """Scores of some queries -> their ranks, as the protocol of `dataset` wants them."""

    def __init__(self, dataset: TripletDataset) -> None:
        self.dataset, self.protocol = dataset, dataset.protocol
        self.grouped = all(triplet.members for triplet in dataset.triplets)
        self.candidates = dataset.candidates()
        self._column = None if self.candidates is None else {place: n for n, place in enumerate(self.candidates)}

    def __call__(self, scores: Tensor, indices: Sequence[int], shown: bool = True) -> list[QueryRanks]:
        """scores [B,G] of the queries `indices` -> ranks [B]; `shown`: with the images for the report."""
        data, protocol = self.dataset, self.protocol
        if self.candidates is not None:
            scores = scores[:, torch.tensor(self.candidates, device=scores.device)]
        excluded: list[int | None] = [None] * len(indices)
        if protocol.remove_reference:
            places = [data.reference_position(index) for index in indices]
            excluded = [next(iter(self._columns(() if place is None else (place,))), None) for place in places]
        targets = [self._columns(data.target_positions(index)) for index in indices]
        answers = [row[:1] for row in targets] if protocol.precision_at else targets
        members = [self._columns(data.member_positions(index)) for index in indices] if self.grouped else None
        found: dict[str, Sequence[Any]] = {"rank": target_ranks(scores, answers, excluded).tolist()}  # {name: a query}
        if members is not None:
            found["subset_rank"] = target_ranks(scores, targets, excluded, members).tolist()
        if protocol.soft:
            found["soft"] = self._soft(scores, indices, excluded, members)
        if protocol.precision_at:
            wanted = min(max(protocol.precision_at), scores.shape[1] - protocol.remove_reference)
            found["best"] = self._places(topk(scores, wanted, excluded))
        if shown:
            best = topk(scores, min(SHOWN, scores.shape[1] - 1), excluded)
            found["top"] = self._places(best)
            found["top_scores"] = [tuple(row) for row in scores.cpu().gather(1, best).tolist()]
        return [QueryRanks(**dict(zip(found, query, strict=True))) for query in zip(*found.values(), strict=True)]

    def _columns(self, places: Sequence[int]) -> tuple[int, ...]:
        """Gallery positions -> columns of the scores that are ranked."""
        if self._column is None:
            return tuple(places)
        return tuple(self._column[place] for place in places if place in self._column)

    def _places(self, columns: Tensor) -> list[tuple[int, ...]]:
        """The way back."""
        known = self.candidates
        return [tuple(row if known is None else (known[n] for n in row)) for row in columns.tolist()]

    def _soft(self, scores: Tensor, indices: Sequence[int], excluded: Any, members: Any) -> list[tuple]:
        graded = [self.dataset.soft_positions(index) for index in indices]
        images = [self._columns([place for place, _ in row]) for row in graded]
        ranks = image_ranks(scores, images, excluded).tolist()
        in_group = image_ranks(scores, images, excluded, members).tolist() if members is not None else ranks
        return [
            tuple((ranks[n][slot], in_group[n][slot], weight) for slot, (_, weight) in enumerate(row))
            for n, row in enumerate(graded)
        ]
