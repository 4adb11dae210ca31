"""A folder of pictures and the index over it, of the tiny model whose score is known in closed form."""

import pytest
from colour_model import ColourModel, make_folder

from neucore_plugin.retrieval import GalleryIndex


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pictures")


@pytest.fixture
def built(folder):
    return GalleryIndex.build(ColourModel(), folder, batch_size=2, progress=False)
