"""CLIP's towers against the host's own encoders; texts that are long, empty or odd; sizes, training, settings."""

import json

import pytest
import torch
from blip_case import check_adapters, check_fingerprint
from clip_case import (
    RESNET,
    TEXT,
    VISION,
    VIT,
    clip_image,
    clip_text,
    host_clip,
    host_model,
    image,
    pixels,
    text,
    write_hosts,
)
from encoder_case import check_alone
from lavis.models.clip_models import pretrained as published
from lavis.models.clip_models.tokenizer import tokenize

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.config.loading import model_defaults
from neucore_plugin.models.backbones.encoder import normalisation
from neucore_plugin.weights import pretrained as weights

MEAN, STD = normalisation("clip")
TEXTS = ["make it red", "", "a longer dress, with no sleeves", "blue"]
LONG = "red dress " * 60


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    return write_hosts(tmp_path_factory.mktemp("clip"))


# ---- the same as the host's ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_vit_gives_the_hosts_vector_and_its_patches(hosts):
    encoder, images = image(hosts, "vit"), pixels(3, 32)
    assert (encoder.width, encoder.pooled_width, encoder.num_tokens, encoder.grid) == (24, 24, 17, (4, 4))
    out, host = encoder(images), hosts["vit"][0]
    assert out["tokens"].shape == (3, 17, 24)
    torch.testing.assert_close(out["pooled"], host.encode_image(images), atol=1e-5, rtol=0)
    seen = []
    hook = host.visual.transformer.register_forward_hook(lambda *args: seen.append(args[2]))
    host.encode_image(images)
    hook.remove()
    expected = host.visual.ln_post(seen[0].permute(1, 0, 2)) @ host.visual.proj
    torch.testing.assert_close(out["tokens"], expected, atol=1e-5, rtol=0)
    assert torch.equal(out["tokens"][:, 0], out["pooled"])


@torch.no_grad()
def test_a_resnet_gives_the_hosts_vector_and_its_last_map(hosts):
    encoder, images = image(hosts, "resnet"), pixels(2, 64)
    assert (encoder.width, encoder.pooled_width, encoder.num_tokens, encoder.grid) == (256, 24, 4, (2, 2))
    out, host, seen = encoder(images), hosts["resnet"][0], []
    hook = host.visual.layer4.register_forward_hook(lambda *args: seen.append(args[2]))
    torch.testing.assert_close(out["pooled"], host.encode_image(images), atol=1e-5, rtol=0)
    hook.remove()
    assert out["tokens"].shape == (2, 4, 256)
    torch.testing.assert_close(out["tokens"][1, 2], seen[0][1, :, 1, 0], atol=1e-5, rtol=0)  # row 1, column 0


@torch.no_grad()
def test_sentences_are_the_hosts(hosts):
    encoder, host = text(hosts), hosts["vit"][0]
    spoken = [one for one in TEXTS if one]
    out = encoder(spoken)
    torch.testing.assert_close(out["sentence"], host.encode_text(tokenize(spoken)), atol=1e-5, rtol=0)
    assert (encoder.width, encoder.word_width, encoder.max_words) == (24, 64, 75)


@pytest.mark.parametrize("chosen", [True, False])
@torch.no_grad()
def test_quick_gelu_is_the_hosts(hosts, chosen):
    host = host_model(VIT, quick_gelu=chosen)
    host.load_state_dict(hosts["vit"][0].state_dict())
    encoder, images = image(hosts, "vit", quick_gelu=chosen), pixels(2, 32)
    torch.testing.assert_close(encoder(images)["pooled"], host.encode_image(images), atol=1e-5, rtol=0)
    other = image(hosts, "vit", quick_gelu=not chosen)
    assert (other(images)["pooled"] - host.encode_image(images)).abs().max() > 1e-3
    assert other.fingerprint != encoder.fingerprint


