"""The matching loss: against loops, closed forms and numerical gradients; masks; bad inputs."""

import math
from collections.abc import Sequence

import pytest
import reference
import torch

from neucore_plugin.models.matching_loss import MatchingLoss


def loss(
    scores: torch.Tensor, keys: Sequence[int] = (), right_keys: Sequence[Sequence[int]] | None = None, factor=1.0
) -> torch.Tensor:
    """All columns show different images unless `keys` says otherwise; without `right_keys` nothing is masked."""
    keys = torch.tensor(keys or range(scores.shape[1]))
    module = MatchingLoss(mask_duplicates=right_keys is not None, reference_negatives=False)
    return module(scores, torch.tensor([factor], dtype=scores.dtype), keys, right_keys)


@pytest.mark.parametrize("columns", [4, 7])
@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
def test_equals_loops(share: float | None, columns: int) -> None:
    """Also with more columns than rows (further negatives), and where a row has no rival left."""
    scores = torch.randn(4, columns, dtype=torch.float64)
    also_right = None if share is None else torch.rand(4, columns) < share
    right_keys = None if share is None else [row.nonzero().flatten().tolist() for row in also_right]
    expected = reference.contrastive_loss(scores.tolist(), 1.2, None if share is None else also_right.tolist())
    assert loss(scores, (), right_keys, math.exp(1.2)).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_closed_forms() -> None:
    assert loss(torch.zeros(4, 4)).item() == pytest.approx(math.log(4))
    assert loss(torch.zeros(4, 6)).item() == pytest.approx(math.log(6))
    assert loss(torch.zeros(4, 4), [5, 5, 8, 8], [(5,), (5,), (8,), (8, 9)]).item() == pytest.approx(math.log(3))
    assert loss(torch.zeros(1, 1)).item() == 0.0
    assert loss(10 * torch.eye(2)).item() == pytest.approx(math.log1p(math.exp(-10)), rel=1e-3)
    assert loss(torch.tensor([[0.0, 0.1], [0.1, 0.0]]), factor=100.0).item() == pytest.approx(math.log1p(math.exp(10)))


def test_gradients() -> None:
    scores, factor = torch.randn(3, 5, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    module, keys = MatchingLoss(mask_duplicates=True, reference_negatives=True), torch.tensor([0, 1, 0, 2, 3])
    inputs = (scores.requires_grad_(), factor.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, f: module(s, f, keys, [(0,), (1, 3), (0, 2)]), inputs)


@pytest.mark.parametrize(
    ("shape", "keys", "message"),
    [
        ((5, 4), range(4), r"batch scores have shape \[5, 4\], expected \[B,G\] with G of at least B"),
        ((4, 4), range(3), r"keys of the columns \[G\] has shape \[3\], expected \[4\]"),
    ],
)
def test_bad_input(shape: tuple[int, int], keys: Sequence[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(shape), list(keys))
