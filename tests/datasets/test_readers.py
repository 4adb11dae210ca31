"""FashionIQ, Shoes, Fashion200K and CIRCO: their readers on hand-made files of the published shape and on real ones."""

import itertools
import json
from pathlib import Path

import pytest
from places import REAL, needs_real
from published_case import edit, put

from neucore_plugin.common.errors import DataError
from neucore_plugin.config.published import FASHIONIQ_CATEGORIES, PRESETS
from neucore_plugin.datasets.protocols import queries
from neucore_plugin.datasets.published import catalogue, fashion200k, shoes
from neucore_plugin.datasets.published.circo import CIRCO, IMAGES
from neucore_plugin.datasets.published.fashion200k import FASHION200K
from neucore_plugin.datasets.published.fashioniq import FASHIONIQ
from neucore_plugin.datasets.published.shoes import SHOES


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_names_that_pages_show():
    assert SHOES.names(["img_womens_athletic_shoes_830.jpg"]) == {
        "img_womens_athletic_shoes_830.jpg": "womens athletic shoes 830"
    }
    image = "women/dresses/casual_and_day_dresses/517/517_0.jpeg"
    assert FASHION200K.names([image, "517_0.jpeg"]) == {image: "casual and day dresses 517"}
    assert FASHIONIQ.names(["B1"]) == {}  # a number of a shop


# ---- FashionIQ -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fashion(tmp_path) -> Path:
    root = tmp_path / "fashioniq"
    pair = {"target": "B2", "candidate": "B1", "captions": ["is  red ", "has dots"]}
    for category, part in itertools.product(FASHIONIQ_CATEGORIES, ("train", "val", "test")):
        pairs = [pair, {**pair, "captions": ["", "is longer\n"]}, {**pair, "captions": [" ", ""]}]
        if part == "test":
            pairs = [{key: value for key, value in one.items() if key != "target"} for one in pairs]
        put(root / f"captions/cap.{category}.{part}.json", pairs)
        put(root / f"image_splits/split.{category}.{part}.json", ["B1", "B2", f"{category[0]}9", "B1"])
    return root


def test_fashioniq_captions_and_galleries(fashion):
    triplets, gallery = FASHIONIQ.read(fashion, "val_shirt")
    assert [t.caption for t in triplets] == ["is  red and has dots", "is longer", ""]
    assert [t.captions for t in triplets] == [("is  red ", "has dots"), ("", "is longer\n"), (" ", "")]  # as written
    first = triplets[0]
    assert (first.query_id, first.reference, first.targets, first.change) == ("shirt-val-0", "B1", ("B2",), "shirt")
    assert gallery.ids == ("B1", "B2", "s9")  # the list's order, nothing twice
    triplets, gallery = FASHIONIQ.read(fashion, "train")
    assert len(triplets) == 9 and len({t.query_id for t in triplets}) == 9
    assert gallery.ids == ("B1", "B2", "d9", "s9", "t9")  # images that categories share stand once
    triplets, _ = FASHIONIQ.read(fashion, "test_dress")
    assert [t.targets for t in triplets] == [()] * 3


def test_fashioniq_images_in_one_folder_or_one_a_category(fashion):
    images = fashion / "images"
    touch(images / "B1.png", images / "shirt" / "B2.jpg", images / "B2.png", images / "dress" / "s9.jpeg")
    _, gallery = FASHIONIQ.read(fashion, "val_shirt")
    expected = [images / "B1.png", images / "shirt" / "B2.jpg", images / "dress" / "s9.jpeg"]
    assert list(gallery.paths) == expected
    _, gallery = FASHIONIQ.read(fashion, "val_toptee")
    assert gallery.paths[1] == images / "B2.png" and gallery.paths[2] == images / "t9.jpg"  # the last is missing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.__setitem__(1, 3), "entry 1: expected an object, given int"),
        (lambda v: v[1].pop("target"), "entry 1: needs the text 'target'"),
        (lambda v: v[1].update(candidate="B7"), "entry 1: candidate 'B7' is not in the image list"),
        (lambda v: v[1].update(captions="is red"), "entry 1: needs 'captions', a list of texts, given 'is red'"),
        (lambda v: v[1].update(captions=[None]), "entry 1: needs 'captions'"),
        (lambda v: v[1].update(captions=[]), "entry 1: needs 'captions'"),
    ],
)
def test_malformed_fashioniq_pairs(fashion, change, message):
    edit(fashion / "captions/cap.dress.val.json", change)
    with pytest.raises(DataError) as caught:
        FASHIONIQ.read(fashion, "val_dress")
    assert f"captions/cap.dress.val.json: {message}" in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", 3, None, "a\\b"])
