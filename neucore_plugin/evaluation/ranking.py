"""What evaluation keeps of a query's scores, by the protocol of its data set; nothing as large as the gallery."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.datasets.triplets import TripletDataset
from neucore_plugin.retrieval.ranks import image_ranks, subset_ranks, target_ranks, topk

LESS = ("text_only", "image_only")  # rows of a result: the model's own, then the same model that sees less of a query
SHOWN = 10  # retrieved images kept a query, for the report


class Ranking:
    """Scores of some queries -> ranks, as the protocol of `dataset` wants them."""

    def __init__(self, dataset: TripletDataset) -> None:
        self.dataset, self.protocol = dataset, dataset.protocol
        self.grouped = all(triplet.members for triplet in dataset.triplets)
        self.candidates = dataset.candidates()
        self._place = None if self.candidates is None else {p: n for n, p in enumerate(self.candidates)}
        self._columns = None if self.candidates is None else torch.tensor(self.candidates)

    def _local(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Gallery positions -> columns of the scores that are ranked."""
        if self._place is None:
            return tuple(positions)
        return tuple(self._place[place] for place in positions if place in self._place)

    def __call__(self, scores: Tensor, indices: Sequence[int], shown: bool = True) -> dict[str, list[Any]]:
        """scores [B,G] of the queries `indices` -> {kind: a value a query}; `shown`: also the images of the report."""
        data, protocol = self.dataset, self.protocol
        removed = protocol is None or protocol.remove_reference
        if self._columns is not None:
            scores = scores[:, self._columns.to(scores.device)]
        excluded: list[int | None] = [None] * len(indices)
        if removed:
            excluded = [
                next(iter(self._local([] if p is None else [p])), None) for p in map(data.reference_position, indices)
            ]
        targets = [self._local(data.target_positions(index)) for index in indices]
        answers = [row[:1] for row in targets] if protocol is not None and protocol.precision_at else targets
        found = {"ranks": target_ranks(scores, answers, excluded).tolist()}
        members = [self._local(data.member_positions(index)) for index in indices] if self.grouped else None
        if members is not None:
            found["subset_ranks"] = subset_ranks(scores, targets, members, excluded).tolist()
        if protocol is not None and protocol.soft:
            found["soft"] = self._soft(scores, indices, excluded, members)
        if protocol is not None and protocol.precision_at:
            count = min(max(protocol.precision_at), scores.shape[1] - 1)
            found["best"] = self._global(topk(scores, count, excluded))
        if shown:
            best = topk(scores, min(SHOWN, scores.shape[1] - 1), excluded)
            found["top"], found["top_scores"] = self._global(best), scores.cpu().gather(1, best).tolist()
        return found

    def _global(self, best: Tensor) -> list[list[int]]:
        return (best if self._columns is None else self._columns[best]).tolist()

    def _soft(self, scores: Tensor, indices: Sequence[int], excluded: Any, members: Any) -> list[tuple]:
        graded = [self.dataset.soft_positions(index) for index in indices]
        places = [self._local([place for place, _ in row]) for row in graded]
        ranks = image_ranks(scores, places, excluded).tolist()
        grouped = image_ranks(scores, places, excluded, members).tolist() if members is not None else ranks
        return [
            (tuple(ranks[n][: len(row)]), tuple(grouped[n][: len(row)]), tuple(weight for _, weight in row))
            for n, row in enumerate(graded)
        ]
