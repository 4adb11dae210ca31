"""Every backbone end to end in the host: tiny random encoders, one epoch, checkpoint, evaluation; training modes."""

import importlib.metadata
import importlib.util
import inspect
import json
import shutil
import sys
import warnings

import encoder_case
import hub_case
import pytest
import tiny
import torch
from lavis.common.registry import registry
from shapes import COLOURS, FORMS, draw_shape

import neucore_plugin
from neucore_plugin import launch
from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config import encoders, loading
from neucore_plugin.config.sections import model_types
from neucore_plugin.models.backbones import ENCODERS, build_backbone, encoder_class
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.retrieval import GalleryIndex
from neucore_plugin.training.optimisation import parameter_groups
from neucore_plugin.weights import checkpoint
from neucore_plugin.weights import pretrained as weights
from neucore_plugin.weights.trust import refuse_strangers

VIT, BERT = {"width": 32, "depth": 2, "heads": 2}, {"width": 32, "layers": 2, "heads": 2}
CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIP_VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
CLIP_RN = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
QFORMER = {"query_width": 32, "query_layers": 2, "query_heads": 2}


def clip(vision):
    return {"config": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": CLIP_TEXT}, "pretrained": "none"}


def sides(name, image, text):
    return {"image": {"name": name, **image}, "text": {"name": name, **text}}


RANDOM = (
    {"image_size": 32, "architecture": VIT, "pretrained": "none"},
    {"architecture": BERT, "pretrained": "none"},
)
TINY = {
    "blip": sides("blip", *RANDOM),
    "clip": sides("clip", clip(CLIP_VIT), clip(CLIP_VIT)),
    "clip_rn": sides("clip", clip(CLIP_RN), clip(CLIP_RN)),
    "albef": sides("albef", *RANDOM),
    "blip2": sides(
        "blip2",
        {"vit": "clip_L", "image_size": 28, "queries": 4, "architecture": {**VIT, **QFORMER}}
        | {"pretrained": "none", "vit_pretrained": "none"},
        {"architecture": BERT, "pretrained": "none"},
    ),
    # the image side of one model, the text side of another
    "mixed": {"image": {"name": "clip", **clip(CLIP_VIT)}, "text": {"name": "minilm_l6"}},
}
# Of other libraries: their weights and tokenizers lie in folders, which `hub_root` writes.
HUB = {
    "open_clip": (hub_case.needs_open_clip, "local-dir:{root}/open_clip", "local-dir:{root}/open_clip"),
    "siglip": (hub_case.needs_transformers, "{root}/siglip", "{root}/siglip"),
    "dinov2_bert": (hub_case.needs_transformers, "{root}/dinov2", "{root}/bert"),
}
SECTION = {"arch": "neucore", "embed_dim": 16, "concept_alignment": {"heads": 2}}
BLIP = {**SECTION, "backbone": TINY["blip"]}
DEFAULT = ("blip", "clip", "mixed")
ALL = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


def quiet(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def chosen(name, **tuning):
    backbone = {side: {**settings, **tuning} for side, settings in TINY[name].items()}

    def change(content):
        content["model"]["backbone"] = backbone
        content["datasets"]["folder"].pop("vis_processor")  # size, mean and deviation follow from the encoder
        content["run"] |= {"max_epoch": 1, "valid_splits": [], "test_splits": ["test"], "report": False}

    return change


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for kind in ("siglip", "dinov2", "bert"):
        hub_case.write_transformers(root / kind, kind)
    if importlib.util.find_spec("open_clip"):
        hub_case.write_open_clip(root / "open_clip", hub_case.open_clip_config())
    return root


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, (mark, *_) in HUB.items()])
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "tuned"])
def test_models_of_other_libraries_from_training_to_search(
    name, freeze, tiny_config, tmp_path, shapes_root, hub_root, monkeypatch
):
    places = HUB[name][1:]
    key, library = ("arch", "open_clip") if name == "open_clip" else ("repo", "huggingface")
    places = [place.format(root=hub_root) for place in places]
    for side, place in zip(("image", "text"), places, strict=True):
        monkeypatch.setitem(TINY.setdefault(name, {}), side, {"name": library, key: place})
    an_epoch_a_checkpoint_and_its_evaluation(name, freeze, tiny_config, tmp_path, shapes_root)
    processor = loading.read_yaml(next((tmp_path / "output").glob("*/config.yaml")))["datasets"]["folder"]
    fit = "shortest" if name == "open_clip" else "stretch"
    assert processor["vis_processor"]["eval"]["fit"] == fit  # as the model's files say
    # The same files elsewhere, which the checkpoint's user names; the pixels' settings are the checkpoint's.
    moved = tmp_path / "moved"
    shutil.copytree(hub_root, moved)
    best = next((tmp_path / "output").glob("*/checkpoint_best.pth"))
    sides = {side: {"name": library, key: settings[key].replace(str(hub_root), str(moved)), "freeze": freeze}
             for side, settings in TINY[name].items()}  # fmt: skip
    stored = checkpoint.load(best)["architecture"]["config"]
    again = NeucoreModel.from_config({**stored, "backbone": sides, "checkpoint": str(best)})
    assert again.image_processor.fit == fit and str(moved) in again.config["backbone"]["image"][key]


