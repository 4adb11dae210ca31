"""Config files: what is completed, what is refused and in which words."""

import subprocess
import sys
import typing

import pytest
import yaml
from config_case import minimal, write

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.config import data, encoders, kinds, loading, run, section, sections


def problems(folder, content, options=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loading.load_config(write(folder, content), options)
    first, *lines = str(caught.value).split("\n  ")
    assert "run.yaml has" in first
    assert f"has {len(lines)} problem" in first
    return lines


def set_at(content: dict, key: str, value) -> dict:
    place = content
    *parents, last = key.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return content


def test_minimal_file_is_completed(tmp_path):
    cfg = loading.load_config(write(tmp_path, minimal()))
    assert cfg.model_cfg.fusion.mode == "progressive"
    assert cfg.model_cfg.backbone.image.name == "efficientnet_lite0"
    assert cfg.datasets_cfg.emoji.vis_processor.eval.image_size == 224
    assert cfg.run_cfg.get("batch_size_train") == 32
    assert cfg.run_cfg.train_splits == ["train"]
    assert cfg.run_cfg.clip_grad_norm is None
    assert cfg.to_dict()["preprocess"]["vis_processor"]["eval"]["name"] == "cir_image"
    assert cfg.get_config() is cfg.config


def test_yaml_wins_over_defaults_and_options_over_yaml(tmp_path):
    content = set_at(set_at(minimal(), "model.embed_dim", 128), "run.seed", 1)
    cfg = loading.load_config(write(tmp_path, content), ["run.seed=2", "datasets.emoji.build_info.role_cap=3"])
    assert (cfg.model_cfg.embed_dim, cfg.run_cfg.seed) == (128, 2)
    assert cfg.datasets_cfg.emoji.build_info.role_cap == 3
    assert cfg.datasets_cfg.emoji.build_info.image_size == 224


@pytest.mark.parametrize("written", ["1e-4", "1.0E-4", "'1e-4'", "0.0001", "1"])
def test_numbers_as_yaml_writes_them(tmp_path, written):
    found = loading.load_config(write(tmp_path, yaml.safe_dump(minimal()) + f"  init_lr: {written}\n")).run_cfg.init_lr
    assert found == float(written.strip("'")) and isinstance(found, float)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["run.seed=3", "run.amp=bf16"], ["run.seed=3", "run.amp=bf16"]),
        (["run.seed", "3", "run.amp", "bf16"], ["run.seed=3", "run.amp=bf16"]),
        (["run.seed=3", "run.output_dir", "a=b"], ["run.seed=3", "run.output_dir=a=b"]),
        (None, []),
    ],
)
def test_both_forms_of_options(given, expected):
    assert loading.dotlist(given) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.seed"], "'run.seed' has no value; write run.seed=VALUE"),
        (["seed=3"], "'seed=3': a key begins with model., datasets., run."),
        (["run..seed=3"], "a key begins with"),
        (["run.test_splits=[a"], "'run.test_splits=[a' cannot be read"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ConfigError) as caught:
        loading.load_config(write(tmp_path, minimal()), options)
    assert message in str(caught.value)


