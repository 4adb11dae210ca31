"""Baselines that train nothing: against the host's CLIP fed by hand, and files of phi good and bad."""

import copy
import json
import warnings
from pathlib import Path

import hub_case
import pytest
import torch
import torch.nn.functional as F
from clip_case import VIT, clip_text, pixels
from lavis.models.clip_models.tokenizer import tokenize
from published_case import pictures
from tiny import save
from torch import nn
from zero_shot_case import E, W, build, named, searle

import neucore_plugin
from neucore_plugin import cli
from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.config import loading
from neucore_plugin.models.baseline import CirBaseline
from neucore_plugin.models.zero_shot import read_phi
from neucore_plugin.retrieval import GalleryIndex

TEXTS = ["make it red", "a longer dress, with no sleeves", "costs $ 5"]
LONG = "red dress " * 60


class Im2Text(nn.Module):
    """pic2word's: blocks of Linear, Dropout, ReLU, and a last Linear."""

    def __init__(self, layers=2, middle=16):
        super().__init__()
        torch.manual_seed(2)
        blocks = [
            nn.Sequential(nn.Linear(middle if n else E, middle), nn.Dropout(0.1), nn.ReLU()) for n in range(layers)
        ]
        self.layers, self.fc_out = nn.Sequential(*blocks), nn.Linear(middle, W)

    def forward(self, x):
        return self.fc_out(self.layers(x))


def inverted(hosts, phi, **settings):
    return build(hosts, "inversion", inversion={"weights": phi[1], **settings})


def by_hand(host, prompt: str, vector: torch.Tensor) -> torch.Tensor:
    """The host's text tower over its whole context: `$` has the vector's place, the end token gives the sentence."""
    ids = tokenize([prompt])
    x = host.token_embedding(ids)
    x[0, ids[0].tolist().index(259)] = vector
    x = host.transformer((x + host.positional_embedding).permute(1, 0, 2), attn_mask=host.attn_mask).permute(1, 0, 2)
    return (host.ln_final(x)[0, ids[0].argmax()] @ host.text_projection)[None]


