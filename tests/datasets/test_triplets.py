"""Triplets, galleries, map-style data sets, and one's own data as a folder."""

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from neucore_plugin.common.errors import DataError, ImageError
from neucore_plugin.common.text import clean_caption
from neucore_plugin.datasets import folder
from neucore_plugin.datasets.triplets import Gallery, GalleryDataset, ImageStore, Triplet, TripletDataset


def pixels(image):
    return torch.tensor([float(sum(image.getpixel((0, 0))))]).expand(3, 2, 2)


@pytest.fixture
def shapes(shapes_root):
    known = folder.images(shapes_root)
    triplets, gallery = folder.load_split(shapes_root, "train", known)
    return triplets, gallery, ImageStore(known, pixels)


def test_folder_data_set_is_read_as_written(shapes_root, shapes):
    triplets, gallery, store = shapes
    written = json.loads((shapes_root / "train.json").read_text())
    assert folder.splits(shapes_root) == ["test", "train", "val"]
    assert len(triplets) == len(written) and len(gallery.ids) == 24
    for triplet, entry in zip(triplets, written, strict=True):
        assert (triplet.reference, triplet.caption, triplet.targets) == (
            entry["reference"],
            entry["caption"],
            (entry["target"],),
        )
    assert store.paths["circle-red.png"] == shapes_root / "images" / "circle-red.png"


def test_samples_and_batches(shapes):
    triplets, gallery, store = shapes
    data = TripletDataset("shapes", "train", triplets, gallery, store, concepts=[("red",)] * len(triplets), train=True)
    batch = data.collater([data[0], data[5]])
    assert batch["reference_image"].shape == batch["target_image"].shape == (2, 3, 2, 2)
    assert batch["text_input"] == [triplets[0].caption, triplets[5].caption]
    assert batch["concept_words"] == [("red",), ("red",)]
    assert batch["index"].tolist() == [0, 5]
    assert batch["target_key"].tolist() == [gallery.ids.index(triplets[i].targets[0]) for i in (0, 5)]
    assert batch["reference_key"].tolist() == [gallery.ids.index(triplets[i].reference) for i in (0, 5)]
    assert batch["right_keys"] == [(key,) for key in batch["target_key"].tolist()]
    evaluated = TripletDataset("shapes", "val", triplets, gallery, store)
    assert "target_image" not in evaluated[0]


def test_equally_right_targets_are_all_known(shapes):
    _, gallery, store = shapes
    a, b, c = gallery.ids[:3]
    triplets = [Triplet("1", c, "x", (a, b)), Triplet("2", c, "y", (b, a)), Triplet("3", a, "z", (c,))]
    data = TripletDataset("shapes", "train", triplets, gallery, store, train=True)
    assert [data[i]["right_keys"] for i in range(3)] == [(0, 1), (1, 0), (2,)]
    assert data.target_positions(1) == (1, 0) and data.reference_position(0) == 2


def test_training_leaves_out_pairs_whose_reference_is_the_target(shapes):
    _, gallery, store = shapes
    a, b, c = gallery.ids[:3]
    pairs = [("1", a, (b,)), ("2", b, (b,)), ("3", c, (c, a)), ("4", a, (c, a)), ("5", c, (c, c))]
    triplets = [Triplet(name, reference, f"text {name}", targets) for name, reference, targets in pairs]
    lemmas = [(name,) for name, _, _ in pairs]
    data = TripletDataset("shapes", "train", triplets, gallery, store, concepts=lemmas, train=True)
    assert data.notices == ["3 of 5 pairs have their reference as target; training leaves them out"]
    assert [data[n]["query_id"] for n in range(len(data))] == ["1", "4"]
    assert [data[n]["target_id"] for n in range(2)] == [b, c]  # the first right answer is the one to learn
    assert [data[n]["concept_words"] for n in range(2)] == [("1",), ("4",)]
    assert data.texts == ["text 1", "text 4"]
    assert TripletDataset("shapes", "train", triplets[:1], gallery, store, train=True).notices == []


def test_reference_outside_the_gallery_has_no_position(shapes):
    _, gallery, store = shapes
    small = Gallery(gallery.ids[1:], gallery.paths[1:])
    data = TripletDataset("shapes", "val", [Triplet("1", gallery.ids[0], "x", (gallery.ids[1],))], small, store)
    assert data.reference_position(0) is None and data.target_positions(0) == (0,)


def test_gallery_dataset_keeps_the_order(shapes):
    _, gallery, store = shapes
    data = GalleryDataset(gallery, store)
    batch = data.collater([data[i] for i in range(len(data))])
    assert tuple(batch["image_id"]) == gallery.ids and batch["image"].shape == (24, 3, 2, 2)


