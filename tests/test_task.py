"""End to end through the host, on drawn shapes with the real encoders: both runners, evaluation, kill and resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shapes import write_tiny

from neucore_plugin import launch
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.images import load_image
from neucore_plugin.datasets import folder
from neucore_plugin.models.neucore import NeucoreModel

QUERIES = {"val": 22, "test": 21}
RECALLS = ("R@1", "R@5", "R@10", "R@50")


def run_folder(path: Path) -> Path:
    (found,) = (entry for entry in (path.parent / "output").iterdir() if entry.is_dir())
    return found


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained(shapes_root, cache_root, tmp_path_factory):
    """One finished training of three epochs: its yaml, output folder, run folder and metrics."""
    config = write_tiny(shapes_root, cache_root, tmp_path_factory.mktemp("trained"))
    metrics = launch.run(config)
    return config, config.parent / "output", run_folder(config), metrics


def test_training_leaves_results_report_checkpoints_and_concepts(trained):
    _, output, run, metrics = trained
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["val", "test"]
    for split, rows in results.items():
        assert list(rows) == ["neucore", "text_only", "image_only"]
        for values in rows.values():
            assert all(0 <= values[name] <= 100 for name in RECALLS) and values["queries"] == QUERIES[split]
            assert values["R@1"] <= values["R@5"] <= values["R@10"] <= values["R@50"] == 100
        assert metrics[split]["R@1"] == rows["neucore"]["R@1"]
        assert metrics[split]["agg_metrics"] == (rows["neucore"]["R@1"] + rows["neucore"]["R@10"]) / 2
    assert results["val"]["neucore"]["R@5"] > 60  # it learns what the text says: chance is 22
    assert (output / "report.html").read_bytes() == (run / "report.html").read_bytes()
    record = json.loads((run / "evaluation.json").read_text())
    assert record["results"] == results and set(record["per_change"]["val"]) == {"colour", "form"}
    assert {"config", "checkpoint", "data", "versions", "seed"} <= set(record)
    assert len(record["checkpoint"]["fingerprint"]) == 64 and record["config"]["run"]["seed"] == 7
    for name in ("checkpoint_best.pth", "checkpoint_last.pth", "log.txt", "concepts.json"):
        assert (run / name).stat().st_size > 0
    words = json.loads((run / "concepts.json").read_text())["words"]
    assert {"red", "square", "cross"} <= set(words)


def test_recalls_are_those_of_a_slow_evaluation(trained, shapes_root):
    """The best checkpoint, one query at a time from the image files, ranked by sorting in Python."""
    _, output, run, _ = trained
    model = NeucoreModel.from_checkpoint(run / "checkpoint_best.pth").eval()
    known = folder.images(shapes_root)
    triplets, gallery = folder.load_split(shapes_root, "test", known)
    hits = dict.fromkeys((1, 5, 10), 0)
    with torch.no_grad():
        process = model.image_processor.__class__(image_size=64)
        images = {name: process(load_image(path))[None] for name, path in known.items()}
        encoded = {name: model.encode_image(images[name]) for name in gallery.ids}
        for triplet in triplets:
            query = model.encode_query(images[triplet.reference], [triplet.caption])
            scores = {name: model.score(query, value).item() for name, value in encoded.items()}
            ranking = sorted((name for name in gallery.ids if name != triplet.reference), key=lambda n: -scores[n])
            rank = 1 + ranking.index(triplet.targets[0])
            for k in hits:
                hits[k] += rank <= k
    results = json.loads((output / "results.json").read_text())["test"]["neucore"]
    for k, count in hits.items():  # cached features are float16: one query may change sides
        assert abs(results[f"R@{k}"] - 100 * count / len(triplets)) <= 100 / len(triplets) + 1e-9


def test_evaluating_the_checkpoint_gives_the_same_metrics_and_keeps_the_run(trained, tiny_config):
    _, _, run, metrics = trained
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    path = tiny_config(lambda config: config["model"].update(checkpoint=str(run / "checkpoint_best.pth")))
    again = launch.run(path, evaluate=True)
    for split in ("val", "test"):
        assert {k: again[split][k] for k in RECALLS} == {k: metrics[split][k] for k in RECALLS}
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_iteration_runner_trains_the_same_way(tiny_config):
    def iterations(config):
        config["run"].update(runner="runner_cir_iter", max_iters=5, iters_per_inner_epoch=2)
        config["run"].pop("max_epoch")

    path = tiny_config(iterations)
    metrics = launch.run(path)
    assert metrics["val"]["queries"] == 22
    log = [json.loads(line) for line in (run_folder(path) / "log.txt").read_text().splitlines()]
    assert [line["iteration"] for line in log if "train_loss" in line] == [2, 4, 5]


def in_processes(config: Path, processes: int = 1, before: str = "") -> subprocess.CompletedProcess:
    """`python -m lavis.train` in processes of its own, after the statements of `before`."""
    script = config.parent / "launch.py"
    script.write_text(
        f"import runpy, sys\n{before}\nsys.argv = ['train', '--cfg-path', {str(config)!r}]\n"
        "runpy.run_module('lavis.train', run_name='__main__')\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, "-W", "ignore", *(launcher if processes > 1 else []), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if processes > 1 else str(torch.get_num_threads())}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


DIE_AT_THE_THIRD_CHECKPOINT = """
import os, signal
from neucore_plugin.weights import checkpoint
save, calls = checkpoint.save, []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*args, **kwargs)
checkpoint.save = dying
"""


def test_killed_training_resumes_to_the_same_weights(trained, tiny_config, caplog):
    """As those of an uninterrupted run of the same seed, bit for bit; asked for once more, it says it is finished."""
    _, _, whole, metrics = trained
    path = tiny_config(lambda config: config["run"].update(resume="auto"))
    killed = in_processes(path, before=DIE_AT_THE_THIRD_CHECKPOINT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    folder_of_run = run_folder(path)
    assert (folder_of_run / "checkpoint_last.pth").exists() and not (folder_of_run / "results.json").exists()
    with caplog.at_level("INFO"):
        assert launch.run(path) == metrics
        assert "finished already" not in caplog.text
        assert launch.run(path) == metrics
    assert run_folder(path) == folder_of_run and "finished already" in caplog.text
    for name in ("checkpoint_last.pth", "checkpoint_best.pth"):
        assert same(weights(folder_of_run / name), weights(whole / name))


def test_two_processes_evaluate_like_one(trained, tiny_config):
    _, output, run, _ = trained

    def evaluation(config: dict) -> None:
        config["model"].update(checkpoint=str(run / "checkpoint_best.pth"))
        config["run"].update(evaluate=True)

    path = tiny_config(evaluation)
    both = in_processes(path, processes=2)
    assert both.returncode == 0, both.stderr[-3000:]
    results = json.loads((path.parent / "output" / "results.json").read_text())
    assert results == json.loads((output / "results.json").read_text())


def test_two_processes_train(tiny_config):
    path = tiny_config(lambda config: config["run"].update(max_epoch=1, batch_size_train=16))
    both = in_processes(path, processes=2)
    assert both.returncode == 0, both.stderr[-3000:]
    assert json.loads((path.parent / "output" / "results.json").read_text())["val"]["neucore"]["queries"] == 22


def test_bad_images_are_all_listed_before_training(shapes_root, tiny_config, tmp_path):
    root = shutil.copytree(shapes_root, tmp_path / "damaged")
    cut = root / "images" / "circle-red.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (root / "images" / "cross-blue.png").write_text("no image at all")
    path = tiny_config(lambda config: config["datasets"]["folder"]["build_info"].update(root=str(root)))
    with pytest.raises(DataError, match="2 images cannot be read") as caught:
        launch.run(path)
    assert "circle-red.png" in str(caught.value) and "cross-blue.png" in str(caught.value)
    listing = Path(str(caught.value).split("all of them: ")[1].split(")")[0])
    assert len(json.loads(listing.read_text())) == 2
    assert not list(path.parent.glob("output/*/checkpoint*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["run"].update(valid_splits=["vall"]), r"valid_splits.*'?vall'?.*val"),
        (
            lambda c: c["run"].update(evaluate=True),
            r"model\.checkpoint: is null, but run\.evaluate=true needs trained weights",
        ),
        (lambda c: c["model"]["concepts"].update(min_count=10_000), "no concept that occurs at least 10000 times"),
        (lambda c: c["datasets"]["folder"]["build_info"].update(root="nowhere"), "nowhere"),
    ],
)
def test_bad_settings_are_told_before_training(tiny_config, change, message):
    path = tiny_config(change)
    with pytest.raises((ConfigError, DataError), match=message):
        launch.run(path)
    assert not list(path.parent.glob("output/*/checkpoint*"))
