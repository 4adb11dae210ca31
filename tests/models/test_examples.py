"""The examples in the docstrings of the model's parts run, and print what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["concept_alignment", "concept_loss", "progressive_fusion", "matching", "matching_loss"]
)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"neucore_plugin.models.{name}"))
    assert found.attempted and not found.failed
