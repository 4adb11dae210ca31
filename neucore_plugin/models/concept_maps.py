"""Where concepts lie in two images: each token's share of the pooled concept logit.

Q queries, N image tokens, K concepts of a query, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def concept_maps(
    sides: Sequence[Mapping[str, Tensor]],
    concept_words: Sequence[Sequence[str]],
    concepts: Tensor,
    grid: tuple[int, int],
) -> list[list[dict[str, Any]]]:
    """Maps of every query's concepts.

    Args:
        sides: what `ConceptAlignment.encode` gave for the references and for the candidates.
        concept_words: concepts of each query; concepts [Q,K,D]: their projected embeddings.
        grid: rows and columns that the last tokens form.
    Returns: a list a query of {"concept", "reference": [h,w], "candidate": [h,w]}, values in [0,1] on one scale a
        concept; negative shares are cut to 0.
    """
    rows, columns = grid
    weighted = [side["tokens"] * side["fg_weights"][..., None] for side in sides]  # each [Q,N,D]
    maps = []
    for query, words in enumerate(concept_words):
        entries = []
        for position, word in enumerate(words):
            pair = [(side[query] @ concepts[query, position])[-rows * columns :].clamp_min(0) for side in weighted]
            top = torch.stack(pair).max().clamp_min(1e-12)
            reference, candidate = ((values / top).reshape(rows, columns).cpu() for values in pair)
            entries.append({"concept": word, "reference": reference, "candidate": candidate})
        maps.append(entries)
    return maps
