"""The concept loss: against loops, closed forms and numerical gradients; extreme logits; bad inputs."""

import math

import pytest
import reference
import torch
from tiny import rand

from neucore_plugin.models.concept_loss import ConceptLoss

B, C = 3, 7


def focal(
    logits: torch.Tensor, labels: torch.Tensor, alpha: float = 0.5, gamma: float = 1.0, weight: float = 1.0
) -> torch.Tensor:
    return ConceptLoss(weight=weight, alpha=alpha, gamma=gamma)(logits, labels)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 1.0), (0.25, 2.0), (0.9, 0.0), (0.5, 0.5)])
def test_focal_loss_equals_loops(alpha: float, gamma: float) -> None:
    logits, labels = 3 * rand(B, C), (torch.rand(B, C) > 0.6).long()
    expected = reference.focal_loss(logits.tolist(), labels.tolist(), alpha, gamma)
    assert focal(logits, labels, alpha, gamma).mean().item() == pytest.approx(expected, rel=1e-12)


def test_focal_loss_in_closed_form() -> None:
    zeros, labels = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0]])
    assert focal(zeros, labels).mean().item() == pytest.approx(0.25 * math.log(2))
    assert focal(zeros, labels, weight=200.0).tolist() == pytest.approx([50 * math.log(2)] * 2)
    one = torch.full((1, 1), math.log(3.0), dtype=torch.float64)  # p = 3/4
    assert focal(one, torch.ones(1, 1)).item() == pytest.approx(-0.5 * 0.25 * math.log(0.75))
    assert focal(one, torch.zeros(1, 1)).item() == pytest.approx(-0.5 * 0.75 * math.log(0.25))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_loss_is_finite_at_extreme_logits(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1, 0, 0, 1, 1]])
    loss = focal(logits, labels, gamma=gamma).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert loss.item() == pytest.approx(2 * 0.5 * 1e4 / 5, rel=1e-3)  # only the two wrong ones cost much


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gradients(gamma: float) -> None:
    labels = (torch.rand(B, C) > 0.5).double()
    assert torch.autograd.gradcheck(lambda z: focal(z, labels, gamma=gamma), rand(B, C).requires_grad_())


BAD = {
    "labels": (lambda: focal(torch.zeros(B, C), torch.zeros(B, C + 1)), r"labels .* \[3, 8\]"),
    "no concepts": (lambda: focal(torch.zeros(B, 0), torch.zeros(B, 0)), "empty batch or vocabulary"),
    "alpha": (lambda: focal(torch.zeros(B, C), torch.zeros(B, C), alpha=2.0), "alpha must lie in 0..1"),
    "weight": (lambda: ConceptLoss(weight=-1.0, alpha=0.5, gamma=1.0), "weight and gamma must not be negative"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