@hub_case.needs_transformers
def test_how_pictures_become_square_is_said_where_the_encoder_is(tiny_config, hub_root):
    def change(content, **image):
        content["model"]["backbone"] = {"image": {"name": "huggingface", "repo": str(hub_root / "siglip"), **image}}
        content["datasets"]["folder"]["vis_processor"] = {"eval": {"name": "cir_image", "fit": "pad"}}

    tables = launch.registry_tables()
    with pytest.raises(ConfigError, match=r"eval.fit: got pad, .* takes stretch; .* in model.backbone.image.fit"):
        loading.load_config(tiny_config(change), tables=tables)
    config = loading.load_config(tiny_config(lambda content: change(content, fit="pad")), tables=tables).to_dict()
    assert config["model"]["backbone"]["image"]["interpolation"] == "bilinear"
    assert config["datasets"]["folder"]["vis_processor"]["train"]["fit"] == "pad"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "tuned"])
def test_an_epoch_a_checkpoint_and_its_evaluation(name, freeze, tiny_config, tmp_path, shapes_root):
    an_epoch_a_checkpoint_and_its_evaluation(name, freeze, tiny_config, tmp_path, shapes_root)


def an_epoch_a_checkpoint_and_its_evaluation(name, freeze, tiny_config, tmp_path, shapes_root):
    path = tiny_config(chosen(name, freeze=freeze))
    metrics = quiet(launch.run, path)["test"]
    best = next((tmp_path / "output").glob("*/checkpoint_best.pth"))
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert results["test"]["neucore"]["queries"] == 21
    options = [f"model.checkpoint={best}", f"run.output_dir={tmp_path / 'again'}"]
    again = quiet(launch.run, path, options, True)["test"]
    assert again["R@1"] == metrics["R@1"] and again["R@10"] == metrics["R@10"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is random any more
        model = neucore_plugin.load_model(best)
    assert model.backbone.freeze_image == model.backbone.freeze_text == freeze
    index = GalleryIndex.build(model, shapes_root / "images", progress=False)
    hits = index.search(draw_shape(FORMS[0], COLOURS[0]), "make it blue", k=3)
    assert len(hits) == 3
    maps = model.concept_maps(*(torch.zeros(1, 3, model.backbone.image.image_size, model.backbone.image.image_size)
                                if place != 1 else ["make it blue"] for place in range(3)))  # fmt: skip
    grid = model.backbone.image.grid
    assert [entry["reference"].shape for entry in maps[0]] == ([torch.Size(grid)] if grid else [])


@pytest.mark.parametrize("name", ["blip", "clip"])
def test_tuning_moves_what_it_names_and_nothing_else(name):
    backbone = quiet(build_backbone, encoder_case.complete(TINY[name], freeze=False, train_blocks=1, layer_decay=0.5))
    moving = {n.split(".")[0] + ":" + str(p.requires_grad) for n, p in backbone.named_parameters()}
    assert moving == {"image:True", "image:False", "text:True", "text:False"}
    trained = {id(p) for p in backbone.parameters() if p.requires_grad}
    expected = set()
    for encoder in (backbone.image, backbone.text):
        for part in (encoder.blocks[-1], *encoder.tail):
            expected |= {id(p) for p in part.parameters()} if isinstance(part, torch.nn.Module) else {id(part)}
    assert trained == expected


@pytest.mark.parametrize("name", ["blip", "clip"])
def test_adapters_on_the_hosts_encoders(name):
    pytest.importorskip("peft")
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0}
    backbone = quiet(build_backbone, encoder_case.complete(TINY[name], freeze=False, lora=lora)).train()
    names = [n for n, p in backbone.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names)
    assert {n.split(".")[0] for n in names} == {"image", "text"}
    pixels = torch.rand(2, 3, backbone.image.image_size, backbone.image.image_size)
    text = backbone.text(["a red dress", "blue"])
    (backbone.image(pixels)["tokens"].square().sum() + text["words"].square().sum() + text["sentence"].sum()).backward()
    assert all(p.grad is not None for n, p in backbone.named_parameters() if p.requires_grad)


