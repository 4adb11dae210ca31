"""The examples in the docstrings of the model's parts run; docs/equations.md names what exists."""

import ast
import doctest
import importlib
import re

import pytest
from places import ROOT


@pytest.mark.parametrize(
    "name", ["concept_alignment", "concept_loss", "progressive_fusion", "matching", "matching_loss"]
)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"neucore_plugin.models.{name}"))
    assert found.attempted and not found.failed


def names(path):
    """Functions, classes and methods of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
    return found


def test_equations_are_where_the_table_says():
    places = re.findall(r"`([\w/]+\.py)::([\w.]+)`", (ROOT / "docs" / "equations.md").read_text(encoding="utf-8"))
    assert len(places) > 40
    for file, name in places:
        folder = "" if "/" in file else "tests/models/" if file.startswith("test_") else "neucore_plugin/models/"
        assert name in names(ROOT / folder / file), f"{file}::{name}"
