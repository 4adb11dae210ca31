"""Baselines that train nothing, end to end: from a shipped yaml to results and submission files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from clip_case import VIT
from PIL import Image
from places import PROJECTS
from published_case import cirr_entry, pictures, put, write_cirr
from zero_shot_case import build

from neucore_plugin import cli, launch
from neucore_plugin.evaluation import submission
from neucore_plugin.models.baseline import CirBaseline


def noise(root: Path) -> Path:
    """Each picture below a root another one, so that no two scores tie."""
    draw = np.random.default_rng(5)
    for path in sorted([*root.rglob("*.png"), *root.rglob("*.jpg")]):
        Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32)).save(path)
    return root


@pytest.fixture(scope="module")
def circo_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("circo")
    names = {number: f"{number:012}.jpg" for number in range(1, 61)}
    images = [{"id": number, "file_name": name} for number, name in names.items()]
    put(root / "annotations/image_info_unlabeled2017.json", {"images": images})
    pictures(root / "unlabeled2017" / name for name in names.values())
    for split in ("val", "test"):
        queries = [
            {"id": n, "reference_img_id": n + 1, "relative_caption": f"has {n} red dogs"}
            | ({"target_img_id": n + 2, "gt_img_ids": [n + 2, n + 9]} if split == "val" else {})
            for n in range(5)
        ]
        put(root / f"annotations/{split}.json", queries)
    return noise(root)


@pytest.fixture(scope="module")
def cirr_root(tmp_path_factory):
    places, queries = {}, {}
    for split in ("val", "test1"):
        members = [[f"{split}-{group}-img{side}" for side in range(6)] for group in range(10)]
        queries[split] = [
            cirr_entry(group, members[group], 0, None if split == "test1" else 1, caption="show it red")
            for group in range(10)
        ]
        places[split] = {name: f"./{split}/{name}.png" for names in members for name in names}
    return noise(write_cirr(tmp_path_factory.mktemp("cirr"), places, queries))


def write_yaml(hosts, root: Path, folder: Path, name: str, cache: Path, **model) -> Path:
    content = yaml.safe_load((PROJECTS / f"zeroshot_{name}.yaml").read_text())
    sides = {side: {"name": "clip", "config": VIT, "pretrained": hosts["vit"][1]} for side in ("image", "text")}
    sides["image"]["image_size"] = 32
    content["model"] |= {"backbone": sides, **model}
    content["datasets"][name]["build_info"]["root"] = str(root)
    content["run"] |= {"output_dir": str(folder / "output"), "cache_dir": str(cache), "device": "cpu"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", ["circo", "cirr"])
@pytest.mark.parametrize("method", ["average", "inversion"])
def test_evaluation_and_submission_without_a_training(
    hosts, phi, circo_root, cirr_root, cache_root, tmp_path, monkeypatch, name, method, alone
):
    root = circo_root if name == "circo" else cirr_root
    model = {"method": method} | ({"inversion": {"weights": phi[1]}} if method == "inversion" else {})
    config = write_yaml(hosts, root, tmp_path, name, cache_root, **model)
    metrics = launch.run(config, evaluate=True)
    rows = json.loads((tmp_path / "output/results.json").read_text())["val"]
    assert list(rows) == [method, "text_only", "image_only"]
    key = "mAP@25" if name == "circo" else "R@50"
    assert metrics["val"][key] == rows[method][key]
    expected = slow(build(hosts, **model), name, root)
    assert rows[method][key] == pytest.approx(expected, abs=1e-4)
    out = tmp_path / "submission"
    assert cli.main(["submit", name, "--cfg-path", str(config), "--out", str(out)]) == 0
    files = sorted(out.glob(f"{name}_*.json"))
    assert len(files) == (1 if name == "circo" else 2)
    for file in files:
        assert f"{name.upper()}" in submission.check(file)
    again = ["evaluate", "--cfg-path", str(config), "--options", "run.cache_features=false"]
    assert cli.main(again) == 0
    uncached = json.loads((tmp_path / "output/results.json").read_text())["val"]
    assert {row: values[key] for row, values in uncached.items()} == {row: values[key] for row, values in rows.items()}


@torch.no_grad()
def slow(model, name: str, root: Path) -> float:
    """mAP@25 of CIRCO or R@50 of CIRR, percent, one query and one image at a time."""

    def scores(reference, caption, images):
        from neucore_plugin.common.images import load_image

        pixels_of = {path: model.image_processor(load_image(path))[None] for path in (reference, *images)}
        query = F.normalize(model.encode_query(pixels_of[reference], [caption])["fused"], dim=-1)
        vectors = [F.normalize(model.encode_image(pixels_of[path])["fg"], dim=-1) for path in images]
        return [float(query @ vector.T) for vector in vectors]

    found = []
    if name == "circo":
        images = [root / f"unlabeled2017/{number:012}.jpg" for number in range(1, 61)]
        for n, query in enumerate(json.loads((root / "annotations/val.json").read_text())):
            values = scores(images[n], query["relative_caption"], images)
            order = sorted(range(60), key=lambda place: -values[place])[:25]
            right = [place + 1 in query["gt_img_ids"] for place in order]
            found.append(sum(sum(right[: k + 1]) / (k + 1) for k in range(25) if right[k]) / 2)
        return 100 * sum(found) / len(found)
    split = json.loads((root / "image_splits/split.rc2.val.json").read_text())
    for query in json.loads((root / "captions/cap.rc2.val.json").read_text()):
        names = [image for image in split if image != query["reference"]]
        files = [root / "img_raw" / split[image] for image in names]
        values = scores(root / "img_raw" / split[query["reference"]], query["caption"], files)
        own = values[names.index(query["target_hard"])]
        found.append(sum(value > own for value in values) < 50)
    return 100 * sum(found) / len(found)


def test_a_training_of_it_and_an_evaluation_that_lacks_weights_are_refused(hosts, circo_root, tmp_path, capsys):
    config = write_yaml(hosts, circo_root, tmp_path, "circo", tmp_path)
    arguments = ["train", "--cfg-path", str(config), "--options", "run.evaluate=false"]
    assert cli.main(arguments) == 2
    assert "model.method: average trains nothing; evaluate it: neucore evaluate" in capsys.readouterr().err
    assert cli.main(["evaluate", "--cfg-path", str(config), "--options", "run.resume=auto"]) == 2
    assert "run.resume: got 'auto'; average has no weights of its own" in capsys.readouterr().err
    lacking = ["model.method=inversion", f"model.inversion.weights={tmp_path / 'gone.pt'}"]
    assert cli.main(["evaluate", "--cfg-path", str(config), "--options", *lacking]) == 2
    assert "gone.pt' does not exist; allowed: the path of phi's weights" in capsys.readouterr().err
    assert cli.main(["submit", "circo", "--cfg-path", "eval_circo"]) == 2
    assert "give a checkpoint" in capsys.readouterr().err


def test_joint_from_evaluation_to_submission(circo_root, cache_root, tmp_path, alone):
    pytest.importorskip(
        "sentence_transformers.base.modality", exc_type=ImportError, reason="needs sentence-transformers 5.4 or later"
    )
    from embedder_case import SIDE, write_embedder

    encoder = {"name": "embedder", "repo": str(write_embedder(tmp_path))}
    backbone = {"image": {**encoder, "image_size": SIDE}, "text": encoder}
    content = yaml.safe_load((PROJECTS / "zeroshot_circo.yaml").read_text())
    content["model"] |= {"method": "joint", "backbone": backbone}
    content["datasets"]["circo"]["build_info"]["root"] = str(circo_root)
    content["run"] |= {"output_dir": str(tmp_path / "output"), "cache_dir": str(cache_root), "device": "cpu"}
    (tmp_path / "circo.yaml").write_text(yaml.safe_dump(content))
    metrics = launch.run(tmp_path / "circo.yaml", evaluate=True)
    model = CirBaseline.from_config({"method": "joint", "backbone": backbone}).eval()
    assert metrics["val"]["mAP@25"] == pytest.approx(slow(model, "circo", circo_root), abs=1e-4)
    submit = ["submit", "circo", "--cfg-path", str(tmp_path / "circo.yaml"), "--out", str(tmp_path / "files")]
    assert cli.main(submit) == 0
    assert submission.check(tmp_path / "files/circo_test.json") == "CIRCO, 5 queries"
