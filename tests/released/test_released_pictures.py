"""The released form's pictures, and the feature maps that stand in their place."""

import io
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from neucore_plugin.common.errors import ConfigError, ImageError
from neucore_plugin.config.encoders import IMAGENET
from neucore_plugin.config.loading import model_defaults
from neucore_plugin.datasets.feature_maps import check_files, map_file, read_map
from neucore_plugin.processors import ImageProcessor
from neucore_plugin.report.page import heat_overlay

SIZES = [(300, 200), (201, 300), (256, 256), (31, 97), (640, 3), (1, 1), (224, 224), (9001, 11), (7, 8300)]


def released(**settings):
    return ImageProcessor(224, *IMAGENET, fit="released", **settings)


def noise(size, mode="RGB", seed=0):
    channels = {"RGB": (3,), "RGBA": (4,), "L": (), "LA": (2,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def torchvisions(picture, size=256, crop=224):
    """By torchvision: white to the longer side, the smaller half left and on top; resize; centre crop."""
    rest = [max(picture.size) - side for side in picture.size]
    sides = (rest[0] // 2, rest[1] // 2, rest[0] - rest[0] // 2, rest[1] - rest[1] // 2)
    steps = [transforms.Pad(sides, fill=(255, 255, 255)), transforms.Resize(size), transforms.CenterCrop(crop)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(*IMAGENET)])(picture)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_padded_resized_and_cropped_as_released(size):
    assert torch.equal(released()(noise(size)), torchvisions(noise(size)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L"])
def test_alpha_is_dropped(mode):
    picture = noise((40, 30), mode)
    assert torch.equal(released()(picture), torchvisions(picture.convert("RGB")))
    if mode != "L":
        assert not torch.equal(released()(picture), ImageProcessor(224, *IMAGENET)(picture))


def test_pictures_are_not_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((60, 30)).save(tmp_path / "turned.png", exif=exif)
    noise((60, 30)).save(tmp_path / "plain.png")
    for source in (str, lambda path: path.read_bytes(), lambda path: io.BytesIO(path.read_bytes()), Image.open):
        made = [released()(source(tmp_path / f"{name}.png")) for name in ("turned", "plain")]
        assert torch.equal(*made)
    other = [ImageProcessor(224)(str(tmp_path / f"{name}.png")) for name in ("turned", "plain")]
    assert not torch.equal(*other)


def test_training_pictures_are_crops_of_the_same_page():
    torch.manual_seed(0)
    page = torchvisions(noise((90, 120)), crop=256)
    found = set()
    for _ in range(6):
        crop = released(augment="crop_flip")(noise((90, 120)))
        places = [
            (flip, y, x)
            for flip, one in ((0, page), (1, page.flip(2)))
            for y in range(33)
            for x in range(33)
            if torch.equal(one[:, y : y + 224, x : x + 224], crop)
        ]
        assert places
        found.add(places[0])
    assert len(found) > 3 and not released(augment="crop_flip").deterministic and released().deterministic


def test_heat_lies_over_the_part_that_the_model_saw():
    picture, values = noise((90, 60)), torch.zeros(2, 2)
    page = ImageOps.pad(picture, (90, 90), color="white").crop((5, 5, 85, 85))
    seen = heat_overlay(picture, values, fit="released")
    assert seen.tobytes() == heat_overlay(page, values, fit="stretch").tobytes()
    assert seen.tobytes() != heat_overlay(picture, values, fit="pad").tobytes()


@pytest.mark.parametrize("size", [(60_000, 20), (20, 60_000), (70_000, 3)])
def test_a_panorama_does_not_fill_the_memory(size, monkeypatch):
    """A square of its longer side would take 10 GB."""
    new = Image.new

    def small(mode, size, *color):
        assert size[0] * size[1] < 20_000_000
        return new(mode, size, *color)

    picture = new("RGB", size, "red")
    monkeypatch.setattr(Image, "new", small)
    assert released()(picture).shape == (3, 224, 224)


@pytest.mark.parametrize("name", ["official_cirr", "official_fashioniq", "official_shoes"])
def test_the_types_processors_are_the_released_ones(name):
    from lavis.models import load_preprocess
    from omegaconf import OmegaConf

    from neucore_plugin.models.neucore import NeucoreModel

    given = OmegaConf.load(NeucoreModel.default_config_path(name))
    images, texts = load_preprocess(given.preprocess)
    picture = noise((100, 80), "RGBA")
    assert torch.equal(images["eval"](picture), torchvisions(picture.convert("RGB")))
    assert images["train"].fit == "released" and texts["eval"](" a\u00a0½ ") == " a\u00a0½ "
    assert model_defaults({"model_type": name})["backbone"]["image"]["fit"] == "released"


# ---- feature maps ---------------------------------------------------------------------------------------------------

MAP = np.random.default_rng(1).normal(size=(5, 2, 3)).astype(np.float32)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_maps_of_every_pickle_and_of_npy(tmp_path, protocol, core):
    arrays = {
        "plain": MAP,
        "batched": MAP[None],
        "half": MAP.astype(np.float16),
        "double": MAP.astype(np.float64),
        "other order of bytes": MAP.astype(">f4"),
        "by columns": np.asfortranarray(MAP),
        "a view": np.repeat(MAP, 2, axis=2)[:, :, ::2],
    }
    for name, array in arrays.items():
        content = pickle.dumps(array, protocol)
        for old in (b"numpy.core", b"numpy._core"):  # as either series of numpy writes it
            if protocol < 4:
                content = content.replace(old + b".", core.encode() + b".")
        (tmp_path / "m.pkl").write_bytes(content)
        found = read_map(tmp_path / "m.pkl")
        assert found.dtype == np.float32 and np.array_equal(found, array.reshape(MAP.shape).astype(np.float32)), name
    np.save(tmp_path / "m.npy", MAP)
    assert np.array_equal(read_map(tmp_path / "m.npy"), MAP)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch HARMED",)


class Loaded:
    """An array's pickle whose parts are others."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return self.arguments


REBUILD = np.ndarray((0,)).__reduce__()[0]
FLOATS = np.dtype("f4")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (Hostile(), r"refused: it asks for (posix|nt)\.system, which no array needs"),
        ({"map": MAP, "more": Hostile()}, "refused: it asks for"),
        (subprocess.Popen, "refused: it asks for subprocess.Popen"),
        (np.array([Hostile()], dtype=object), "refused: (it asks for|its array holds no floating-point)"),
        (np.array(["a"]), "its array holds no floating-point"),
        (np.zeros((2, 2), dtype=[("a", "f4")]), "its array holds no floating-point"),
        (np.zeros((3, 2, 2), dtype=int), "its array holds no floating-point"),
        (np.memmap, "it asks for numpy.memmap|it asks for numpy.core.memmap"),
        ([MAP], "it holds no array"),
        (MAP[0], r"it holds float32 \[2, 3\], not floats"),
        (np.stack([MAP, MAP]), r"\[2, 5, 2, 3\], not floats"),
        (np.zeros((0, 2, 2), np.float32), "not floats"),
        (MAP * np.float32("nan"), "holds NaN or infinity"),
        (Loaded(REBUILD, (np.ndarray, (0,), b"b"), (1, (9, 9, 9), FLOATS, False, b"1234")), "no feature map"),
        (Loaded(REBUILD, (np.ndarray, (0,), b"b"), (1, (10**9,) * 9, FLOATS, False, b"")), "no array of plain numbers"),
        (Loaded(REBUILD, (np.ndarray, (0,), b"b"), (1, (1, 1, 1), FLOATS, False, [MAP])), "no array of plain numbers"),
        (Loaded(REBUILD, (np.ndarray, (0,), b"b"), "odd"), "no feature map"),
    ],
)
def test_hostile_and_foreign_maps_are_refused_with_one_error(tmp_path, monkeypatch, value, match):
    monkeypatch.chdir(tmp_path)
    for protocol in (3, 5):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(ImageError, match=match) as error:
            read_map(tmp_path / "m.pkl")
        assert str(error.value).count("\n") == 0 and "m.pkl" in str(error.value)
    assert not (tmp_path / "HARMED").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps(MAP)[:-9],
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a table of 2^31 parts
        b"\x80\x02)" + b"2\x86" * 60 + b".",  # a tuple of 2^60
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # bytes that are not there
        # attributes of what stands for numpy's names
        b"\x80\x02c_codecs\nencode\n(N}X\x07\x00\x00\x00__new__K\x05stb.",
        b"\x80\x02cnumpy\nndarray\n(N}X\x05\x00\x00\x00otherK\x05stb.",
    ],
)
def test_damaged_maps(tmp_path, content):
    (tmp_path / "m.pkl").write_bytes(content)
    with pytest.raises(ImageError, match="m.pkl is no feature map"):
        read_map(tmp_path / "m.pkl")
    (tmp_path / "good.pkl").write_bytes(pickle.dumps(MAP, 2))
    assert np.array_equal(read_map(tmp_path / "good.pkl"), MAP)
    failures = check_files([tmp_path / "good.pkl", tmp_path / "m.pkl", tmp_path / "none.npy"], None)
    assert [path.name for path, _ in failures] == ["m.pkl", "none.npy"]


def test_a_converted_map_comes_first(tmp_path):
    assert map_file(tmp_path / "a" / "b.png") == tmp_path / "a" / "b.pkl"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.npy").touch()
    assert map_file(tmp_path / "a" / "b.png") == tmp_path / "a" / "b.npy"


def test_features_and_their_folder_belong_together(tmp_path):
    from neucore_plugin.config.loading import check
    from neucore_plugin.config.sections import package_tables

    def told(image, features):
        content = {
            "model": {"arch": "neucore", "backbone": {"image": image}},
            "datasets": {"cirr": {"build_info": {"features": features}}},
            "run": {"max_epoch": 1},
        }
        check(content, package_tables(), "c.yaml")

    told({"name": "features"}, "patch_feat_res152")
    with pytest.raises(
        ConfigError, match="features: got None, but the image encoder features takes feature maps; name"
    ):
        told({"name": "features"}, None)
    with pytest.raises(ConfigError, match="got 'maps', but the image encoder efficientnet_lite0 takes pictures"):
        told({"name": "efficientnet_lite0"}, "maps")
