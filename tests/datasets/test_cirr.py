"""CIRR: the reader on hand-made files of the published shape, and what it says of missing files."""

from pathlib import Path

import pytest
from lavis.common.registry import registry
from places import PROJECTS, REAL, needs_real
from published_case import build, cirr_entry, edit, write_cirr

from neucore_plugin import launch
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.config import sections
from neucore_plugin.datasets.check import check
from neucore_plugin.datasets.emoji.splits import emoji_names
from neucore_plugin.datasets.published import catalogue
from neucore_plugin.datasets.published.cirr import CIRR
from neucore_plugin.datasets.published.shoes import SHOES
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset

YAML = PROJECTS / "train_cirr.yaml"
REAL_CIRR = REAL / "cirr"

TRAIN = [f"train-{set_}-{pair}-img{side}" for set_ in (11041, 5247) for pair in range(2) for side in range(2)]
DEV = [f"dev-{set_}-0-img{side}" for set_ in (244, 1028, 430, 63) for side in range(2)]
TEST = [f"test1-{set_}-1-img0" for set_ in (147, 83, 359, 906, 12, 7)]


@pytest.fixture
def root(tmp_path) -> Path:
    """8 train images in two numbered folders, 8 of val, 6 of test1; val's two groups share four images."""
    places = {
        "train": {name: f"./train/{34 if '11041' in name else 4}/{name}.png" for name in TRAIN},
        "val": {name: f"./dev/{name}.png" for name in DEV},
        "test1": {name: f"./test1/{name}.png" for name in TEST},
    }
    first, second = DEV[:6], DEV[2:]
    queries = {
        "train": [cirr_entry(1, TRAIN[:6], 0, 1), cirr_entry(2, TRAIN[:6], 1, 0), cirr_entry(3, TRAIN[2:], 5, 4)],
        "val": [
            cirr_entry(12060, first, 0, 1, {first[1]: 1.0, first[3]: 0.5, first[4]: -1.0}),
            cirr_entry(12062, first, 3, 2, {first[5]: 1.0}),  # soft targets without the hard one
            cirr_entry(12081, second, 5, 0, {second[0]: 1.0, second[5]: 0.2}),  # soft targets that hold the reference
            cirr_entry(12090, second, 1, 4),
            cirr_entry(12091, second, 4, 1),
        ],
        "test1": [cirr_entry(12063, TEST, 0, None)],
    }
    return write_cirr(tmp_path / "cirr", places, queries)


@pytest.fixture(autouse=True)
def no_root_of_the_user(monkeypatch):
    monkeypatch.delenv(CIRR.root_variable, raising=False)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_val_is_read_as_published(root):
    triplets, gallery = CIRR.read(root, "val")
    assert gallery.ids == tuple(DEV)
    assert gallery.paths[0] == root / "img_raw" / "dev" / "dev-244-0-img0.png"
    assert [triplet.query_id for triplet in triplets] == ["12060", "12062", "12081", "12090", "12091"]
    assert triplets[1] == Triplet("12062", DEV[3], "query 12062", (DEV[2],), "", tuple(DEV[:6]), ((DEV[5], 1.0),))
    # hard: neither an image of weight 0.5 nor the reference becomes a right answer, and a hard target need not be soft
    assert [triplet.targets for triplet in triplets] == [(DEV[n],) for n in (1, 2, 2, 6, 3)]
    assert all(triplet.reference in triplet.members for triplet in triplets)


def test_train_lies_in_numbered_folders_and_the_gallery_is_the_whole_list(root):
    triplets, gallery = CIRR.read(root, "train")
    paths = dict(zip(gallery.ids, gallery.paths, strict=True))
    assert paths[TRAIN[0]] == root / "img_raw" / "train" / "34" / f"{TRAIN[0]}.png"
    assert paths[TRAIN[7]] == root / "img_raw" / "train" / "4" / f"{TRAIN[7]}.png"
    named = {name for triplet in triplets for name in (triplet.reference, *triplet.targets)}
    assert len(gallery.ids) == 8 and len(named) == 4