@pytest.mark.parametrize(
    ("arch", "pretrained", "expected"),
    [
        ("ViT-B-32", "none", False),
        ("ViT-B-32-quickgelu", "none", True),
        ("ViT-B-32", "openai", True),
        ("RN50", "cc12m", True),  # its file is rn50-quickgelu-cc12m
        ("ViT-B-32", "https://somewhere.org/vit_b_32-laion2b.pt", False),
    ],
)
def test_quick_gelu_follows_the_names(arch, pretrained, expected):
    encoder = clip_text(arch=arch, pretrained=pretrained, load=False)
    assert encoder.quick_gelu is expected
    assert isinstance(encoder.blocks[0].mlp.gelu, host_clip.QuickGELU) is expected
    assert encoder.in_checkpoint is (pretrained == "none")


# ---- texts -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch(hosts):
    encoder = text(hosts)
    out = check_alone(encoder, [*TEXTS, LONG])
    assert out["mask"].sum(1).tolist() == [3, 0, 7, 1, 75]
    assert not out["words"][~out["mask"]].any()
    assert not out["sentence"][1].any()
    assert encoder(["", " \n"])["words"].shape == (2, 0, 24)
    assert [tuple(value.shape) for value in encoder([]).values()] == [(0, 0, 24), (0, 0), (0, 24)]


@torch.no_grad()
def test_a_long_text_keeps_its_end_token(hosts):
    """In the host, texts of more than 75 word pieces all have the vector of the start token."""
    encoder, host = text(hosts), hosts["vit"][0]
    long = [LONG, "a blue shirt " + LONG, "short " * 75 + "cut"]
    collapsed = host.encode_text(tokenize(long))
    out = encoder(long)["sentence"]
    assert (collapsed[0] - collapsed[1]).abs().max() < 1e-5 < 1e-2 < (out[0] - out[1]).abs().max()
    assert (out - collapsed).abs().max(1).values.min() > 1e-2
    torch.testing.assert_close(out[2:], host.encode_text(tokenize(["short " * 75])), atol=1e-5, rtol=0)
    few = text(hosts, max_words=2)
    torch.testing.assert_close(few(["red dress now"])["sentence"], encoder(["red dress"])["sentence"])
    assert few.fingerprint != encoder.fingerprint


@torch.no_grad()
def test_special_tokens_that_a_text_spells_are_no_words(hosts):
    encoder = text(hosts)
    torch.testing.assert_close(
        encoder(["red <end_of_text> dress<start_of_text>"])["sentence"], encoder(["red dress"])["sentence"]
    )


def test_words_are_embedded_by_their_mean_and_with_gradient(hosts):
    encoder, table = text(hosts), hosts["vit"][0].token_embedding.weight
    ids = [tokenize([word])[0].tolist() for word in ("red", "sleevelessness")]
    ids = [row[1 : row.index(49407)] for row in ids]
    assert len(ids[0]) == 1 < len(ids[1])
    found = encoder.embed_words(["red", "", "sleevelessness", "red"])
    expected = torch.stack([table[ids[0]].mean(0), torch.zeros(64), table[ids[1]].mean(0), table[ids[0]].mean(0)])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    touched = encoder.token_embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == sorted([*ids[0], *ids[1]])
    assert encoder.words_live
    assert encoder.embed_words([]).shape == (0, 64)
    assert encoder.embed_words([""]).shape == (1, 64)


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side"), [("vit", 32), ("resnet", 64)])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_and_has_one_size(hosts, name, side):
    encoder, images = image(hosts, name), pixels(4, side)
    check_alone(encoder, images)
    for wrong in (images[:, :, 1:], images[:, :1], images[0]):
        with pytest.raises(ValueError, match=f"clip expects {side} px squares, given"):
            encoder(wrong)


