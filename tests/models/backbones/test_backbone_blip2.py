"""BLIP-2's encoders: against the host's own model, one Q-Former for both sides, files of weights."""

import copy
import shutil
from functools import partial

import blip_case as case
import pytest
import torch
from encoder_case import backbone as build
from encoder_case import encoder as made
from lavis.models import clip_vit, eva_vit
from lavis.models.blip2_models import Qformer as host_qformer
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from torch import nn

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.models.backbones import blip2

SIZE, QUERIES = 28, 3
SIZES = case.IMAGE | {"query_width": 16, "query_layers": 3, "query_heads": 2}
TEXT = {"width": 16, "layers": 3, "heads": 2}
VITS = ("eva_clip_g", "clip_L")
SAMPLES = {"image": case.images(SIZE), "text_input": case.TEXTS}


def host_vit(vit, size=SIZE):
    if vit == "clip_L":
        return clip_vit.VisionTransformer(size, 14, width=12, layers=3, heads=2, use_grad_checkpointing=False)
    norm = partial(nn.LayerNorm, eps=1e-6)
    sizes = {"embed_dim": 12, "depth": 2, "num_heads": 2, "mlp_ratio": 4.3637, "norm_layer": norm}
    return eva_vit.VisionTransformer(size, 14, use_mean_pooling=False, qkv_bias=True, **sizes)


class Host(Blip2Qformer):
    """The host's model from tiny parts; the rest is its own constructor."""

    @classmethod
    def init_tokenizer(cls):
        return case.tokenizer("[DEC]")

    @classmethod
    def init_vision_encoder(cls, model_name, img_size, *_):
        return host_vit(model_name, img_size), nn.LayerNorm(12)

    @classmethod
    def init_Qformer(cls, num_query_token, vision_width, cross_attention_freq=2):
        settings = host_qformer.BertConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, encoder_width=vision_width
        )
        settings.add_cross_attention, settings.cross_attention_freq = True, cross_attention_freq
        settings.query_length = num_query_token
        return host_qformer.BertLMHeadModel(settings), nn.Parameter(torch.zeros(1, num_query_token, 16))


@pytest.fixture(scope="module", params=VITS)
def published(request, tmp_path_factory):
    """Name of the ViT, the host's model, and its files as published: the Q-Former's without a ViT, and the ViT's."""
    folder = tmp_path_factory.mktemp(request.param)
    host = case.scrambled(Host(request.param, SIZE, num_query_token=QUERIES, embed_dim=5))
    state = {name: value for name, value in host.state_dict().items() if not name.startswith("visual_encoder.")}
    torch.save({"model": state}, folder / "qformer.pth")
    torch.save({**host.visual_encoder.state_dict(), "norm.weight": torch.ones(12)}, folder / "vit.pth")
    return request.param, host, folder


def image(vit="eva_clip_g", tokens="queries", size=SIZE, **settings):
    settings = {"pretrained": "none", "vit_pretrained": "none", "load": False, **settings}
    settings = {"architecture": SIZES, **settings}
    return made("image", "blip2", vit=vit, tokens=tokens, image_size=size, queries=QUERIES, **settings).eval()


def text(shared=None, **settings):
    settings = {"architecture": None if shared else TEXT, "pretrained": "none", "load": False, **settings}
    return made("text", "blip2", shared=shared, **{"max_words": 20, **settings}).eval()


def files(folder):
    return {"pretrained": str(folder / "qformer.pth"), "vit_pretrained": str(folder / "vit.pth"), "load": True}


# ---- against the host -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_queries_and_patches_are_those_of_the_host(published):
    vit, host, folder = published
    encoder = image(vit, **files(folder))
    expected = host.extract_features(SAMPLES, mode="image").image_embeds
    assert expected.std() > 0.1 and expected.shape == (3, QUERIES, 16)
    found = encoder(SAMPLES["image"])
    torch.testing.assert_close(found["tokens"], expected, **case.CLOSE)
    torch.testing.assert_close(found["pooled"], expected.mean(1), **case.CLOSE)
    patches = image(vit, "patches", **files(folder))(SAMPLES["image"])
    expected = host.forward_image(SAMPLES["image"])[1]
    torch.testing.assert_close(patches["tokens"], expected, **case.CLOSE)
    torch.testing.assert_close(patches["pooled"], expected[:, 0], **case.CLOSE)


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_texts_are_those_of_the_host(published, shared):
    vit, host, folder = published
    side = image(vit, **files(folder)) if shared else None
    encoder = text(side and side.qformer, pretrained=str(folder / "qformer.pth"), load=True)
    expected = host.extract_features(SAMPLES, mode="text").text_embeds
    found = encoder(case.TEXTS)
    for row, count in enumerate(found["mask"].sum(1).tolist()):
        torch.testing.assert_close(found["words"][row, :count], expected[row, 1 : 1 + count], **case.CLOSE)
        if count:
            torch.testing.assert_close(found["sentence"][row], expected[row, 0], **case.CLOSE)