@pytest.mark.parametrize("annotations", ["published", "clip4cir", "split"])
@pytest.mark.parametrize("images", ["published", "clip4cir", "both"])
def test_clip4cirs_layout_is_read_and_any_mixture(root, annotations, images):
    """annotations: in root/cirr, or only the image lists there. images: below the root, or val's there alone."""
    expected = {split: CIRR.read(root, split) for split in CIRR.splits}
    folders = {"published": (), "clip4cir": ("captions", "image_splits"), "split": ("image_splits",)}[annotations]
    (root / "cirr").mkdir()
    for folder in folders:
        (root / folder).rename(root / "cirr" / folder)
    moved = {"published": (), "clip4cir": ("train", "dev", "test1"), "both": ("dev",)}[images]
    for folder in moved:
        (root / "img_raw" / folder).rename(root / folder)
    if images == "both":  # a folder that stands in both places, each with a part of the pictures
        (root / "img_raw/dev").mkdir()
        (root / "dev" / f"{DEV[0]}.png").rename(root / "img_raw/dev" / f"{DEV[0]}.png")
    for split in CIRR.splits:
        triplets, gallery = CIRR.read(root, split)
        assert triplets == expected[split][0] and gallery.ids == expected[split][1].ids
        assert all(path.is_file() for path in gallery.paths)
    report = check("cirr", root)
    assert report["complete"], report
    assert report["splits"]["val"]["image_folder"] == str(root / ("img_raw/dev" if images != "clip4cir" else "dev"))
    assert set(build("cirr", root)) == {"train", "val"}


def test_what_is_wrong_in_clip4cirs_layout_is_told_at_its_place(root):
    (root / "cirr").mkdir()
    for folder in ("captions", "image_splits"):
        (root / folder).rename(root / "cirr" / folder)
    for folder in ("train", "dev", "test1"):
        (root / "img_raw" / folder).rename(root / folder)
    (root / "dev" / f"{DEV[2]}.png").unlink()
    (root / "cirr/captions/cap.rc2.train.json").unlink()
    with pytest.raises(ConfigError) as caught:
        build("cirr", root)
    assert f"- {root}/dev: 1 of 8 images of val, such as dev/{DEV[2]}.png" in str(caught.value)
    assert f"- {root}/cirr/captions/cap.rc2.train.json\n" in str(caught.value)
    edit(root / "cirr/captions/cap.rc2.val.json", lambda v: v[3].update(reference="dev-0"))
    with pytest.raises(DataError, match=r"cirr/captions/cap.rc2.val.json: entry 3: .* not in cirr/image_splits/split"):
        CIRR.read(root, "val")


def test_test1_has_no_targets_and_is_no_split_of_the_builder(root):
    triplets, gallery = CIRR.read(root, "test1")
    assert triplets[0].targets == () and triplets[0].members == tuple(TEST) and len(gallery.ids) == 6
    builder = registry.get_builder_class("cirr")
    assert builder.SPLITS == sections.SPLITS["cirr"] == CIRR.answered == ("train", "val")
    with pytest.raises(ConfigError, match=r"no split 'test'\. Did you mean 'test1'"):
        CIRR.read(root, "test")


def test_builder_gives_both_splits_and_says_the_protocol(root, monkeypatch, caplog):
    monkeypatch.setenv(CIRR.root_variable, str(root))
    with caplog.at_level("INFO"):
        datasets = build("cirr", None, max_train=2)
    assert {split: len(dataset) for split, dataset in datasets.items()} == {"train": 2, "val": 5}
    assert "target_image" in datasets["train"][0] and "target_image" not in datasets["val"][0]
    assert (
        "protocol hard: gallery: the split's own list; reference removed" in caplog.text
        and "val holds 5 queries, gallery 8" in caplog.text
    )
    assert "NLVR2" in datasets["val"].credit
    for name, called in (("cirr", CIRR.names), ("shoes", SHOES.names), ("emoji", emoji_names)):
        assert registry.get_builder_class(name).names is called
    assert datasets["val"].names is CIRR.names
    assert datasets["val"].member_positions(2) == (2, 3, 4, 5, 6, 7) and datasets["val"].reference_position(2) == 7