def test_fingerprint_changes_with_text_target_and_gallery(shapes):
    triplets, gallery, store = shapes
    base = TripletDataset("shapes", "train", triplets, gallery, store).fingerprint
    t = triplets[0]
    other_text = [Triplet(t.query_id, t.reference, t.caption + "!", t.targets), *triplets[1:]]
    other_target = [Triplet(t.query_id, t.reference, t.caption, (triplets[1].targets[0],)), *triplets[1:]]
    fewer = Gallery(gallery.ids[::-1], gallery.paths[::-1])
    changed = {
        TripletDataset("shapes", "train", other_text, gallery, store).fingerprint,
        TripletDataset("shapes", "train", other_target, gallery, store).fingerprint,
        TripletDataset("shapes", "train", triplets, fewer, store).fingerprint,
    }
    assert base not in changed and len(changed) == 3
    assert base == TripletDataset("other", "val", triplets, gallery, store).fingerprint


def bad_split(tmp_path, shapes_root, entries, gallery=None):
    root = tmp_path / "bad"
    root.mkdir()
    (root / "images").symlink_to(shapes_root / "images")
    (root / "train.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
    if gallery is not None:
        (root / "gallery.train.json").write_text(json.dumps(gallery))
    return folder.load_split(root, "train", folder.images(root))


GOOD = {"reference": "circle-red.png", "caption": "blue", "target": "circle-blue.png"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[", "no valid JSON"),
        ({"a": 1}, "expected a JSON list, given dict"),
        ([3], "entry 0: expected an object, given int"),
        ([{**GOOD, "refrence": "x"}], r"unknown key 'refrence'\. Did you mean 'reference'"),
        ([{"caption": "blue", "target": "circle-blue.png"}], "needs the texts 'reference' and 'caption'"),
        ([{**GOOD, "target": []}], "needs 'target', an image name or a list of names"),
        ([GOOD, {**GOOD, "target": "circle-pink.png"}], "entry 1: no image 'circle-pink.png' below"),
        ([{**GOOD, "reference": {"name": "circle-red.png"}}], "needs the texts 'reference' and 'caption'"),
        ([{**GOOD, "query_id": ["a"]}], "'query_id' must be a text, given \\['a'\\]"),
        ([{**GOOD, "query_id": "a"}, {**GOOD, "query_id": "a"}], "entry 1: query_id a stands already in entry 0"),
    ],
)
def test_malformed_annotations_name_file_and_entry(tmp_path, shapes_root, entries, message):
    with pytest.raises(DataError, match=message) as caught:
        bad_split(tmp_path, shapes_root, entries)
    assert "train.json" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "on_disk"),
    [
        ("./a.png", "a.png"),
        ("deep//a.png", "deep/a.png"),
        ("deep\\a.png", "deep/a.png"),
        ("a.jpg", "A.JPG"),
        ("photo", "photo.webp"),
        ("a.png ", "a.png"),
        ("caf\u00e9.png", "cafe\u0301.png"),
        ("Stra\u00dfe.PNG", "strasse.png"),
        ("\udcff.png", "\udcff.png"),
        ("\udcff", "\udcff.png"),
        ("a\nb.png", "a\nb.png"),
    ],
)
def test_an_image_is_found_however_it_is_spelt(tmp_path, written, on_disk):
    for name in (on_disk, "other.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name, "PNG")
    entry = {"reference": written, "caption": "\ud83d", "target": ["other.png", "./other.png"]}
    (tmp_path / "val.json").write_text(json.dumps([entry]), encoding="utf-8")  # in ASCII, with escapes
    (tmp_path / "gallery.val.json").write_text(json.dumps([written, "OTHER.png"]), encoding="utf-8")
    known = folder.images(tmp_path)
    (triplet,), gallery = folder.load_split(tmp_path, "val", known)
    assert (triplet.reference, triplet.targets) == (on_disk, ("other.png",))
    assert gallery.ids == (on_disk, "other.png")
    data = TripletDataset("folder", "val", [triplet], gallery, ImageStore(known, pixels), captions=clean_caption)
    assert data[0]["text_input"] == "" and len(data.fingerprint) == 64


def test_what_may_mean_several_images_is_told_with_its_entry(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "A.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    entries = [{"reference": "c", "caption": "x", "target": target} for target in ("a.png", "A.PNG", ["A"])]
    (tmp_path / "val.json").write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        folder.load_split(tmp_path, "val", folder.images(tmp_path))
    told = str(caught.value)
    assert "2 problems" in told and "entry 1: 'A.PNG' may mean 'A.png', 'a.png'" in told and "entry 2: 'A' may" in told


def test_json_files_beside_the_splits(tmp_path, shapes_root, caplog):
    for name in ("images", "train.json", "val.json"):
        (tmp_path / name).symlink_to(shapes_root / name)
    foreign = {"package": {"name": "x"}, "labels": ["a", "b"], "coco": [{"image_id": 1, "caption": "a"}], "broken": 3}
    for name, content in foreign.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content)[: 9 if name != "broken" else 0], encoding="utf-8")
        (tmp_path / f".{name}.json").write_text("[", encoding="utf-8")
    (tmp_path / "._train.json").write_bytes(b"\0\5\x16\7")
    (tmp_path / "holdout.json").write_text("[]", encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    assert folder.splits(tmp_path) == ["holdout", "train", "val"]
    assert sorted(record.getMessage().split(": ")[0] for record in caplog.records) == [
        str(tmp_path / f"{name}.json") for name in sorted(foreign)
    ]
    assert folder.splits(tmp_path, ["labels"]) == ["holdout", "labels", "train", "val"]  # and reading it tells what is


@pytest.mark.parametrize(
    "name", ["gallery.vall", "galery.val", "gallery-val", "Gallery.val", "gallery", "gallery.test"]
)
def test_a_gallery_of_no_split_is_told(tmp_path, shapes_root, name):
    for part in ("images", "val.json"):
        (tmp_path / part).symlink_to(shapes_root / part)
    (tmp_path / f"{name}.json").write_text("[]", encoding="utf-8")
    for read in (folder.splits, lambda root: folder.load_split(root, "val", folder.images(root))):
        with pytest.raises(DataError, match=rf"{name}\.json: a gallery, but of no split.*gallery\.val\.json") as told:
            read(tmp_path)
        assert "gallery.gallery" not in str(told.value).lower()  # as if it were a split itself


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        ([{"image": "circle-red.png"}], "entry 0: expected the name of an image, given {'image': 'circle-red.png'}"),
        (["circle-red.png", "circle-RED.png"], "entry 1: 'circle-RED.png' stands already in entry 0"),
        ({"images": []}, "expected a JSON list, given dict"),
    ],
)
def test_galleries_that_are_none(tmp_path, shapes_root, gallery, message):
    with pytest.raises(DataError) as caught:
        bad_split(tmp_path, shapes_root, [GOOD], gallery)
    assert "gallery.train.json" in str(caught.value) and message in str(caught.value)


