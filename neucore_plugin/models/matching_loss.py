"""Matching loss: of all images of the batch, a query's own target is to score highest.

B queries of the batch, G images they are compared with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neucore_plugin.models.layers import check_shape


class MatchingLoss(nn.Module):
    """Cross-entropy of the batch's scores S(q, t) times a learned factor:

    L_m = -1/B sum_i log( exp(factor S(q_i, t_i)) / sum_j exp(factor S(q_i, t_j)) ).

    Column i belongs to the target of query i. With `reference_negatives` the references of the batch follow the targets
    as further columns. With `mask_duplicates` columns that answer a query as well as its own target are left out of its
    sum: they are no wrong answers. The factor, exp(temperature), is learned by `Matching`, which holds it.

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
        self, scores: Tensor, factor: Tensor, keys: Tensor, right_keys: Sequence[Sequence[int]] | None
    ) -> Tensor:
        """scores [B,G] with G of at least B, factor [] or [1] -> scalar.

        keys [G]: what each column shows; equal keys, equal images. right_keys: the keys that answer each query;
        read only where duplicates are masked.
        """
        count = len(scores)
        if scores.ndim != 2 or scores.shape[1] < count:
            raise ValueError(f"batch scores have shape {list(scores.shape)}, expected [B,G] with G of at least B")
        check_shape("keys of the columns [G]", keys, scores.shape[1])
        logits = scores * factor
        own = torch.arange(count, device=logits.device)
        if self.mask_duplicates:
            keys = keys.cpu()
            ignored = torch.stack([torch.isin(keys, torch.tensor(right)) for right in right_keys]).to(logits.device)
            ignored[own, own] = False
            logits = logits.masked_fill(ignored, float("-inf"))
        return F.cross_entropy(logits, own)
