"""Models of transformers against the library's own vectors; texts, sizes, pictures, weights, training, settings."""

import json

import hub_case
import numpy as np
import pytest
import torch
from blip_case import check_adapters, check_fingerprint
from encoder_case import check_alone, encoder
from hub_case import (
    LONG,
    TEXT_ALONE,
    TEXTS,
    TWO_TOWERS,
    VISION_ALONE,
    named,
    of_transformers,
    pixels,
    write_transformers,
)
from PIL import Image

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.models.backbones import own_pixels
from neucore_plugin.processors import ImageProcessor

pytestmark = hub_case.needs_transformers
IMAGES, READERS = {**TWO_TOWERS, **VISION_ALONE}, {**TWO_TOWERS, **TEXT_ALONE}


def working(kinds):
    """Those whose own get_text_features works."""
    broken = pytest.mark.skipif(hub_case.transformers_is_before((5, 0)), reason="Chinese-CLIP's fails before 5.0")
    return [pytest.param(kind, marks=broken) if kind == "chinese_clip" else kind for kind in kinds]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{kind: (folder, transformers' model)}."""
    root = tmp_path_factory.mktemp("transformers")
    return {kind: (root / kind, write_transformers(root / kind, kind)) for kind in {**IMAGES, **READERS}}


def ids_of(folder, texts, kind):
    from transformers import AutoTokenizer

    full = {"padding": "max_length"} if kind.startswith("siglip") else {"padding": True}
    folder = folder / "words" if kind == "siglip2" else folder
    batch = AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=16, return_tensors="pt", **full)
    names = ("input_ids",) if kind.startswith("siglip") else ("input_ids", "attention_mask")
    return {name: batch[name] for name in names}


# ---- the same as the library's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TWO_TOWERS)
@torch.no_grad()
def test_images_of_two_towers_are_the_librarys(written, kind):
    folder, library = written[kind]
    tower = of_transformers("image", folder)
    images = pixels(3, tower.image_size)
    inputs = {"pixel_values": images}
    if kind == "siglip2":
        cells = [(row, column) for row in range(0, 32, 8) for column in range(0, 32, 8)]
        rows = torch.stack(
            [images[:, :, row : row + 8, column : column + 8].permute(0, 2, 3, 1).flatten(1) for row, column in cells],
            1,
        )
        shapes = torch.tensor([[4, 4]] * 3)
        inputs = {"pixel_values": rows, "pixel_attention_mask": torch.ones(3, 16), "spatial_shapes": shapes}
    out = tower(images)
    torch.testing.assert_close(out["pooled"], named(library.get_image_features(**inputs)), atol=1e-5, rtol=0)
    hidden = library.vision_model(*inputs.values()).last_hidden_state
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    torch.testing.assert_close(out["tokens"], hidden, atol=1e-5, rtol=0)
    assert out["tokens"].shape == (3, tower.num_tokens, tower.width)
    assert tower.grid == ((2, 2) if kind == "align" else (4, 4)) and not hasattr(tower.network, "logit_scale.data")
    assert not any("text" in name for name in tower.state_dict())


@pytest.mark.parametrize("kind", VISION_ALONE)
@torch.no_grad()
def test_images_of_a_vision_model_alone_are_the_librarys(written, kind):
    folder, library = written[kind]
    tower, images = of_transformers("image", folder), pixels(3, 32)
    found, out = library(images), tower(images)
    hidden = found.last_hidden_state
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    torch.testing.assert_close(out["tokens"], hidden, atol=1e-5, rtol=0)
    pooled = hidden[:, 0] if kind == "vit" else found.pooler_output.flatten(1)  # ViT's pooler has weights of its own
    torch.testing.assert_close(out["pooled"], pooled, atol=1e-5, rtol=0)
    assert (tower.grid, tower.num_tokens) == ((4, 4), {"dinov3_vit": 21, "convnext": 16, "swin": 16}.get(kind, 17))


@pytest.mark.parametrize("kind", working(TWO_TOWERS))
@torch.no_grad()
def test_sentences_of_two_towers_are_the_librarys(written, kind):
    folder, library = written[kind]
    tower, spoken = of_transformers("text", folder), [*(text for text in TEXTS if text), LONG]
    expected = named(library.get_text_features(**ids_of(folder, spoken, kind)))
    torch.testing.assert_close(tower(spoken)["sentence"], expected, atol=1e-5, rtol=0)
    assert not any("vis" in name for name in tower.state_dict())


@pytest.mark.parametrize("kind", TEXT_ALONE)
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@torch.no_grad()
def test_words_and_sentences_of_a_text_model_alone(written, kind, pooling):
    folder, library = written[kind]
    tower = of_transformers("text", folder, pooling=pooling)
    text = "a longer dress"
    hidden = library(**ids_of(folder, [text], kind)).last_hidden_state[0]
    out = tower([text, LONG])
    torch.testing.assert_close(out["words"][0, :3], hidden[1:-1], atol=1e-5, rtol=0)
    sentence = {"cls": hidden[0], "mean": hidden.mean(0), "last": hidden[-1]}[pooling]
    torch.testing.assert_close(out["sentence"][0], sentence, atol=1e-5, rtol=0)


@torch.no_grad()
def test_sentences_of_sentence_transformers(written, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    for mode in ("cls", "mean"):
        folder = tmp_path / mode
        words = models.Transformer(str(written["bert"][0]))
        pool = models.Pooling(32, pooling_mode=mode)
        whole = library.SentenceTransformer(modules=[words, pool], device="cpu")
        whole.save_pretrained(str(folder), create_model_card=False)
        tower = of_transformers("text", folder)
        assert tower.pooling == mode
        expected = whole.encode(["a longer dress", "red"], convert_to_tensor=True)
        torch.testing.assert_close(tower(["a longer dress", "red"])["sentence"], expected, atol=1e-5, rtol=0)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"type": "sentence_transformers.models.Dense", "path": "2"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="has Dense after its transformer.*name a `pooling`"):
        of_transformers("text", folder)
    assert of_transformers("text", folder, pooling="cls").pooling == "cls"


@pytest.mark.parametrize("kind", working(READERS))
@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch_and_a_long_one_keeps_its_end(written, kind):
    folder = written[kind][0]
    tower = of_transformers("text", folder)
    out = check_alone(tower, [*TEXTS, LONG])
    assert out["mask"].sum(1).tolist() == [3, 0, 6, 1, tower.max_words]
    assert tower.max_words == (15 if kind.startswith("siglip") else 14)
    assert not out["words"][~out["mask"]].any() and not out["sentence"][1].any()
    assert [tuple(value.shape) for value in tower([]).values()] == [(0, 0, tower.width), (0, 0), (0, tower.width)]
    few = of_transformers("text", folder, max_words=2)
    torch.testing.assert_close(few(["red dress blue"])["sentence"], tower(["red dress"])["sentence"], atol=1e-6, rtol=0)
    assert few.fingerprint != tower.fingerprint
    table, words = tower.table, tower.embed_words(["red", "", "longer dress"])
    torch.testing.assert_close(words, torch.stack([table[6], torch.zeros(32), table[[8, 9]].mean(0)]))
    spelled = tower(["red </s> dress"])  # words like others, which end nothing
    assert (spelled["sentence"] - tower(["red"])["sentence"]).abs().max() > 1e-4 and spelled["mask"].sum() > 2


@torch.no_grad()
def test_flava_is_compared_by_its_first_tokens(tmp_path):
    sizes = {"text_config": hub_case.READS, "image_config": hub_case.VISION, "multimodal_config": hub_case.SIZES}
    library = write_transformers(tmp_path, "flava", {**sizes, "hidden_size": 32, "projection_dim": 24})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hub_case.PROCESSORS["clip"]))
    images = pixels(2, 32)
    found = of_transformers("image", tmp_path)(images)["pooled"]
    expected = named(library.get_image_features(pixel_values=images))[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found = of_transformers("text", tmp_path)(["make it red"])["sentence"]
    expected = named(library.get_text_features(**ids_of(tmp_path, ["make it red"], "flava")))[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@torch.no_grad()
def test_texts_of_no_piece_where_the_tokenizer_adds_none(written, tmp_path, pooling):
    for kind in ("bert", "qwen3"):
        hub_case.write_tokenizer(tmp_path / kind, first="", last="")
        given = {"tokenizer": str(tmp_path / kind), "pooling": pooling}
        tower = encoder("text", "huggingface", repo=str(written[kind][0]), **given).eval()
        out = tower(["", " "])
        assert out["words"].shape == (2, 0, 32) and not out["mask"].any() and not out["sentence"].any()
        assert check_alone(tower, TEXTS)["mask"].sum(1).tolist() == [3, 0, 6, 1]


@torch.no_grad()
def test_siglip_reads_lower_case_whatever_its_tokenizer(written, tmp_path):
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    for kind in ("siglip", "bert"):
        folder = tmp_path / kind
        hub_case.write_tokenizer(folder)
        raw = AutoTokenizer.from_pretrained(folder)
        raw.backend_tokenizer.normalizer = normalizers.Sequence([])
        raw.save_pretrained(folder)
        tower = encoder("text", "huggingface", repo=str(written[kind][0]), tokenizer=str(folder)).eval()
        upper, lower = tower(["Red DRESS", "red dress"])["sentence"]
        assert torch.equal(upper, lower) is (kind == "siglip")
        assert torch.equal(*tower.embed_words(["Red", "red"])) is (kind == "siglip")


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip", "align", "siglip2", "dinov2"])
def test_pictures_are_prepared_as_by_the_librarys_processor(written, kind):
    from transformers import AutoImageProcessor

    folder = written[kind][0]
    tower = of_transformers("image", folder)
    ours, theirs = ImageProcessor(**tower.resolved), AutoImageProcessor.from_pretrained(folder)
    drawn = np.random.default_rng(0)
    for shape in ((70, 90), (64, 64)):
        picture = Image.fromarray(drawn.integers(0, 255, (*shape, 3), dtype=np.uint8)).resize((50, 45))
        expected = theirs(picture, return_tensors="pt")["pixel_values"][0]
        if kind == "siglip2":  # its own keeps the picture's shape
            assert (tower.image_size, tower.fit) == (32, "stretch")
            continue
        torch.testing.assert_close(ours(picture), expected, atol=0.03, rtol=0)
    assert own_pixels({"name": "huggingface", "repo": str(folder)}) == tower.resolved


CONVNEXT = {**hub_case.SQUARE, "image_processor_type": "ConvNextImageProcessor", "resample": 3}
CONVNEXT.pop("do_center_crop")
POOLFORMER = {**hub_case.SQUARE, "image_processor_type": "PoolFormerImageProcessor", "do_center_crop": True}
POOLFORMER["crop_size"] = {"height": 32, "width": 32}

ALIGN = {**hub_case.PROCESSORS["align"], "size": {"height": 38, "width": 38}, "do_center_crop": True}
ALIGN["crop_size"] = POOLFORMER["crop_size"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({**CONVNEXT, "size": {"shortest_edge": 32}, "crop_pct": 0.875}, ("shortest", 32, 36)),
        ({**CONVNEXT, "size": {"shortest_edge": 384}, "crop_pct": 1.0}, ("stretch", 384, None)),
        ({**POOLFORMER, "size": {"shortest_edge": 32}, "crop_pct": 0.8}, ("shortest", 32, 40)),
        ({**hub_case.SQUARE, "image_processor_type": "ViTImageProcessor", "resample": 0}, ("stretch", 32, None)),
        (ALIGN, ("stretch", 32, 38)),
    ],
)
def test_pictures_of_processors_with_rules_of_their_own(written, tmp_path, said, expected):
    from transformers import AutoImageProcessor

    (tmp_path / "config.json").write_text((written["convnext"][0] / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    found = own_pixels({"name": "huggingface", "repo": str(tmp_path)})
    assert (found["fit"], found["image_size"], found["resize"]) == expected
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 11, 3), dtype=np.uint8)).resize((80, 64))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ImageProcessor(**found)(picture), theirs, atol=0.03, rtol=0)