@torch.no_grad()
def test_another_image_size_gets_the_hosts_interpolated_positions(published):
    """EVA's and CLIP's positions are interpolated in two ways."""
    vit, host, folder = published
    larger, state = host_vit(vit, 56), dict(host.visual_encoder.state_dict())
    (clip_vit if vit == "clip_L" else eva_vit).interpolate_pos_embed(larger, state)
    larger.load_state_dict(state)
    pixels = case.images(56)
    encoder = image(vit, "patches", 56, **files(folder))
    assert encoder.grid == (4, 4) and encoder.num_tokens == 17
    torch.testing.assert_close(encoder(pixels)["tokens"], host.ln_vision(larger(pixels)), **case.CLOSE)
    assert image(vit, size=56, **files(folder))(pixels)["tokens"].shape == (3, QUERIES, 16)


@torch.no_grad()
def test_a_fine_tuned_vit_in_the_qformers_file_is_preferred(published, tmp_path):
    vit, host, _ = published
    tuned = copy.deepcopy(host)
    case.scrambled(tuned.visual_encoder, seed=9)
    path = case.save(tuned, tmp_path / "tuned.pth")
    encoder = image(vit, pretrained=str(path), vit_pretrained=str(tmp_path / "is never read"), load=True)
    expected = tuned.extract_features(SAMPLES, mode="image").image_embeds
    torch.testing.assert_close(encoder(SAMPLES["image"])["tokens"], expected, **case.CLOSE)
    assert (expected - host.extract_features(SAMPLES, mode="image").image_embeds).abs().max() > 0.01


# ---- the protocol ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize("tokens", ["queries", "patches"])
def test_images(vit, tokens):
    encoder = case.scrambled(image(vit, tokens))
    case.check_image(encoder)
    case.check_adapters(encoder)
    case.check_fingerprint(encoder)
    if tokens == "queries":
        assert (encoder.grid, encoder.num_tokens, encoder.width, len(encoder.blocks)) == (None, QUERIES, 16, 5)
    else:
        assert (encoder.grid, encoder.num_tokens, encoder.width, len(encoder.blocks)) == ((2, 2), 5, 12, 2)
    case.seeded_sum(encoder.train()(SAMPLES["image"])["tokens"]).backward()
    reached, named = case.with_gradient(encoder)
    assert reached == named


@pytest.mark.parametrize("shared", [False, True])
def test_texts(shared):
    side = case.scrambled(image()) if shared else None
    encoder = case.scrambled(text(side and side.qformer), seed=2)
    case.check_text(encoder)
    case.check_adapters(encoder)
    case.check_fingerprint(encoder)
    assert len(encoder.blocks) == 3 and not encoder.tail
    found = encoder.train()(case.TEXTS)
    case.seeded_sum(found["words"], found["sentence"]).backward()
    reached, named = case.with_gradient(encoder)
    assert reached == named


def test_one_qformer_for_both_sides():
    """Self-attention is one set of weights, owned by the image side; the rest is each side's own."""
    side = case.scrambled(image())
    words = case.scrambled(text(side.qformer), seed=2)
    model = nn.ModuleDict({"image": side, "text": words})
    names = set(model.state_dict())
    assert not any(name.startswith("text.") and ".attention." in name for name in names)
    assert "image.qformer.bert.encoder.layer.2.attention.self.query.weight" in names
    owned = [id(parameter) for encoder in (side, words) for parameter in encoder.parameters()]
    assert len(set(owned)) == len(owned)

    before = words.fingerprint, words(["red"])["sentence"]
    with torch.no_grad():
        side.qformer.bert.encoder.layer[0].attention.output.dense.bias[0] += 1
    assert words.fingerprint != before[0] and (words(["red"])["sentence"] - before[1]).abs().max() > 1e-3
    with torch.no_grad():
        side.qformer.bert.encoder.layer[0].crossattention.output.dense.bias[0] += 1
    after = words.fingerprint

    other = copy.deepcopy(model)  # copies share as the originals do
    assert other["text"].blocks[0].attention is other["image"].qformer.bert.encoder.layer[0].attention
    assert other["text"].blocks[0].attention is not words.blocks[0].attention
    assert other["text"].fingerprint == after
    assert {p.dtype for p in other.double().parameters()} == {torch.float64}
    assert other["text"](["red"])["sentence"].dtype == torch.float64  # a move reaches what is borrowed

    found = words(case.TEXTS)
    case.seeded_sum(side(SAMPLES["image"])["tokens"], found["words"], found["sentence"]).backward()
    reached, named = case.with_gradient(side, words)
    assert reached == named


