"""Fixtures of the tests of shards: the shapes, and a folder of shards of them."""

from pathlib import Path

import pytest
from shards_case import shapes, write


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> tuple[dict, dict]:
    return shapes(tmp_path_factory.mktemp("shapes") / "root")


@pytest.fixture
def written(data, tmp_path) -> Path:
    return write(data, tmp_path / "out").parent
