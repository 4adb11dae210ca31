"""What a model is given of a batch or a query, once its backbone and its projections have read it.

B batch, N image tokens, L words, K concepts of a query, D width, Dw width of a concept's embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class EmbeddedConcepts(NamedTuple):
    """Concepts of queries, padded, as the text encoder embeds them."""

    embeddings: Tensor  # [B,K,Dw], 0 at padding
    mask: Tensor  # [B,K]


@dataclass(frozen=True)
class Query:
    """Queries, projected; a learned stand-in is in the place of what they lack."""

    reference: Tensor | None  # tokens [B,N,D] or pooled [B,D], as the model reads it; None where it reads no image
    text: Mapping[str, Tensor]  # of words [B,L,D] with word_mask [B,L], and sentence [B,D], what the model reads
    concept_words: Sequence[Sequence[str]] | EmbeddedConcepts  # lemmas of each query


@dataclass(frozen=True)
class Pairs(Query):
    """Training queries with their targets."""

    target: Tensor  # as gallery images are read
    negative: Tensor | None = None  # the references, read as gallery images are


def projection(width: int, dim: int, normalised: bool | None) -> nn.Module:
    """Features of an encoder -> width D; None: as they are."""
    if normalised is None:
        return nn.Identity()
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim)) if normalised else nn.Linear(width, dim)


def drawn(query_dropout: Mapping[str, float], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which queries of a training batch lose their image, and which their text, each [B]; never both."""
    draw, image = torch.rand(size, device=device), query_dropout["image"]
    return draw < image, (draw >= image) & (draw < image + query_dropout["text"])


def with_stand_ins(
    text: Mapping[str, Tensor], absent: Tensor, word: Tensor | None, sentence: Tensor | None
) -> dict[str, Tensor]:
    """`text` as in `Query`, its rows where `absent` [B] replaced by the stand-ins: one `word` and a `sentence`, [D]."""
    result = {}
    if "words" in text:
        words, mask = text["words"], text["word_mask"]
        if words.shape[1] == 0:
            words, mask = words.new_zeros(len(words), 1, len(word)), mask.new_zeros(len(mask), 1)
        first = torch.arange(words.shape[1], device=words.device) == 0  # [L]
        stand_in = torch.where(first[:, None], word, torch.zeros_like(word))  # [L,D]
        result["words"] = torch.where(absent[:, None, None], stand_in, words)
        result["word_mask"] = (absent[:, None] & first) | (~absent[:, None] & mask)  # onnxruntime lacks a bool `where`
    if "sentence" in text:
        result["sentence"] = torch.where(absent[:, None], sentence, text["sentence"])
    return result
