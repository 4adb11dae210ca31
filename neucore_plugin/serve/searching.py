"""What the model's thread does: queries that wait together are answered together, and concept maps are made.

A picture is what the model's processor gives, [3,H,W].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.retrieval import GalleryIndex
from neucore_plugin.retrieval.encoding import evaluating
from neucore_plugin.retrieval.index import Hit
from neucore_plugin.retrieval.queries import Query, concepts

Answer = tuple[list[Hit], list[str]]  # the hits, and the words of an explained query that were taken as concepts


class Searching:
    """Handlers of `Worker` over one index and its model."""

    def __init__(self, index: GalleryIndex) -> None:
        self.index, self.model = index, index.model

    def search(self, queries: Sequence[Query]) -> list[Answer]:
        """What the index answers to each query. Raises NeucoreError for one of them."""
        found = self.index.search_many(queries)
        return [(hits, self._concepts(query)) for query, hits in zip(queries, found, strict=True)]

    def _concepts(self, query: Query) -> list[str]:
        read = concepts(self.model, query)[: len(query.turns)] if query.explain else []
        return list(dict.fromkeys(word for _, words in read for word in words))

    def maps(self, asked: Sequence[tuple[Tensor, str, Tensor]]) -> list[list[dict[str, Any]]]:
        """Concept maps of each (reference, caption, result); none where the model has none."""
        draw = getattr(self.model, "concept_maps", None)
        if draw is None:
            return [[] for _ in asked]
        with torch.inference_mode(), evaluating(self.model):
            sides = (torch.stack([item[side] for item in asked]).to(self.model.device) for side in (0, 2))
            references, results = sides
            return draw(references, [caption for _, caption, _ in asked], results)