def test_fashioniq_image_names_are_names(fashion, name):
    put(fashion / "image_splits/split.dress.val.json", ["B1", "B2", name])
    with pytest.raises(DataError, match="split.dress.val.json: entry 2: expected an image name"):
        FASHIONIQ.read(fashion, "val_dress")


@needs_real("fashioniq")
@pytest.mark.parametrize(
    ("split", "pairs", "images", "changed_texts"),
    [
        ("train_dress", 5985, 11452, 752),
        ("val_dress", 2017, 3817, 264),
        ("test_dress", 2024, 3818, 256),
        ("train_toptee", 6027, 16121, 1284),
        ("val_toptee", 1961, 5373, 430),
        ("test_toptee", 2056, 5374, 447),
    ],
)
def test_fashioniq_counts(split, pairs, images, changed_texts):
    """changed_texts: that the marks of preset clip4cir change."""
    triplets, gallery = FASHIONIQ.read(REAL / "fashioniq", split)
    assert (len(triplets), len(gallery.ids)) == (pairs, images)
    if split.startswith("val"):
        union = {name for t in triplets for name in (t.reference, *t.targets)}
        assert len(union) == {"val_dress": 2628, "val_toptee": 2902}[split]
    # every pair in both orders, those with an empty caption (2 of val_toptee, 12 of train_toptee) as well
    assert len(queries(PRESETS["fashioniq"]["neucore"], triplets)) == 2 * pairs
    stripped = queries(PRESETS["fashioniq"]["clip4cir"], triplets)
    changed = sum(t.caption != plain.caption for t, plain in zip(stripped, triplets, strict=True))
    assert changed == changed_texts
    assert not any(text[:1] in ".?," or text[-1:] in ".?," for text in (t.caption for t in stripped))


# ---- Shoes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shoe(tmp_path) -> Path:
    root = tmp_path / "shoes"
    train, evaluation = [f"img_womens_boots_{n}.jpg" for n in range(3)], [f"img_womens_flats_{n}.jpg" for n in range(4)]
    put(root / "train_im_names.txt", "\n".join(train) + "\n\n")
    put(root / "eval_im_names.txt", "\r\n".join(evaluation))
    entries = [
        (train[1], train[0], "are  red"),
        (evaluation[2], evaluation[0], "have a bow"),
        (train[2], evaluation[1], "x"),
    ]
    keys = ("ImageName", "ReferenceImageName", "RelativeCaption")
    put(root / "relative_captions_shoes.json", [dict(zip(keys, entry, strict=True)) for entry in entries])
    touch(
        root / "womens_boots/0" / train[0],
        root / "womens_boots/1" / train[0],
        root / "deep/womens_flats/1" / evaluation[2],
    )
    return root


def test_shoes_splits_by_their_lists_and_pictures_by_one_index(shoe):
    triplets, gallery = SHOES.read(shoe, "test")
    assert [(t.query_id, t.caption) for t in triplets] == [("1", "have a bow")]
    assert triplets[0].reference.endswith("flats_0.jpg") and triplets[0].targets[0].endswith("flats_2.jpg")
    assert len(gallery.ids) == 4 and gallery.paths[2] == shoe / "deep/womens_flats/1/img_womens_flats_2.jpg"
    assert gallery.paths[0] == shoe / "img_womens_flats_0.jpg"  # missing
    triplets, gallery = SHOES.read(shoe, "train")
    assert [t.caption for t in triplets] == ["are  red"]
    assert gallery.paths[0] == shoe / "womens_boots/0/img_womens_boots_0.jpg"  # the same name twice: the first