def test_missing_parts_of_a_folder_are_named(tmp_path, shapes_root):
    with pytest.raises(DataError, match=r"no data set here\. Expected .*train\.json"):
        folder.splits(tmp_path)
    for where in (tmp_path, tmp_path / ("x" * 5000)):
        with pytest.raises(
            DataError, match=r"images: no such folder\. Put the pictures there, or give the folder that"
        ):
            folder.images(where)
    (tmp_path / "images").write_text("")
    with pytest.raises(DataError, match="images: no such folder"):
        folder.images(tmp_path)
    with pytest.raises(DataError, match=r"no such annotation file\. Splits found: test, train, val"):
        folder.load_split(shapes_root, "dev", {})
    with pytest.raises(DataError, match="entry 1: no image 'gone.png' below"):
        bad_split(tmp_path, shapes_root, [GOOD], gallery=["circle-blue.png", "gone.png"])


def test_split_problems_are_known_before_training(shapes):
    triplets, gallery, store = shapes
    with pytest.raises(DataError, match="split 'val' holds no queries"):
        TripletDataset("shapes", "val", [], gallery, store)
    gone = [Triplet("1", "gone.png", "x", (gallery.ids[0],))]
    with pytest.raises(DataError, match=r"names 1 images that have no file, such as gone\.png"):
        TripletDataset("shapes", "train", gone, gallery, store, train=True)
    outside = [Triplet("1", gallery.ids[0], "x", (gallery.ids[1],))]
    with pytest.raises(DataError, match="targets outside its gallery"):
        TripletDataset("shapes", "val", outside, Gallery(gallery.ids[:1], gallery.paths[:1]), store)
    own = [Triplet("q7", gallery.ids[0], "x", (gallery.ids[0],))]
    with pytest.raises(DataError, match="1 of 1 pairs have their reference as target.*nothing is left to learn from"):
        TripletDataset("shapes", "train", own, gallery, store, train=True)
    alone = Gallery(gallery.ids[:1], gallery.paths[:1])
    with pytest.raises(DataError, match="a gallery of fewer than two images"):
        TripletDataset("shapes", "val", own, alone, store)
    with pytest.raises(DataError, match="query ids that occur more than once"):
        TripletDataset("shapes", "train", [triplets[0], triplets[0]], gallery, store)
    with pytest.raises(DataError, match="unique names"):
        Gallery(("a", "a"), (Path("a"), Path("b")))


def test_broken_image_is_named_when_it_is_loaded(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        ImageStore({"broken": path}, pixels).load("broken")


def test_a_folder_holds_what_pillow_reads_and_the_rest_is_told(tmp_path, caplog):
    root, outside = tmp_path / "data" / "images", tmp_path / "outside"
    for path in (
        root / "a.jfif",
        root / "b" / "B.PNG",
        root / "._a.jfif",
        root / "__MACOSX" / "c.png",
        root / "d.heic",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    outside.mkdir()
    (outside / "e.avif").write_bytes(b"?")
    (root / "linked").symlink_to(outside)
    (root / "b" / "up").symlink_to(root)
    with caplog.at_level(logging.INFO):
        assert list(folder.images(root.parent)) == ["a.jfif", "b/B.PNG", "linked/e.avif"]
    assert "left out: 2 hidden, 1 .heic (install pillow-heif), 1 linked folders that are read elsewhere" in caplog.text
    (tmp_path / "other" / "images").mkdir(parents=True)
    (tmp_path / "other" / "images" / "d.heic").write_bytes(b"?")
    with pytest.raises(DataError, match=r"no images here. Looked for \.bmp, .*; left out: 1 \.heic \(install pillow"):
        folder.images(tmp_path / "other")