def test_groups_change_the_fingerprint_and_older_triplets_keep_theirs():
    gallery = Gallery(("a", "b", "c"), (Path("a"), Path("b"), Path("c")))
    store = ImageStore(dict(zip(gallery.ids, gallery.paths, strict=True)), str)

    def dataset(*members):
        return TripletDataset("x", "val", [Triplet("1", "a", "text", ("b",), members=members)], gallery, store)

    assert len({dataset(*names).fingerprint for names in ((), ("a", "b"), ("a", "b", "c"))}) == 3
    assert dataset().member_positions(0) == () and dataset("a", "gone", "b").member_positions(0) == (0, 1)
    with pytest.raises(DataError, match="has 1 queries without a right answer in their group, such as 1"):
        dataset("a", "gone", "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.__setitem__(2, 7), "entry 2: expected an object, given int"),
        (lambda v: v[1].pop("pairid"), "entry 1: needs 'pairid', a whole number, given None"),
        (lambda v: v[1].update(pairid="12062"), "entry 1: needs 'pairid', a whole number, given '12062'"),
        (lambda v: v[4].update(pairid=12060), "entry 4: pairid 12060 stands already in entry 0"),
        (lambda v: v[0].pop("target_hard"), "entry 0: needs the text 'target_hard'"),
        (lambda v: v[0].update(caption=None), "entry 0: needs the text 'caption'"),
        (
            lambda v: v[3].update(reference="dev-0"),
            "entry 3: reference 'dev-0' is not in image_splits/split.rc2.val.json",
        ),
        (lambda v: v[3].update(img_set=[]), "entry 3: needs img_set.members, a list of image names"),
        (lambda v: v[3]["img_set"].update(members=[1]), "entry 3: needs img_set.members"),
        (lambda v: v[3]["img_set"]["members"].append("x"), "entry 3: member 'x' is not in image_splits"),
        (
            lambda v: v[0]["img_set"]["members"].pop(1),
            "entry 0: img_set.members lacks the target_hard 'dev-244-0-img1'",
        ),
    ],
)
def test_malformed_queries_name_file_and_entry(root, change, message):
    edit(root / "captions" / "cap.rc2.val.json", change)
    with pytest.raises(DataError) as caught:
        CIRR.read(root, "val")
    assert f"captions/cap.rc2.val.json: {message}" in str(caught.value)


@pytest.mark.parametrize("place", ["/etc/passwd", "../secret.png", "./dev/../../x.png", "", ".", 3, None])
def test_image_paths_stay_below_img_raw(root, place):
    edit(root / "image_splits" / "split.rc2.val.json", lambda value: value.update(other=place))
    with pytest.raises(DataError, match="split.rc2.val.json: 'other': expected a path below img_raw, given"):
        CIRR.read(root, "val")


