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

    def of(self, rows: Tensor) -> "Query":
        """Those of some rows [n]."""
        return Query(
            None if self.reference is None else self.reference[rows],
            {name: value[rows] for name, value in self.text.items()},
            [self.concept_words[row] for row in rows.tolist()],
        )


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


def drawn(query_dropout: Mapping[str, float], draw: Tensor) -> tuple[Tensor, Tensor]:
    """Which queries of a training batch lose their image, and which their text, each [B]; never both.

    draw [B], uniform in [0, 1).
    """
    image = query_dropout["image"]
    return draw < image, (draw >= image) & (draw < image + query_dropout["text"])


def uniform(noise: Tensor) -> Tensor:
    """The samples' noise [B] -> a draw from [0, 1) that follows from it; from other bits than `dropped` takes."""
    return (noise >> 38).remainder(2**23).float() / 2**23


def partial_rows(query_dropout: Mapping[str, float], noise: Tensor) -> tuple[Tensor, Tensor]:
    """Which queries of a batch come once more without a part: rows [E], ascending, and which lack their image [E]."""
    no_image, no_text = drawn(query_dropout, uniform(noise))
    rows = (no_image | no_text).nonzero().flatten()
    return rows, no_image[rows]


def dropped(features: Tensor, share: float, noise: Tensor, slot: int) -> Tensor:
    """Dropout of an encoder's features [B,...,C]: image i's follows from noise[i] [B] and `slot` alone.

    A channel is lost in all tokens of an image: an entry of one alone is still told by its neighbours, and the draws
    would cost more than the layers. noise may be [1]: all images lose the same. slot: below 8; features of one sample
    that are to lose different channels have different ones.
    """
    kept = torch.empty(len(noise), features.shape[-1], dtype=torch.bool)  # [B or 1, C]
    generator = torch.Generator()
    for row, seed in zip(kept, noise.tolist(), strict=True):
        row.bernoulli_(1 - share, generator=generator.manual_seed(seed % 2**60 * 8 + slot))
    kept = kept.view(len(noise), *[1] * (features.ndim - 2), features.shape[-1])
    return features * kept.to(features.device, features.dtype).div_(1 - share)


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


def without(
    query: Query,
    no_image: Tensor,
    no_text: Tensor,
    image: Tensor | None,
    word: Tensor | None,
    sentence: Tensor | None,
) -> Query:
    """Queries of which some, `no_image` and `no_text` [B], have the stand-ins [D] in place of image or text."""
    reference = query.reference
    if reference is not None:
        reference = torch.where(no_image.view(-1, *[1] * (reference.ndim - 1)), image, reference)
    words = [() if gone else words for words, gone in zip(query.concept_words, no_text.tolist(), strict=True)]
    return Query(reference, with_stand_ins(query.text, no_text, word, sentence), words)