def test_malformed_shoes(shoe):
    put(shoe / "relative_captions_shoes.json", [{"ImageName": "x"}, 3])
    put(shoe / "train_im_names.txt", "a.jpg\n../b.jpg\n")
    with pytest.raises(DataError) as caught:
        SHOES.read(shoe, "train")
    error = str(caught.value)
    assert "3 problems" in error and "line 2: expected a file name, given '../b.jpg'" in error
    assert "entry 0: needs the texts ReferenceImageName, RelativeCaption" in error
    (shoe / "eval_im_names.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="eval_im_names.txt: no text in UTF-8"):
        SHOES.read(shoe, "test")


# ---- Fashion200K -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fashion200k_root(tmp_path) -> Path:
    root = tmp_path / "fashion200k"
    lines = {
        "dress": ["women/dress/a/1.jpeg\t0.9\tBlack  lace dress", "women/dress/b/2.jpeg\t0.8\twhite lace dress"],
        "skirt": ["women/skirt/c/3.jpeg\t0.9\twhite lace dress", "women/skirt/d/4.jpeg\t0.9\tA.B & c*"],
        "jacket": ["women/jacket/e/5.jpeg\t0.9\tlong coat"],
    }
    for category in fashion200k.CATEGORIES:
        for split in ("train", "test"):
            put(root / f"labels/{category}_{split}_detect_all.txt", "\n".join(lines.get(category, [])))
    put(
        root / "test_queries.txt",
        "women/dress/a/1.jpeg women/dress/b/2.jpeg\nwomen/skirt/c/3.jpeg women/dress/a/1.jpeg\n",
    )
    return root


def test_fashion200k_captions_texts_and_answers(fashion200k_root):
    triplets, gallery = FASHION200K.read(fashion200k_root, "test")
    assert len(gallery.ids) == 5
    assert [(t.caption, t.targets) for t in triplets] == [
        ("replace Black with white", ("women/dress/b/2.jpeg", "women/skirt/c/3.jpeg")),  # every image of that caption
        ("replace white with Black", ("women/dress/a/1.jpeg",)),
    ]
    assert fashion200k.clean(" A.B & c*?\r") == "AdotmarkB andmark cstarmarkquestionmark"


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("black lace dress", "white lace dress", ("black", "white")),
        ("long red coat", "red coat", ("long", "coat")),  # none that the source lacks: the last word
        ("red coat", "red coat belt", ("coat", "belt")),
        ("a b c", "d b e", ("a", "d")),  # several: the first
        ("Red coat", "red coat", ("Red", "red")),  # in the letters they are written in
        ("coat", "coat", ("coat", "coat")),
        ("red  red coat", "red coat", ("coat", "coat")),
    ],
)
def test_fashion200k_words_are_those_of_tirg(source, target, words):
    assert fashion200k.difference(source, target) == words


def test_fashion200k_training_pairs_are_one_word_apart(fashion200k_root, tmp_path):
    triplets, _ = FASHION200K.read(fashion200k_root, "train")
    assert {t.reference[-6] for t in triplets} == {"1", "2", "3"}  # the others have no such neighbour
    assert FASHION200K.read(fashion200k_root, "train")[0] == triplets
    captions = [
        " ".join(words) for words in itertools.product(("red", "blue"), ("long", "short", "wide"), ("coat", "hat"))
    ]
    put(
        fashion200k_root / "labels/top_train_detect_all.txt",
        "\n".join(f"women/top/{n}.jpeg\t1\t{captions[n % 12]}" for n in range(40)),
    )
    triplets, _ = FASHION200K.read(fashion200k_root, "train")
    named = {f"women/top/{n}.jpeg": captions[n % 12].split() for n in range(40)}
    ours = [t for t in triplets if t.reference in named]
    assert len(ours) == 40
    for triplet in ours:
        source, target = named[triplet.reference], named[triplet.targets[0]]
        changed = [(a, b) for a, b in zip(source, target, strict=True) if a != b]
        assert len(changed) == 1 and triplet.caption == "replace {} with {}".format(*changed[0])


