"""Negatives beyond the batch: images of the training gallery that every query is compared with.

Where a gallery vector is cheap (a projection of a cached pooled vector) it is computed anew each step, with gradient.
Where it is not, encodings are kept from when each image was last seen or refreshed, without gradient. Knows no host.

B queries of the batch, E of them once more without image or text, G images, D width, n images at a time.

Source: of the kept encodings: Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neucore_plugin.common import distributed
from neucore_plugin.common.randomness import mix
from neucore_plugin.models.matching_loss import LEAST, right_columns

BLOCK = 8192  # images scored at a time: bounds the memory, whatever the gallery

Scores = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
Block = tuple[Tensor, Callable[[], Mapping[str, Tensor]]]  # keys [n], and what encodes these images: {name: [n,D]}


class TrainingImages(Protocol):
    """What this module asks of a training gallery (`datasets/training_gallery.py`)."""

    keys: Tensor  # [G], ascending: a number an image, as in the samples
    cached: bool  # whether `features` can be had

    def features(self, rows: Tensor, name: str) -> Tensor:
        """tokens [n,N,Di] or pooled [n,Di] of some images, as the encoder gave them."""


class Negatives:
    """Which images of the gallery are negatives of a step, and their encodings.

    Args:
        gallery: the training images.
        wanted: how many of them, drawn anew; None: all.
        seed: what is drawn follows from it, the epoch and the iteration.
        encode: (rows [n] of the gallery, noise of the dropout [n] or [1]) -> {name: [n,D]}; of a cached gallery.
        cheap: whether `encode` is asked for all of them in each step, with gradient.
    """

    def __init__(
        self,
        gallery: TrainingImages,
        wanted: int | None,
        seed: int,
        encode: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
        cheap: bool,
    ) -> None:
        self.gallery, self.seed, self.encode, self._cheap = gallery, seed, encode, cheap
        self.wanted = None if wanted is None or wanted >= len(gallery.keys) else wanted
        self._turn: int | None = None  # for which the images were drawn
        self._rows = torch.arange(len(gallery.keys))  # of the gallery, ascending
        self._kept: dict[str, Tensor] = {}  # [rows,D]
        self._filled = torch.zeros(len(self._rows), dtype=torch.bool)

    @property
    def live(self) -> bool:
        """Whether encodings are computed anew each step, with gradient."""
        return self._cheap and self.gallery.cached

    def begin(self, epoch: int, iteration: int) -> None:
        """Choose the images of a step, or where encodings are kept of an epoch; of those that stay, these stay too."""
        turn = iteration if self.live else epoch
        if self.wanted is None or turn == self._turn:
            return
        self._turn = turn
        generator = torch.Generator().manual_seed(mix(self.seed, turn, 1))
        rows = torch.randperm(len(self.gallery.keys), generator=generator)[: self.wanted].sort().values
        old, filled = self._places(self.gallery.keys[rows]), {}
        stay = old >= 0
        stay[stay.clone()] = self._filled[old[stay]]
        for name, kept in self._kept.items():
            filled[name] = kept.new_zeros(len(rows), kept.shape[1])
            filled[name][stay.to(kept.device)] = kept[old[stay].to(kept.device)]
        self._rows, self._kept, self._filled = rows, filled, stay

    def _places(self, keys: Tensor) -> Tensor:
        """Where the images of `keys` [n] stand among the chosen ones; -1: nowhere."""
        known = self.gallery.keys[self._rows]
        places = torch.searchsorted(known, keys).clamp_(max=max(0, len(known) - 1))
        return torch.where(known[places] == keys, places, -1) if len(known) else torch.full_like(keys, -1)

    @torch.no_grad()
    def refresh(self, iteration: int, count: int, exchange: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """Renew `count` kept encodings a process, one round of the images after another.

        Does nothing where encodings are not kept, or where the images would have to be read for it: then the batches
        alone renew them. exchange: rows of this process -> those of all processes.
        """
        if self.live or not self.gallery.cached:
            return
        start = (iteration * distributed.world_size() + distributed.rank()) * count
        rows = self._rows[(start + torch.arange(count)) % len(self._rows)]
        keys = self.gallery.keys[rows]
        noise = (keys * 2654435761 + mix(self.seed, iteration, 3)).remainder(2**62)  # of each image its own
        encodings = exchange(dict(self.encode(rows, noise)))
        device = next(iter(encodings.values())).device
        self.keep(exchange({"key": keys[:, None].to(device)})["key"].flatten(), encodings)

    @torch.no_grad()
    def keep(self, keys: Tensor, encodings: Mapping[str, Tensor], order: Tensor | None = None) -> None:
        """Keep encodings [n,D] of the images of `keys` [n]. Of an image that comes twice the row that is last in
        `order` [n] counts, so that the order of the rows does not matter."""
        if self.live:
            return
        places = self._places(keys.cpu())
        order = torch.arange(len(keys)) if order is None else order.cpu().argsort(stable=True).argsort()
        last = torch.full((len(self._rows),), -1).scatter_reduce(0, places.clamp(min=0), order, "amax")
        chosen = (places >= 0) & (order == last[places.clamp(min=0)])
        places = places[chosen]
        for name, rows in encodings.items():
            if name not in self._kept:
                kind = torch.promote_types(rows.dtype, torch.float32)
                self._kept[name] = torch.zeros(len(self._rows), rows.shape[1], dtype=kind, device=rows.device)
            self._kept[name][places.to(rows.device)] = rows[chosen.to(rows.device)].to(self._kept[name].dtype)
        self._filled[places] = True

    def blocks(self, taken: Tensor, noise: Tensor) -> Iterator[Block]:
        """The images but for those of the keys `taken`, which the batch shows itself; at most BLOCK at a time.

        noise [1]: what the dropout of all of them follows from.
        """
        keys = self.gallery.keys[self._rows]
        places = (~torch.isin(keys, taken.cpu()) & (self._filled | self.live)).nonzero().flatten()
        for part in places.split(BLOCK):
            if not len(part):
                continue
            if self.live:
                rows = self._rows[part]
                yield keys[part], lambda rows=rows: self.encode(rows, noise)
            else:
                kept = {name: value[part.to(value.device)] for name, value in self._kept.items()}
                yield keys[part], lambda kept=kept: kept

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint has to hold to go on with the same negatives, not copied: the next step changes it. None:
        all follows from seed and iteration."""
        if not self._kept:
            return None
        return {"rows": self._rows, "turn": self._turn, "filled": self._filled, "kept": dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any] | None, device: torch.device) -> None:
        """Go on from a checkpoint's `state`, which stays as it is; what was kept until now is forgotten."""
        self._turn, self._kept = None, {}
        self._rows = torch.arange(len(self.gallery.keys))
        self._filled = torch.zeros(len(self._rows), dtype=torch.bool)
        if state is not None:
            self._rows, self._turn, self._filled = state["rows"], state["turn"], state["filled"].clone()
            self._kept = {name: value.to(device).clone() for name, value in state["kept"].items()}