def test_random_frozen_weights_travel_in_the_checkpoint_and_fetched_ones_do_not():
    model = quiet(NeucoreModel.from_config, BLIP)
    state, frozen = checkpoint.model_state(model)
    assert any(name.startswith("backbone.image.") for name in state) and "backbone.image" not in frozen
    model.backbone.image.in_checkpoint = False
    state, frozen = checkpoint.model_state(model)
    assert not any(name.startswith("backbone.image.") for name in state) and "backbone.image" in frozen


def test_weights_that_cannot_be_fetched_are_told_before_anything_is_encoded(tmp_path, tiny_config, monkeypatch):
    def refuse(url, target, **_):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def change(content):
        content["model"] = {"arch": "neucore", "model_type": "blip_cirr", "concepts": {"min_count": 1}}
        content["datasets"]["folder"].pop("vis_processor")

    with pytest.raises(CheckpointError) as caught:
        launch.run(tiny_config(change))
    text = str(caught.value)
    assert "https://" in text and str(tmp_path / "hub") in text and "'none'" in text and "no network" in text


@pytest.mark.parametrize(("side", "name"), [(side, name) for side, known in ENCODERS.items() for name in known])
def test_a_schema_says_what_its_encoder_takes_and_alone_has_defaults(side, name):
    takes = {}
    for kind in encoder_class(side, name).__mro__[:2]:  # a subclass hands further settings on
        parameters = inspect.signature(kind.__init__).parameters
        takes = {**parameters, **takes}
        if not {"settings", "identity"} & set(parameters):
            break
    offered = {"self", "settings", "identity", "frozen", "load", "words", "shared"}
    fixed = {"vit"} if name == "albef" else set()
    fields = set(encoders.BACKBONE_SCHEMAS[side][name].model_fields) - encoder_case.TUNING
    assert set(takes) - offered - fixed == fields and set(ENCODERS[side]) == set(encoders.BACKBONE_SCHEMAS[side])
    assert all(takes[key].default is inspect.Parameter.empty for key in fields)


def test_sizes_of_clips_pictures_are_the_hosts():
    from lavis.models.clip_models.model import _MODEL_CONFIGS

    for name, content in _MODEL_CONFIGS.items():
        if "timm_model_name" not in content["vision_cfg"]:
            size = content["vision_cfg"]["image_size"]
            assert encoders.pixels_of({"name": "clip", "arch": name})["image_size"] == size, name


@pytest.mark.parametrize("model_type", sorted(model_types("neucore")))
def test_every_model_type_is_a_valid_section_named_by_its_file(model_type):
    section = loading.model_defaults({"arch": "neucore", "model_type": model_type})
    content = loading.read_yaml(model_types("neucore")[model_type])
    assert content["model"]["model_type"] == model_type
    wanted = encoders.pixels_of(section["backbone"]["image"])
    for processor in content["preprocess"]["vis_processor"].values():  # for the host's load_model_and_preprocess
        processor.pop("augment", None)
        assert processor == {"name": "cir_image", **wanted}
    assert section["embed_dim"] % section["concept_alignment"]["heads"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"name": "blipp"}}, r"'blipp' is no image encoder. Did you mean 'blip'"),
        ({"image": {"name": "blip", "image_size": 100}}, r"image_size"),
        ({"image": {"name": "blip", "vit": "huge"}}, r"image.vit: got .*huge"),
        ({"image": {"name": "blip", "architecture": {"deph": 5}}}, r"architecture.deph: .* Did you mean 'depth'"),
        ({"image": {"name": "blip2", "tokens": "query"}}, r"image.tokens: got .*query"),
        ({"text": {"name": "blip", "max_words": 511}}, r"text.max_words: got 511"),
        ({"text": {"name": "blip", "max_wrods": 4}}, r"max_wrods: unknown key .* Did you mean 'max_words'"),
        ({"image": {"name": "clip", "arch": "ViT-B-23", "pretrained": "none"}}, r"Did you mean 'ViT-B-32'"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        quiet(NeucoreModel.from_config, {**BLIP, "backbone": {**TINY["blip"], **change}})


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path):
    path = tiny.save(quiet(NeucoreModel.from_config, BLIP), tmp_path / "blip.pth")
    with pytest.raises(CheckpointError, match=r"backbone.image.name: 'blip' in the checkpoint, 'clip' in the config"):
        NeucoreModel.from_config({**SECTION, "backbone": TINY["clip"], "checkpoint": str(path)})
    stored = checkpoint.load(path)
    broken = {name: value for name, value in stored["model"].items() if "blocks.1." not in name}
    checkpoint.save({**stored, "model": broken}, path)
    with pytest.raises(CheckpointError, match="missing in the file|frozen weights"):
        NeucoreModel.from_checkpoint(path)