# ---- average ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_average_is_the_mean_of_the_hosts_unit_vectors(hosts, weight):
    model, host, images = build(hosts, text_weight=weight), hosts["vit"][0], pixels(3, 32)
    seen, read = (F.normalize(v, dim=-1) for v in (host.encode_image(images), host.encode_text(tokenize(TEXTS))))
    expected = F.normalize((1 - weight) * seen + weight * read, dim=-1)
    found = model.encode_query(images, TEXTS)
    torch.testing.assert_close(F.normalize(found["fused"], dim=-1), expected, atol=1e-5, rtol=0)
    gallery = pixels(5, 32)
    scores = model.score(found, model.encode_image(gallery))
    torch.testing.assert_close(scores, expected @ F.normalize(host.encode_image(gallery), dim=-1).T, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_query_of_one_side_is_that_sides_vector(hosts):
    model, host, images = build(hosts), hosts["vit"][0], pixels(3, 32)
    torch.testing.assert_close(model.encode_query(images)["fused"], host.encode_image(images), atol=1e-5, rtol=0)
    alone = model.encode_query(texts=TEXTS)["fused"]
    torch.testing.assert_close(alone, host.encode_text(tokenize(TEXTS)), atol=1e-5, rtol=0)
    blank = model.encode_query(images, ["", " ", ""])["fused"]
    torch.testing.assert_close(F.normalize(blank), F.normalize(host.encode_image(images)), atol=1e-5, rtol=0)
    for wrong in ({}, {"pixels": images, "texts": TEXTS[:2]}):
        with pytest.raises(ValueError, match=r"needs a reference image|3 reference images but 2"):
            model.encode_query(**wrong)


def test_vectors_that_cannot_be_compared_are_refused(hosts, tmp_path):
    clip = {"name": "clip", "config": VIT, "pretrained": hosts["vit"][1]}
    with pytest.raises(ConfigError, match="joint needs an encoder that reads picture and text together"):
        build(hosts, "joint")
    other = tmp_path / "other.pt"
    torch.save(torch.load(hosts["vit"][1]), other)
    for image, text, message in (
        (clip, {"name": "minilm_l6"}, "never trained to be compared"),
        ({"name": "efficientnet_lite0"}, {"name": "minilm_l6"}, "never trained to be compared"),
        (clip, {**clip, "pretrained": str(other)}, "two different models"),
    ):
        with pytest.raises(ConfigError, match=message):
            CirBaseline.from_config({"method": "average", "backbone": {"image": image, "text": text}})


@pytest.mark.filterwarnings("ignore:.*random weights")
@torch.no_grad()
def test_blip_projected_has_a_joint_space_and_plain_blip_none():
    small = {"image_size": 32, "architecture": {"width": 32, "depth": 1, "heads": 2}}
    text = {"architecture": {"width": 32, "layers": 1, "heads": 2}}
    for name in ("blip", "albef"):
        for projected in (True, False):
            shared = {"name": name, "projected": projected, "proj_dim": 16, "pretrained": "none"}
            section = {"method": "average", "backbone": {"image": {**shared, **small}, "text": {**shared, **text}}}
            if not projected:
                with pytest.raises(ConfigError, match="never trained to be compared"):
                    CirBaseline.from_config(section)
                continue
            model = CirBaseline.from_config(section).eval()
            assert model.encode_query(pixels(2, 32), TEXTS[:2])["fused"].shape == (2, 16)


# ---- textual inversion -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["a photo of $ that {}", "a photo of $ , {} !"])
@pytest.mark.parametrize("normalised", [False, True])
def test_inversion_is_the_hosts_text_tower_with_a_word_replaced(hosts, phi, prompt, normalised):
    """Also of a caption that holds the sign itself: the first one is the reference's."""
    model, host, images = inverted(hosts, phi, prompt=prompt, normalised=normalised), hosts["vit"][0], pixels(3, 32)
    seen = host.encode_image(images)
    vectors = phi[0](F.normalize(seen, dim=-1) if normalised else seen)
    texts = [model.caption_processor(text) for text in TEXTS]
    expected = [by_hand(host, prompt.replace("{}", text), v) for text, v in zip(texts, vectors, strict=True)]
    found = model.encode_query(images, TEXTS)["fused"]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)
    head = torch.cat([by_hand(host, "a photo of $", vector) for vector in vectors])
    for without in (model.encode_query(images), model.encode_query(images, ["", "", " "])):
        torch.testing.assert_close(without["fused"], head, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model.encode_query(texts=TEXTS)["fused"], host.encode_text(tokenize(texts)), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(model.encode_image(images)["fg"], seen, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_caption_that_is_too_long_is_cut_before_the_end_token(hosts, phi):
    model, host, images = inverted(hosts, phi), hosts["vit"][0], pixels(1, 32)
    kept = "a photo of $ that " + " ".join(LONG.split()[: 75 - 5])  # each a piece
    expected = by_hand(host, kept, phi[0](host.encode_image(images))[0])
    torch.testing.assert_close(model.encode_query(images, [LONG])["fused"], expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("method", ["average", "inversion"])
def test_nothing_depends_on_batch_mates_or_on_a_cache(hosts, phi, method):
    model = build(hosts, method, inversion={"weights": phi[1]})
    images, texts = pixels(3, 32), ["red", LONG, TEXTS[1]]
    together = model.encode_query(images, texts)["fused"]
    for row in range(3):
        alone = model.encode_query(images[row : row + 1], texts[row : row + 1])["fused"]
        torch.testing.assert_close(together[row], alone[0], atol=1e-6, rtol=0)
    out, text = model.backbone.image(images), model.backbone.text(texts)
    features = {"words": text["words"], "word_mask": text["mask"], "sentence": text["sentence"]}
    cached = model.encode_query(pooled=out["pooled"], tokens=out["tokens"], texts=texts, text_features=features)
    torch.testing.assert_close(cached["fused"], together, atol=1e-6, rtol=0)


def test_a_prompt_must_leave_the_placeholder_in_what_is_read(hosts, phi):
    for prompt in ("a photo of $", "{} on $", "$ and $ that {}", "a photo of * that {}", "$ {} {}"):
        with pytest.raises(ConfigError, match=r"inversion.prompt: got .*allowed: a text with one \$"):
            inverted(hosts, phi, prompt=prompt)
    sides = {side: {"name": "clip", "config": VIT, "pretrained": hosts["vit"][1]} for side in ("image", "text")}
    sides["text"]["max_words"] = 3
    with pytest.raises(ConfigError, match=r"inversion.prompt: text 0: what is read of it holds no '\$'"):
        CirBaseline.from_config({"method": "inversion", "backbone": sides, "inversion": {"weights": phi[1]}})
    text = clip_text(config=VIT, pretrained=hosts["vit"][1])
    with pytest.raises(ValueError, match="is 2 word pieces"):
        text.sentence_with(["a red dog"], "red dog", torch.zeros(1, W))


# ---- other libraries' towers -----------------------------------------------------------------------------------------

OPEN_CLIP = [pytest.param("open_clip", text, marks=hub_case.needs_open_clip) for text in ("clip", "siglip", "coca")]
TRANSFORMERS = [pytest.param("huggingface", kind, marks=hub_case.needs_transformers) for kind in hub_case.TWO_TOWERS]


def tower_sections(library, kind, folder):
    """Both sides of one tiny model, written as its library does."""
    if library == "open_clip":
        texts = {"clip": hub_case.TEXT, "siglip": hub_case.SIGLIP_TEXT}
        texts["coca"] = {**hub_case.TEXT, "embed_cls": True, "context_length": 76}
        hub_case.write_open_clip(folder, hub_case.open_clip_config(text=texts[kind]))
        side = {"name": "open_clip", "arch": f"local-dir:{folder}"}
    else:
        hub_case.write_transformers(folder, kind)
        side = {"name": "huggingface", "repo": str(folder)}
        if kind == "siglip2":
            return {"image": side, "text": {**side, "tokenizer": str(folder / "words")}}
    return {"image": side, "text": side}


@torch.no_grad()
@pytest.mark.parametrize(("library", "kind"), [*OPEN_CLIP, *TRANSFORMERS])
def test_towers_of_other_libraries_average_and_take_a_word(library, kind, tmp_path):
    sections = tower_sections(library, kind, tmp_path)
    model = CirBaseline.from_config({"method": "average", "backbone": sections}).eval()
    images, texts = hub_case.pixels(2, model.image_processor.image_size), ["make it red", "longer"]
    seen, read = model.backbone.image(images)["pooled"], model.backbone.text(texts)["sentence"]
    expected = F.normalize((F.normalize(seen, dim=-1) + F.normalize(read, dim=-1)) / 2, dim=-1)
    found = F.normalize(model.encode_query(images, texts)["fused"], dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    text = model.backbone.text  # the same with the word's own row of the table changed
    vectors, prompts = torch.randn(2, text.word_width), [f"make it blue {one}" for one in texts]
    (piece,) = text.pieces_of("blue")
    given = text.sentence_with(prompts, "blue", vectors)
    moved = (given - text(prompts)["sentence"]).abs().max()
    for row in range(2):
        changed = copy.deepcopy(text)
        changed.table.data[piece] = vectors[row]
        assert (given[row] - changed(prompts)["sentence"][row]).abs().max() < min(1e-5, 0.01 * moved)
    torch.testing.assert_close(text(texts)["sentence"], read)  # nothing of it stays
    with pytest.raises(ValueError, match="text 1: what is read of it holds no 'blue'"):
        text.sentence_with(["blue", "red"], "blue", vectors)


@hub_case.needs_transformers
def test_a_tokenizer_that_mistakes_a_word_of_the_prompt_for_the_placeholder_is_refused(tmp_path):
    sections = tower_sections("huggingface", "clip", tmp_path / "clip")
    torch.save(named(searle(first=24, last=32)), tmp_path / "phi.pt")
    section = {"method": "inversion", "backbone": sections, "inversion": {"weights": str(tmp_path / "phi.pt")}}
    with pytest.raises(ConfigError, match=r"reads a word of 'a photo of ' as \$"):  # all of them are unknown to it
        CirBaseline.from_config(section)
    section["inversion"]["prompt"] = "make it $ with {}"
    assert CirBaseline.from_config(section).encode_query(hub_case.pixels(1, 32), ["red"])["fused"].shape == (1, 24)


# ---- files of phi ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_pic2words_layout(tmp_path, layers):
    network, x = Im2Text(layers).eval(), torch.randn(4, E)
    whole = {"epoch": 1, "state_dict": {"visual.proj": torch.zeros(2)}}  # CLIP's weights stand in the same file
    whole["state_dict_img2text"] = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save(whole, tmp_path / "pic2word.pt")
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    for name in ("pic2word.pt", "bare.pt"):
        torch.testing.assert_close(read_phi(tmp_path / name, E, W)(x), network(x))


@torch.no_grad()
def test_searles_layout_bare_in_half_precision_and_as_safetensors(tmp_path, phi):
    from safetensors.torch import save_file

    x = torch.randn(4, E)
    torch.testing.assert_close(read_phi(phi[1], E, W)(x), phi[0](x))
    save_file(named(phi[0]), tmp_path / "phi.safetensors")
    torch.testing.assert_close(read_phi(tmp_path / "phi.safetensors", E, W)(x), phi[0](x))
    torch.save({name: value.half() for name, value in named(phi[0]).items()}, tmp_path / "half.pt")
    half = read_phi(tmp_path / "half.pt", E, W)
    assert half[0].weight.dtype == torch.float32 and not any(p.requires_grad for p in half.parameters())
    torch.testing.assert_close(half(x), phi[0](x), atol=1e-2, rtol=0)


def without(*names):
    return lambda: {name: value for name, value in named(searle()).items() if name not in names}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: named(searle(first=512)), r"layers.0.weight \[96, 512\].*\n.*takes width 24 .*gives 64"),
        (lambda: named(searle(last=768)), r"phi of another model.\n  found: .*layers.6.weight \[768, 96\]"),
        (lambda: named(searle()) | {"layers.3.weight": torch.zeros(96, 5)}, "another model"),
        (lambda: named(searle()) | {"layers.3.bias": torch.zeros(5)}, "another model"),
        (lambda: named(searle()) | {"layers.3.weight": torch.zeros(96)}, "another model"),
        (without("layers.3.bias"), "no phi of a known layout.\n  found: layers.0.weight .*\n  expected: layers.0, "),
        (lambda: {f"mlp.{name}": value for name, value in named(searle()).items()}, "no phi of a known layout"),
        (lambda: {"layers.0.weight": torch.zeros(W, E), "layers.0.bias": torch.zeros(W)}, "no phi of a known layout"),
        (lambda: {"Phi": {"a": 1}}, "holds no weights"),
        (lambda: {"Phi": named(searle()), "run": Path("x")}, "is refused: it contains code"),
    ],
)
def test_bad_files_of_phi(tmp_path, make, message):
    torch.save(make(), tmp_path / "phi.pt")
    with pytest.raises(CheckpointError, match=message):
        read_phi(tmp_path / "phi.pt", E, W)


def test_a_file_that_is_missing_or_damaged(tmp_path, phi, hosts):
    with pytest.raises(ConfigError, match=r"inversion.weights: got null; allowed: the path"):
        build(hosts, "inversion")
    with pytest.raises(CheckpointError, match="no file"):
        read_phi(tmp_path / "gone.pt", E, W)
    (tmp_path / "half.pt").write_bytes(Path(phi[1]).read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        read_phi(tmp_path / "half.pt", E, W)


# ---- as models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "inversion"])
def test_nothing_is_trained_and_nothing_warns_of_an_untrained_head(hosts, phi, method, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(hosts, method, inversion={"weights": phi[1]}).to("cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters()) and model.parameter_groups() == []
    assert model.title == method
    with pytest.raises(ConfigError, match=f"{method} trains nothing"):
        model({})
    for side in ("image", "text"):
        clip = {"name": "clip", "config": VIT, "pretrained": hosts["vit"][1]}
        sides = {"image": dict(clip), "text": dict(clip)}
        sides[side]["freeze"] = False
        with pytest.raises(ConfigError, match=rf"backbone.{side}.freeze: got false; {method} trains nothing"):
            CirBaseline.from_config({"method": method, "backbone": sides, "inversion": {"weights": phi[1]}})
    again = neucore_plugin.load_model(save(model, tmp_path / "zero.pth"))
    images = pixels(3, 32)
    assert torch.equal(again.encode_query(images, TEXTS)["fused"], model.encode_query(images, TEXTS)["fused"])


def test_an_index_takes_it(hosts, tmp_path):
    model = build(hosts)
    pictures(tmp_path / "pictures" / f"{number}.png" for number in range(6))
    index = GalleryIndex.build(model, tmp_path / "pictures")
    index.save(tmp_path / "index")
    hits = GalleryIndex.load(tmp_path / "index", model).search("0.png", "make it red", k=3)
    assert len(hits) == 3 and hits == index.search("0.png", "make it red", k=3)


def test_model_types_are_the_baselines_alone():
    types = CirBaseline.PRETRAINED_MODEL_CONFIG_DICT
    assert {"zeroshot_clip_vitb32", "zeroshot_clip_vitl14"} <= set(types)
    for name in (name for name in types if name.startswith("zeroshot_")):
        with pytest.raises(ConfigError, match="no model type|known model type|model_type"):
            loading.model_defaults({"arch": "neucore", "model_type": name})
    found = loading.model_defaults({"arch": "cir_baseline", "model_type": "zeroshot_clip_vitl14"})
    assert (found["method"], found["backbone"]["text"]["arch"]) == ("average", "ViT-L-14")


def test_a_search_by_a_type_that_needs_no_training(hosts, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(CirBaseline, "from_pretrained", lambda name: asked.append(name) or build(hosts))
    pictures(tmp_path / f"{number}.png" for number in range(4))
    arguments = ["search", "--model-type", "zeroshot_clip_vitb32", "--folder", str(tmp_path), "--image", "0.png"]
    assert cli.main([*arguments, "--text", "make it red", "--json"]) == 0
    assert asked == ["zeroshot_clip_vitb32"] and len(json.loads(capsys.readouterr().out)) == 3
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--checkpoint", "best.pth"])


def test_a_search_with_a_type_that_needs_training_is_refused(tmp_path, capsys):
    arguments = ["search", "--model-type", "embedded", "--folder", str(tmp_path), "--text", "red"]
    assert cli.main(arguments) == 2
    assert "has nothing trained to search with; give --checkpoint" in capsys.readouterr().err