def log_sums(
    score: Scores,
    factor: Tensor,
    blocks: Iterator[Block],
    full: tuple[Mapping[str, Tensor], Sequence[Sequence[int]]],
    partial: tuple[Mapping[str, Tensor], Sequence[Sequence[int]]],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the images of all blocks add to the softmax of each query: log-sum-exps, a column a block.

    A block's columns stand in a softmax as the one logit that is their log-sum-exp, so no [B,G] is ever whole; of
    several blocks the scores are computed again in the backward pass.

    Args:
        full, partial: encodings of queries, [B,D] and [E,D] each, with the keys of their right answers; `partial` may
            have none.
    Returns: of `full` over what is no right answer [B,blocks]; of `partial` over all, and over the right ones, both
        [E,blocks], without gradient to images and factor; None where there are no such queries.
    """
    blocks = list(blocks)
    found: list[tuple[Tensor, ...]] = []
    for keys, encode in blocks:
        rights = [right_columns(keys, right).to(factor.device) for _, right in (full, partial)]

        def sums(encode=encode, rights=rights) -> tuple[Tensor, ...]:
            images = encode()
            logits = score(full[0], images) * factor
            wrong = logits.masked_fill(rights[0], LEAST).logsumexp(1)
            if not partial[0]:
                return (wrong,)
            logits = score(partial[0], {name: value.detach() for name, value in images.items()}) * factor.detach()
            return wrong, logits.logsumexp(1), logits.masked_fill(~rights[1], LEAST).logsumexp(1)

        found.append(sums() if len(blocks) == 1 else checkpoint(sums, use_reentrant=False))
    counts = len(full[1]), *([len(partial[1])] * 2 if partial[0] else [])
    empty = [factor.new_zeros(count, 0) for count in counts]
    result = [torch.stack(column, 1) for column in zip(*found, strict=True)] if found else empty
    return tuple(result + [None] * (3 - len(result)))