@pytest.mark.parametrize(("name", "size", "side"), [("vit", 48, 6), ("vit", 16, 2), ("resnet", 96, 3)])
@torch.no_grad()
def test_another_size_interpolates_the_positions(hosts, name, size, side):
    encoder, host = image(hosts, name, image_size=size), hosts[name][0]
    assert encoder.grid == (side, side)
    owner, theirs = (encoder.visual, host.visual) if name == "vit" else (encoder.visual.attnpool, host.visual.attnpool)
    mine, old = owner.positional_embedding, theirs.positional_embedding
    assert torch.equal(mine[0], old[0])
    assert len(mine) == 1 + side * side
    low, high = old[1:].min(0).values, old[1:].max(0).values
    assert (mine[1:] >= low - 0.3 * (high - low)).all()
    assert (mine[1:] <= high + 0.3 * (high - low)).all()
    flat = torch.nn.functional.interpolate(
        old[1:].T.reshape(1, -1, *[round((len(old) - 1) ** 0.5)] * 2), (side, side), mode="bicubic"
    )
    torch.testing.assert_close(mine[1:].T.reshape(flat.shape), flat)
    assert torch.isfinite(encoder(pixels(1, size))["pooled"]).all()
    assert encoder.fingerprint != image(hosts, name).fingerprint


@pytest.mark.parametrize(("config", "size", "wanted"), [(VIT, 36, "a multiple of 8"), (RESNET, 80, "a multiple of 32")])
def test_a_size_that_does_not_fit_is_refused(config, size, wanted):
    with pytest.raises(ConfigError, match=f"model.backbone.image.image_size is {size}; .*{wanted}"):
        clip_image(config=config, pretrained="none", image_size=size)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_gradients_reach_every_trained_part_of_an_image_tower(hosts, name):
    encoder = image(hosts, name).train()
    encoder(pixels(4, encoder.image_size))["tokens"].square().sum().backward()
    trained = {key: value for key, value in encoder.named_parameters() if value.requires_grad}
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained.values())
    idle = {key.split(".")[1] for key, value in encoder.named_parameters() if not value.requires_grad}
    assert idle == ({"attnpool"} if name == "resnet" else set())
    ordered = [parameter for part in [*encoder.blocks, *encoder.tail] for parameter in members(part)]
    assert len({id(one) for one in ordered}) == len(ordered)
    before = {key.split(".")[1] for key, value in trained.items() if not any(value is one for one in ordered)}
    stem = {"conv1", "class_embedding", "positional_embedding", "ln_pre"}
    assert before == (stem if name == "vit" else {"conv1", "conv2", "conv3", "bn1", "bn2", "bn3"})
    assert len(encoder.blocks) == (2 if name == "vit" else 5)


def members(part):
    return list(part.parameters()) if isinstance(part, torch.nn.Module) else [part]


def test_gradients_reach_every_part_of_the_text_tower(hosts):
    encoder = text(hosts).train()
    encoder(TEXTS)["sentence"].square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in encoder.parameters())
    ordered = [parameter for part in [*encoder.blocks, *encoder.tail] for parameter in members(part)]
    rest = {key for key, value in encoder.named_parameters() if not any(value is one for one in ordered)}
    assert rest == {"positional_embedding", "token_embedding.weight"}


