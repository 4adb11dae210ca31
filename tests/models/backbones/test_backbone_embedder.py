"""A universal embedder as both sides of a backbone, against the library itself; `joint`; refusals; end to end."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from tiny import pictures

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.models.backbones import build_backbone
from neucore_plugin.models.backbones.embedder import EmbedderText
from neucore_plugin.models.baseline import CirBaseline

TEXTS = ["make it red", "a longer dress with a print of flowers, and no sleeves", "blue"]
SIDE = 32


def sections(folder, **more):
    side = {"name": "embedder", "repo": str(folder), **more}
    return {"image": {**side, "image_size": SIDE}, "text": side}


def complete(folder, **more):
    from encoder_case import complete as completed

    return completed(sections(folder, **more))


def test_without_the_library_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.modality", None)
    with pytest.raises(
        ConfigError, match=r"sentence-transformers 5.4 or later.*pip install 'neucore-plugin\[embedder\]'"
    ):
        build_backbone(complete(tmp_path))


def test_an_embedder_is_never_trained(tmp_path):
    with pytest.raises(ConfigError, match="backbone.image.freeze: got false; an embedder is used as it is"):
        complete(tmp_path, freeze=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip(
        "sentence_transformers.base.modality", exc_type=ImportError, reason="needs sentence-transformers 5.4 or later"
    )
    from embedder_case import write_embedder

    return write_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def library(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def model(folder):
    return CirBaseline.from_config({"method": "joint", "backbone": sections(folder)}).eval()


def as_pixels(model, images):
    return torch.stack([model.image_processor(image) for image in images])


def images(count=3):
    return [image.resize((SIDE, SIDE), Image.Resampling.NEAREST) for image in pictures(count, 8)]


@torch.no_grad()
def test_vectors_are_the_librarys_own(model, library):
    pixels = as_pixels(model, images())
    pairs = [{"image": image, "text": text} for image, text in zip(images(), TEXTS, strict=True)]
    fused = torch.from_numpy(library.encode(pairs))
    torch.testing.assert_close(model.encode_query(pixels, TEXTS)["fused"], fused, atol=1e-5, rtol=0)
    seen, read = torch.from_numpy(library.encode(images())), torch.from_numpy(library.encode(TEXTS))
    torch.testing.assert_close(model.encode_image(pixels)["fg"], seen, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_query(pixels)["fused"], seen, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_query(texts=TEXTS)["fused"], read, atol=1e-5, rtol=0)
    assert (fused - seen).abs().max() > 1e-3 and (fused - read).abs().max() > 1e-3  # it does read both
    torch.testing.assert_close(
        model.score(model.encode_query(pixels, TEXTS), model.encode_image(pixels)), fused @ seen.T, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_nothing_depends_on_batch_mates(model):
    pixels, texts = as_pixels(model, images()), [TEXTS[0], "", TEXTS[1]]
    together = model.encode_query(pixels, texts)["fused"]
    for row in range(3):
        alone = model.encode_query(pixels[row : row + 1], texts[row : row + 1])["fused"]
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=0)
    assert torch.equal(together[1], model.encode_query(pixels[1:2])["fused"][0])


@torch.no_grad()
def test_a_prompt_of_the_files_and_one_of_the_config(folder, tmp_path):
    from embedder_case import write_embedder

    pytest.importorskip("sentence_transformers.base.modality", exc_type=ImportError)
    own = write_embedder(tmp_path, prompts={"query": "find: ", "document": ""})
    plain, prompted = (
        CirBaseline.from_config({"method": "joint", "backbone": sections(place)}).eval() for place in (folder, own)
    )
    pixels = as_pixels(plain, images())
    assert torch.equal(plain.encode_image(pixels)["fg"], prompted.encode_image(pixels)["fg"])
    queries = [one.encode_query(pixels, TEXTS)["fused"] for one in (plain, prompted)]
    assert (queries[0] - queries[1]).abs().max() > 1e-3
    told = CirBaseline.from_config({"method": "joint", "backbone": sections(folder, prompt="find: ")}).eval()
    torch.testing.assert_close(told.encode_query(pixels, TEXTS)["fused"], queries[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_as_a_frozen_backbone(folder):
    backbone = build_backbone(complete(folder))
    assert backbone.text.embedding is backbone.image.embedding and backbone.freeze_image
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    out, text = backbone.image(torch.rand(2, 3, SIDE, SIDE)), backbone.text(["red", " "])
    assert out["tokens"].shape == (2, 1, 32) and torch.equal(out["tokens"][:, 0], out["pooled"])
    assert text["words"].shape == (2, 1, 32) and text["mask"].tolist() == [[True], [False]]
    assert not text["sentence"][1].any() and backbone.text([])["words"].shape == (0, 1, 32)
    assert backbone.text.embed_words(["red", "dog"]).shape == (2, 32)
    with pytest.raises(ValueError, match="embedder expects 32 px squares"):
        backbone.image(torch.rand(1, 3, 16, 16))
    average = CirBaseline.from_config({"method": "average", "backbone": sections(folder)}).eval()
    pixels = as_pixels(average, images())
    mean = (average.encode_image(pixels)["fg"] + average.encode_query(texts=TEXTS)["fused"]) / 2
    torch.testing.assert_close(average.encode_query(pixels, TEXTS)["fused"], mean, atol=1e-5, rtol=0)


def test_a_trained_head_on_it_gets_gradients(folder):
    from tiny import build, samples

    model = build("combiner", backbone=sections(folder)).train()
    model(samples(as_pixels(model, images())))["loss"].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "absent" not in name)


def test_joint_needs_such_an_encoder_and_pixels(model, folder):
    with pytest.raises(ConfigError, match="never trained to be compared"):
        CirBaseline.from_config({"method": "joint"})
    with pytest.raises(ValueError, match="reads picture and text together: give the reference as pixels"):
        model.encode_query(pooled=torch.zeros(1, 32), texts=["red"])
    assert model.reads_pairs


# ---- refusals --------------------------------------------------------------------------------------------------------


def changed(folder, to, name, change):
    shutil.copytree(folder, to)
    content = json.loads((to / name).read_text())
    change(content)
    (to / name).write_text(json.dumps(content))
    return to


def test_files_that_would_run_code_or_are_none(folder, tmp_path):
    def strange(modules):
        modules[0]["type"] = "os_tools.Evil"

    with pytest.raises(CheckpointError, match="wants code of its author, os_tools.Evil, which is never run"):
        build_backbone(complete(changed(folder, tmp_path / "code", "modules.json", strange)))
    router = shutil.copytree(folder, tmp_path / "router")
    (router / "router_config.json").write_text(json.dumps({"types": {"0_Mine": "code.Mine"}, "structure": {}}))
    with pytest.raises(CheckpointError, match="wants code of its author, code.Mine, which is never run"):
        build_backbone(complete(router))
    gone = shutil.copytree(folder, tmp_path / "gone")
    (gone / "modules.json").unlink()
    with pytest.raises(CheckpointError, match="modules.json cannot be read"):
        build_backbone(complete(gone))
    half = shutil.copytree(folder, tmp_path / "half")
    (half / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_backbone(complete(half))
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_backbone(complete(pickled))


def test_a_model_of_texts_alone_is_refused(folder, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=6, **sizes)).save_pretrained(tmp_path / "base")
    parts = [Transformer(str(tmp_path / "base")), Pooling(16)]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "text"))
    with pytest.raises(ConfigError, match="reads text, but no picture together with a text"):
        build_backbone(complete(tmp_path / "text"))


def test_offline_the_repository_and_the_place_of_its_files_are_named(folder, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for repo in ("owner/nothing", "no/such/folder"):
        with pytest.raises(CheckpointError, match=rf"image.repo: {repo} is no folder here, and .* cannot be fetched"):
            build_backbone(complete(repo))
    with pytest.raises(CheckpointError, match="models--owner--nothing"):
        EmbedderText("owner/nothing", None, "float32", None)