def test_all_problems_of_both_files_are_told_together(root):
    edit(root / "image_splits" / "split.rc2.val.json", lambda value: value.update(other="/x"))
    edit(root / "captions" / "cap.rc2.val.json", lambda v: (v[0].pop("caption"), v[4].pop("reference")))
    with pytest.raises(DataError, match=r"cirr: 3 problems of split 'val'(?s:.)*other(?s:.)*entry 0(?s:.)*entry 4"):
        CIRR.read(root, "val")
    edit(root / "captions" / "cap.rc2.val.json", lambda v: v.extend([None] * 20))
    with pytest.raises(DataError, match="23 problems(?s:.)*and 13 more$"):
        CIRR.read(root, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[", "no valid JSON"), ("{}", "expected a JSON list, given dict"), (None, "cannot be read")],
)
def test_files_that_are_no_annotations(root, content, message):
    path = root / "captions" / "cap.rc2.val.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=rf"cap\.rc2\.val\.json: {message}"):
        CIRR.read(root, "val")


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_missing_images_are_counted_and_a_few_named(root):
    for path in (root / "img_raw" / "train" / "34").iterdir():
        path.unlink()
    for name in DEV:
        (root / "img_raw" / "dev" / f"{name}.png").unlink()
    (root / "img_raw" / "dev").rmdir()
    (root / "captions" / "cap.rc2.train.json").unlink()
    with pytest.raises(ConfigError) as caught:
        build("cirr", root)
    error = str(caught.value)
    assert f"not complete below {root} (given by datasets.cirr.build_info.root)" in error
    assert f"- {root}/captions/cap.rc2.train.json\n" in error and "cap.rc2.val.json" not in error
    assert f"- {root}/img_raw/train: the images of train" not in error  # some are there: nothing to say without a list
    assert f"- {root}/img_raw/dev: 8 of 8 images of val" in error
    assert "https://github.com/Cuberick-Orion/CIRR" in error and "https://github.com/lil-lab/nlvr" in error


def test_an_empty_root_lacks_everything(tmp_path, monkeypatch):
    monkeypatch.setenv(CIRR.root_variable, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=rf"environment variable {CIRR.root_variable}\); missing:") as caught:
        catalogue.load("cirr", None, CIRR.answered)
    listed = [line.strip(" -") for line in str(caught.value).splitlines() if line.startswith("  - ")]
    files = [
        f"{folder}.rc2.{split}.json" for split in ("train", "val") for folder in ("captions/cap", "image_splits/split")
    ]
    expected = [*files, "img_raw/train: the images of train", "img_raw/dev: the images of val"]
    assert listed == [f"{tmp_path}/nowhere/{line}" for line in expected]


@pytest.mark.parametrize("given", [None, "no/where"])
def test_the_command_without_data_says_everything_before_encoders_are_loaded(given, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("data come first")

    task = registry.get_task_class("composed_image_retrieval")
    monkeypatch.setattr(task, "_find_concepts", never)
    monkeypatch.setattr(task, "build_model", never)
    options = ["run.device=cpu", *([f"datasets.cirr.build_info.root={given}"] if given else [])]
    with pytest.raises(ConfigError) as caught:
        launch.run(YAML, options)
    error = str(caught.value)
    assert "datasets.cirr.build_info.root" in error and (given or CIRR.root_variable) in error
    for part in ("cap.rc2.train.json", "cap.rc2.val.json", "split.rc2.train.json", "split.rc2.val.json"):
        assert error.count(part) == 1
    assert "img_raw/train: the images of train" in error and "img_raw/dev: the images of val" in error


@needs_real("cirr")
def test_counts_of_the_real_files():
    triplets, gallery = CIRR.read(REAL_CIRR, "val")
    assert (len(triplets), len(gallery.ids)) == (4181, 2297)
    weights = [weight for triplet in triplets for _, weight in triplet.soft]
    assert [weights.count(value) for value in (1.0, -1.0, 0.5, 0.2)] == [4216, 807, 62, 6]
    assert sum(triplet.targets[0] not in dict(triplet.soft) for triplet in triplets) == 37
    assert all(len(set(triplet.members)) == 6 and len(triplet.targets) == 1 for triplet in triplets)
    assert {path.parent for path in gallery.paths} == {REAL_CIRR / "img_raw" / "dev"}
    if not (REAL_CIRR / "img_raw").exists():
        report = check("cirr", REAL_CIRR)
        assert report["splits"]["val"]["images_missing"] == 2297 and not report["complete"]


def test_pictures_are_found_however_the_list_spells_them(root):
    """Fashion200K, FashionIQ, Shoes and CIRCO go the same way: `Reader.read` asks the disk."""
    folder = root / "img_raw/dev"
    names = DEV[:4]
    (folder / f"{names[0]}.png").rename(folder / f"{names[0].upper()}.PNG")
    (folder / f"{names[1]}.png").rename(folder / "cafe\u0301 \udcff.png")
    edit(root / "image_splits/split.rc2.val.json", lambda v: v.update({names[1]: "./dev/caf\u00e9 \udcff.png"}))
    (folder / f"{names[2]}.png").rename(folder / f"{names[2]}.PNG")
    _, gallery = CIRR.read(root, "val")
    assert [gallery.files[name].name for name in names] == [
        f"{names[0].upper()}.PNG", "cafe\u0301 \udcff.png", f"{names[2]}.PNG", f"{names[3]}.png"
    ]  # fmt: skip
    assert catalogue.load("cirr", root, ["val"])[2] == {}  # nothing is missing
    (folder / f"{names[2]}.pNG").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{names[2]}\.png' may mean '{names[2]}\.PNG', '{names[2]}\.pNG'"):
        CIRR.read(root, "val")
