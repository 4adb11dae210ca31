"""What a model is given of a batch or a query, once its backbone and its projections have read it.

B batch, N image tokens, L words, K concepts of a query, D width, Dw width of a concept's embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddedConcepts(NamedTuple):
    """Concepts of queries, padded, as the text encoder embeds them."""

    embeddings: Tensor  # [B,K,Dw], 0 at padding
    mask: Tensor  # [B,K]


@dataclass(frozen=True)
class Query:
    """Queries, projected; a learned stand-in is in the place of what they lack."""

    reference: Mapping[str, Tensor]  # of tokens [B,N,D] and pooled [B,D], what the model reads
    # Of words [B,L,D] with word_mask [B,L], and sentence [B,D], what the model reads; of one that reads clauses
    # sentence [B,C,D] of each, and which there are, `present` [B,C].
    text: Mapping[str, Tensor]
    concept_words: Sequence[Sequence[str]] | EmbeddedConcepts  # lemmas of each query

    def of(self, rows: Tensor) -> "Query":
        """Those of some rows [n]."""
        return Query(
            {name: value[rows] for name, value in self.reference.items()},
            {name: value[rows] for name, value in self.text.items()},
            [self.concept_words[row] for row in rows.tolist()],
        )


@dataclass(frozen=True)
class Pairs(Query):
    """Training queries with their targets."""

    target: Mapping[str, Tensor]  # as gallery images are read, and what else the training reads of them
    negative: Tensor | None = None  # the references, read as gallery images are
    origin: Tensor | None = None  # the same, with stand-ins where a query has lost its image


def projection(width: int, dim: int, normalised: bool | None) -> nn.Module:
    """Features of an encoder -> width D; None: as they are."""
    if normalised is None:
        return nn.Identity()
    return Projection(nn.LayerNorm(width), nn.Linear(width, dim)) if normalised else nn.Linear(width, dim)


class Projection(nn.Sequential):
    """LayerNorm and a linear layer, with dropout of the normalised channels between: all in one product."""

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """x [B,...,C], kept [B,C] or [1,C], what each channel is multiplied by -> [B,...,D]."""
        if kept is None:
            return super().forward(x)
        norm, linear = self
        bias = F.linear(norm.bias * kept, linear.weight, linear.bias)  # [B or 1,D]
        if len(kept) == 1:  # no normalised copy of x is made: x, a cached feature map, is by far the largest here
            weight = linear.weight * (norm.weight * kept)  # [D,C]
            mean = x.mean(-1, keepdim=True)
            squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
            variance = (squares - mean.square()).clamp_min(0)  # of a constant x rounding alone is left
            centred = F.linear(x, weight) - mean * weight.sum(1)
            return centred * (variance + norm.eps).rsqrt() + bias[0]
        normal = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
        rows = len(kept), *[1] * (x.ndim - 2), -1
        return F.linear(normal.mul_(kept.view(rows)), linear.weight * norm.weight) + bias.view(rows)


def part_of(read: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Of an image's features one, tokens or pooled; with pooled what the layout reads, where it is there."""
    names = (name, "layout") if name == "pooled" and "layout" in read else (name,)
    return {one: read[one] for one in names}


def drawn(query_dropout: Mapping[str, float], draw: Tensor) -> tuple[Tensor, Tensor]:
    """Which queries of a training batch lose their image, and which their text, each [B]; never both.

    draw [B], uniform in [0, 1).
    """
    image = query_dropout["image"]
    return draw < image, (draw >= image) & (draw < image + query_dropout["text"])


def uniform(noise: Tensor) -> Tensor:
    """The samples' noise [B] -> a draw from [0, 1) that follows from it; unlike those of `kept_channels`."""
    return (noise >> 38).remainder(2**23).float() / 2**23


def partial_rows(query_dropout: Mapping[str, float], noise: Tensor) -> tuple[Tensor, Tensor]:
    """Which queries of a batch come once more without a part: rows [E], ascending, and which lack their image [E]."""
    no_image, no_text = drawn(query_dropout, uniform(noise))
    rows = (no_image | no_text).nonzero().flatten()
    return rows, no_image[rows]


def kept_channels(channels: int, share: float, noise: Tensor, slot: int) -> Tensor:
    """What dropout multiplies the channels of an encoder's features by, [B,C]: image i's follow from noise[i] [B] and
    `slot` alone.

    A channel is lost in all tokens of an image: an entry of one alone is still told by its neighbours, and the draws
    would cost more than the layers. noise may be [1]: all images lose the same. slot: below 8; features of one sample
    that are to lose different channels have different ones.
    """
    seeds = noise.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(8) + np.uint64(slot)
    state = seeds * np.uint64(0x5851F42D4C957F2D) + np.arange(1, channels + 1, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    # What SplitMix64 ends with (Steele et al., OOPSLA 2014): a generator seeded anew for each row takes far longer.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    kept = torch.from_numpy((state >> np.uint64(40)).astype(np.int32)) >= share * 2**24
    return kept.float().div_(1 - share)


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
    if "present" in text:
        first = torch.arange(text["present"].shape[1], device=absent.device) == 0  # [C]
        result["present"] = (absent[:, None] & first) | (~absent[:, None] & text["present"])
    if "sentence" in text:
        result["sentence"] = torch.where(
            absent.view(-1, *[1] * (text["sentence"].ndim - 1)), sentence, text["sentence"]
        )
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
    reference = {
        name: torch.where(no_image.view(-1, *[1] * (value.ndim - 1)), image, value)
        for name, value in query.reference.items()
    }
    words = [() if gone else words for words, gone in zip(query.concept_words, no_text.tolist(), strict=True)]
    return Query(reference, with_stand_ins(query.text, no_text, word, sentence), words)