def test_colours_in_another_order_are_refused(written, tmp_path):
    said = {**hub_case.PROCESSORS["clip"], "image_processor_type": "MobileViTImageProcessor"}
    (tmp_path / "config.json").write_text((written["vit"][0] / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**said, "do_flip_channel_order": True}))
    with pytest.raises(ConfigError, match="takes colours as blue, green, red"):
        own_pixels({"name": "huggingface", "repo": str(tmp_path)})


def test_a_model_that_draws_is_refused():
    """A masked autoencoder hides other patches each time, in eval mode too."""
    config = {"model_type": "vit_mae", **hub_case.VISION}
    with pytest.raises(ConfigError, match="other vectors each time, as a masked autoencoder does"):
        encoder("image", "huggingface", config=config, pretrained="none")


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dinov2", "dinov3_vit", "vit"])
@torch.no_grad()
def test_another_size_interpolates_the_positions(written, kind):
    tower, small = (of_transformers("image", written[kind][0], image_size=size) for size in (48, None))
    assert (tower.grid, tower.image_size, tower.resize) == ((6, 6), 48, None)
    assert torch.isfinite(tower(pixels(2, 48))["tokens"]).all() and tower.fingerprint != small.fingerprint
    with pytest.raises(ValueError, match="expects 48 px squares"):
        tower(pixels(2, 32))


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_damaged_or_hostile_are_refused(written, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    write_transformers(folder, "clip")
    state = load_file(folder / "model.safetensors")
    some = {name: value for name, value in state.items() if "layers.1" not in name}
    save_file(some, folder / "model.safetensors", metadata={"format": "pt"})
    for side in ("image", "text"):
        with pytest.raises(CheckpointError, match="weights of another network; it lacks .*layers.1"):
            of_transformers(side, folder)
    (folder / "model.safetensors").write_bytes(b"0" * 40)
    with pytest.raises(CheckpointError, match="clip cannot be used"):
        of_transformers("image", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights; wanted: one of model.safetensors"):
        of_transformers("image", folder)
    torch.save(state, folder / "pytorch_model.bin")
    images = pixels(1, 32)
    with torch.no_grad():
        found = of_transformers("image", folder)(images)["pooled"]
        torch.testing.assert_close(found, of_transformers("image", written["clip"][0])(images)["pooled"])

    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("x",))

    torch.save({**state, "run": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="clip cannot be used"):
        of_transformers("image", folder)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_repository_is_never_run(written, tmp_path):
    folder = tmp_path / "own"
    write_transformers(folder, "bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "code.Mine", "AutoConfig": "code.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ConfigError, match="model_type 'mine', which transformers lacks; code .* is never run"):
        of_transformers("text", folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@torch.no_grad()
def test_half_precision_is_near_and_comes_out_as_float32(written, dtype):
    folder = written["clip"][0]
    images = pixels(2, 32)
    for side, given, key in (("image", images, "tokens"), ("text", TEXTS, "words")):
        exact, half = (of_transformers(side, folder, dtype=kind) for kind in ("float32", dtype))
        found, expected = half(given)[key], exact(given)[key]
        assert found.dtype == torch.float32 and next(half.network.parameters()).dtype == getattr(torch, dtype)
        assert 0 < (found - expected).norm() < 0.03 * expected.norm()
        assert half.fingerprint != exact.fingerprint
    assert half.embed_words(["red", ""]).dtype == torch.float32


@pytest.mark.parametrize(("kind", "side"), [("qwen3", "text"), ("dinov3_vit", "image")])
def test_the_angles_of_rotary_positions_keep_their_precision(written, kind, side):
    exact, half = (of_transformers(side, written[kind][0], dtype=dtype).network for dtype in ("float32", "bfloat16"))
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    expected, found = (dict(one.named_buffers()) for one in (exact, half))
    angles = [name for name in expected if "inv_freq" in name]
    assert angles and all(torch.equal(found[name], expected[name]) for name in angles)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGES)
def test_gradients_reach_every_trained_part_of_an_image_side(written, kind):
    tower = of_transformers("image", written[kind][0], frozen=False).train()
    tower(pixels(4, tower.image_size))["tokens"].square().sum().backward()
    trained = [value for value in tower.parameters() if value.requires_grad]
    assert len(trained) > 10 and all(value.grad is not None for value in trained)
    assert {id(p) for p in tower.parameters() if not p.requires_grad} == {id(p) for p in tower.idle}
    assert len(tower.blocks) >= 2


@pytest.mark.parametrize("kind", working(READERS))
def test_gradients_reach_every_trained_part_of_a_text_side(written, kind):
    tower = of_transformers("text", written[kind][0], frozen=False).train()
    out = tower(TEXTS)
    (out["sentence"].square().sum() + out["words"].square().sum()).backward()
    trained = [value for value in tower.parameters() if value.requires_grad]
    assert len(trained) > 20 and all(value.grad is not None for value in trained) and len(tower.blocks) == 2


def test_adapters_fingerprints_and_batches(written):
    for kind in ("clip", "siglip", "dinov2"):
        tower = of_transformers("image", written[kind][0])
        check_alone(tower, pixels(3, tower.image_size))
        check_fingerprint(tower)
        check_adapters(of_transformers("image", written[kind][0]))
    check_fingerprint(of_transformers("text", written["clip"][0]))
    check_adapters(of_transformers("text", written["clip"][0]))


# ---- settings --------------------------------------------------------------------------------------------------------


def test_a_side_that_a_model_lacks_is_told(written):
    with pytest.raises(ConfigError, match="text: a model of type dinov2 has no text side"):
        of_transformers("text", written["dinov2"][0])
    with pytest.raises(ConfigError, match="image: a model of type bert has no image side"):
        of_transformers("image", written["bert"][0])
    with pytest.raises(ConfigError, match="text.pooling is 'cls'; a clip has a vector of its own"):
        of_transformers("text", written["clip"][0], pooling="cls")
    with pytest.raises(ConfigError, match="text.max_words is 15; this model keeps 1 to 14"):
        of_transformers("text", written["clip"][0], max_words=15)
    own = {"config": {"model_type": "bert", **TEXT_ALONE["bert"]}, "pretrained": "none"}
    with pytest.raises(ConfigError, match="text.tokenizer: your own config brings none"):
        encoder("text", "huggingface", **own)
    assert encoder("text", "huggingface", **own, tokenizer=str(written["bert"][0])).in_checkpoint
    with pytest.raises(ConfigError, match="image.image_size is null, and the model's files say no size; give it"):
        encoder("image", "huggingface", config={"model_type": "resnet"}, pretrained="none")
    with pytest.raises(ConfigError, match="image: the config is of model_type 'clipp', which transformers lacks"):
        encoder("image", "huggingface", config={"model_type": "clipp"}, pretrained="none")


def test_offline_the_repository_the_file_and_the_cache_are_named(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(repo, name, **_):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for side in ("image", "text"):
        with pytest.raises(CheckpointError) as caught:
            encoder(side, "huggingface", repo="google/siglip2-base-patch16-224")
        text = str(caught.value)
        assert f"model.backbone.{side}.repo: cannot fetch config.json" in text and "no network" in text
        assert str(tmp_path / "hub" / "models--google--siglip2-base-patch16-224") in text
    with pytest.raises(ConfigError, match="'no/such/place' is no folder here, and no repository"):
        encoder("image", "huggingface", repo="no/such/place")
