"""BLIP's and ALBEF's encoders: against the host's own models, invariances, gradients, files of weights."""

import shutil

import blip_case as case
import pytest
import torch
from encoder_case import encoder
from lavis.models.albef_models.albef_feature_extractor import AlbefFeatureExtractor
from lavis.models.blip_models.blip_feature_extractor import BlipFeatureExtractor
from lavis.models.med import BertForMaskedLM, XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from lavis.processors.blip_processors import BlipImageEvalProcessor
from transformers import BertConfig

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.config import loading
from neucore_plugin.models.backbones import albef, blip, build_backbone, encoder_class

SIZE, PATCH, DIM = 16, 8, 6
SIDES = ("blip", "albef")
TYPES = ("blip", "albef", "blip2", "blip_cirr", "blip_fashioniq")


def host_model(name, folder, size=SIZE):
    vit = VisionTransformerEncoder(size, PATCH, embed_dim=12, depth=2, num_heads=2)
    vit.vision_width = 12
    if name == "blip":
        text = XBertEncoder.from_config({"med_config_path": str(case.med_config(folder))})
        return case.scrambled(BlipFeatureExtractor(vit, text, DIM))
    settings = case.med_config(folder, vocab_size=30522, num_hidden_layers=4, fusion_layer=2)
    text = BertForMaskedLM(BertConfig.from_json_file(settings))
    return case.scrambled(AlbefFeatureExtractor(vit, text, DIM))


@pytest.fixture(scope="module", autouse=True)
def _offline_tokenizers():
    patch = pytest.MonkeyPatch()
    for kind, special in ((BlipFeatureExtractor, ("[DEC]", "[ENC]")), (AlbefFeatureExtractor, ())):
        patch.setattr(kind, "init_tokenizer", classmethod(lambda cls, special=special: case.tokenizer(*special)))
    yield
    patch.undo()


@pytest.fixture(scope="module", params=SIDES)
def published(request, tmp_path_factory):
    """Name, the host's model, and a file of its weights with the published layout."""
    folder = tmp_path_factory.mktemp(request.param)
    host = host_model(request.param, folder)
    return request.param, host, case.save(host, folder / "published.pth")


def image(name="blip", size=SIZE, **settings):
    settings = {"pretrained": "none", "load": False, "proj_dim": DIM, **settings}
    return encoder("image", name, image_size=size, patch_size=PATCH, **{"architecture": case.IMAGE, **settings}).eval()


def text(name="blip", **settings):
    settings = {"pretrained": "none", "load": False, "proj_dim": DIM, "max_words": 20, **settings}
    return encoder("text", name, **{"architecture": case.TEXT, **settings}).eval()


# ---- against the host -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projected", [False, True])
@torch.no_grad()
def test_features_are_those_of_the_host(published, projected):
    name, host, path = published
    samples = {"image": case.images(SIZE), "text_input": case.TEXTS}
    kinds = ("image_embeds_proj", "text_embeds_proj") if projected else ("image_embeds", "text_embeds")
    ours = {"projected": projected, "pretrained": str(path), "load": True}
    tokens = image(name, **ours)(samples["image"])
    expected = host.extract_features(samples, mode="image")[kinds[0]]
    torch.testing.assert_close(tokens["tokens"], expected, **case.CLOSE)
    torch.testing.assert_close(tokens["pooled"], expected[:, 0], **case.CLOSE)
    found = text(name, **ours)(case.TEXTS)
    expected = host.extract_features(samples, mode="text")[kinds[1]]
    assert found["words"].shape[1] == expected.shape[1] - 2
    for row, count in enumerate(found["mask"].sum(1).tolist()):
        torch.testing.assert_close(found["words"][row, :count], expected[row, 1 : 1 + count], **case.CLOSE)
        if count:
            torch.testing.assert_close(found["sentence"][row], expected[row, 0], **case.CLOSE)


@torch.no_grad()
def test_another_image_size_gets_the_hosts_interpolated_positions(published, tmp_path):
    name, _, path = published
    larger = host_model(name, tmp_path, size=4 * PATCH)
    larger.load_from_pretrained(str(path)) if name == "blip" else larger.load_from_pretrained(str(path), False)
    encoder = image(name, 4 * PATCH, pretrained=str(path), load=True)
    samples = {"image": case.images(4 * PATCH), "text_input": [""]}
    expected = larger.extract_features(samples, mode="image").image_embeds
    assert encoder.grid == (4, 4) and expected.shape == (3, 17, 12)
    torch.testing.assert_close(encoder(samples["image"])["tokens"], expected, **case.CLOSE)


def test_pixels_are_normalised_as_by_the_host():
    normalize = BlipImageEvalProcessor().normalize
    for name in SIDES:
        kind = encoder_class("image", name)
        assert (kind.mean, kind.std) == (tuple(normalize.mean), tuple(normalize.std))


