"""Baselines: every method as a model, in a config, and end to end in the host."""

import copy
import json
import warnings
from typing import get_args

import clip_case
import pytest
import tiny
import torch
import yaml
from places import PROJECTS
from shapes import write_tiny
from tiny import BASELINE, TEXTS

import neucore_plugin
from neucore_plugin import cli, launch
from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config import loading
from neucore_plugin.config.model import ZERO_SHOT, CirBaselineSchema
from neucore_plugin.models.base import CirModel
from neucore_plugin.models.baseline import CirBaseline
from neucore_plugin.models.composers import COMPOSERS, Artemis
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.models.zero_shot import COMPOSERS as WITHOUT_TRAINING
from neucore_plugin.training.checkpointer import load_weights
from neucore_plugin.weights import checkpoint, trust

ZERO_SHOT_TYPES = ("zeroshot_clip_vitb32", "zeroshot_clip_vitl14", "zeroshot_qwen3vl_2b")
EMOJI = PROJECTS / "train_emoji.yaml"


# ---- as models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built():
    """One model a method."""
    return {method: tiny.build(method) for method in COMPOSERS}


def test_the_schema_names_the_methods():
    known = get_args(CirBaselineSchema.model_fields["method"].annotation)
    assert known == (*COMPOSERS, *WITHOUT_TRAINING) and tuple(WITHOUT_TRAINING) == ZERO_SHOT


def test_no_encoder_runs_for_what_a_method_does_not_read(built):
    pixels = tiny.pixels(built["sum"])
    for method, side in (("image_only", "text"), ("text_only", "image")):
        model = copy.deepcopy(built[method]).eval()
        model.matching_loss.reference_negatives = False
        calls = []
        getattr(model.backbone, side).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.encode_query(pixels, TEXTS)
        assert not calls
        model(tiny.samples(pixels))
        assert len(calls) == (0 if side == "text" else 1)  # the target alone


def test_only_what_a_method_reads_has_weights(built):
    for method, model in built.items():
        names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert ("sentence_projection" in names) is (method not in ("image_only", "cross_attention"))
        assert ("absent_image" in names) is (method != "text_only")
        assert {"word_projection", "image_projection", "absent_word"} <= names or method != "cross_attention"


