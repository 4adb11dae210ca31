"""The published data sets end to end in the host: generated pictures under annotations, two protocols, shards."""

import json
from pathlib import Path

import pytest
from places import REAL, needs_real
from published_case import build, copy_without, damaged, pictures, put
from shapes import write_tiny

from neucore_plugin import cli, launch
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.images import check_images
from neucore_plugin.config.published import FASHIONIQ_CATEGORIES
from neucore_plugin.datasets.check import check
from neucore_plugin.datasets.published import catalogue
from neucore_plugin.datasets.shards.writer import write_shards
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset


def configure(tmp_path, cache_root, name: str, root: Path, protocol, valid, test, **info) -> Path:
    def change(config):
        image = config["datasets"].pop("folder")["vis_processor"]
        config["datasets"][name] = {
            "build_info": {"root": str(root), "protocol": protocol, **info},
            "vis_processor": image,
        }
        config["run"].update(max_epoch=1, batch_size_train=8, valid_splits=valid, test_splits=test, report=False)

    return write_tiny(root, cache_root, tmp_path, change, f"{name}.yaml")


def numbers(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# ---- training and evaluation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_on_cirr(cirr_root, cache_root, tmp_path_factory) -> tuple[Path, Path]:
    """The yaml of a run that was trained and tested with two protocols, and its best checkpoint."""
    folder = tmp_path_factory.mktemp("cirr")
    path = configure(folder, cache_root, "cirr", cirr_root, ["hard", "soft", "soft_top50"], ["val"], ["val"])
    launch.run(path)
    return path, next((folder / "output").rglob("checkpoint_best.pth"))


def test_cirr_with_several_protocols_and_evaluated_again(trained_on_cirr, tmp_path):
    path, best = trained_on_cirr
    results = numbers(path.parent / "output")
    assert list(results) == ["val", "val@soft", "val@soft_top50"]
    assert results["val"]["neucore"]["protocol"] == "hard" and results["val@soft"]["neucore"]["protocol"] == "soft"
    assert results["val"]["neucore"]["queries"] == 12 and "R_subset@1" in results["val@soft"]["text_only"]
    stored = json.loads((best.parent / "evaluation.json").read_text())["protocols"]
    soft = "gallery: the split's own list; reference removed; R@K: largest target_soft"
    assert stored["val"]["name"] == "hard" and stored["val@soft"]["summary"].startswith(soft)
    assert results["val@soft_top50"]["neucore"]["protocol"] == stored["val@soft_top50"]["name"] == "soft_top50"
    assert "those in the global top 50; as in ARTEMIS and NEUCORE" in stored["val@soft_top50"]["summary"]
    assert "all five others; as in CIRPLANT" in stored["val@soft"]["summary"]
    # the same again by the command, from the checkpoint, with the presets named there: no train image is needed
    arguments = ["--protocol", "soft", "hard", "--options", f"run.output_dir={tmp_path / 'again'}"]
    assert cli.main(["evaluate", "--cfg-path", str(path), "--checkpoint", str(best), *arguments]) == 0
    again = numbers(tmp_path / "again")
    assert again["val"] == results["val@soft"] and again["val@hard"] == results["val"]


def test_fashioniq_categories_and_their_mean(fashioniq_root, cache_root, tmp_path):
    valid = [f"val_{category}" for category in FASHIONIQ_CATEGORIES]
    chosen = ["neucore", "clip4cir", "val"]
    path = configure(tmp_path, cache_root, "fashioniq", fashioniq_root, chosen, valid, valid)
    launch.run(path)
    results = numbers(tmp_path / "output")
    assert {split for split in results if "mean" in split} == {"val_mean", "val_mean@clip4cir", "val_mean@val"}
    for split, queries in (("val_dress", 12), ("val_dress@clip4cir", 6), ("val_mean", 36), ("val_mean@val", 36)):
        assert results[split]["neucore"]["queries"] == queries, split
    for k in (10, 50):
        rows = [results[f"val_{category}"]["neucore"][f"R@{k}"] for category in FASHIONIQ_CATEGORIES]
        assert results["val_mean"]["neucore"][f"R@{k}"] == pytest.approx(sum(rows) / 3)


def test_the_released_forms_mark_between_captions(fashioniq_root, tmp_path, monkeypatch):
    """Written by the data set, left alone by the processor, read by the word splitter as the special word it is."""
    from neucore_plugin.models.backbones.resnet_gru import split_words

    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    marked = build("fashioniq", fashioniq_root, ["train", "val_dress"], joiner="<and>")
    plain = build("fashioniq", fashioniq_root, ["train", "val_dress"])
    for split, dataset in marked.items():
        pairs = list(zip(dataset.triplets, dataset.texts, plain[split].texts, strict=True))
        assert any(len(triplet.captions) == 2 for triplet, _, _ in pairs)
        for triplet, text, other in pairs:
            assert split_words(text).count("<and>") == len(triplet.captions) - 1
            assert text.replace(" <and> ", " and ") == other


def test_submission_from_a_checkpoint(cirr_root, trained_on_cirr, tmp_path, capsys, monkeypatch):
    """test1 has 12 pictures here, so the files are made with shorter rankings; all else is as published."""
    from neucore_plugin.commands import submit
    from neucore_plugin.evaluation import submission

    path, best = trained_on_cirr
    monkeypatch.setitem(submission.LENGTHS, "recall", 10)
    out = tmp_path / "submission"
    arguments = ["submit", "cirr", "--cfg-path", str(path), "--checkpoint", str(best), "--out", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cirr_test1_recall.json: good: CIRR recall, 6 queries" in printed
    whole, groups = (json.loads((out / f"cirr_test1_{kind}.json").read_text()) for kind in ("recall", "recall_subset"))
    queries = json.loads((cirr_root / "captions/cap.rc2.test1.json").read_text())
    assert set(whole) == {"version", "metric", *(str(query["pairid"]) for query in queries)}
    for query in queries:
        ranking, group = whole[str(query["pairid"])], groups[str(query["pairid"])]
        assert len(ranking) == 10 and query["reference"] not in ranking
        assert len(group) == 3 and set(group) <= set(query["img_set"]["members"]) - {query["reference"]}
        inside = [name for name in ranking if name in query["img_set"]["members"]]
        assert inside[:3] == group[: len(inside[:3])]  # the group is ranked as in the whole gallery
    check = ["submit", "cirr", "--check", str(out / "cirr_test1_recall.json"), "--root", str(cirr_root)]
    assert cli.main(check) == 0
    monkeypatch.undo()
    assert cli.main(check) == 2
    assert "has 10 images; exactly 50 are wanted" in capsys.readouterr().err
    assert submit.SPLITS == {"cirr": "test1", "circo": "test"}


# ---- missing images --------------------------------------------------------------------------------------------------


def test_missing_images_stop_or_are_skipped_when_asked(cirr_root, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    queries = json.loads((cirr_root / "captions/cap.rc2.val.json").read_text())
    gone = [queries[0]["reference"], queries[5]["target_hard"]]
    root = copy_without(cirr_root, tmp_path / "partial", gone)
    with pytest.raises(ConfigError, match=r"img_raw/dev: 2 of \d+ images of val, such as img_raw/dev/"):
        build("cirr", root, ["val"])
    with caplog.at_level("WARNING"):
        dataset = build("cirr", root, ["val"], missing="skip")["val"]
    affected = [q for q in queries if q["reference"] in gone or q["target_hard"] in gone]
    assert len(dataset) == 12 - len(affected) and not set(gone) & set(dataset.gallery.ids)
    assert dataset.left_out["missing_images"] == 2 and dataset.left_out["skipped_queries"] == len(affected)
    listed = Path(dataset.left_out["listed_in"]).read_text().split()
    assert sorted(Path(file).stem for file in listed) == sorted(gone)
    assert f"val: 2 images have no file; {len(affected)} queries are left out" in caplog.text


def test_a_split_that_is_not_wanted_need_not_be_there(cirr_root, tmp_path):
    root = copy_without(cirr_root, tmp_path / "val_only", [])
    for path in (root / "img_raw/train/0").iterdir():
        path.unlink()
    (root / "captions/cap.rc2.train.json").unlink()
    assert set(build("cirr", root, ["val"])) == {"val"}
    with pytest.raises(ConfigError, match="cap.rc2.train.json"):
        build("cirr", root, ["train", "val"])


def test_nothing_left_is_an_error(cirr_root, tmp_path, monkeypatch):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    names = list(json.loads((cirr_root / "image_splits/split.rc2.val.json").read_text()))
    with pytest.raises(DataError, match="every query needs an image that is missing or"):
        build("cirr", copy_without(cirr_root, tmp_path / "empty", names), ["val"], missing="skip")


def answers(name: str, targets, gone) -> list[Triplet]:
    """What `missing: skip` leaves of one query of a data set whose images `gone` have no file."""
    gallery = Gallery(tuple("rabcd"), tuple(Path(f"/none/{image}") for image in "rabcd"))
    query = Triplet("1", "r", "x", tuple(targets), "", tuple("rabc"), (("a", 1.0), ("b", 0.5)))
    other = Triplet("2", "r", "y", ("d",))
    absent = [path for path in gallery.paths if path.name in gone]
    splits, left_out = catalogue.without(name, {"val": ([query, other], gallery)}, absent)
    found, there = splits["val"]
    assert found[-1].query_id == "2" and there.ids == tuple(image for image in "rabcd" if image not in gone)
    assert left_out["val"]["skipped_queries"] == 2 - len(found) and left_out["val"]["missing_images"] == len(gone)
    store = ImageStore(dict(zip(there.ids, there.paths, strict=True)), str)
    assert len(TripletDataset(name, "val", found, there, store)) == len(found)  # it refuses answers without a file
    return found[:-1]


def test_of_several_answers_the_absent_ones_are_left_out():
    """Fashion200K counts any right answer, CIRCO's R@K the first one: without it the query cannot be counted."""
    for name in ("fashion200k", "circo"):
        assert [t.targets for t in answers(name, "abc", "b")] == [("a", "c")], name
        assert answers(name, "abc", "abc") == []
    assert [t.targets for t in answers("fashion200k", "abc", "a")] == [("b", "c")]
    assert answers("circo", "abc", "a") == []
    assert answers("fashion200k", "ra", "a") == []  # its own reference is no answer
    (kept,) = answers("cirr", "a", "b")
    assert kept.members == ("r", "a", "c") and kept.soft == (("a", 1.0),)


def test_skipped_queries_are_told_from_shards_as_from_the_folder(cirr_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    queries = json.loads((cirr_root / "captions/cap.rc2.val.json").read_text())
    root = copy_without(cirr_root, tmp_path / "partial", [queries[0]["reference"], queries[5]["target_hard"]])
    out = tmp_path / "tars"
    arguments = ["shards", "cirr", "--root", str(root), "--out", str(out), "--splits"]
    assert cli.main([*arguments, "val"]) == 2
    assert "img_raw/dev: 2 of " in capsys.readouterr().err and not out.exists()
    assert cli.main([*arguments, "vall"]) == 2
    assert "CIRR has no split 'vall'. Did you mean 'val'?" in capsys.readouterr().err
    assert cli.main([*arguments, "val", "--missing", "skip"]) == 0
    by_folder = build("cirr", root, ["val"], missing="skip")["val"]
    by_shards = build("cirr", out, ["val"], data_type="shards")["val"]
    assert by_folder.fingerprint == by_shards.fingerprint
    for key in ("missing_images", "skipped_queries"):
        assert by_shards.left_out[key] == by_folder.left_out[key] > 0
    skipped = by_folder.left_out["skipped_queries"]
    assert f"val: 2 images have no file; {skipped} queries are left out" in capsys.readouterr().out
    listed = json.loads((out / "triplets-val.json").read_text())["left_out"]["files"]
    assert len(listed) == 2 and all(file.startswith("img_raw/dev/") for file in listed)
    with pytest.raises(DataError, match="holds shards of 'cirr', not of 'shoes'"):
        build("shoes", out, ["test"], data_type="shards")


@pytest.mark.parametrize("kind", ["images", "shards"])
def test_unreadable_images_are_skipped_as_missing_ones_are(kind, cirr_root, tmp_path, monkeypatch, caplog, cache_root):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    queries = json.loads((cirr_root / "captions/cap.rc2.val.json").read_text())
    cut, gone = queries[0]["reference"], queries[9]["target_hard"]
    affected = [q for q in queries if {cut, gone} & {q["reference"], q["target_hard"]}]
    root = damaged(copy_without(cirr_root, tmp_path / "partial", [gone]), tmp_path / "cut", [cut])
    info = {"missing": "skip"}
    if kind == "shards":  # written without the missing one, as it was; the other was cut on the way
        whole = copy_without(cirr_root, tmp_path / "whole", [gone])
        splits, left_out = catalogue.load("cirr", whole, ["val"], "skip")[1:]
        images = splits["val"][1].files
        images[cut] = next(root.rglob(f"{cut}.png"))
        root = write_shards(tmp_path / "tars", "cirr", images, splits, progress=False, left_out=left_out).parent
    with caplog.at_level("WARNING"):
        dataset = build("cirr", root, ["val"], data_type=kind, **info)["val"]
    assert len(dataset) == 12 - len(affected) and not {cut, gone} & set(dataset.gallery.ids)
    counts = {"missing_images": 1, "unreadable_images": 1, "skipped_queries": len(affected)}
    assert counts.items() <= dataset.left_out.items()
    assert cut in Path(dataset.left_out["listed_in"]).read_text()
    assert f"val: 1 images have no file, 1 cannot be read; {len(affected)} queries are left out" in caplog.text
    assert not check_images(dataset.images.paths.values()) and dataset.images.checked


def test_a_run_skips_unreadable_images_and_stops_without_the_word(trained_on_cirr, cirr_root, tmp_path, capsys):
    path, best = trained_on_cirr
    queries = json.loads((cirr_root / "captions/cap.rc2.val.json").read_text())
    cut = queries[5]["target_hard"]
    affected = sum(cut in (q["reference"], q["target_hard"]) for q in queries)
    root = damaged(cirr_root, tmp_path / "cut", [cut])
    options = [f"datasets.cirr.build_info.root={root}", f"run.output_dir={tmp_path / 'out'}"]
    command = ["evaluate", "--cfg-path", str(path), "--checkpoint", str(best), "--options", *options]
    assert cli.main(command) == 2
    assert f"{cut}.png is truncated or damaged" in capsys.readouterr().err
    assert cli.main([*command, "datasets.cirr.build_info.missing=skip"]) == 0
    row = numbers(tmp_path / "out")["val"]["neucore"]
    assert (row["queries"], row["unreadable_images"], row["skipped_queries"]) == (12 - affected, 1, affected)


# ---- a pair of one image with itself ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shoes_root(tmp_path_factory) -> Path:
    """18 pairs of train, two of them of one image with itself, and 9 of test with one such."""
    root = tmp_path_factory.mktemp("published") / "shoes"
    entries = []
    for file, kind, count, own in (("train_im_names", "boots", 18, (3, 7)), ("eval_im_names", "flats", 9, (4,))):
        names = [f"img_womens_{kind}_{number}.jpg" for number in range(count + 1)]
        put(root / f"{file}.txt", "\n".join(names))
        pictures(root / f"womens_{kind}/0" / name for name in names)
        entries += [
            {
                "ReferenceImageName": names[n],
                "ImageName": names[n + (n not in own)],
                "RelativeCaption": f"{n} red bows",
            }
            for n in range(count)
        ]
    put(root / "relative_captions_shoes.json", entries)
    return root


TRAIN_NOTICE = "2 of 18 pairs have their reference as target; training leaves them out"
TEST_NOTICE = (
    "1 of 9 queries have their reference as target, which the protocol removes from the ranking; they count as misses"
)


def test_such_pairs_are_left_out_of_training_and_missed_in_evaluation(shoes_root, cache_root, tmp_path, caplog):
    path = configure(tmp_path, cache_root, "shoes", shoes_root, ["shoes"], ["test"], ["test"])
    with caplog.at_level("INFO"):
        launch.run(path)
    row = numbers(tmp_path / "output")["test"]["neucore"]
    assert row["queries"] == 9 and row["R@50"] == pytest.approx(100 * 8 / 9)  # ten images: all others are found
    assert f"shoes: train: {TRAIN_NOTICE}" in caplog.text and f"shoes: test: {TEST_NOTICE}" in caplog.text
    assert "shoes: train holds 16 queries" in caplog.text and "shoes: test holds 9 queries" in caplog.text


@pytest.mark.parametrize("kind", ["shoes", "folder", "shards"])
def test_check_tells_what_a_run_tells(kind, shoes_root, tmp_path, capsys):
    """By the builders of a run: the same notices, the same errors, for a published data set as for one's own."""
    root = shoes_root
    if kind == "folder":
        pairs = json.loads((shoes_root / "relative_captions_shoes.json").read_text())
        pictures(tmp_path / "mine/images" / pair[key] for pair in pairs for key in ("ImageName", "ReferenceImageName"))
        keys = {"ReferenceImageName": "reference", "ImageName": "target", "RelativeCaption": "caption"}
        entries = [{keys[key]: value for key, value in pair.items()} for pair in pairs]
        root = tmp_path / "mine"
        put(root / "train.json", entries[:18])
        put(root / "test.json", entries[18:])
    if kind == "shards":
        assert cli.main(["shards", "shoes", "--root", str(root), "--out", str(tmp_path / "tars")]) == 0
        built = build("shoes", tmp_path / "tars", data_type="shards")
    else:
        assert cli.main(["data", "check", kind, "--root", str(root)]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[-3:] == [f"{split}: {text}" for split, text in told(kind).items()] + ["complete"]
        built = build(kind, root)
    assert (built["train"].notices, built["test"].notices) == ([TRAIN_NOTICE], [TEST_NOTICE])
    assert (len(built["train"]), len(built["test"])) == (16, 9)
    if kind == "folder":
        put(root / "test.json", [entries[18], entries[18] | {"query_id": "test-0"}])  # the name that the first one has
        assert cli.main(["data", "check", "folder", "--root", str(root)]) == 1
        assert "folder: split 'test' has query ids that occur more than once" in capsys.readouterr().out
        with pytest.raises(DataError, match="split 'test' has query ids that occur more than once"):
            build("folder", root)


def told(kind: str) -> dict[str, str]:
    texts = {"train": TRAIN_NOTICE, "test": TEST_NOTICE}
    return texts if kind == "shoes" else {split: texts[split] for split in sorted(texts)}


def test_where_a_protocol_ranks_the_reference_check_says_so(fashioniq_root, tmp_path):
    root = copy_without(fashioniq_root, tmp_path / "own", ["cap.dress.val"])
    pairs = json.loads((fashioniq_root / "captions/cap.dress.val.json").read_text())
    pairs[2]["target"] = pairs[2]["candidate"]
    put(root / "captions/cap.dress.val.json", pairs)
    row = check("fashioniq", root)["splits"]["val_dress"]
    assert row["queries"] == 6 and row["error"] is None
    assert [notice.rsplit(" ", 1)[1] for notice in row["notices"]] == ["(neucore)", "(covr)", "(val)", "(tgcir)"]
    assert row["notices"][0].startswith("2 of 12 queries") and row["notices"][1].startswith("1 of 6 queries")


@needs_real("shoes")
def test_the_real_shoes():
    report = check("shoes", REAL / "shoes")["splits"]
    assert report["train"]["notices"] == [TRAIN_NOTICE.replace("2 of 18", "26 of 8,990")]
    assert report["test"]["notices"] == [TEST_NOTICE.replace("1 of 9", "1 of 1,761")]
    assert not any(row["error"] for row in report.values())