def test_frozen_weights_may_lie_elsewhere_when_a_checkpoint_is_used(tmp_path, monkeypatch):
    """A checkpoint of an encoder from a URL: the same file is taken from the hub's folder, or where the config says."""
    source = quiet(build_backbone, encoder_case.complete(TINY["blip"]))
    published = {**source.image.state_dict(), **source.text.state_dict()}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    name = "https://storage.googleapis.com/sfr-vision-language-research/tiny.pth"
    file = weights.cached_path(name)
    file.parent.mkdir(parents=True)
    torch.save({"model": published}, file)
    fetched = {side: {**settings, "pretrained": name} for side, settings in TINY["blip"].items()}
    model = NeucoreModel.from_config({**SECTION, "backbone": fetched}, vocabulary=ConceptVocabulary(["red"]))
    path = tiny.save(model, tmp_path / "trained.pth")
    assert {"backbone.image", "backbone.text"} <= set(checkpoint.load(path)["frozen"])
    assert torch.equal(NeucoreModel.from_checkpoint(path).backbone.image.visual_encoder.cls_token,
                       source.image.visual_encoder.cls_token)  # fmt: skip
    moved = file.rename(tmp_path / "moved.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(CheckpointError, match="cannot fetch https://storage.*/tiny.pth"):
        NeucoreModel.from_checkpoint(path)
    local = {side: {**settings, "pretrained": str(moved)} for side, settings in TINY["blip"].items()}
    again = NeucoreModel.from_config({**SECTION, "backbone": local, "checkpoint": str(path)})
    assert again.fingerprint() != "" and torch.equal(again.backbone.image.visual_encoder.cls_token,
                                                      source.image.visual_encoder.cls_token)  # fmt: skip
    published["visual_encoder.cls_token"] = published["visual_encoder.cls_token"] + 1
    torch.save({"model": published}, moved)
    with pytest.raises(CheckpointError, match="missing in the file: backbone.image|frozen weights that are not those"):
        NeucoreModel.from_config({**SECTION, "backbone": local, "checkpoint": str(path)})


def test_a_model_of_the_registry_can_be_tuned_when_both_sides_are_it():
    import registered_case as case

    both = {"image": {"method": "image", "image_size": 32}, "text": {"method": "encode_texts"}}
    mine = {"name": "registered", "arch": "mine", "config": {"width": 12}, "freeze": False}
    if "mine" not in registry.mapping["model_name_mapping"]:
        registry.register_model("mine")(case.Mine)
    backbone = {side: {**mine, **settings} for side, settings in both.items()}
    model = NeucoreModel.from_config({**SECTION, "backbone": backbone}, vocabulary=ConceptVocabulary(["red"]))
    groups = parameter_groups(model, 0.01, {"backbone_image": 0.1})
    counted = [id(p) for group in groups for p in group["params"]]
    assert len(counted) == len(set(counted)) == sum(p.requires_grad for p in model.parameters())


def test_a_checkpoint_may_neither_import_nor_fetch_on_its_own(tmp_path, monkeypatch):
    held = {"backbone": {"image": {"name": "registered", "module": "evil_module"}, "text": {"name": "minilm_l6"}}}
    with pytest.raises(CheckpointError, match="evil_module.*may not import"):
        refuse_strangers("x.pth", held)
    with pytest.raises(CheckpointError, match="evil_module"):
        refuse_strangers("x.pth", held, {"backbone": {"image": {"module": "another"}}})
    refuse_strangers("x.pth", held, {"backbone": {"image": {"module": "evil_module"}}})
    monkeypatch.setitem(sys.modules, "evil_module", sys)
    refuse_strangers("x.pth", held)
    url = "https://evil.example/x/model_base_capfilt_large.pth"
    held = {"backbone": {"image": {"name": "blip", "pretrained": url}}}
    with pytest.raises(CheckpointError, match="none of the host's places"):
        refuse_strangers("x.pth", held)
    refuse_strangers("x.pth", held, held)
    official = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_base_capfilt_large.pth"
    refuse_strangers("x.pth", {"backbone": {"image": {"name": "blip", "pretrained": official}}})
    assert weights.cached_path(official).name == "model_base_capfilt_large.pth"
    assert weights.cached_path(url).name != weights.cached_path(official).name  # none is taken for the other


def test_an_evaluation_does_not_import_what_its_checkpoint_names(tmp_path, tiny_config):
    model = quiet(NeucoreModel.from_config, BLIP)
    model.config["backbone"]["image"] = {"name": "registered", "arch": "mine", "module": "evil_module"}
    tiny.save(model, tmp_path / "evil.pth")
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(CheckpointError, match="evil_module.*may not import"):
            launch.run(tiny_config(), [f"model.checkpoint={tmp_path / 'evil.pth'}"], True)
    finally:
        sys.path.remove(str(tmp_path))


def test_an_activation_that_followed_from_a_name_is_kept_in_the_checkpoint(tmp_path):
    source = quiet(build_backbone, encoder_case.complete(TINY["clip"]))
    file = tmp_path / "tiny-quickgelu.pth"
    state = {name: value for side in (source.image, source.text) for name, value in side.state_dict().items()}
    torch.save(state, file)
    named = {side: {**settings, "pretrained": str(file)} for side, settings in TINY["clip"].items()}
    named["image"]["image_size"] = 32
    model = NeucoreModel.from_config({**SECTION, "backbone": named}, vocabulary=ConceptVocabulary(["red"])).eval()
    assert model.backbone.image.quick_gelu
    path = tiny.save(model, tmp_path / "trained.pth")
    file.rename(tmp_path / "moved.pth")
    moved = {side: {**settings, "pretrained": str(tmp_path / "moved.pth")} for side, settings in named.items()}
    again = NeucoreModel.from_config({**SECTION, "backbone": moved, "checkpoint": str(path)}).eval()
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.backbone.image(pixels)["tokens"], model.backbone.image(pixels)["tokens"])


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        ("image", {"name": "blip", "image_size": 225}, "image_size: got 225; allowed: a multiple of the patch size 16"),
        ("image", {"name": "blip", "architecture": {"width": 30, "heads": 7}}, "heads: got 7; allowed: a divisor of"),
        ("text", {"name": "blip", "pretrained": "no/where.pth"}, "'no/where.pth' does not exist"),
        ("text", {"name": "minilm_l6", "train_blocks": 2}, "train_blocks: got 2; it needs freeze: false"),
        ("text", {"name": "minilm_l6", "lora": {"rank": 2}}, "lora: is given, but freeze is true"),
        (
            "text",
            {"name": "minilm_l6", "freeze": False, "train_blocks": 2, "lora": {"rank": 2}},
            "lora: is given beside train_blocks",
        ),
        ("image", {"name": "efficientnet_lite0", "lora": {"rank": 2}}, "lora: unknown key"),
        ("image", {"name": "open_clip"}, "pretrained: got null; allowed: a tag of open_clip's, the path of a file, or"),
        ("text", {"name": "open_clip", "pretrained": "no/where.pt"}, "'no/where.pt' does not exist"),
        ("text", {"name": "huggingface"}, "repo: got null; allowed: OWNER/NAME on the hub, or the path of a folder"),
        ("text", {"name": "huggingface", "repo": "a/b", "pretrained": "x.pt"}, 'got "x.pt"; allowed: one of none'),
        (
            "image",
            {"name": "huggingface", "repo": "a/b", "dtype": "float16", "freeze": False, "image_size": 32},
            "dtype: got float16; it needs freeze: true",
        ),
        ("image", {"name": "registered", "arch": "blip_feature_extractr"}, "Did you mean 'blip_feature_extractor'"),
    ],
)
def test_mistakes_in_an_encoder_are_told_by_the_check_of_the_config(side, change, message, tiny_config):
    def set_(content):
        content["model"]["backbone"][side] = change
        content["datasets"]["folder"].pop("vis_processor")

    with pytest.raises(ConfigError) as caught:
        loading.load_config(tiny_config(set_), tables=launch.registry_tables())
    assert message in str(caught.value) and "has 1 problem" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "package", "old"),
    [
        ("open_clip", {"pretrained": "none"}, "open_clip_torch", "2.20.0"),
        ("huggingface", {"repo": "google/siglip2-base-patch16-224"}, "transformers", "4.26.1"),
    ],
)
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_missing_or_old_library_is_told(name, settings, package, old, side, monkeypatch):
    remedy = rf"needs {package} .* or later; run: pip install 'neucore-plugin\[{name}\]'"
    for version, message in ((old, f"{package} {old} is too old for {name}"), (None, "which is not installed")):

        def found(name, version=version):
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", found)
        with pytest.raises(ConfigError, match=f"model.backbone.{side}: .*{message}.*{remedy}"):
            encoder_case.encoder(side, name, **settings)
