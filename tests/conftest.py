"""Fixtures of all tests: the shapes of `helpers/shapes.py`, written once, and yamls that train on them."""

from pathlib import Path

import pytest
from shapes import write_shapes, write_tiny


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory) -> Path:
    """Feature caches, shared by the tests of one run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_config(shapes_root, cache_root, tmp_path):
    """`write_tiny` into the test's own folder."""
    return lambda change=None, name="tiny.yaml": write_tiny(shapes_root, cache_root, tmp_path, change, name)


@pytest.fixture
def alone(monkeypatch):
    """No launcher around the test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
