"""Matching loss: of all images of the batch, a query's own target is to score highest.

B queries of the batch, E queries without image or text, G images they are compared with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neucore_plugin.models.layers import check_shape

LEAST = -1e30  # the logit of what does not count; unlike -inf it has a gradient, 0


class MatchingLoss(nn.Module):
    """Cross-entropy of the batch's scores S(q, t) times a learned factor:

    L_m = -1/B sum_i log( exp(factor S(q_i, t_i)) / sum_j exp(factor S(q_i, t_j)) ).

    Column i belongs to the target of query i. With `reference_negatives` the references of the batch follow the targets
    as further columns. With `mask_duplicates` columns that answer a query as well as its own target are left out of its
    sum: they are no wrong answers. The factor, exp(temperature), is learned by `Matching`, which holds it.
    Negatives beyond the batch (`negatives.py`) come as `further` logits, each the log-sum-exp of many images.

    >>> loss = MatchingLoss(mask_duplicates=True, reference_negatives=False)
    >>> scores, factor = torch.zeros(2, 3), torch.tensor(14.3)
    >>> loss(scores, factor, keys=torch.tensor([5, 7, 9]), right_keys=[(5, 9), (7,)])  # (log 2 + log 3) / 2
    tensor(0.8959)

    Source: Zhao & Xu 2023, progressive fusion (L_m); the factor: the released code; duplicates and references: ours.
    """

    def __init__(self, *, mask_duplicates: bool, reference_negatives: bool):
        super().__init__()
        self.mask_duplicates, self.reference_negatives = mask_duplicates, reference_negatives

    def forward(
        self,
        scores: Tensor,
        factor: Tensor,
        keys: Tensor,
        right_keys: Sequence[Sequence[int]] | None,
        further: Tensor | None = None,
    ) -> Tensor:
        """scores [B,G] with G of at least B, factor [] or [1] -> scalar.

        keys [G]: what each column shows; equal keys, equal images. right_keys: the keys that answer each query;
        read only where duplicates are masked. further [B,n]: more logits that are to be low.
        """
        count = len(scores)
        if scores.ndim != 2 or scores.shape[1] < count:
            raise ValueError(f"batch scores have shape {list(scores.shape)}, expected [B,G] with G of at least B")
        check_shape("keys of the columns [G]", keys, scores.shape[1])
        logits = scores * factor
        own = torch.arange(count, device=logits.device)
        if self.mask_duplicates:
            ignored = right_columns(keys, right_keys).to(logits.device)
            ignored[own, own] = False
            logits = logits.masked_fill(ignored, float("-inf"))
        return F.cross_entropy(logits if further is None else torch.cat([logits, further], dim=1), own)


def partial_loss(
    scores: Tensor, factor: Tensor, right: Tensor, further: Tensor | None = None, further_right: Tensor | None = None
) -> Tensor:
    """Loss [E] of queries that lack their image or their text, of which several images are right answers:

    -log( sum_right exp(factor S) / sum_all exp(factor S) ): whichever of them it finds.

    scores [E,G], factor [] or [1], right [E,G], one at least in each row; further, further_right [E,n]: log-sum-exps
    over all images beyond these, and over the right ones among them.
    """
    logits = scores * factor
    chosen = logits.masked_fill(~right, LEAST)
    if further is not None:
        logits, chosen = torch.cat([logits, further], dim=1), torch.cat([chosen, further_right], dim=1)
    return logits.logsumexp(dim=1) - chosen.logsumexp(dim=1)


def right_columns(keys: Tensor, right: Sequence[Sequence[int]]) -> Tensor:
    """[B,G]: whether the image of `keys` [G] is among the right answers of each query."""
    shown, inverse = torch.unique(keys.cpu(), return_inverse=True)
    found = torch.zeros(len(right), len(shown), dtype=torch.bool)
    flat = torch.tensor([key for answers in right for key in answers], dtype=torch.long)
    if len(flat) and len(shown):
        row = torch.repeat_interleave(torch.arange(len(right)), torch.tensor([len(answers) for answers in right]))
        place = torch.searchsorted(shown, flat).clamp_(max=len(shown) - 1)
        hit = shown[place] == flat
        found[row[hit], place[hit]] = True
    return found[:, inverse].to(keys.device)