def test_a_checkpoint_brings_the_method(built, tmp_path):
    path = tiny.save(built["tirg"], tmp_path / "best.pth")
    assert type(neucore_plugin.load_model(path)) is CirBaseline
    section = trust.section_of(path, {})["config"]
    assert (section["arch"], section["method"]) == ("cir_baseline", "tirg")


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("method", ["tirg", "artemis", "cross_attention"])
def test_on_other_encoders(method, tmp_path):
    """A CLIP ResNet, whose pooled vector has a width of its own, and a text encoder that is trained with the head."""
    image = {"name": "clip", "config": clip_case.RESNET, "pretrained": "none"}
    text = {"name": "glove_bigru", "word_dim": 8, "width": 16}
    section = {**BASELINE, "method": method, "backbone": {"image": image, "text": text}}
    model = CirBaseline.from_config(section, vocabulary=ConceptVocabulary(("blue",)), captions=TEXTS)
    assert model.pooled_projection[1].in_features == 24
    assert model.image_projection is None or model.image_projection[1].in_features == 256
    pixels = clip_case.pixels(3, 64)
    keys = {"reference_key": torch.arange(3), "target_key": torch.arange(3, 6), "right_keys": [(3,), (4,), (5,)]}
    texts = {"text_input": TEXTS, "concept_words": [()] * 3}
    model.train()({"reference_image": pixels, "target_image": pixels.flip(0), **texts, **keys})["loss"].backward()
    assert model.backbone.text.embedding.weight.grad.abs().sum() > 0
    with torch.no_grad():
        loaded = neucore_plugin.load_model(tiny.save(model, tmp_path / "best.pth"))
        assert loaded.backbone.text.words == model.backbone.text.words
        scores = [m.score(m.encode_query(pixels, TEXTS), m.encode_image(pixels)) for m in (model.eval(), loaded)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("method", ["tirg", "artemis"])
def test_checkpoints_of_an_earlier_form_are_refused(method, built, tmp_path):
    """Their weights would give other scores than those they were trained for, or do not fit."""
    path = tiny.save(built[method], tmp_path / "best.pth")
    stored = checkpoint.load(path)
    if method == "artemis":
        del stored["model"]["matching.text_length"]
    else:
        wide = stored["model"].pop("composer.residual.2.weight")
        for name in [name for name in stored["model"] if name.startswith(("composer.gate", "composer.residual."))]:
            del stored["model"][name]
        for part in ("gate", "residual"):
            stored["model"] |= {f"composer.{part}.0.weight": wide, f"composer.{part}.0.bias": wide[0]}
            stored["model"] |= {f"composer.{part}.2.weight": wide[:32], f"composer.{part}.2.bias": wide[0, :32]}
    checkpoint.save(stored, path)
    for load in (CirModel.from_checkpoint, lambda path: load_weights(copy.deepcopy(built[method]), path)):
        with pytest.raises(CheckpointError, match=f"does not fit(?s:.)*earlier version wrote it: {method} has changed"):
            load(path)


def test_checkpoints_of_another_model_or_method_are_refused(built, tmp_path):
    path = tiny.save(built["tirg"], tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match="holds a model of architecture 'cir_baseline', not 'neucore'"):
        NeucoreModel.from_checkpoint(path)
    with pytest.raises(CheckpointError, match="other settings(?s:.)*method: 'tirg' in the checkpoint, 'sum' in"):
        CirBaseline.from_config({**BASELINE, "method": "sum", "checkpoint": str(path)})
    changed = {**BASELINE, "method": "tirg", "query_dropout": {"image": 0.5}, "checkpoint": str(path)}
    assert CirBaseline.from_config(changed).query_dropout["image"] == 0.5
    stored = checkpoint.load(path)
    stored["architecture"]["arch"] = "blip"
    checkpoint.save(stored, tmp_path / "blip.pth")
    with pytest.raises(CheckpointError, match="architecture 'blip', not (?s:.)*'neucore' or 'cir_baseline'"):
        CirModel.from_checkpoint(tmp_path / "blip.pth")


def test_the_host_loads_it_by_name(built, tmp_path):
    from lavis.models import load_model, model_zoo

    assert "embedded" in dict(model_zoo)["cir_baseline"]
    assert not [name for name in dict(model_zoo)["cir_baseline"] if name.startswith("official_")]
    with pytest.warns(UserWarning, match="cir_baseline: projections and composer have random weights"):
        assert load_model("cir_baseline", is_eval=True).title == "combiner"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = tiny.save(built["artemis"], tmp_path / "best.pth")
        loaded = load_model("cir_baseline", checkpoint=str(path), is_eval=True)
    assert loaded.title == "artemis" and type(loaded.matching) is Artemis


# ---- in a config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", COMPOSERS)
def test_two_options_make_a_job_of_neucore_a_baseline(method):
    options = ["model.arch=cir_baseline", f"model.method={method}", "run.output_dir=output/other"]
    found, plain = loading.load_config(EMOJI, options).to_dict(), loading.load_config(EMOJI).to_dict()
    assert found["model"]["method"] == method and found["run"].pop("output_dir") == "output/other"
    plain["run"].pop("output_dir")
    assert {key: found[key] for key in ("run", "datasets", "preprocess")} == {
        key: plain[key] for key in ("run", "datasets", "preprocess")
    }
    for key in ("backbone", "embed_dim", "query_dropout", "concepts"):
        assert found["model"][key] == plain["model"][key]
    plain["model"]["matching"].pop("terms")
    assert found["model"]["matching"] == plain["model"]["matching"]
    assert not {"fusion", "concept_alignment", "loss", "form"} & set(found["model"])


def test_types_are_those_of_neucore_but_the_released_form_and_those_that_train_nothing():
    tables = loading.package_tables()
    shared = {name: path for name, path in tables.models["neucore"].items() if not name.startswith("official_")}
    own = CirBaseline.PRETRAINED_MODEL_CONFIG_DICT
    assert tables.models["cir_baseline"] == own and own.keys() - shared.keys() == set(ZERO_SHOT_TYPES)
    assert shared.items() <= own.items() and all(name.startswith("zeroshot_") for name in ZERO_SHOT_TYPES)
    for name in shared:
        section = loading.model_defaults({"arch": "cir_baseline", "model_type": name})
        assert section["backbone"] == loading.model_defaults({"model_type": name})["backbone"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method=tirgg"], r"model.method: got \"tirgg\"; allowed: one of .*combiner.*Did you mean 'tirg'"),
        (
            ["fusion.steps=3"],
            "model.fusion: is a setting of neucore, not of cir_baseline; take it out. Allowed here: ",
        ),
        (["matching.terms=[fused]"], "model.matching.terms: is a setting of neucore, not of cir_baseline; take it out"),
        (["metod=tirg"], "model.metod: unknown key .*Did you mean 'method'"),
        (["model_type=official_cirr"], "'official_cirr' is no model type of cir_baseline"),
        (["method=tirg", "dropout=0.3"], "model.dropout: got 0.3; tirg has none, only combiner and cross_attention"),
        (
            ["method=cross_attention", "cross_attention.heads=3"],
            "cross_attention.heads: got 3; allowed: a divisor of",
        ),
        (
            ["method=image_only", "backbone.text.name=glove_bigru"],
            "model.backbone.text.freeze: got false; image_only reads no text",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        loading.load_config(EMOJI, ["model.arch=cir_baseline", *(f"model.{option}" for option in options)])


def test_other_ways_to_a_bad_model_are_told_too():
    with pytest.raises(ConfigError, match=r"model\.method: is a setting of cir_baseline, not of neucore"):
        loading.load_config(EMOJI, ["model.method=tirg"])
    with pytest.raises(ConfigError, match="model.dropout: got 0.1; sum has none"):
        CirBaseline.from_config({**BASELINE, "method": "sum", "dropout": 0.1})


# ---- end to end ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(shapes_root, cache_root, tmp_path_factory):
    """Three epochs of two methods from one yaml of NEUCORE: {method: output folder}, and that yaml."""

    def change(content):
        for key in ("concept_alignment", "fusion"):
            content["model"].pop(key, None)

    path = write_tiny(shapes_root, cache_root, tmp_path_factory.mktemp("baselines"), change)
    folders = {}
    for method in ("artemis", "text_only"):
        folders[method] = path.parent / method
        options = ["model.arch=cir_baseline", f"model.method={method}", f"run.output_dir={folders[method]}"]
        launch.run(path, options)
    return folders, path


def test_results_are_named_by_the_method(runs, capsys, tmp_path):
    folders, _ = runs
    less = ["text_only", "image_only"]
    for method, rows in (("artemis", ["artemis", *less]), ("text_only", less)):
        results = json.loads((folders[method] / "results.json").read_text())
        assert [list(results[split]) for split in ("val", "test")] == [rows, rows]
        record = json.loads(next(folders[method].glob("*/evaluation.json")).read_text())
        assert record["results"] == results and set(record["per_change"]["val"]) == {"colour", "form"}
        page = (folders[method] / "report.html").read_text()
        assert "NEUCORE" not in page and "Where each concept lies" not in page
        title = "ARTEMIS" if method == "artemis" else "text only"
        assert f"<title>{title} on folder</title>" in page and f">{title}</th>" in page
    assert cli.main(["report", str(folders["artemis"]), "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["val", "artemis"]
    assert "<title>ARTEMIS on folder: " in (tmp_path / "page.html").read_text()


def test_it_learns(runs):
    """Both terms of the query count: the two together are far above either alone (chance: R@5 of 22)."""
    rows = json.loads((runs[0]["artemis"] / "results.json").read_text())["val"]
    assert rows["artemis"]["R@5"] > 60 and rows["artemis"]["R@5"] > 1.5 * rows["text_only"]["R@5"]


def test_a_config_of_neucore_evaluates_a_baseline_and_search_takes_it(runs, shapes_root, tmp_path, capsys):
    folders, path = runs
    best = next(folders["artemis"].glob("*/checkpoint_best.pth"))
    content = yaml.safe_load(path.read_text())
    content["run"]["output_dir"] = str(tmp_path / "again")
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(content))
    assert cli.main(["evaluate", "--cfg-path", str(tmp_path / "evaluate.yaml"), "--checkpoint", str(best)]) == 0
    again, first = ((folder / "results.json").read_bytes() for folder in (tmp_path / "again", folders["artemis"]))
    assert again == first
    query = ["--folder", str(shapes_root / "images"), "--image", "circle-red.png", "--text", "make it blue", "-k", "3"]
    capsys.readouterr()
    assert cli.main(["search", "--checkpoint", str(best), *query, "--device", "cpu", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == 3 and hits[0]["score"] >= hits[1]["score"] >= hits[2]["score"]
