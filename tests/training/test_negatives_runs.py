"""Runs with negatives beyond the batch, as users start them: stopped and continued; from a stream."""

import gc
from pathlib import Path

import pytest
import torch

from neucore_plugin import launch
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.task import ComposedImageRetrievalTask
from neucore_plugin.weights import checkpoint

EPOCHS = {"max_epoch": 2, "checkpoint_every_iters": 4}
ITERS = {"runner": "runner_cir_iter", "max_epoch": None, "max_iters": 12, "iters_per_inner_epoch": 5}
MODEL = {
    "matching": {"negatives": 14},
    "query_dropout": {"image": 0.2, "text": 0.2, "mode": "extra", "weight": 0.5},
    "feature_dropout": 0.2,
}


class Stopped(Exception):
    pass


@pytest.fixture
def started(tiny_config, monkeypatch):
    """Train; stop before a batch. The last checkpoint."""

    def start(name: str, run: dict, stop_at: int = -1, model_type: str = "embedded_paper") -> dict:
        def change(config: dict) -> None:
            config["model"] |= {**MODEL, "model_type": model_type}
            places = {"output_dir": str(Path(config["run"]["output_dir"]) / name), "resume": "auto", "report": False}
            config["run"].update({"ema_decay": 0.9, "valid_splits": [], "test_splits": ["val"], **places, **run})

        step, seen = ComposedImageRetrievalTask.train_step, []

        def noted(self, model, samples):
            if len(seen) == stop_at:
                raise Stopped
            seen.append(samples["query_id"])
            return step(self, model, samples)

        path = tiny_config(change, f"{name}.yaml")
        with monkeypatch.context() as patched:
            patched.setattr(ComposedImageRetrievalTask, "train_step", noted)
            try:
                launch.run(path)
            except Stopped:
                assert stop_at >= 0
        gc.collect()  # the run's folder is free again
        (last,) = (path.parent / "output" / name).glob("*/checkpoint_last.pth")
        return checkpoint.load(last)

    return start


@pytest.mark.parametrize("run", [EPOCHS, ITERS], ids=["epochs", "iterations"])
def test_continued_equals_uninterrupted(started, run):
    """Weights, their average, and the kept encodings, to the bit; a new set of negatives was drawn in between."""
    whole = started("whole", run)
    begun = started("parts", run, stop_at=6)
    assert begun["progress"]["iteration"] < 6
    parts = started("parts", run)
    assert parts["progress"]["iteration"] == whole["progress"]["iteration"] >= 12
    assert not torch.equal(begun["training"]["rows"], whole["training"]["rows"])
    for one, other in (
        (parts["model"], whole["model"]),
        (parts["average"]["weights"], whole["average"]["weights"]),
        (parts["training"]["kept"], whole["training"]["kept"]),
    ):
        assert one.keys() == other.keys() and one
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_gallery_with_gradient_continues_as_well(started):
    """The form in clauses keeps no encodings: its negatives follow from the seed and the step."""
    whole = started("whole", ITERS, model_type="embedded")
    started("parts", ITERS, stop_at=6, model_type="embedded")
    parts = started("parts", ITERS, model_type="embedded")
    assert whole["training"] is None and parts["model"].keys() == whole["model"].keys()
    assert all(torch.equal(value, whole["model"][name]) for name, value in parts["model"].items())


def test_a_stream_says_what_to_set_instead(tiny_config, monkeypatch):
    path = tiny_config(lambda config: config["model"].update(MODEL))
    build = ComposedImageRetrievalTask.build_datasets

    def streamed(self, cfg):
        datasets = build(self, cfg)
        datasets["folder"]["train"].streamed = True
        return datasets

    monkeypatch.setattr(ComposedImageRetrievalTask, "build_datasets", streamed)
    with pytest.raises(ConfigError, match="comes as a stream.*model.matching.negatives: batch"):
        launch.run(path)