def sections(**image_section):
    both = {"name": "blip2", "pretrained": "none"}
    own = {"image_size": SIZE, "queries": QUERIES, "architecture": SIZES, "vit_pretrained": "none", **image_section}
    return {"image": {**both, **own}, "text": {**both, "architecture": TEXT}}


@torch.no_grad()
def test_a_checkpoint_restores_both_sides():
    trained = case.scrambled(build(sections(), load=False))
    fresh = build(sections(), load=False)
    fresh.load_state_dict(trained.state_dict())
    for ours, theirs, given in (
        (fresh.text, trained.text, case.TEXTS),
        (fresh.image, trained.image, SAMPLES["image"]),
    ):
        assert ours.fingerprint == theirs.fingerprint
        for key, value in theirs(given).items():
            assert torch.equal(ours.eval()(given)[key], value)


def test_a_shared_qformer_must_be_the_same():
    side = image()
    with pytest.raises(ValueError, match="one architecture and one file of weights.*none.*other.pth"):
        text(side.qformer, pretrained="other.pth")
    with pytest.raises(ValueError, match="one architecture"):
        text(side.qformer, architecture={**TEXT, "layers": 2})
    assert text(side.qformer, architecture=TEXT, pretrained=None).in_checkpoint


def test_a_backbone_shares_where_both_sides_are_one_model():
    config = sections()
    backbone = build(config, load=False)
    borrowed = backbone.image.qformer.bert.encoder.layer[1].attention
    assert backbone.text.blocks[1].attention is borrowed
    config["text"]["freeze"] = False
    with pytest.raises(ConfigError, match="image and text are one blip2 model, .* must be the same on both sides"):
        build(config, load=False)
    config["image"]["tokens"] = "patches"  # no Q-Former there
    alone = build(config, load=False)
    assert any(".attention." in name for name in alone.text.state_dict())


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"blip2 expects 28 px squares, given \[1, 3, 14, 28\]"):
        image()(torch.zeros(1, 3, 14, 28))
    with pytest.raises(ValueError, match="query_width 16 is no multiple of query_heads 3"):
        image(architecture={**SIZES, "query_heads": 3})


# ---- files of weights -----------------------------------------------------------------------------------------------


def test_none_is_random_and_says_so(published):
    vit, _, folder = published
    for key in ("pretrained", "vit_pretrained"):
        with pytest.warns(UserWarning, match=f"model.backbone.image.{key} is 'none': blip2 has random weights"):
            assert image(vit, **{**files(folder), key: "none"}).in_checkpoint
    with pytest.warns(UserWarning, match="model.backbone.text.pretrained is 'none'"):
        text(load=True)


def test_a_file_of_another_network_is_refused_by_name(published, tmp_path):
    vit, _, folder = published
    other = tmp_path / "other.pth"
    torch.save({"model": {"ln_vision.weight": torch.ones(12), "ln_vision.bias": torch.ones(12)}}, other)
    with pytest.raises(CheckpointError, match=f"(?s){other} holds weights of another.*missing in .*: Qformer.query"):
        image(vit, **{**files(folder), "pretrained": str(other)})
    with pytest.raises(CheckpointError, match=f"(?s){other} holds weights of another.*It has ln_vision.weight"):
        image(vit, **{**files(folder), "vit_pretrained": str(other)})
    with pytest.raises(CheckpointError, match=f"{other} holds weights of another"):
        text(pretrained=str(other), load=True)


def test_urls_are_answered_from_the_hub_folder_or_named(published, tmp_path, monkeypatch):
    vit, host, folder = published
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", case.no_network)
    hub = tmp_path / "hub" / "checkpoints"
    default = {"pretrained": None, "vit_pretrained": None, "load": True}
    for url, file in ((blip2.URLS[vit], "qformer.pth"), (blip2.VIT_URLS[vit], "vit.pth")):
        cached = hub / url.rpartition("/")[2]
        with pytest.raises(CheckpointError) as caught:
            image(vit, **default)
        assert url in str(caught.value) and str(cached) in str(caught.value) and "'none'" in str(caught.value)
        shutil.copy(folder / file, cached)
    encoder = image(vit, **default)
    words = text(encoder.qformer, pretrained=None, load=True)  # the file of the image side, whatever its ViT
    assert not encoder.in_checkpoint and not words.in_checkpoint
    torch.testing.assert_close(words.word_embeddings.weight, host.Qformer.bert.embeddings.word_embeddings.weight)
    assert image(vit, pretrained=None).in_checkpoint and image(vit, vit_pretrained=None).in_checkpoint