def test_adapters_and_fingerprints(hosts):
    for encoder in (image(hosts, "vit"), text(hosts)):
        check_adapters(encoder)
        check_fingerprint(encoder)
    assert image(hosts, "resnet").lora_targets == ()


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "ViT-B-23"}, "image.arch: 'ViT-B-23' is no CLIP of the host. Did you mean 'ViT-B-32'"),
        ({"arch": "ViT-H-14"}, "'ViT-H-14' is no CLIP of the host"),  # its class lacks head_width
        ({"arch": "timm-resnet50d"}, "'timm-resnet50d' is no CLIP of the host"),
        ({"pretrained": "opnai"}, "image.pretrained: 'opnai' is no tag of ViT-B-32, no URL.* Did you mean 'openai'"),
        ({"config": VIT}, "'openai' is no tag for an architecture given as config"),
        ({"config": {"vision_cfg": VISION, "text_cfg": TEXT}}, "config: embed_dim must be a whole number"),
        ({"config": {**VIT, "vision_cfg": {"width": 64}}}, "config: vision_cfg lacks image_size, layers"),
        ({"config": {**VIT, "vision_cfg": {**VISION, "patch": 1}}}, "no 'patch'. Did you mean 'patch_size'"),
        ({"config": {**VIT, "vision_cfg": {**VISION, "patch_size": None}}}, "vision_cfg lacks patch_size"),
        ({"config": {**VIT, "vision_cfg": {**VISION, "image_size": [32, 16]}}}, "image_size must be a whole number"),
        ({"config": {**VIT, "text_cfg": {**TEXT, "vocab_size": 9}}}, "vocab_size is below the tokenizer's 49408"),
        ({"config": {**VIT, "vision_cfg": {**VISION, "width": 129}}, "pretrained": "none"}, "cannot build this CLIP"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        clip_image(**settings)


def test_wrong_number_of_words():
    for count in (0, 76):
        with pytest.raises(ConfigError, match=f"text.max_words is {count}; this CLIP keeps 1 to 75 word pieces"):
            clip_text(config=VIT, pretrained="none", max_words=count)


@pytest.mark.parametrize(
    ("arch", "size", "tokens", "width"),
    [
        ("ViT-B-32", 224, 50, 512),
        ("ViT-B/16", 224, 197, 512),
        ("ViT-L-14", 224, 257, 768),
        ("ViT-L-14-336", 336, 577, 768),
        ("RN50", 224, 49, 2048),
        ("RN50x16", 384, 144, 3072),
    ],
)
def test_sizes_of_published_architectures(arch, size, tokens, width, monkeypatch):
    """Published sizes, without building the networks."""
    empty = torch.nn.ModuleDict({"visual": torch.nn.ModuleDict({"attnpool": torch.nn.Identity()})})
    monkeypatch.setattr(host_clip, "CLIP", lambda **settings: empty)
    encoder = clip_image(arch=arch, pretrained="none", load=False)
    assert (encoder.image_size, encoder.num_tokens, encoder.width) == (size, tokens, width)
    assert (encoder.mean, encoder.std) == (MEAN, STD)


@torch.no_grad()
def test_mixed_precision(hosts):
    images = pixels(2, 64)
    for encoder, given in ((image(hosts, "vit"), images[..., :32, :32]), (image(hosts, "resnet"), images)):
        exact = encoder(given)["tokens"]
        with torch.autocast("cpu", torch.bfloat16):
            found = encoder(given)["tokens"].float()
        assert (found - exact).norm() < 0.03 * exact.norm()
    encoder = text(hosts)
    exact = encoder(TEXTS)["words"]
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(TEXTS)["words"].float()
        assert encoder.embed_words(["red"]).shape == (1, 64)
    assert (found - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    "name", ["clip_vitb32", "clip_rn50", "clip_vitb32_cirr", "clip_vitb32_fashioniq", "clip_vitl14_cirr"]
)
def test_model_types_name_what_the_host_has(name):
    section = model_defaults({"arch": "neucore", "model_type": name})
    image_section, text_section = (section["backbone"][side] for side in ("image", "text"))
    assert image_section["name"] == text_section["name"] == "clip"
    assert image_section["arch"] == text_section["arch"]
    assert image_section["freeze"] and text_section["freeze"]
    host = host_clip._MODEL_CONFIGS[image_section["arch"]]
    assert image_section["image_size"] == host["vision_cfg"]["image_size"]
    assert published.get_pretrained_url(image_section["arch"], image_section["pretrained"])
    assert section["embed_dim"] % section["concept_alignment"]["heads"] == 0
    assert weights.is_url(published.get_pretrained_url(text_section["arch"], text_section["pretrained"]))
    assert json.loads(json.dumps(section)) == section
