"""Concept loss: the concepts of a caption as weak labels of the two images.

B batch, C concept vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models.layers import check_shape


class ConceptLoss(nn.Module):
    """Focal multi-label loss of each pair, the mean over the concepts of the vocabulary:

    L_c = -weight / C sum_c ( y_c alpha (1 - p_c)^gamma log p_c + (1 - y_c) (1 - alpha) p_c^gamma log(1 - p_c) ),
    p = sigmoid(logit).

    Args:
        weight, gamma: at least 0. alpha: share of the concepts that are there, in [0,1].

    >>> loss = ConceptLoss(weight=20.0, alpha=0.5, gamma=1.0)
    >>> loss(torch.zeros(2, 4), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]]))  # 20 * 0.5 * 0.5 * log 2 each
    tensor([3.4657, 3.4657])

    Source: Zhao & Xu 2023, multi-modal concept alignment (L_c, multi-label classification with weak labels); that it is
    focal, and in the released form alpha 0.5, gamma 1, weight 200: the released code.
    """

    def __init__(self, *, weight: float, alpha: float, gamma: float):
        super().__init__()
        if weight < 0 or not 0 <= alpha <= 1 or gamma < 0:
            raise ConfigError(
                f"concept loss: weight {weight}, alpha {alpha}, gamma {gamma}; "
                "weight and gamma must not be negative, alpha must lie in 0..1"
            )
        self.weight, self.alpha, self.gamma = weight, alpha, gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [B,C], labels [B,C] of 0 and 1 -> [B]. Raises ValueError for an empty batch or vocabulary."""
        check_shape("concept logits [B,C]", logits, None, None)
        check_shape("concept labels [B,C]", labels, *logits.shape)
        if logits.numel() == 0:
            shape = list(logits.shape)
            raise ValueError(f"concept logits have shape {shape}: an empty batch or vocabulary has no loss")
        labels = labels.to(logits.dtype)
        log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)  # [B,C]
        # Powers as exponentials of logarithms: finite, with finite gradients, at any logit and any gamma of at least 0.
        present = self.alpha * torch.exp(self.gamma * log_not_p) * log_p
        absent = (1.0 - self.alpha) * torch.exp(self.gamma * log_p) * log_not_p
        return self.weight * -(labels * present + (1.0 - labels) * absent).mean(dim=1)  # [B]
