"""N processes of B pairs train like one process of N x B: the loss sees the whole global batch, with gradient."""

import batch_case as case
import pytest
import torch
from runner_case import in_group

from neucore_plugin.common.errors import ConfigError

PAIR = {"mask_duplicates": False, "reference_negatives": False}
FLOAT32 = {"dtype": torch.float32, "train_text": True, "reference_negatives": True}
RULES = [{"mask_duplicates": masked, "reference_negatives": more} for masked in (True, False) for more in (True, False)]


def test_parameters_that_are_idle_somewhere_or_everywhere(tmp_path):
    """The loss of a process differs from the others'; `rare` has a gradient in one of three alone, `idle` in none."""
    parts = in_group(tmp_path, case.step, "toy", {}, 12, world=3)
    case.assert_group_equals_one(parts, case.step("toy", {}, 12))
    assert len({part["losses"]["loss_matching"] for part in parts}) == 3
    assert parts[2]["grads"]["rare"] is not None and parts[0]["grads"]["idle.weight"] is None


def test_neucore(tmp_path):
    """Each rule of what makes a pair right or wrong; float32 with a trained text encoder; one pair a process; clauses,
    of which one process has other numbers than the other."""
    calls = [("neucore", settings, 8) for settings in (*RULES, FLOAT32)] + [("neucore", PAIR, 2)]
    calls += [("neucore", {"kind": "clauses", **rules}, count) for rules, count in ((RULES[0], 8), (PAIR, 2))]
    groups = list(zip(*in_group(tmp_path, case.steps, calls), strict=True))
    ones = case.steps(calls)
    for call, parts, one in zip(calls, groups, ones, strict=True):
        case.assert_group_equals_one(list(parts), one, 1e-5 if call[1] is FLOAT32 else 1e-9)
    assert len({round(one["losses"]["loss_matching"], 6) for one in ones[:4]}) == 4  # each rule acts
    trained = [name for name, value in groups[4][0]["grads"].items() if value is not None]
    assert any(name.startswith("backbone.text.network.encoder.layer.5") for name in trained)


def test_one_pair_alone_is_refused_unless_references_are_negatives():
    with pytest.raises(ConfigError, match="a batch of one pair has no negatives.*run.batch_size_train to 2"):
        case.step("neucore", {"reference_negatives": False}, 1)
    assert case.step("neucore", {**PAIR, "reference_negatives": True}, 1)["losses"]["loss_matching"] > 0


def test_negatives_beyond_the_batch_and_queries_without_a_part(tmp_path):
    """Encodings made anew (ARTEMIS, NEUCORE in clauses) or kept from the batch before (NEUCORE), of all images and of
    some; in chunks."""
    settings = [
        {"kind": "artemis"},
        {"kind": "artemis", "negatives": 5},
        {"kind": "neucore", "negatives": 9},
        {"kind": "clauses"},
    ]
    calls = [("beyond", given, 8, chunk, 2) for given, chunk in zip(settings, (3, None, 3, 2), strict=True)]
    groups = list(zip(*in_group(tmp_path, case.steps, calls), strict=True))
    ones = [case.step("beyond", given, 8, None, 2) for given in settings]
    for parts, one in zip(groups, ones, strict=True):
        case.assert_group_equals_one(list(parts), one)
        assert one["losses"]["loss_partial"] > 0
    assert len({round(one["losses"]["loss_matching"], 6) for one in ones}) == 4  # each acts
