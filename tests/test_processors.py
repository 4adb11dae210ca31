"""The processor of pictures: any picture of Pillow becomes the pixels that its file gives."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.images import load_for, load_image
from neucore_plugin.processors import ImageProcessor


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    grey = Image.linear_gradient("L").resize(size)
    if mode in ("La", "RGBa"):
        return grey.convert(mode.upper()).convert(mode)
    return grey.convert("P").convert("PA") if mode == "PA" else grey.convert(mode)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch", "released"])
@pytest.mark.parametrize("size", [(40, 40), (16, 16), (40, 24)])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "I", "F"])
def test_a_picture_of_any_mode_is_taken(mode, size, fit):
    given = picture(mode, size)
    process = ImageProcessor(16, fit=fit)
    pixels = process(given)
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels, process(load_for(process, given)))
    assert given.mode == mode and given.size == size  # it stays as it was


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_file_its_bytes_and_its_picture_give_the_same_pixels(tmp_path, augment):
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture("RGBA", (40, 40))
    image.putalpha(Image.radial_gradient("L").resize((40, 40)))
    image.save(path, exif=exif)
    process = ImageProcessor(16, augment=augment)
    found = []
    with Image.open(path) as opened:
        for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), opened, load_image(path)):
            torch.manual_seed(0)
            found.append(process(source))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_no_picture_is_told():
    for given in (np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8)):
        with pytest.raises(ImageError, match=f"given as {type(given).__name__}: give a path, its bytes"):
            ImageProcessor(16)(given)


def test_the_pixel_limit_is_the_processors_own():
    data = io.BytesIO()
    picture("L", (20, 20)).save(data, "PNG")
    assert ImageProcessor(16, max_pixels=400)(data).shape == (3, 16, 16)
    process = ImageProcessor(16, max_pixels=399)
    with pytest.raises(ImageError, match=r"400 pixels, the limit is 399 .*raise max_pixels"):
        process(data)
    assert ImageProcessor(**process.settings).max_pixels == 399  # a checkpoint keeps it
    assert process.fingerprint == ImageProcessor(16).fingerprint  # no pixel depends on it


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
@pytest.mark.parametrize("fit", ["pad", "crop", "stretch", "released"])
def test_pillows_own_limit_does_not_matter(monkeypatch, fit, augment):
    """Pillow asks it before it crops, not only when a file is opened."""
    given, process = picture("RGB", (40, 24)), ImageProcessor(16, fit=fit, augment=augment)
    found = []
    for limit in (None, 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        torch.manual_seed(0)
        found.append(process(given))
    assert torch.equal(*found)
