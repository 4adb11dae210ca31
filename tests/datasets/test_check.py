"""neucore data check: what a data set has, and what a run of it would lack."""

import json
import logging
import shutil

import pytest
from lavis.common.registry import registry
from lavis.datasets.builders import load_dataset
from published_case import build, copy_without, damaged, put

from neucore_plugin import cli
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.config.published import PUBLISHED
from neucore_plugin.datasets.check import check
from neucore_plugin.datasets.published import catalogue


def test_check_says_what_is_there_and_what_is_not(cirr_root, tmp_path, capsys):
    assert cli.main(["data", "check", "cirr", "--root", str(cirr_root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "complete"
    root = copy_without(cirr_root, tmp_path / "partial", ["cap.rc2.test1"])
    for path in (root / "img_raw/dev").iterdir():
        path.unlink()
    assert cli.main(["data", "check", "cirr", "--root", str(root), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["splits"]["val"]["queries"] == 12 and report["splits"]["train"]["images_missing"] == 0
    assert report["splits"]["val"]["images_missing"] == report["splits"]["val"]["gallery"]
    assert report["splits"]["test1"]["annotations_missing"] == [str(root / "captions/cap.rc2.test1.json")]
    assert not report["complete"]
    assert cli.main(["data", "check", "cirr", "--root", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "no annotations" in printed and "https://github.com/Cuberick-Orion/CIRR" in printed
    assert f"belong below {root}/img_raw/dev" in printed


def test_check_opens_every_picture_when_asked(cirr_root, shapes_root, tmp_path, capsys):
    queries = json.loads((cirr_root / "captions/cap.rc2.val.json").read_text())
    root = damaged(cirr_root, tmp_path / "cut", [queries[0]["reference"], queries[4]["reference"]])
    assert cli.main(["data", "check", "cirr", "--root", str(root)]) == 0
    capsys.readouterr()
    assert cli.main(["data", "check", "cirr", "--root", str(root), "--open"]) == 1
    printed = capsys.readouterr().out
    assert "2 images of val cannot be read, such as\n  " in printed and "truncated or damaged" in printed
    left = len(build("cirr", root, ["val"], missing="skip")["val"])
    assert f"`missing: skip` leaves {12 - left} queries of val out" in printed
    assert check("cirr", root, open_images=True)["splits"]["train"]["images_unreadable"] == 0
    mine = copy_without(shapes_root, tmp_path / "mine", ["circle-red"])
    (mine / "images/circle-red.png").write_bytes(b"GIF89a, or so")
    assert cli.main(["data", "check", "folder", "--root", str(mine)]) == 0
    assert cli.main(["data", "check", "folder", "--root", str(mine), "--open", "--json"]) == 1
    report = json.loads(capsys.readouterr().out.split("complete\n")[-1])
    assert {split: row["images_unreadable"] for split, row in report["splits"].items()} == dict.fromkeys(
        ("test", "train", "val"), 1
    )


def test_check_of_ones_own_folder(shapes_root, tmp_path, capsys):
    assert cli.main(["data", "check", "folder", "--root", str(shapes_root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "complete" and lines[3].split() == ["train", "149", "24", "0"]
    root = copy_without(shapes_root, tmp_path / "mine", ["square-blue"])
    put(root / "gallery.val.json", ["gone.png"])
    assert cli.main(["data", "check", "folder", "--root", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "damaged" in printed and "no image 'square-blue.png' below" in printed and "root/images/**" in printed
    for arguments, message in (([], "no root folder: give --root\n"), (["--root", str(tmp_path)], "no such folder")):
        assert cli.main(["data", "check", "folder", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_queries_are_counted_though_the_image_list_is_missing(cirr_root, fashioniq_root, tmp_path, capsys):
    root = copy_without(cirr_root, tmp_path / "cirr", ["split.rc2.test1", "split.rc2.train"])
    rows = check("cirr", root)["splits"]
    assert (rows["train"]["queries"], rows["test1"]["queries"]) == (24, 6) and "gallery" not in rows["train"]
    root = copy_without(fashioniq_root, tmp_path / "fashioniq", ["split.shirt.val"])
    assert check("fashioniq", root)["splits"]["val_shirt"]["queries"] == 6
    put(tmp_path / "circo/annotations/val.json", [{"id": n} for n in range(7)])
    assert cli.main(["data", "check", "circo", "--root", str(tmp_path / "circo")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["val", "7", "–", "incomplete"]
    assert lines[3].split() == ["test", "–", "–", "no", "annotations"]
    put(tmp_path / "circo/annotations/val.json", "{")
    assert "no valid JSON" in check("circo", tmp_path / "circo")["splits"]["val"]["error"]


def test_the_hosts_load_dataset_takes_the_root_as_vis_path(shapes_root, cirr_root, written, monkeypatch, tmp_path):
    monkeypatch.delenv("NEUCORE_CIRR_ROOT", raising=False)
    with pytest.raises(ConfigError, match=r"datasets\.folder\.build_info\.root is null; .*vis_path=FOLDER"):
        load_dataset("folder")
    for given in (str(shapes_root), shapes_root):
        assert {split: len(data) for split, data in load_dataset("folder", vis_path=given).items()} == {
            "test": 21,
            "train": 149,
            "val": 22,
        }
    assert len(load_dataset("folder", vis_path=str(written), data_type="shards")["train"]) == 149
    assert set(load_dataset("cirr", vis_path=str(cirr_root))) == {"train", "val"}
    with pytest.raises(ConfigError, match="CIRR is not complete below"):
        load_dataset("cirr", vis_path=str(tmp_path))
    with pytest.raises(DataError, match="images: no such folder"):
        load_dataset("folder", vis_path=str(tmp_path))


def test_check_without_a_root_and_of_an_unknown_name(monkeypatch, capsys):
    monkeypatch.delenv("NEUCORE_SHOES_ROOT", raising=False)
    assert cli.main(["data", "check", "shoes"]) == 2
    assert "NEUCORE_SHOES_ROOT" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"Did you mean 'shoes'"):
        check("shoe", "x")


def test_a_root_that_is_no_folder_is_told(tmp_path, capsys):
    (tmp_path / "file").touch()
    for name, place, code in (("circo", "file", 2), ("folder", "file", 2), ("folder", "none", 2), ("circo", "none", 1)):
        assert cli.main(["data", "check", name, "--root", str(tmp_path / place)]) == code
        told = capsys.readouterr()
        if code == 2:
            assert told.err == f"error: {tmp_path / place}: is no folder; give the root folder of the data set\n"
        else:  # what is to be fetched, and where it belongs, is told before there is a folder
            assert f"no such folder: {tmp_path / place}\n" in told.out and "where it comes from" in told.out


def test_links_to_nowhere_are_missing_images(cirr_root, tmp_path):
    root = tmp_path / "linked"
    shutil.copytree(cirr_root, root)
    bad, *_ = sorted((root / "img_raw/dev").iterdir())
    bad.unlink()
    bad.symlink_to("/mnt/drive that is gone")
    assert check("cirr", root)["splits"]["val"]["images_missing"] == 1


def test_each_published_data_set_has_its_parts():
    assert tuple(catalogue.READERS) == PUBLISHED
    for name, reader in catalogue.READERS.items():
        assert reader.answered == registry.get_builder_class(name).SPLITS
        for split in reader.splits:
            assert reader.files(split) and reader.image_folder("root", split).startswith("root/")
        assert "root" in reader.sources("root") and "{" not in reader.sources("root")


def test_check_tells_what_is_no_picture_and_takes_a_pixel_limit(shapes_root, tmp_path, capsys, caplog):
    root = copy_without(shapes_root, tmp_path / "mine", [])
    for name in ("photo.heic", "._circle-red.png", "film.mov"):
        (root / "images" / name).write_bytes(b"?")
    with caplog.at_level(logging.INFO):
        assert cli.main(["data", "check", "folder", "--root", str(root)]) == 0
    assert "left out: 1 .heic (install pillow-heif), 1 .mov, 1 hidden" in caplog.text
    capsys.readouterr()
    assert cli.main(["data", "check", "folder", "--root", str(root), "--open", "--max-pixels", "100"]) == 1
    assert "pixels, the limit is 100 " in capsys.readouterr().out
    assert cli.main(["data", "check", "folder", "--root", str(root), "--open", "--max-pixels", "1000000"]) == 0
