"""The yamls of projects/neucore: each is a valid config, and an evaluation takes its model from the checkpoint."""

import pytest
import yaml
from places import PROJECTS

from neucore_plugin import launch
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.config import loading

# A study is no config of one run: tests/study/test_plan.py
YAMLS = sorted(path.name for path in PROJECTS.glob("*.yaml") if not path.name.startswith("study_"))


@pytest.mark.parametrize("name", YAMLS)
def test_a_project_is_complete_but_for_what_the_user_gives(name, tmp_path):
    options = []
    if name.startswith("eval_"):
        with pytest.raises(ConfigError, match=r"has 1 problem:\s+model.checkpoint: is null"):
            loading.load_config(PROJECTS / name, tables=launch.registry_tables())
        (tmp_path / "best.pth").touch()
        options = [f"model.checkpoint={tmp_path / 'best.pth'}"]
    if name == "train_folder.yaml":
        options = [f"datasets.folder.build_info.root={tmp_path}"]
    found = loading.load_config(PROJECTS / name, options, launch.registry_tables()).to_dict()
    assert found["run"]["output_dir"].startswith("output/")
    # the command in the head of the file names the file
    head = (PROJECTS / name).read_text().split("model:\n")[0]
    verb = "evaluate" if name.startswith(("eval_", "zeroshot_")) else "train"
    assert f"neucore {verb} --cfg-path {name.removesuffix('.yaml')}" in head


def test_no_two_projects_write_into_one_folder():
    folders = [yaml.safe_load((PROJECTS / name).read_text())["run"]["output_dir"] for name in YAMLS]
    assert len(set(folders)) == len(folders)


def test_the_yamls_say_what_the_paper_and_its_released_form_have():
    for dataset in ("fashioniq", "shoes"):
        found = loading.load_config(PROJECTS / f"train_official_{dataset}.yaml").to_dict()
        section = found["datasets"][dataset]
        assert found["model"]["form"] == "released" and found["model"]["model_type"] == f"official_{dataset}"
        assert section["vis_processor"]["train"]["augment"] == "crop_flip"
        assert section["vis_processor"]["eval"].get("augment", "none") == "none"
        assert {side["fit"] for side in section["vis_processor"].values()} == {"released"}
        assert not any(side["clean"] for side in section["text_processor"].values())
        assert found["run"]["decay_all"] and found["model"]["fusion"]["dropout"] == 0.1
    plain = loading.load_config(PROJECTS / "train_fashioniq.yaml").to_dict()["datasets"]["fashioniq"]
    assert plain["vis_processor"]["eval"]["fit"] == "pad" and plain["text_processor"]["eval"]["clean"]
    papers = loading.load_config(PROJECTS / "train_cirr.yaml").to_dict()
    assert papers["model"]["concepts"]["pos"] == ["NOUN", "ADJ"]
    with pytest.raises(ConfigError, match=r"joiner: .*allowed: .*<and>, and"):
        loading.load_config(PROJECTS / "train_fashioniq.yaml", ["datasets.fashioniq.build_info.joiner=und"])


def test_an_evaluation_takes_the_model_from_its_checkpoint(tmp_path):
    stored = {**loading.model_defaults({"model_type": "blip_cirr", "embed_dim": 64}), "checkpoint": None}
    options = [f"model.checkpoint={tmp_path / 'best.pth'}"]
    (tmp_path / "best.pth").touch()
    found = loading.load_config(
        PROJECTS / "eval_cirr.yaml",
        options,
        section_of=lambda path, given: {"config": stored, "image_processor": {"fit": "crop"}},
    ).to_dict()
    assert found["model"] == {**stored, "checkpoint": str(tmp_path / "best.pth")}
    processors = found["datasets"]["cirr"]["vis_processor"]
    assert (processors["eval"]["fit"], processors["train"]["fit"]) == ("crop", "pad")  # as it was trained
    mean = processors["eval"]["mean"]
    assert mean == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)  # BLIP's
    other = loading.load_config(
        PROJECTS / "eval_cirr.yaml", [*options, "model.embed_dim=32"], section_of=lambda *_: {"config": stored}
    )
    assert other.model_cfg.embed_dim == 32  # an error when the weights are loaded
    trained = loading.load_config(PROJECTS / "train_cirr.yaml", options, section_of=lambda *_: {}).to_dict()
    assert trained["model"]["model_type"] == "blip_cirr"  # a training goes by its file
