"""The processor of pictures: any picture of Pillow becomes the pixels that its file gives."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from neucore_plugin.common.errors import ConfigError, ImageError
from neucore_plugin.common.images import load_for, load_image
from neucore_plugin.processors import ImageProcessor


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    grey = Image.linear_gradient("L").resize(size)
    if mode in ("La", "RGBa"):
        return grey.convert(mode.upper()).convert(mode)
    return grey.convert("P").convert("PA") if mode == "PA" else grey.convert(mode)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch", "shortest", "released"])
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
@pytest.mark.parametrize("fit", ["pad", "crop", "stretch", "shortest", "released"])
def test_pillows_own_limit_does_not_matter(monkeypatch, fit, augment):
    """Pillow asks it before it crops, not only when a file is opened."""
    given, process = picture("RGB", (40, 24)), ImageProcessor(16, fit=fit, augment=augment)
    found = []
    for limit in (None, 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        torch.manual_seed(0)
        found.append(process(given))
    assert torch.equal(*found)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize("size", [(40, 64), (33, 31), (90, 20), (16, 16)])
@pytest.mark.parametrize("resize", [None, 20])
def test_the_middle_of_a_picture_whose_shorter_side_is_resized(size, resize, interpolation):
    """As torchvision's Resize and CenterCrop."""
    noise = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    found = ImageProcessor(16, fit="shortest", resize=resize, interpolation=interpolation)(image)
    by = transforms.InterpolationMode(interpolation)
    steps = [transforms.Resize(resize or 16, by), transforms.CenterCrop(16), transforms.ToTensor()]
    expected = transforms.Compose([*steps, transforms.Normalize((0.5,) * 3, (0.5,) * 3)])(image)
    assert torch.equal(found, expected)


def test_a_stretched_picture_loses_its_border():
    image = Image.effect_noise((40, 64), 60).convert("RGB")
    found = ImageProcessor(16, fit="stretch", resize=20, interpolation="bilinear")(image)
    steps = [transforms.Resize((20, 20)), transforms.CenterCrop(16), transforms.ToTensor()]
    expected = transforms.Compose([*steps, transforms.Normalize(*[(0.5,) * 3] * 2)])(image)
    torch.testing.assert_close(found, expected)
    assert ImageProcessor(16, fit="stretch", resize=20, augment="crop_flip")(image).shape == (3, 16, 16)


def test_of_a_panorama_the_middle_alone_is_resized():
    image = Image.new("RGB", (60_000, 1), "red")
    assert ImageProcessor(224, fit="shortest")(image).shape == (3, 224, 224)  # whole: 9 GB
    image = Image.linear_gradient("L").resize((20, 400)).convert("RGB")
    found = ImageProcessor(16, fit="shortest")(image)
    steps = [transforms.Resize(16, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(16)]
    expected = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])(image)
    assert (found - expected).abs().max() <= 2.1 / 255


def test_fingerprints_of_earlier_settings_stay_and_new_ones_count():
    old = "cir_image:16:(0.5, 0.5, 0.5):(0.5, 0.5, 0.5):pad:none"
    assert ImageProcessor(16).fingerprint == old
    settings = [{"interpolation": "bilinear"}, {"fit": "shortest"}, {"fit": "shortest", "resize": 20}]
    assert len({ImageProcessor(16, **one).fingerprint for one in settings} | {old}) == 4
    assert ImageProcessor(**ImageProcessor(16, **settings[2]).settings).resize == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation one of .*bicubic.*given .*'cubic'"),
        ({"resize": 20}, "resize is 20; it needs fit shortest"),
        ({"fit": "shortest", "resize": 8}, "resize is 8; it needs fit shortest or stretch, and at least 16"),
        ({"fit": "stretch", "resize": 8}, "resize is 8; it needs fit shortest or stretch, and at least 16"),
    ],
)
def test_wrong_ways_of_resizing(settings, message):
    with pytest.raises(ConfigError, match=message):
        ImageProcessor(16, **settings)
