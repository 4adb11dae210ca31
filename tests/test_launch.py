"""The main flow: registry tables, ids of runs, the host's own parts, errors before anything is touched."""

from pathlib import Path

import lavis.tasks
import pytest
from lavis.common.registry import registry

from neucore_plugin import launch
from neucore_plugin.common.errors import ConfigError


def test_job_ids_differ():
    assert len({launch.new_job_id() for _ in range(20)}) == 20


def test_registry_tables_know_both_sides():
    tables = launch.registry_tables()
    assert Path(tables.models["neucore"]["embedded"]).is_file()
    assert Path(tables.models["blip_caption"]["base_coco"]).is_file()
    assert {"runner_cir", "runner_base"} <= set(tables.runners)
    assert "test_combo" in tables.splits["emoji"]


def test_main_flow_of_the_host_itself(tmp_path, alone):
    """Arch, task, data set and runner that are none of ours go the stock way, with their keys unchecked."""
    seen = []

    class Task(lavis.tasks.BaseTask):
        def build_datasets(self, cfg):
            return {"stub": {"train": [1, 2]}}

        def build_model(self, cfg):
            return ("model", cfg.model_cfg.own_key)

    class Runner:
        def __init__(self, cfg, job_id, task, model, datasets):
            seen.append((model, datasets, cfg.run_cfg.own_key, cfg.run_cfg.rank))

        def train(self):
            return "trained"

        def evaluate(self, skip_reload=False):
            return f"evaluated {skip_reload}"

    mappings = registry.mapping
    mappings["task_name_mapping"]["stub_task"], mappings["runner_name_mapping"]["stub_runner"] = Task, Runner
    path = tmp_path / "stock.yaml"
    path.write_text(
        "model: {arch: blip_caption, model_type: base_coco, own_key: 1}\n"
        "datasets: {coco_caption: {own_key: 2}}\n"
        "run: {task: stub_task, runner: stub_runner, own_key: 3, device: cpu, seed: 1}\n"
    )
    try:
        assert launch.run(path) == "trained"
        assert launch.run(path, evaluate=True) == "evaluated True"
    finally:
        del mappings["task_name_mapping"]["stub_task"], mappings["runner_name_mapping"]["stub_runner"]
    assert seen[0] == (("model", 1), {"stub": {"train": [1, 2]}}, 3, 0)
    assert registry.get("configuration").run_cfg.own_key == 3


def test_a_bad_config_is_told_before_data_are_touched(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("data were touched")

    monkeypatch.setattr(registry.get_task_class("composed_image_retrieval"), "build_datasets", never)
    path = tmp_path / "bad.yaml"
    path.write_text("model: {arch: neucore}\ndatasets: {emojy: {}}\nrun: {max_epoch: 1, sead: 1}\n")
    with pytest.raises(ConfigError) as caught:
        launch.run(path)
    assert "'emojy' is no known data set. Did you mean 'emoji'?" in str(caught.value)
    assert "run.sead: unknown key (given 1). Did you mean 'seed'?" in str(caught.value)
