"""open_clip's towers against the library's own encoders; texts, sizes, pictures, weights, training, settings."""

import contextlib
import json

import hub_case
import numpy as np
import pytest
import torch
from blip_case import check_adapters, check_fingerprint
from encoder_case import check_alone, encoder
from hub_case import LONG, SIGLIP_TEXT, TEXT, TEXTS, TOWERS, of_open_clip, open_clip_config, pixels, write_open_clip
from PIL import Image

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.models.backbones import own_pixels
from neucore_plugin.processors import ImageProcessor

pytestmark = hub_case.needs_open_clip
TEXT_TOWERS = {"clip": TEXT, "coca": {**TEXT, "embed_cls": True, "context_length": 76}, "siglip": SIGLIP_TEXT}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{name: (folder, open_clip's model)}, one a kind of image tower and one a kind of text tower."""
    root, found = tmp_path_factory.mktemp("open_clip"), {}
    configs = {name: open_clip_config(name) for name in TOWERS}
    configs |= {f"text_{name}": open_clip_config(text=text) for name, text in TEXT_TOWERS.items()}
    for name, config in configs.items():
        found[name] = (root / name, write_open_clip(root / name, config))
    return found


def ids_of(texts, config):
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=config["context_length"])(texts)


def first(found):
    return found[0] if isinstance(found, tuple) else found


# ---- the same as the library's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_images_are_the_librarys(written, name):
    folder, library = written[name]
    tower = of_open_clip("image", folder)
    images = pixels(3, tower.image_size)
    out = tower(images)
    torch.testing.assert_close(out["pooled"], first(library.encode_image(images)), atol=1e-5, rtol=0)
    assert out["tokens"].shape == (3, tower.num_tokens, tower.width)
    assert out["pooled"].shape == (3, tower.pooled_width)
    rows, columns = tower.grid
    assert tower.num_tokens - rows * columns in (0, 1)
    assert rows == columns == {"resnet": 2, "siglip": 10, "convnext": 5}.get(name, 4)


@torch.no_grad()
def test_patches_are_where_they_lie_and_the_class_token_is_the_pooled_vector(written):
    tower = of_open_clip("image", written["vit"][0])
    images = pixels(1, 32)
    out = tower(images)
    torch.testing.assert_close(out["tokens"][:, 0], out["pooled"], atol=1e-5, rtol=0)
    library = written["vit"][1].visual
    last = library.forward_intermediates(images, indices=1, normalize_intermediates=True)["image_intermediates"][0]
    torch.testing.assert_close(out["tokens"][0, 1 + 2 * 4 + 3], last[0, :, 2, 3] @ library.proj, atol=1e-5, rtol=0)
    cells = of_open_clip("image", written["convnext"][0])
    images = pixels(1, 160)
    map_ = written["convnext"][1].visual.trunk.forward_features(images)
    torch.testing.assert_close(cells(images)["tokens"][0, 5 + 2], map_[0, :, 1, 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TEXT_TOWERS)
@torch.no_grad()
def test_sentences_are_the_librarys(written, name):
    folder, library = written[f"text_{name}"]
    tower, spoken = of_open_clip("text", folder), [text for text in TEXTS if text]
    expected = first(library.encode_text(ids_of(spoken, TEXT_TOWERS[name])))
    torch.testing.assert_close(tower(spoken)["sentence"], expected, atol=1e-5, rtol=0)
    assert (tower.width, tower.word_width) == (24, 32)


@pytest.mark.parametrize("name", TEXT_TOWERS)
@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch_and_a_long_one_keeps_its_end(written, name):
    folder, library = written[f"text_{name}"]
    tower = of_open_clip("text", folder)
    out = check_alone(tower, [*TEXTS, LONG])
    assert out["mask"].sum(1).tolist() == [3, 0, 6, 1, tower.max_words]
    assert not out["words"][~out["mask"]].any() and not out["sentence"][1].any()
    assert [tuple(value.shape) for value in tower([]).values()] == [(0, 0, 24), (0, 0), (0, 24)]
    expected = first(library.encode_text(ids_of([LONG], TEXT_TOWERS[name])))  # it puts the end token last
    torch.testing.assert_close(out["sentence"][-1:], expected, atol=1e-5, rtol=0)
    few = of_open_clip("text", folder, max_words=2)
    torch.testing.assert_close(few(["red dress now"])["sentence"], tower(["red dress"])["sentence"])
    assert few.fingerprint != tower.fingerprint
    torch.testing.assert_close(
        tower(["red <end_of_text> dress<start_of_text>"])["sentence"], tower(["red dress"])["sentence"]
    )


@torch.no_grad()
def test_a_tokenizer_of_the_hub_and_a_text_model_of_transformers(tmp_path):
    hub_case.write_transformers(tmp_path / "bert", "bert")
    reads = {"hf_tokenizer_name": str(tmp_path / "bert"), "context_length": 12}
    own = {**SIGLIP_TEXT, **reads, "vocab_size": 32}
    theirs = {**reads, "hf_model_name": reads["hf_tokenizer_name"], "hf_proj_type": "linear"}
    from open_clip.tokenizer import HFTokenizer

    ids = HFTokenizer(str(tmp_path / "bert"), context_length=12)
    for place, text in enumerate((own, theirs)):
        library = write_open_clip(tmp_path / str(place), open_clip_config(text=text))
        tower = of_open_clip("text", tmp_path / str(place))
        out = check_alone(tower, [*TEXTS, LONG])
        assert out["mask"].sum(1).tolist() == [3, 0, 6, 1, 10]
        spoken = [*(text for text in TEXTS if text), LONG]
        expected = first(library.encode_text(ids(spoken)))
        torch.testing.assert_close(out["sentence"][[0, 2, 3, 4]], expected, atol=1e-5, rtol=0)
        assert tower.embed_words(["red", "dress"]).shape == (2, 32)


def test_words_are_embedded_by_their_mean_and_with_gradient(written):
    tower = of_open_clip("text", written["text_clip"][0])
    table = tower.table
    ids = [row[1 : list(row).index(49407)] for row in ids_of(["red", "sleevelessness"], TEXT).tolist()]
    found = tower.embed_words(["red", "", "sleevelessness"])
    torch.testing.assert_close(found, torch.stack([table[ids[0]].mean(0), torch.zeros(32), table[ids[1]].mean(0)]))
    found.sum().backward()
    assert tower.words_live and table.grad.abs().sum() > 0
    assert tower.embed_words([]).shape == (0, 32)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_are_prepared_as_by_the_library(tmp_path, mode, interpolation):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    said = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": interpolation, "resize_mode": mode}
    write_open_clip(tmp_path, open_clip_config(preprocess_cfg=said))
    tower = of_open_clip("image", tmp_path)
    ours = ImageProcessor(**tower.resolved)
    theirs = image_transform_v2(PreprocessCfg(size=32, **said), is_train=False)
    drawn = np.random.default_rng(0)
    for shape in ((50, 70), (90, 41), (32, 32), (10, 300)):
        picture = Image.fromarray(drawn.integers(0, 255, (*shape, 3), dtype=np.uint8))
        torch.testing.assert_close(ours(picture), theirs(picture), atol=0.02, rtol=0)
    assert own_pixels({"name": "open_clip", "arch": f"local-dir:{tmp_path}"}) == tower.resolved
    wide = of_open_clip("image", tmp_path, image_size=48, fit="pad", mean=[0.0, 0.0, 0.0])
    assert (wide.image_size, wide.fit, wide.mean, wide.std) == (48, "pad", (0.0, 0.0, 0.0), (0.5, 0.6, 0.7))
    assert wide.grid == (6, 6) and wide.fingerprint != tower.fingerprint


@pytest.mark.parametrize(
    ("name", "size", "side"),
    [("vit", 48, 6), ("vit", 16, 2), ("resnet", 96, 3), ("siglip", 192, 12), ("convnext", 192, 6), ("coca", 48, 6)],
)
@torch.no_grad()
def test_another_size_interpolates_the_positions(written, name, size, side):
    tower, own = of_open_clip("image", written[name][0], image_size=size), of_open_clip("image", written[name][0])
    assert (tower.grid, tower.image_size) == ((side, side), size) and tower.fingerprint != own.fingerprint
    out = tower(pixels(2, size))
    assert out["tokens"].shape[1] == tower.num_tokens and torch.isfinite(out["pooled"]).all()


def test_what_a_tag_says_of_its_pictures_and_of_its_activation():
    image = {"name": "open_clip", "arch": "ViT-B-32", "pretrained": "openai"}
    assert own_pixels(image)["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    image = {"name": "open_clip", "arch": "ViT-B-16-SigLIP-384", "pretrained": "webli"}
    found = own_pixels(image)
    assert (found["image_size"], found["fit"], found["mean"]) == (384, "stretch", [0.5, 0.5, 0.5])
    assert own_pixels({**image, "image_size": 256, "fit": "pad"})["image_size"] == 256
    found = own_pixels({"name": "open_clip", "arch": "MobileCLIP-S1", "pretrained": "datacompdr"})
    assert (found["mean"], found["std"], found["interpolation"]) == ([0.0] * 3, [1.0] * 3, "bilinear")
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        tower = encoder("text", "open_clip", arch="ViT-B-32", pretrained=tag, load=False)
        assert tower.description["quick_gelu"] is quick and not tower.in_checkpoint
        assert type(tower.blocks[0].mlp.gelu).__name__ == ("QuickGELU" if quick else "GELU")


# ---- weights ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_of_every_layout_are_the_same(written, tmp_path):
    """A file by the names of open_clip's older class, of its newer one, and one that was a training's."""
    library = written["vit"][1]
    config = open_clip_config()
    new = library.state_dict()
    old = {name.removeprefix("text."): value for name, value in new.items()}
    for place, state in enumerate((new, old, {"state_dict": {f"module.{k}": v for k, v in new.items()}})):
        torch.save(state, tmp_path / f"{place}.pt")
        mine = {"config": config, "pretrained": str(tmp_path / f"{place}.pt")}
        image, text = (encoder(side, "open_clip", **mine).eval() for side in ("image", "text"))
        assert image.in_checkpoint and text.in_checkpoint
        images = pixels(2, 32)
        torch.testing.assert_close(image(images)["pooled"], library.encode_image(images), atol=1e-5, rtol=0)
        theirs = library.encode_text(ids_of(["red"], TEXT))
        torch.testing.assert_close(text(["red"])["sentence"], theirs, atol=1e-5, rtol=0)


def test_weights_that_do_not_fit_or_are_hostile_are_refused(written, tmp_path):
    config, path = open_clip_config(), tmp_path / "weights.pt"
    state = written["vit"][1].state_dict()
    torch.save({name: value for name, value in state.items() if "resblocks.1" not in name}, path)
    for side in ("image", "text"):
        with pytest.raises(CheckpointError, match=r"(?s)weights of another network.*missing in the file"):
            encoder(side, "open_clip", config=config, pretrained=str(path))
    torch.save({**state, "visual.further": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="unknown to the model: visual.further"):
        encoder("image", "open_clip", config=config, pretrained=str(path))
    torch.save({"state_dict": state, "run": print}, path)
    with pytest.raises(CheckpointError, match="refused.*code"):
        encoder("image", "open_clip", config=config, pretrained=str(path))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        encoder("image", "open_clip", config=config, pretrained=str(path))


def test_what_a_repositorys_config_asks_for_is_neither_run_nor_fetched(tmp_path, monkeypatch):
    import timm.models._hub

    words = tmp_path / "words"
    hub_case.write_tokenizer(words)
    settings = json.loads((words / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
    ran = tmp_path / "ran"
    kind = "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast): pass\n"
    (words / "code.py").write_text(f"open({str(ran)!r}, 'w')\n{kind}")
    reads = {"hf_tokenizer_name": str(words), "context_length": 12, "vocab_size": 32}
    reads["tokenizer_kwargs"] = {"trust_remote_code": True, "local_files_only": False}
    write_open_clip(tmp_path / "model", open_clip_config(text={**SIGLIP_TEXT, **reads}))
    with contextlib.suppress(CheckpointError):  # of a version of transformers that takes no other class in its place
        of_open_clip("text", tmp_path / "model")
    assert not ran.exists()

    own = {"model_type": "mine", "auto_map": {"AutoConfig": "code.MineConfig"}}
    (words / "config.json").write_text(json.dumps(own))
    text = {**reads, "hf_model_name": str(words), "hf_proj_type": "linear"}
    with pytest.raises(ConfigError, match="is of model_type 'mine', which transformers lacks; code .* is never run"):
        encoder("text", "open_clip", config=open_clip_config(text=text), pretrained="none")

    asked = []
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", lambda *a, **_: asked.append(a))
    config = open_clip_config("convnext")
    config["vision_cfg"] = {**config["vision_cfg"], "timm_model_name": "hf-hub:someone/model"}
    with pytest.raises(ConfigError, match="takes its tower from 'hf-hub:someone/model'; only names of timm's own"):
        encoder("image", "open_clip", config=config, pretrained="none")
    assert asked == []


def test_offline_the_repository_the_file_and_the_cache_are_named(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(repo, name, **_):
        asked.append((repo, name))
        raise OSError("no network")

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError) as caught:
        encoder("image", "open_clip", arch="ViT-B-32", pretrained="laion2b_s34b_b79k")
    text = str(caught.value)
    repo = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert repo in text and "open_clip_model.safetensors" in text and "no network" in text
    assert str(tmp_path / "hub" / f"models--{repo.replace('/', '--')}") in text
    with pytest.raises(CheckpointError, match=r"image.arch: cannot fetch open_clip_config.json of .* someone/model"):
        encoder("image", "open_clip", arch="hf-hub:someone/model", pretrained="none")
    assert asked == [(repo, "open_clip_model.safetensors"), ("someone/model", "open_clip_config.json")]


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_gradients_reach_every_trained_part_of_an_image_tower(written, name):
    tower = of_open_clip("image", written[name][0], frozen=False).train()
    tower(pixels(4, tower.image_size))["tokens"].square().sum().backward()
    trained = {key: value for key, value in tower.named_parameters() if value.requires_grad}
    assert trained and all(value.grad is not None for value in trained.values())
    assert {id(p) for p in tower.parameters() if not p.requires_grad} == {id(p) for p in tower.idle}
    assert len(tower.blocks) >= 2


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_gradients_reach_every_part_of_a_text_tower(written, name):
    tower = of_open_clip("text", written[f"text_{name}"][0], frozen=False).train()
    out = tower(TEXTS)
    (out["sentence"].square().sum() + out["words"].square().sum()).backward()
    trained = [value for value in tower.parameters() if value.requires_grad]
    assert len(trained) > 20 and all(value.grad is not None for value in trained)


def test_adapters_fingerprints_and_batches(written):
    for name in ("vit", "siglip"):
        tower = of_open_clip("image", written[name][0])
        check_alone(tower, pixels(3, tower.image_size))
        check_adapters(of_open_clip("image", written[name][0]))
        check_fingerprint(tower)
    check_adapters(of_open_clip("text", written["text_clip"][0]))
    check_fingerprint(of_open_clip("text", written["text_clip"][0]))


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "ViT-B-23", "pretrained": "none"}, "image.arch: 'ViT-B-23' is no model of open_clip. Did you mean"),
        ({"pretrained": "opnai"}, "image.pretrained: 'opnai' is no tag of ViT-B-32, and no file. Did you mean"),
        ({"config": {"vision_cfg": {}}, "pretrained": "none"}, "config lacks embed_dim, text_cfg"),
        ({"config": open_clip_config(), "pretrained": "openai"}, "'openai' is no tag of an own config"),
        ({"config": open_clip_config(), "pretrained": "none", "image_size": 36}, "image_size is 36; .* multiple of 8"),
        (
            {"config": {**open_clip_config(), "vision_cfg": {"timm_model_name": "no_such"}}, "pretrained": "none"},
            "open_clip cannot build this model",
        ),
        ({"arch": "local-dir:/no/where", "pretrained": "none"}, "'/no/where' is no folder here, and no repository"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        encoder("image", "open_clip", **settings)


def test_wrong_number_of_words_and_a_folder_that_lacks_something(written, tmp_path):
    for count in (0, 76):
        with pytest.raises(ConfigError, match=f"text.max_words is {count}; this model keeps 1 to 75 word pieces"):
            of_open_clip("text", written["text_clip"][0], max_words=count)
    with pytest.raises(CheckpointError, match="lacks open_clip_config.json"):
        of_open_clip("image", tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip_config()}))
    with pytest.raises(CheckpointError, match="holds no weights; wanted: open_clip_model.safetensors"):
        of_open_clip("image", tmp_path)
