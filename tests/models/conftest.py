"""Fixtures of the tests of models."""

import numpy as np
import pytest
import torch
from clip_case import write_hosts
from zero_shot_case import named, searle


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    return write_hosts(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    """(SEARLE's network, its file as published)."""
    path, network = tmp_path_factory.mktemp("phi") / "SEARLE_ViT-B32.pt", searle()
    torch.save({"epoch": 3, "loss": np.float64(0.5), "Phi": named(network)}, path)
    return network, str(path)