def test_model_type_of_options_selects_the_default_file(tmp_path):
    types = {}
    for name, width in (("small", 16), ("large", 64)):
        types[name] = str(tmp_path / f"{name}.yaml")
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({"model": {"arch": "neucore", "model_type": name, "embed_dim": width}})
        )
    tables = sections.Tables(models={"neucore": types}, datasets=loading.package_tables().datasets)
    path = write(tmp_path, set_at(minimal(), "model.model_type", "small"))
    assert loading.load_config(path, tables=tables).model_cfg.embed_dim == 16
    cfg = loading.load_config(path, ["model.model_type=large"], tables)
    assert (cfg.model_cfg.embed_dim, cfg.model_cfg.model_type) == (64, "large")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("runn", {}, "runn: unknown section. Did you mean 'run'?"),
        ("model.arch", "neucor", "model.arch: 'neucor' is no known model. Did you mean 'neucore'?"),
        (
            "model.model_type",
            "embeded",
            "model.model_type: 'embeded' is no model type of neucore. Did you mean 'embedded'?",
        ),
        ("model.embed_dims", 64, "model.embed_dims: unknown key (given 64). Did you mean 'embed_dim'?"),
        ("model.embed_dim", "64", 'model.embed_dim: got "64"; allowed: a whole number of at least 1'),
        ("model.embed_dim", True, "model.embed_dim: got true; allowed: a whole number of at least 1"),
        ("model.embed_dim", 6, "model.concept_alignment.heads: got 4; allowed: a divisor of model.embed_dim (6)"),
        ("model.matching.negatives", "all", 'negatives: got "all"; allowed: batch, gallery, or a whole number of at'),
        ("model.matching.negatives", 0, "negatives: got 0; allowed: batch, gallery, or a whole number of at least 1"),
        ("model.fusion", 3, "model.fusion: got 3; allowed: a mapping with the keys mode, gumbel, steps,"),
        ("model.fusion.mode", "mixed", 'model.fusion.mode: got "mixed"; allowed: one of mixture, progressive. Did you'),
        ("model.fusion.dropout", 1.0, "model.fusion.dropout: got 1.0; allowed: a number of at least 0 and less than 1"),
        ("model.matching.terms", ["fused", "explict", "x"], "Did you mean 'explicit'?"),
        ("model.matching.terms", [], "model.matching.terms: got []; allowed: a list of at least 1 names"),
        (
            "model.matching.terms",
            ["background"],
            "got ['background']; model.form clauses has fused, explicit, implicit, change",
        ),
        (
            "model.form",
            "default",
            "matching.terms: got ['implicit', 'change']; model.form default has fused, explicit, background",
        ),
        ("model.matching.terms", ["change"], "got change alone; allowed: beside another term"),
        ("model.fusion.mode", "mixture", "got mixture; model.form clauses does not read it; the type embedded_paper"),
        ("model.fusion.steps", 5, "model.fusion.steps: got 5; model.form clauses does not read it"),
        ("model.form", "clause", 'model.form: got "clause"; allowed: one of clauses, default, released. Did you mean'),
        ("model.fusion.clauses", 0, "model.fusion.clauses: got 0; allowed: a whole number of at least 1"),
        ("model.concepts.pos", ["NOUNS"], "Did you mean 'NOUN'?"),
        ("model.concepts.pos", ["SPACE"], 'model.concepts.pos: got ["SPACE"]; allowed: one of ADJ, ADP'),
        ("model.concepts.pos", ["ADJ", 3], 'model.concepts.pos: got ["ADJ", 3]; allowed: a list of at least 1 names'),
        ("model.backbone.image.name", "efficientnet", "Did you mean 'efficientnet_lite0'?"),
        ("model.backbone.image.image_size", 100, "got 100; allowed: a whole number of at least 32, a multiple of 32"),
        ("model.backbone.image.gird", 7, "model.backbone.image.gird: unknown key (given 7). Did you mean 'grid'?"),
        ("model.backbone.image.grid", 8, "model.backbone.image.grid: got 8; allowed: at most image_size / 32, here 7"),
        ("model.backbone.sound", {}, "model.backbone.sound: unknown key"),
        ("model.checkpoint", "gone.pth", "model.checkpoint: 'gone.pth' does not exist"),
        ("datasets", {}, "datasets: got {}; allowed: a mapping of at least one data set"),
        ("datasets.emojis", {}, "datasets.emojis: 'emojis' is no known data set. Did you mean 'emoji'?"),
        ("datasets.emoji.build_infos", {}, "Did you mean 'build_info'?"),
        ("datasets.emoji.build_info.role_cap", 0, "datasets.emoji.build_info.role_cap: got 0; allowed: a whole number"),
        ("datasets.emoji.build_info.image_size", 31, "got 31; allowed: a whole number of at least 32 and at most 1024"),
        ("datasets.emoji.build_info.image_size", True, "got true; allowed: a whole number of at least 32 and at most"),
        (
            "datasets.emoji.vis_processor.eval.name",
            "cir_img",
            "'cir_img' is no known processor. Did you mean 'cir_image'?",
        ),
        (
            "datasets.emoji.vis_processor.eval.fit",
            "pads",
            'got "pads"; allowed: one of crop, pad, released, shortest, stretch',
        ),
        ("datasets.emoji.vis_processor.eval.image_size", 64, "efficientnet_lite0 takes 224; leave it out"),
        ("datasets.emoji.vis_processor.eval.mean", [0.4, 0.4, 0.4], "efficientnet_lite0 takes [0.5, 0.5, 0.5]"),
        ("datasets.folder", {}, "datasets.folder.build_info.root: got null; allowed: the path of your folder"),
        ("datasets.folder", {"build_info": 3}, "datasets.folder.build_info: got 3; allowed: a mapping with the keys"),
        ("datasets.folder.build_info.root", "no/where", "build_info.root: folder 'no/where' does not exist"),
        ("run.runner", "runner_circ", "run.runner: 'runner_circ' is no known runner. Did you mean 'runner_cir'?"),
        ("run.task", "composed_retrieval", "is no known task. Did you mean 'composed_image_retrieval'?"),
        ("run.lr_sched", "linear_warmup_cosine", "Did you mean 'linear_warmup_cosine_lr'?"),
        ("run.batch_sise_train", 8, "run.batch_sise_train: unknown key (given 8). Did you mean 'batch_size_train'?"),
        ("run.resume_ckpt_path", None, "run.resume_ckpt_path: unknown key (given null). Did you mean 'resume'?"),
        ("run.batch_size_train", 0, "run.batch_size_train: got 0; allowed: a whole number of at least 1"),
        ("run.init_lr", "fast", 'run.init_lr: got "fast"; allowed: a number greater than 0'),
        ("run.init_lr", float("nan"), "run.init_lr: got NaN; allowed: a number greater than 0"),
        ("run.ema_decay", 0, "run.ema_decay: got 0; allowed: a number greater than 0 and less than 1"),
        ("run.ema_decay", 1.0, "run.ema_decay: got 1.0; allowed: a number greater than 0 and less than 1"),
        ("run.grad_cache_chunk", 0, "run.grad_cache_chunk: got 0; allowed: a whole number of at least 1"),
        ("run.clip_grad_norm", 0.0, "run.clip_grad_norm: got 0.0; allowed: a number greater than 0"),
        ("run.accum_grad_iters", 0, "run.accum_grad_iters: got 0; allowed: a whole number of at least 1"),
        ("run", 3, "run: got 3; allowed: a mapping"),
        ("run.min_lr", 1.0, "run.min_lr: got 1.0; allowed: at most run.init_lr (0.0005)"),
        (
            "run.amp",
            "float16",
            "run.amp: got \"float16\"; allowed: one of bf16, false, fp16, true. Did you mean 'fp16'?",
        ),
        ("run.amp", 1, "run.amp: got 1; allowed: one of bf16, false, fp16, true"),
        ("run.evaluate", "yes", 'run.evaluate: got "yes"; allowed: true or false'),
        ("run.evaluate", True, "model.checkpoint: is null, but run.evaluate=true needs trained weights"),
        ("run.lr_scales", {"head": -1}, "run.lr_scales: got"),
        ("run.device", "gpu", 'run.device: got "gpu"; allowed: auto, cpu, cuda, cuda:N or mps'),
        ("run.resume", "gone.pth", "run.resume: 'gone.pth' does not exist; allowed: never, auto, or the path"),
        ("run.train_splits", [], "run.train_splits: got []; training needs a split"),
        ("run.train_splits", "train", 'run.train_splits: got "train"; allowed: a list of names'),
        (
            "run.test_splits",
            ["test_comb"],
            "run.test_splits: 'test_comb' is no split of emoji. Did you mean 'test_combo'?",
        ),
        ("run.max_epoch", None, "run.max_epoch: is required by runner_cir but not given"),
        ("run.max_epoch", 2.0, "run.max_epoch: got 2.0; allowed: a whole number of at least 1"),
    ],
)
def test_each_bad_value_gives_one_problem(tmp_path, key, value, message):
    lines = problems(tmp_path, set_at(minimal(), key, value))
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_all_problems_at_once(tmp_path):
    content = minimal()
    wrong = {
        "model.embed_dimm": 1,
        "model.fusion.mode": "x",
        "datasets.emoji.build_info.image_sise": 1,
        "run.seed": -1,
        "run.resume": "gone.pth",
        "run.valid_splits": ["vall"],
        "run.runner": "runner_cir_iter",  # needs two lengths
        "extra": 1,
    }
    for key, value in wrong.items():
        set_at(content, key, value)
    lines = problems(tmp_path, content, ["run.batch_size=4"])
    others = ["run.batch_size", "run.max_iters", "run.iters_per_inner_epoch"]
    assert sorted(line.split(":")[0] for line in lines) == sorted({*wrong, *others} - {"run.runner"})