def test_a_pair_of_one_image_with_itself_is_read(fashion200k_root, shoe):
    """What it counts is decided where training and evaluation begin, for all data sets alike."""
    put(fashion200k_root / "test_queries.txt", "women/jacket/e/5.jpeg women/jacket/e/5.jpeg")
    (triplet,), _ = FASHION200K.read(fashion200k_root, "test")
    assert triplet.targets == (triplet.reference,) == ("women/jacket/e/5.jpeg",)
    name = "img_womens_flats_1.jpg"
    edit(shoe / "relative_captions_shoes.json", lambda v: v[1].update(ImageName=name, ReferenceImageName=name))
    (triplet,), _ = SHOES.read(shoe, "test")
    assert triplet.targets == (triplet.reference,) == (name,)


def test_malformed_fashion200k(fashion200k_root):
    put(fashion200k_root / "labels/top_test_detect_all.txt", "women/x.jpeg 0.9 no tabs\n/etc/x\t1\tcaption\n")
    put(
        fashion200k_root / "test_queries.txt",
        "one\nwomen/dress/a/1.jpeg gone.jpeg\nwomen/jacket/e/5.jpeg women/jacket/e/5.jpeg",
    )
    with pytest.raises(DataError) as caught:
        FASHION200K.read(fashion200k_root, "test")
    error = str(caught.value)
    for part in (
        "top_test_detect_all.txt: line 1: expected path, score and description",
        "top_test_detect_all.txt: line 2: expected path",
        "test_queries.txt: line 1: expected two paths, given 'one'",
        "test_queries.txt: line 2: 'gone.jpeg' is in no label file of test",
    ):
        assert part in error


# ---- CIRCO -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def circo_root(tmp_path) -> Path:
    root = tmp_path / "circo"
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(10, 20)]
    put(root / IMAGES, {"images": images})
    query = {"reference_img_id": 10, "relative_caption": "has  two dogs", "shared_concept": "a dog", "id": 0}
    put(root / "annotations/val.json", [{**query, "target_img_id": 12, "gt_img_ids": [12, 15, 11]}])
    put(root / "annotations/test.json", [query, {**query, "id": 1}])
    return root


def test_circo_answers_and_gallery(circo_root):
    triplets, gallery = CIRCO.read(circo_root, "val")
    assert [(t.query_id, t.reference, t.caption) for t in triplets] == [("0", "10", "has  two dogs")]
    assert triplets[0].targets == ("12", "15", "11")
    assert gallery.ids[0] == "10" and gallery.paths[0] == circo_root / "unlabeled2017/000000000010.jpg"
    assert [t.targets for t in CIRCO.read(circo_root, "test")[0]] == [(), ()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.append(v[0]), "entry 1: id 0 stands already in entry 0"),
        (lambda v: v[0].update(id="0"), "entry 0: needs 'id', a whole number, given '0'"),
        (lambda v: v[0].update(gt_img_ids=[]), "entry 0: needs 'gt_img_ids', a list of image ids, given []"),
        (lambda v: v[0].update(gt_img_ids=[12, 99]), "entry 0: gt_img_ids 99 is not in annotations/image_info"),
        (lambda v: v[0].update(reference_img_id=99), "entry 0: reference_img_id 99 is not in"),
        (lambda v: v[0].pop("relative_caption"), "entry 0: needs the text 'relative_caption'"),
    ],
)
def test_malformed_circo(circo_root, change, message):
    edit(circo_root / "annotations/val.json", change)
    with pytest.raises(DataError) as caught:
        CIRCO.read(circo_root, "val")
    assert f"annotations/val.json: {message}" in str(caught.value)


