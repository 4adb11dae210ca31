"""Any registered model as a backbone: models of one's own, the host's feature extractors, shared ones, and mistakes."""

import sys
from types import SimpleNamespace

import pytest
import torch
from encoder_case import check_alone
from encoder_case import encoder as encoder_of
from lavis.common.registry import registry
from registered_case import Mine, Silent, TinyAlbef, TinyBlip, Typed
from torch import nn

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.config.loading import model_defaults
from neucore_plugin.models.backbones.encoder import normalisation

TEXTS = ["red dress", "", "a much longer red dress", "sleeveless"]


@pytest.fixture(autouse=True)
def models():
    """Names in the host's registry, for one test."""
    names = {"test_mine": Mine, "test_silent": Silent, "test_typed": Typed}
    names |= {"test_blip": TinyBlip, "test_albef": TinyAlbef}
    torch.manual_seed(0)
    for name, kind in names.items():
        registry.register_model(name)(kind)
    yield
    for name in names:
        del registry.mapping["model_name_mapping"][name]


def pixels(count=3, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def image(arch="test_mine", **settings):
    return encoder_of("image", "registered", arch=arch, **{"image_size": 32, **settings}).eval()


def text(arch="test_mine", **settings):
    """By `encode_texts` of Mine; the host's extractors are asked for features."""
    settings = {"method": "encode_texts" if arch == "test_mine" else None, **settings}
    return encoder_of("text", "registered", arch=arch, **settings).eval()


# ---- models of one's own ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_of_ones_own_is_found_by_name():
    encoder, images = image(), pixels()
    out = encoder(images)
    assert (encoder.width, encoder.num_tokens, encoder.grid, encoder.pooled_width) == (12, 16, (4, 4), 12)
    assert torch.equal(out["tokens"], encoder.host.model.image(images))
    assert torch.equal(out["pooled"], out["tokens"].mean(1))
    assert (encoder.mean, encoder.in_checkpoint) == (normalisation("clip")[0], True)
    assert image(config={"width": 20}, save_weights=False, mean=[0, 0, 0]).width == 20
    assert image(spatial=False).grid is None
    with pytest.raises(ValueError, match="test_mine expects 32 px squares, given"):
        encoder(pixels(side=16))


@torch.no_grad()
def test_methods_of_ones_own():
    encoder, images = image(method="encode_pixels"), pixels()
    out, model = encoder(images), encoder.host.model
    assert (encoder.num_tokens, encoder.grid, encoder.pooled_width) == (17, (4, 4), 2)
    assert torch.equal(out["tokens"][:, 1:], model.image(images))
    assert torch.equal(out["pooled"], model.other(model.image(images).mean(1)))
    words = text()
    out = words(TEXTS)
    assert out["mask"].sum(1).tolist() == [2, 0, 5, 1]
    assert not out["words"][~out["mask"]].any()
    letters = words.host.model.letters.weight
    assert torch.equal(out["words"][0, 1], letters[ord("d")])
    assert torch.equal(out["sentence"][0], letters[ord("r")] + letters[ord("d")])
    assert not out["sentence"][1].any()


@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch():
    encoder = text()
    check_alone(encoder, TEXTS)
    assert [tuple(value.shape) for value in encoder(["", " "]).values()] == [(2, 0, 12), (2, 0), (2, 12)]
    assert [tuple(value.shape) for value in encoder([]).values()] == [(0, 0, 12), (0, 0), (0, 12)]
    few = text(max_words=2)
    few.load_state_dict(encoder.state_dict())
    assert torch.equal(few(["red dress now"])["sentence"], encoder(["red  dress"])["sentence"])


def test_a_module_is_imported_first(tmp_path, monkeypatch):
    (tmp_path / "encoders_of_mine.py").write_text(
        "import torch\nfrom lavis.common.registry import registry\nfrom lavis.models.base_model import BaseModel\n\n\n"
        '@registry.register_model("test_imported")\nclass Imported(BaseModel):\n'
        "    def __init__(self):\n        super().__init__()\n        self.layer = torch.nn.Conv2d(3, 4, 16, 16)\n\n"
        "    def encode(self, images):\n        return self.layer(images).flatten(2).transpose(1, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"no model 'test_imported'\..*name it in model.backbone.image.module"):
        image("test_imported")
    try:
        assert image("test_imported", method="encode", module="encoders_of_mine").grid == (2, 2)
    finally:
        registry.mapping["model_name_mapping"].pop("test_imported", None)
        sys.modules.pop("encoders_of_mine", None)
    with pytest.raises(ConfigError, match="image.module: No module named 'encoders_of_yours'; it must be installed"):
        image(module="encoders_of_yours")


# ---- the host's feature extractors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["test_blip", "test_albef"])
@torch.no_grad()
def test_the_hosts_feature_extractors(arch):
    side, images = image(arch), pixels()
    model = side.host.model
    expected = model.extract_features({"image": images, "text_input": None}, mode="image").image_embeds
    out = side(images)
    assert torch.equal(out["tokens"], expected)
    assert (side.num_tokens, side.grid) == (17, (4, 4))
    assert torch.equal(out["pooled"], expected[:, 0])  # the class token
    words = text(arch, shared=side.host, max_words=6)
    out = words([*TEXTS, "one two three four five sleevelessness"])
    assert out["mask"].sum(1).tolist() == [2, 0, 5, 2, 6]  # word pieces, without [CLS] and [SEP]
    for row, given in enumerate(TEXTS):
        if given:
            alone = model.extract_features({"image": None, "text_input": [given]}, mode="text").text_embeds[0]
            torch.testing.assert_close(out["sentence"][row], alone[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(out["words"][row, : len(alone) - 2], alone[1:-1], atol=1e-5, rtol=0)
    assert not out["sentence"][1].any()
    assert not out["words"][~out["mask"]].any()
    nothing = words(["\u200b", "red"])  # a letter that the tokenizer drops: no word is left
    assert nothing["mask"].sum(1).tolist() == [0, 1]
    assert not nothing["sentence"][0].any()


@torch.no_grad()
def test_a_text_longer_than_the_model_takes_is_cut():
    encoder = text("test_blip")
    out = encoder(["unbelievably " * 400, "red"])  # the host's own call ends in an error past 512 word pieces
    assert out["mask"].sum(1).tolist() == [64, 1]


def test_a_model_that_cuts_texts_itself_needs_a_method(monkeypatch):
    encoder = text("test_blip")
    original = encoder.host.model.extract_features

    def extract(samples, mode):
        return SimpleNamespace(text_embeds=original(samples, mode).text_embeds[:, :6])

    monkeypatch.setattr(encoder.host.model, "extract_features", extract)
    with pytest.raises(ConfigError, match=r"gives \[3, 6, 16\] as text_embeds of \[3, 7\] word pieces; name"):
        encoder(TEXTS)


# ---- training --------------------------------------------------------------------------------------------------------


def trained(encoder):
    return {name.removeprefix("host.model.") for name, value in encoder.named_parameters() if value.requires_grad}


def test_gradients_reach_what_is_trained_and_the_rest_is_idle():
    encoder = image(frozen=False, blocks="layers").train()
    assert {name.partition(".")[0] for name in trained(encoder)} == {"patches", "layers"}
    encoder(pixels())["tokens"].square().sum().backward()
    assert all(value.grad is not None for value in encoder.parameters() if value.requires_grad)
    assert len(encoder.idle) == 3  # letters and other
    assert encoder.blocks == list(encoder.host.model.layers)
    assert (encoder.lora_targets, encoder.tail) == ((), ())  # the blocks are linear layers, they hold none
    words = text(frozen=False)
    assert {name.partition(".")[0] for name in trained(words)} == {"letters"}
    words(TEXTS)["sentence"].square().sum().backward()
    assert all(value.grad is not None for value in words.parameters() if value.requires_grad)


def test_of_a_shared_model_both_sides_are_trained():
    side = image(frozen=False)
    words = text(frozen=False, shared=side.host)
    assert words.host is side.host
    assert {name.partition(".")[0] for name in trained(words)} == {"patches", "layers", "letters"}
    assert len(side.idle) == len(words.idle) == 2  # other's weight and bias
    (side(pixels())["tokens"].sum() + words(TEXTS)["words"].square().sum()).backward()
    assert all(value.grad is not None for value in side.parameters() if value.requires_grad)


def test_what_the_model_has_frozen_itself_stays_frozen(monkeypatch):
    build = Mine.from_config.__func__

    def half_frozen(cls, cfg=None):
        model = build(cls, cfg)
        model.patches.requires_grad_(False)
        return model

    monkeypatch.setattr(Mine, "from_config", classmethod(half_frozen))
    assert {name.partition(".")[0] for name in trained(image(frozen=False))} == {"layers"}


@pytest.mark.parametrize("side", [image, text])
def test_features_without_gradient_cannot_be_trained(side):
    side("test_blip")
    with pytest.raises(
        ConfigError, match=r"freeze is false, but no gradient reaches .* name a differentiable `method`"
    ):
        side("test_blip", frozen=False)


def test_a_method_makes_the_hosts_encoder_trainable():
    settings = {"method": "visual_encoder.forward_features", "blocks": "visual_encoder.blocks"}
    encoder = image("test_blip", frozen=False, **settings)
    assert {name.partition(".")[0] for name in trained(encoder)} == {"visual_encoder"}
    assert encoder.lora_targets == ("fc1", "fc2", "proj", "qkv")
    assert torch.equal(encoder(pixels())["tokens"], image_embeds(encoder.host.model))


@torch.no_grad()
def image_embeds(model):
    return model.extract_features({"image": pixels()}, mode="image").image_embeds


def test_words_are_remembered_while_frozen():
    encoder = text().requires_grad_(False)
    assert not encoder.words_live
    found = encoder.embed_words(["red", "", "dress"])
    assert torch.equal(found[0], encoder(["red"])["sentence"][0])
    assert not found[1].any()
    assert encoder.embed_words([]).shape == (0, 12)
    called = []
    encoder.host.model.letters.register_forward_hook(lambda *args: called.append(args))
    assert torch.equal(encoder.embed_words(["dress", "red"]), found[[2, 0]])
    assert not called
    state = {name: value + 1 for name, value in encoder.state_dict().items()}
    nn.ModuleDict({"text": encoder}).load_state_dict({f"text.{name}": value for name, value in state.items()})
    assert (encoder.embed_words(["red"])[0] - found[0]).abs().max() > 1e-3  # other weights, other words
    live = text(frozen=False)
    assert live.words_live
    assert live.embed_words(["red", "dress"]).requires_grad


def test_fingerprints_change_with_weights_and_settings():
    one = image()
    same = image()
    same.load_state_dict(one.state_dict())
    assert one.fingerprint == same.fingerprint != image(method="image").fingerprint
    with torch.no_grad():
        same.host.model.patches.weight[0, 0, 0, 0] += 1
    assert one.fingerprint != same.fingerprint
    long, short = (text(max_words=count, shared=one.host) for count in (64, 8))
    assert len({one.fingerprint, long.fingerprint, short.fingerprint}) == 3


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "test_mime"}, r"image.arch: the host has no model 'test_mime'. Did you mean 'test_mine'"),
        ({"arch": "test_silent"}, r"'test_silent' has no extract_features; name .*image.method: pixels \[B,3,H,W\]"),
        ({"method": "encode_pixel"}, "image.method: test_mine has no method 'encode_pixel'. Did you mean 'encode_pix"),
        ({"blocks": "layer"}, "image.blocks: test_mine has no list of modules 'layer'. Did you mean 'layers'"),
        ({"blocks": "other"}, "image.blocks: test_mine has no list of modules 'other'"),
        ({"model_type": "base"}, "image.model_type: test_mine has no type 'base'. Allowed: nothing"),
        ({"arch": "test_typed"}, "image.model_type: test_typed has several types: small, large"),
        ({"arch": "test_typed", "model_type": "smal"}, "no type 'smal'. Did you mean 'small'"),
        ({"arch": "test_typed", "model_type": "small", "config": {}}, "give model_type, or config in its place"),
        ({"config": {"width": -1}}, "image: test_mine cannot be built .RuntimeError: "),
        ({"method": "as_numbers"}, "test_mine gives list, wanted: pixels"),
        ({"method": "one_vector"}, r"test_mine gives \[1, 3\], wanted: pixels"),
        ({"method": "encode_pixels.forward"}, "has no method 'encode_pixels.forward'"),
        ({"method": "broken"}, "cannot encode a blank input .RuntimeError: mat1 and mat2 shapes.*needed is"),
    ],
)
def test_mistakes_of_an_image_side(settings, message):
    with pytest.raises(ConfigError, match=message):
        image(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "test_silent"}, r"text: the host's model 'test_silent' has no extract_features"),
        ({"method": None}, r"text: test_mine has no tokenizer of a BERT.* name a `method`: list of texts -> {'words'"),
        ({"method": "letters.forward"}, "cannot encode a blank input .TypeError"),
        ({"method": "as_numbers"}, r"text.method: as_numbers must give list of texts -> {'words'"),
    ],
)
def test_mistakes_of_a_text_side(settings, message):
    with pytest.raises(ConfigError, match=message):
        text(**settings)


def test_the_config_is_checked_before_the_host_is_asked():
    image_section = {"name": "registered", "config": 3, "mean": [1.0], "std": [0.5, 0.5, 0], "method": ""}
    with pytest.raises(ConfigError) as caught:
        model_defaults({"backbone": {"image": image_section, "text": {"name": "registered", "arch": "a", "mode": 1}}})
    for problem in (
        "model.backbone.image.arch: is required but not given",
        "model.backbone.image.config: got 3; allowed: a mapping",
        "model.backbone.image.mean: got [1.0]; allowed: a list of three numbers",
        "model.backbone.image.std: got [0.5, 0.5, 0]; allowed: a list of three numbers greater than 0",
        'model.backbone.image.method: got ""; allowed: a text that is not empty',
        "model.backbone.text.mode: unknown key (given 1)",
    ):
        assert problem in str(caught.value)