# ---- the protocol ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("projected", [False, True])
def test_images_and_texts(name, projected):
    encoder = case.scrambled(image(name, projected=projected))
    case.check_image(encoder)
    assert (encoder.grid, encoder.num_tokens, encoder.width) == ((2, 2), 5, DIM if projected else 12)
    words = case.scrambled(text(name, projected=projected))
    case.check_text(words)
    assert (words.width, words.word_width) == (DIM if projected else 12, 12)


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("projected", [False, True])
def test_no_parameter_is_idle(name, projected):
    encoder, words = image(name, projected=projected).train(), text(name, projected=projected).train()
    case.scrambled(encoder), case.scrambled(words)
    found = words(case.TEXTS)
    case.seeded_sum(encoder(case.images(SIZE))["tokens"]).backward()
    case.seeded_sum(found["words"], found["sentence"]).backward()
    reached, named = case.with_gradient(encoder, words)
    assert reached == named
    words.zero_grad()
    case.seeded_sum(words.embed_words(["red", "floralish"])).backward()
    assert case.with_gradient(words)[0] == {"0.text_encoder.embeddings.word_embeddings.weight"}


@pytest.mark.parametrize("name", SIDES)
def test_fingerprints(name):
    encoder, words = image(name, projected=True), text(name, projected=True)
    case.check_fingerprint(encoder)
    case.check_fingerprint(words)
    heads = {"width": 12, "heads": 3}
    others = [text(name, max_words=21), text(name, max_words=21, architecture=case.TEXT | heads)]
    for other in others:
        other.load_state_dict(words.state_dict(), strict=False)
    assert len({words.fingerprint, *(other.fingerprint for other in others)}) == 3


@pytest.mark.parametrize("name", SIDES)
def test_blocks_tail_and_adapters(name):
    encoder, words = image(name, projected=True), text(name, projected=True)
    for side in (encoder, words):
        assert len(side.blocks) == 2
        case.check_adapters(side)
    assert encoder.tail == [encoder.visual_encoder.norm, encoder.vision_proj] and words.tail == [words.text_proj]
    assert len(image(name).tail) == 1 and text(name).tail == []


def test_what_cannot_be():
    encoder = image()
    with pytest.raises(ValueError, match=r"blip expects 16 px squares, given \[2, 3, 16, 24\]"):
        encoder(torch.zeros(2, 3, 16, 24))
    with pytest.raises(ValueError, match="width 12 is no multiple of heads 5"):
        image(architecture={**case.IMAGE, "heads": 5})


# ---- files of weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIDES)
def test_none_is_random_and_says_so(name):
    for make, side in ((image, "image"), (text, "text")):
        with pytest.warns(UserWarning, match=f"model.backbone.{side}.pretrained is 'none': {name} has random weights"):
            assert make(name, load=True).in_checkpoint


def test_a_file_of_another_network_is_refused_by_name(tmp_path, published):
    name, _, good = published
    other = tmp_path / "other.pth"
    torch.save({"model": {"visual_encoder.weight": torch.ones(2)}}, other)
    for make, lacking in ((image, "visual_encoder.cls_token"), (text, "text_encoder")):
        with pytest.raises(CheckpointError, match=f"(?s){other} holds weights of another.*missing in .*: {lacking}"):
            make(name, pretrained=str(other), load=True)
        with pytest.raises(CheckpointError, match="no file .*gone.pth"):
            make(name, pretrained=str(tmp_path / "gone.pth"), load=True)
        with pytest.raises(CheckpointError, match=f"(?s){good} .*other shape: .*_proj.weight"):
            make(name, pretrained=str(good), load=True, projected=True, proj_dim=7)
    torch.save({"model": {"visual_encoder.pos_embed": torch.ones(1, 4, 12)}}, other)
    with pytest.raises(CheckpointError, match=f"{other}: its table of 3 positions is no square"):
        image(name, pretrained=str(other), load=True)


def test_a_url_is_answered_from_the_hub_folder_or_named(tmp_path, monkeypatch, published):
    name, host, good = published
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", case.no_network)
    url = blip.URLS["base"] if name == "blip" else albef.URL
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    for make in (image, text):
        with pytest.raises(CheckpointError) as caught:
            make(name, pretrained=None, load=True)
        assert url in str(caught.value) and str(cached) in str(caught.value) and "'none'" in str(caught.value)
    shutil.copy(good, cached)
    encoder = image(name, pretrained=None, load=True)
    assert not encoder.in_checkpoint and not text(name, pretrained=None, load=True).in_checkpoint
    assert image(name, pretrained=str(good)).in_checkpoint
    torch.testing.assert_close(encoder.visual_encoder.pos_embed, host.visual_encoder.pos_embed)


def test_a_large_vit_has_its_own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", case.no_network)
    with pytest.raises(CheckpointError, match="BLIP/models/model_large.pth"):
        image(vit="large", pretrained=None, load=True)


# ---- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TYPES)
def test_model_types(model_type):
    """Each type is valid, and it builds and runs with tiny encoders."""
    section = loading.model_defaults({"arch": "neucore", "model_type": model_type})
    sides = section["backbone"]
    assert sides["image"]["freeze"] and sides["text"]["freeze"]
    tiny = {"image": dict(sides["image"]), "text": dict(sides["text"])}
    for side, sizes in (("image", case.IMAGE), ("text", case.TEXT)):
        tiny[side] |= {"pretrained": "none", "architecture": dict(sizes)}
    if sides["image"]["name"] == "blip2":
        tiny["image"]["architecture"] |= {f"query_{key}": value for key, value in case.TEXT.items()}
    backbone = build_backbone(tiny, load=False)
    size = section["backbone"]["image"]["image_size"]
    with torch.no_grad():
        assert backbone.image(case.images(size, 1))["tokens"].shape == (1, backbone.image.num_tokens, 12)
        assert backbone.text(["red"])["words"].shape == (1, 1, 12)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
