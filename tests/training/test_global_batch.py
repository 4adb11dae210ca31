"""N processes of B pairs train like one process of N x B: the loss sees the whole global batch, with gradient."""

import batch_case as case
import numpy as np
import pytest
import torch
from runner_case import in_group

from neucore_plugin.common.errors import ConfigError


def assert_group_equals_one(tmp_path, kind, settings, count, world=2, tolerance=1e-9) -> list[dict]:
    one = case.step(kind, settings, count)
    parts = in_group(tmp_path, case.step, kind, settings, count, world=world)
    for part in parts:
        case.assert_same_step({**part, "losses": case.mean_losses(parts)}, one, tolerance)
        for name, value in parts[0]["grads"].items():  # the same bits everywhere, or the weights would drift apart
            assert value is None or np.array_equal(part["grads"][name], value), name
    return parts


def test_parameters_that_are_idle_somewhere_or_everywhere(tmp_path):
    """The loss of a process differs from the others'; `rare` has a gradient in one of three alone, `idle` in none."""
    parts = assert_group_equals_one(tmp_path, "toy", {}, 12, world=3)
    assert len({part["losses"]["loss_matching"] for part in parts}) == 3
    assert parts[2]["grads"]["rare"] is not None and parts[0]["grads"]["idle.weight"] is None


@pytest.mark.parametrize("mask_duplicates", [True, False])
@pytest.mark.parametrize("reference_negatives", [True, False])
def test_neucore(tmp_path, mask_duplicates, reference_negatives):
    settings = {"mask_duplicates": mask_duplicates, "reference_negatives": reference_negatives}
    assert_group_equals_one(tmp_path, "neucore", settings, 8)


def test_neucore_in_float32_with_a_trained_text_encoder(tmp_path):
    settings = {"dtype": torch.float32, "train_text": True, "reference_negatives": True}
    parts = assert_group_equals_one(tmp_path, "neucore", settings, 8, tolerance=1e-5)
    trained = [name for name, value in parts[0]["grads"].items() if value is not None]
    assert any(name.startswith("backbone.text.network.encoder.layer.5") for name in trained)


def test_what_makes_a_pair_right_or_wrong_changes_the_loss():
    """Else the four cases above would all be one."""
    losses = [
        case.step("neucore", {"mask_duplicates": masked, "reference_negatives": more}, 8)["losses"]["loss_matching"]
        for masked in (True, False)
        for more in (True, False)
    ]
    assert len({round(loss, 6) for loss in losses}) == 4


def test_one_pair_alone_is_refused_and_two_processes_of_one_pair_are_not(tmp_path):
    with pytest.raises(ConfigError, match="a batch of one pair has no negatives.*run.batch_size_train to 2"):
        case.step("neucore", {"reference_negatives": False}, 1)
    settings = {"reference_negatives": False, "mask_duplicates": False}
    assert case.step("neucore", {**settings, "reference_negatives": True}, 1)["losses"]["loss_matching"] > 0
    assert_group_equals_one(tmp_path, "neucore", settings, 2)
