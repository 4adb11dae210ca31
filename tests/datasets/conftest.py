"""Fixtures of the tests of shards: the shapes, and a folder of shards of them."""

import shutil
from pathlib import Path

import pytest
import stream_case
from published_case import write_cirr_to_train_on, write_fashioniq
from shards_case import shapes, write


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> tuple[dict, dict]:
    return shapes(tmp_path_factory.mktemp("shapes") / "root")


@pytest.fixture
def written(data, tmp_path) -> Path:
    return write(data, tmp_path / "out").parent


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> Path:
    """A folder of whole samples."""
    return stream_case.write(data, tmp_path_factory.mktemp("samples") / "out")


@pytest.fixture
def samples(whole, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(whole, tmp_path / "out")


@pytest.fixture(scope="session")
def cirr_root(tmp_path_factory) -> Path:
    return write_cirr_to_train_on(tmp_path_factory.mktemp("published") / "cirr")


@pytest.fixture(scope="session")
def fashioniq_root(tmp_path_factory) -> Path:
    return write_fashioniq(tmp_path_factory.mktemp("published") / "fashioniq")