def test_missing_sections(tmp_path):
    lines = problems(tmp_path, {"preprocess": {}})
    assert lines == [f"{key}: this section is required but not given" for key in ("model", "datasets", "run")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "cannot be read"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("model: {arch: ${nothing.here}}", "cannot be read"),
        ("run: {seed: 1}\nrun: {seed: 2}", "cannot be read"),
    ],
)
def test_broken_files(tmp_path, content, message):
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        loading.load_config(write(tmp_path, content))
    assert message in str(caught.value)


def test_another_encoder_does_not_inherit_settings(tmp_path):
    content = set_at(minimal(), "model.backbone.image", {"name": "features"})
    image = loading.load_config(write(tmp_path, content)).to_dict()["model"]["backbone"]["image"]
    assert image == {"name": "features", "width": 2048, "grid": 7, "image_size": 224, "freeze": True}


def test_a_replaced_value_gives_no_second_problem(tmp_path):
    content = set_at(set_at(minimal(), "run.init_lr", "fast"), "run.min_lr", 0.1)  # above the default of init_lr
    assert len(problems(tmp_path, content)) == 1


def test_sections_of_the_host_pass_unchecked(tmp_path):
    default = tmp_path / "base.yaml"
    default.write_text(yaml.safe_dump({"model": {"arch": "blip", "vit_type": "base", "own": 1}}))
    tables = sections.Tables(
        models={"blip": {"base": str(default)}},
        datasets={"coco": {}},
        tasks=("captioning",),
        runners=("runner_base", "runner_cir"),
    )
    content = {
        "model": {"arch": "blip", "model_type": "base", "own": 2},
        "datasets": {"coco": {"whatever": [1]}},
        "run": {"runner": "runner_base", "task": "captioning", "some_key": 1},
    }
    found = loading.load_config(write(tmp_path, content), tables=tables).to_dict()
    assert found["model"] == {"arch": "blip", "vit_type": "base", "own": 2, "model_type": "base"}
    assert found["datasets"] == content["datasets"]
    assert found["run"] == content["run"]


