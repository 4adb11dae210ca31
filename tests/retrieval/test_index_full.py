"""A drive that is full at any one step of a change: one error, nothing half-written, and the same call works after."""

import errno
import os
import shutil

import numpy as np
import pytest
import torch
from colour_model import ColourModel, draw

from neucore_plugin.common.errors import FileError
from neucore_plugin.retrieval import GalleryIndex

STEPS = ((np, "save"), (os, "replace"), (os, "fsync"), (os, "open"), (os, "mkdir"))
CHANGES = {
    "add": lambda index, more: index.add([more / "new.png"], progress=False),
    "remove": lambda index, _: index.remove("red.png"),
    "sync": lambda index, more: index.sync(more, progress=False),
    "compact": lambda index, _: index.compact(),
}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full_at(monkeypatch, number):
    """The system refuses its `number`-th step from now on; gives a list whose length counts the steps."""
    steps = []

    def counted(function):
        def step(*arguments, **named):
            steps.append(function)
            if len(steps) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **named)

        return step

    for module, name in STEPS:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return steps


@pytest.mark.parametrize("change", CHANGES)
def test_a_drive_that_is_full_at_any_step(folder, tmp_path, monkeypatch, change):
    torch.manual_seed(0)
    GalleryIndex.build(ColourModel(), folder, out=tmp_path / "whole", unit_size=2, progress=False)
    draw(folder / "new.png", "pink")
    told, number, steps = [], 0, [None]
    while len(steps) >= number:
        number += 1
        shutil.rmtree(tmp_path / "index", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "index")
        before = files(tmp_path / "index")
        index = GalleryIndex.open(tmp_path / "index", ColourModel())
        with monkeypatch.context() as patch:
            steps = full_at(patch, number)
            try:
                CHANGES[change](index, folder)
            except FileError as error:
                told.append(str(error))
            else:
                continue  # that step is no matter of life and death, or there are fewer
        found = GalleryIndex.open(tmp_path / "index", ColourModel())
        assert found.verify(ColourModel())["problems"] == []
        assert len(found) == 5 and not list((tmp_path / "index").rglob("*.tmp"))
        assert change == "compact" or files(tmp_path / "index") == before
        CHANGES[change](found, folder)
        assert GalleryIndex.open(tmp_path / "index").verify()["problems"] == []
    assert len(told) >= 4 and all("free space there" in text for text in told)