@pytest.mark.parametrize("moved", [("list",), ("pictures",), ("list", "pictures"), ()], ids=" ".join)
def test_circo_in_both_layouts_and_in_mixtures(circo_root, moved):
    published = circo_root / "COCO2017_unlabeled"
    if "list" in moved:
        put(published / "annotations/image_info_unlabeled2017.json", (circo_root / IMAGES).read_text())
        (circo_root / IMAGES).unlink()
    pictures = (published if "pictures" in moved else circo_root) / "unlabeled2017"
    touch(*(pictures / f"{n:012d}.jpg" for n in range(10, 20)))
    _, gallery = CIRCO.read(circo_root, "val")
    assert {path.parent for path in gallery.paths} == {pictures} and all(path.is_file() for path in gallery.paths)
    assert catalogue.load("circo", circo_root, ["val"])[1]["val"][1] == gallery
    assert CIRCO.image_folder(circo_root, "val") == str(pictures)
    if moved == ("pictures",):  # a file in each: both are found
        touch(circo_root / "unlabeled2017/000000000010.jpg")
        (pictures / "000000000010.jpg").unlink()
        _, gallery = CIRCO.read(circo_root, "val")
        assert all(path.is_file() for path in gallery.paths)


def test_circo_aspects(circo_root):
    assert [t.aspects for t in CIRCO.read(circo_root, "val")[0]] == [()]
    edit(circo_root / "annotations/val.json", lambda v: v[0].update(semantic_aspects=["negation", "addition"]))
    assert [t.aspects for t in CIRCO.read(circo_root, "val")[0]] == [("negation", "addition")]
    edit(circo_root / "annotations/val.json", lambda v: v[0].update(semantic_aspects="negation"))
    with pytest.raises(DataError, match="entry 0: 'semantic_aspects' must be a list of texts, given 'negation'"):
        CIRCO.read(circo_root, "val")


@pytest.mark.parametrize(
    "images", [None, [{"id": 1}], [{"id": 1, "file_name": "../x"}], [{"id": 1, "file_name": "a"}] * 2]
)
def test_a_list_of_images_that_is_none(circo_root, images):
    put(circo_root / IMAGES, {"images": images})
    with pytest.raises(DataError, match="image_info_unlabeled2017.json"):
        CIRCO.read(circo_root, "val")


@needs_real("circo")
def test_circo_counts(tmp_path):
    entries = json.loads((REAL / "circo/annotations/val.json").read_text())
    named = {image for e in entries for image in (e["reference_img_id"], e["target_img_id"], *e["gt_img_ids"])}
    put(tmp_path / "annotations/val.json", entries)
    put(tmp_path / IMAGES, {"images": [{"id": image, "file_name": f"{image}.jpg"} for image in sorted(named)]})
    triplets, _ = CIRCO.read(tmp_path, "val")
    assert len(triplets) == 220
    assert [list(map(int, t.targets)) for t in triplets] == [
        e["gt_img_ids"] for e in entries
    ]  # the target stands first


def test_hidden_files_and_links_of_published_pictures(fashion, tmp_path):
    images = fashion / "images"
    touch(images / "._B1.jpg", images / ".B1.jpg", images / "B1.avif", images / "B2.webp", images / "B2.jpe")
    _, gallery = FASHIONIQ.read(fashion, "val_shirt")
    assert list(gallery.paths)[:2] == [images / "B1.avif", images / "B2.jpe"]
    touch(tmp_path / "elsewhere" / "womens_boots" / "img_womens_boots_1.jfif")
    touch(tmp_path / "__MACOSX" / "._img_womens_boots_2.jpg", tmp_path / "shoes" / "a" / "._img_womens_boots_2.jpg")
    (tmp_path / "shoes" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "shoes" / "a" / "up").symlink_to(tmp_path / "shoes")
    found = shoes._pictures(tmp_path / "shoes")
    assert list(found) == ["img_womens_boots_1.jfif"]