def test_fingerprint_keeps_what_decides_the_result(tmp_path):
    path = write(tmp_path, minimal())
    same = [[], ["run.output_dir=elsewhere"], ["run.num_workers=3", "run.resume=auto"]]
    same += [["datasets.emoji.build_info.cache_dir=x"], ["run.device=cpu", "run.log_freq=1"]]
    assert len({loading.load_config(path, options).fingerprint() for options in same}) == 1
    other = [
        ["run.seed=5"],
        ["model.embed_dim=64"],
        ["run.batch_size_train=8"],
        ["datasets.emoji.build_info.role_cap=1"],
    ]
    assert len({loading.load_config(path, options).fingerprint() for options in [[], *other]}) == 5


def test_model_defaults():
    assert loading.model_defaults({"embed_dim": 64})["loss"]["concept_weight"] == 20.0
    assert loading.model_defaults({"model_type": None})["model_type"] == "embedded"
    with pytest.raises(ConfigError, match=r"model\.fusion\.step: unknown key .* Did you mean 'steps'"):
        loading.model_defaults({"fusion": {"step": 2}})


def test_every_key_is_described_and_what_it_may_hold_can_be_said():
    def fields(schema, path):
        for key, field in schema.model_fields.items():
            yield f"{path}.{key}", field
            for kind in (field.annotation, *typing.get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, section.Section):
                    yield from fields(kind, f"{path}.{key}")

    schemas = [*sections.MODEL_SCHEMAS.values(), *data.DATASET_SCHEMAS.values(), *data.PROCESSOR_SCHEMAS.values()]
    schemas += [schema for side in encoders.BACKBONE_SCHEMAS.values() for schema in side.values()]
    for schema in (*schemas, run.RunSchema, data.PreprocessSchema):
        for path, field in fields(schema, schema.__name__):
            assert field.description and kinds.allowed(field), path


def test_needs_neither_torch_nor_lavis(tmp_path):
    code = "import sys; from neucore_plugin.config import loading; loading.load_config(sys.argv[1]); "
    code += "assert not {'torch', 'lavis', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, write(tmp_path, minimal())], check=True, cwd=tmp_path)


def test_the_order_of_options_does_not_matter(tmp_path):
    options = ["model.backbone.image.image_size=96", "model.backbone.image.name=blip"]
    for chosen in (options, options[::-1]):
        image = loading.load_config(write(tmp_path, minimal()), [*chosen]).model_cfg.backbone.image
        assert (image.name, image.image_size) == ("blip", 96)
