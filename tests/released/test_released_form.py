"""The released form as model types: encoders, any settings against plain loops, two-phase training."""

import copy
import warnings

import numpy as np
import pytest
import released_reference as slow
import tiny
import torch
import yaml
from encoder_case import backbone as build
from encoder_case import encoder as made
from reference import contrastive_loss, focal_loss
from released_weights import CONCEPTS, OPT, WORDS, converted, tensors, weights
from torchvision import models as zoo

from neucore_plugin import launch
from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config.loading import load_config, model_defaults
from neucore_plugin.models.backbones.resnet_gru import SPECIALS, split_words, word_list
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.models.progressive_fusion import ProgressiveFusion
from neucore_plugin.weights import checkpoint


@pytest.fixture(scope="module")
def loops():
    """Weights and a converted model with S 5, depth 3, T 2, and a batch of two queries of unequal length."""
    w = weights()
    model = converted().model
    model.backbone.image.grid = (2, 2)
    maps = np.random.default_rng(1).normal(size=(4, 6, 2, 2))
    return w, model, maps, ["make it longer red", "blue dress"], [("red", "sleeve", "unheard"), ("dress",)]


# ---- any settings, against loops ------------------------------------------------------------------------------------


@torch.no_grad()
def test_search_is_that_of_the_loops(loops):
    """A batch of two queries: each as if it were alone, with no trace of padding."""
    w, model, maps, texts, concepts = loops
    pixels = torch.from_numpy(maps)
    query = model.encode_query(pixels[:2], texts, concept_words=concepts)
    scores = model.score(query, model.encode_image(pixels)).numpy()
    encoded = slow.images(w, maps, OPT)
    for row, (text, words) in enumerate(zip(texts, concepts, strict=True)):
        ids = [1, *(WORDS.index(word) for word in text.split()), 3]
        sentence, vectors = slow.text(w, ids)
        _, tokens, fg, bg = encoded[row]
        known = [WORDS.index(word) if word in WORDS else 4 for word in words]
        fused = slow.fuse(w, sentence, vectors, tokens, fg, known, len(known), OPT)
        expected = [slow.score(w, sentence, fused, bg, t_fg, t_bg) for _, _, t_fg, t_bg in encoded]
        assert scores[row] == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_the_loss_is_that_of_the_loops(loops):
    """In training, padding enters the norms as in the released code."""
    w, model, maps, texts, concepts = loops
    pixels = torch.from_numpy(maps)
    samples = {"reference_image": pixels[:2], "target_image": pixels[2:], "text_input": texts}
    out = model({**samples, "concept_words": concepts, "target_key": torch.tensor([2, 3])})
    encoded, matrix, logits = slow.images(w, maps, OPT), [], []
    for row, (text, words) in enumerate(zip(texts, concepts, strict=True)):
        sentence, vectors = slow.text(w, [1, *(WORDS.index(word) for word in text.split()), 3])
        known = [WORDS.index(word) if word in WORDS else 4 for word in words]
        _, tokens, fg, bg = encoded[row]
        fused = slow.fuse(w, sentence, vectors, tokens, fg, known, 3, OPT)
        matrix.append([slow.score(w, sentence, fused, bg, t[2], t[3]) for t in encoded[2:]])
        rows = [WORDS.index(word) for word in CONCEPTS]
        logits.append(slow.concept_logits(w, encoded[row], encoded[row + 2], rows, OPT))
    labels = [[int(concept in words) for concept in CONCEPTS] for words in concepts]
    assert out["loss_matching"].item() == pytest.approx(contrastive_loss(matrix, 1.3), rel=1e-9)
    assert out["loss_concept"].item() == pytest.approx(200 * focal_loss(logits, labels, 0.5, 1.0), rel=1e-9)


def test_words_get_a_gradient_as_classes_and_none_as_concepts_of_the_query(loops):
    _, _, maps, _, _ = loops
    model = converted().model
    model.backbone.image.grid = (2, 2)
    assert not list(model.backbone.text.embedding.parameters())  # phase 1
    concepts, mask = model.query_concepts([("red",)])
    assert concepts.requires_grad and mask.all()  # by the projection, which the fusion cuts:
    pixels = torch.from_numpy(maps)
    samples = {"reference_image": pixels[:2], "target_image": pixels[2:], "text_input": ["make it", "blue"]}
    samples |= {"concept_words": [("red",), ("dress",)], "target_key": torch.tensor([2, 3])}
    model(samples)["loss_matching"].backward()
    assert model.alignment.classifier.projection.weight.grad is None


def test_dropout_acts_at_four_places_of_an_executor_in_training_alone(monkeypatch):
    """On the attention's weights and its output, behind the GELU, and behind the second linear layer."""
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention(*given, dropout_p=0.0, **more):
        seen.append(("weights", dropout_p))
        return attend(*given, dropout_p=0.0, **more)

    def drop(x, p=0.5, training=True, inplace=False):
        seen.append((x.shape[-1], p if training else 0.0))
        return x

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    for name in ("official_cirr", "official_fashioniq", "official_shoes"):
        fusion = {**model_defaults({"model_type": name})["fusion"], "module_depth": 1}
        del fusion["clauses"], fusion["places"]  # of another form
        executor = ProgressiveFusion(dim=12, released=True, **fusion).executors[0][0]
        assert executor.attention[0].heads == 8 and executor.attention[0].proj.in_features == 512
        for training in (True, False):
            seen.clear()
            executor.train(training)(torch.randn(2, 5, 12), torch.randn(2, 12), torch.ones(2, 5, dtype=torch.bool))
            assert seen == [(place, 0.1 * training) for place in ("weights", 12, 48, 12)]


# ---- image encoders -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    net = zoo.resnet18(weights=None).eval()
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
    return net


def named(net, how):
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    if how == "torchvision":
        return {f"img_enc.cnn.module.{name}": value for name, value in net.state_dict().items()}
    if how == "sequence":
        places = {name: str(place) for place, (name, _) in enumerate(net.named_children())}
        parts = {name: name.split(".", 1) for name in state}
        return {f"img_enc.cnn.{places[head]}.{rest}": state[name] for name, (head, rest) in parts.items()}
    counted = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    return {f"img_enc.part{place}.w": value for place, value in enumerate(counted)}


@pytest.mark.parametrize("how", ["torchvision", "sequence", "order"])
@torch.no_grad()
def test_a_cnn_of_the_checkpoint_is_found_under_any_names(resnet18, how):
    state = {**tensors(width=512), **named(resnet18, how)}
    done = converted(state)
    model = done.model
    assert model.config["backbone"]["image"]["network"] == "resnet18"
    assert [name for name in done.unused if name.endswith("fc.weight")] == (
        ["img_enc.cnn.module.fc.weight"] if how == "torchvision" else []
    )
    model.backbone.image.image_size = 64
    pixels = torch.randn(2, 3, 64, 64).double()
    net = copy.deepcopy(resnet18).double()
    expected = torch.nn.Sequential(*list(net.children())[:-2])(pixels)  # [2,512,2,2]
    tokens = model.backbone.image(pixels)["tokens"]
    assert torch.allclose(tokens, expected.permute(0, 2, 3, 1).reshape(2, 4, 512), rtol=1e-6)
    weight = state["img_enc.proj.weight"].double()
    projected = torch.nn.functional.conv2d(expected, weight, state["img_enc.proj.bias"].double())
    assert torch.allclose(model.image_features(["tokens"], pixels)["tokens"][1, 2], projected[1, :, 1, 0], rtol=1e-6)


def test_weights_of_no_known_cnn_are_refused():
    state = {**tensors(), "img_enc.cnn.layer9.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="the weights below img_enc. are none of resnet18, resnet34"):
        converted(state)


def resnet(network, weights=None, **settings):
    return made("image", "resnet", network=network, weights=weights, **settings)


def test_resnet_reads_torchvisions_file_and_nothing_else(resnet18, tmp_path):
    torch.save(resnet18.state_dict(), tmp_path / "good.pth")
    encoder = resnet("resnet18", tmp_path / "good.pth", image_size=64).eval()
    assert torch.equal(encoder.network.layer4[1].conv2.weight, resnet18.layer4[1].conv2.weight)
    with pytest.raises(CheckpointError, match="good.pth holds weights of another network"):
        resnet("resnet34", tmp_path / "good.pth")
    with pytest.raises(CheckpointError, match="no file .*none.pth; give a file of weights"):
        resnet("resnet18", tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut.pth is truncated, damaged"):
        resnet("resnet18", tmp_path / "cut.pth")
    with pytest.warns(UserWarning, match="resnet18 has random weights"):
        resnet("resnet18")
    with pytest.raises(ValueError, match="64 px squares"):
        encoder(torch.zeros(1, 3, 32, 32))


def test_a_frozen_resnet_does_not_move_and_a_free_one_does(resnet18, tmp_path):
    torch.save(resnet18.state_dict(), tmp_path / "r.pth")
    section = {"image": {"name": "resnet", "network": "resnet18", "weights": str(tmp_path / "r.pth"), "image_size": 32}}
    text = {"name": "glove_bigru", "word_dim": 5, "width": 8, "freeze": False}
    for freeze in (True, False):
        backbone = build({"image": {**section["image"], "freeze": freeze}, "text": text}, WORDS)
        backbone.train()
        before = {name: value.clone() for name, value in backbone.image.state_dict().items()}
        parameters = list(backbone.image.parameters())
        assert bool(parameters) is not freeze
        assert any(part.training for part in backbone.image.modules()) is not freeze
        tokens = backbone.image(torch.randn(4, 3, 32, 32))["tokens"]
        assert tokens.requires_grad is not freeze
        if not freeze:
            tokens.square().sum().backward()
            torch.optim.SGD(parameters, lr=0.1).step()
        moved = {name for name, value in backbone.image.state_dict().items() if not torch.equal(value, before[name])}
        assert ("network.bn1.running_mean" in moved and "network.conv1.weight" in moved) is not freeze
        assert not (freeze and moved)


def test_features_say_what_they_take():
    encoder = made("image", "features", width=6, grid=2)
    maps = torch.arange(24.0).reshape(1, 6, 2, 2)
    tokens = encoder(maps)["tokens"]
    assert tokens.shape == (1, 4, 6) and tokens[0, 1].tolist() == [1, 5, 9, 13, 17, 21]
    with pytest.raises(ConfigError, match=r"takes feature maps \[B, 6, 2, 2\], given \[1, 3, 224, 224\]; extract them"):
        encoder(torch.zeros(1, 3, 224, 224))


# ---- text encoder ---------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return made("text", "glove_bigru", words=WORDS, word_dim=5, width=8).double()


def test_words_of_captions():
    assert split_words("Make it RED,  don't use T-shirts!") == ["make", "it", "red", "don't", "use", "t", "shirts"]
    assert split_words("is red <and> has sleeves") == ["is", "red", "<and>", "has", "sleeves"]
    assert word_list(["b a", "a c"], ["d", "a"]) == [*SPECIALS, "b", "a", "c", "d"]
    assert split_words("") == split_words(" ,.! ") == []


def test_the_bigru_is_that_of_the_loops(encoder):
    """Each text of a padded batch as if alone; words are zero at padding."""
    w = {f"txt_enc.sent_enc.{name}": value.detach().numpy() for name, value in encoder.gru.named_parameters()}
    w["txt_enc.embed.weight"] = encoder.embedding.weight.detach().numpy()
    out = encoder(["red dress", "make it longer unheard red", "it"])
    rows = ([1, 5, 7, 3], [1, 9, 10, 8, 4, 5, 3], [1, 10, 3])
    assert out["mask"].sum(1).tolist() == [4, 7, 3] and not out["words"][~out["mask"]].any()
    for place, ids in enumerate(rows):
        sentence, words = slow.text(w, ids)
        assert out["sentence"][place].tolist() == pytest.approx(sentence, rel=1e-9)
        assert np.allclose(out["words"][place, : len(ids)].detach(), words, rtol=1e-9)


def test_texts_without_words_and_no_texts(encoder):
    out = encoder(["", "red", "!!"])
    assert out["mask"].any(1).tolist() == [False, True, False] and not out["sentence"][0].any()
    assert encoder([])["sentence"].shape == (0, 8) and encoder.embed_words([]).shape == (0, 5)
    long = encoder(["red " * 500])
    assert long["words"].shape[1] == encoder.max_words + 2


def test_glove_freezes_in_parts():
    whole, words, free = (
        made("text", "glove_bigru", words=WORDS, word_dim=5, width=8, frozen=f, freeze_words=w)
        for f, w in ((True, True), (False, True), (False, False))
    )
    assert [len(list(one.parameters())) for one in (whole, words, free)] == [0, 8, 9]
    assert whole.state_dict().keys() == words.state_dict().keys() == free.state_dict().keys()
    assert not whole(["red"])["sentence"].requires_grad and words(["red"])["sentence"].requires_grad
    assert free.embed_words(["red"]).requires_grad and not words.embed_words(["red"]).requires_grad
    held = copy.deepcopy(whole).double()
    held.load_state_dict({name: value.double() * 2 for name, value in whole.state_dict().items()})
    free.double().load_state_dict(held.state_dict())
    assert torch.allclose(held(["red dress"])["words"], free(["red dress"])["words"])  # its copies follow its weights


# ---- model types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "network", "steps", "depth"),
    [
        ("official_cirr", "resnet152", 3, 1),
        ("official_fashioniq", "resnet50", 5, 3),
        ("official_shoes", "resnet50", 5, 3),
    ],
)
def test_types_say_what_the_released_code_has(name, network, steps, depth):
    config = model_defaults({"arch": "neucore", "model_type": name})
    assert config["form"] == "released" and config["backbone"]["image"]["network"] == network
    assert (config["fusion"]["steps"], config["fusion"]["module_depth"], config["embed_dim"]) == (steps, depth, 512)


def test_load_model_by_type():
    from lavis.models import load_model

    with pytest.warns(UserWarning, match="random weights"):
        model = load_model("neucore", "official_shoes", is_eval=True)
    assert model.released and model.image_projection.weight.shape == (512, 2048)
    assert model.image_processor.mean == (0.485, 0.456, 0.406) and model.alignment.encoder.cls_token is not None


def test_a_released_model_needs_the_released_parts(tmp_path):
    section = {"arch": "neucore", "model_type": "official_shoes", "fusion": {"mode": "progressive"}, "embed_dim": 256}
    section["concept_alignment"] = {"bag": "union"}
    section["backbone"] = {"image": {"weights": "nowhere.pth"}, "text": {"glove": "nowhere.txt"}}
    path = tmp_path / "c.yaml"
    run = {"max_epoch": 1, "train_splits": ["train"]}
    path.write_text(yaml.safe_dump({"model": section, "datasets": {"emoji": {}}, "run": run}))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    for part in (
        "model.fusion.mode: got 'progressive'; model.form released needs 'mixture'",
        "model.concept_alignment.bag: got 'union'; model.form released needs 'joint'",
        "model.backbone.text.width: got 512; model.form released needs model.embed_dim's",
        "model.backbone.image.weights: 'nowhere.pth' does not exist",
        "model.backbone.text.glove: 'nowhere.txt' does not exist",
    ):
        assert part in str(error.value)


# ---- training in two phases -----------------------------------------------------------------------------------------


def released_yaml(tiny_config, resnet18_file, name, run=None, **model):
    image = {"name": "resnet", "network": "resnet18", "weights": str(resnet18_file), "image_size": 32}
    processor = {"name": "cir_image", "image_size": 32}

    def change(config):
        config["model"] = {
            "arch": "neucore",
            "model_type": "official_shoes",
            "backbone": {"image": image, "text": {"name": "glove_bigru", "word_dim": 6, "width": 16}},
            "embed_dim": 16,
            "concept_alignment": {"depth": 1, "heads": 2},
            "fusion": {"steps": 2, "module_depth": 1, "heads": 2, "head_dim": 8},
            "concepts": {"min_count": 1},
        }
        for key, value in model.items():
            config["model"][key] = value
        config["datasets"]["folder"]["vis_processor"] = {"train": dict(processor), "eval": dict(processor)}
        config["run"] |= {"max_epoch": 1, "test_splits": ["test"], "report": False}
        config["run"] |= {"decay_all": True, "lr_sched": "constant_lr", **(run or {})}
        config["run"]["output_dir"] += f"_{name}"

    return tiny_config(change, f"{name}.yaml")


@torch.no_grad()
def moved(one, other):
    return {name for name, value in one.state_dict().items() if not torch.equal(value, other.state_dict()[name])}


def test_two_phases(tiny_config, resnet18, tmp_path):
    """Phase 1 leaves the CNN and the words as they are, but for the batch norms' statistics; phase 2 starts from its
    last checkpoint and the optimiser there, and trains everything."""
    torch.save(resnet18.state_dict(), tmp_path / "r.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launch.run(released_yaml(tiny_config, tmp_path / "r.pth", "one"))
    first = next((tmp_path / "output_one").glob("*/checkpoint_last.pth"))
    one = NeucoreModel.from_checkpoint(first)
    assert torch.equal(one.backbone.image.network.conv1.weight, resnet18.conv1.weight)
    statistics = one.backbone.image.network.bn1.running_mean
    assert not torch.equal(statistics, resnet18.bn1.running_mean)
    assert torch.equal(one.backbone.image.network.bn1.weight, resnet18.bn1.weight)
    (tmp_path / "r.pth").unlink()  # the checkpoint carries it
    backbone = {"image": {**one.config["backbone"]["image"], "freeze": False}}
    backbone["text"] = {**one.config["backbone"]["text"], "freeze_words": False}
    given = {"checkpoint": str(first), "backbone": backbone}
    launch.run(released_yaml(tiny_config, tmp_path / "r.pth", "two", {"keep_optimizer": True}, **given))
    second = next((tmp_path / "output_two").glob("*/checkpoint_last.pth"))
    two = NeucoreModel.from_checkpoint(second)
    steps, moments = zip(*(adam(path) for path in (first, second)), strict=True)
    every = set(steps[0].values()).pop()
    assert set(steps[0].values()) == {every} and set(steps[1].values()) == {every, 2 * every}
    grown = {name for name, count in steps[1].items() if count == 2 * every}
    assert grown == set(steps[0]) and {"backbone.text.embedding.weight"} <= set(steps[1]) - grown
    launch.run(released_yaml(tiny_config, tmp_path / "r.pth", "anew", **given))
    anew = adam(next((tmp_path / "output_anew").glob("*/checkpoint_last.pth")))
    assert set(anew[0].values()) == {every}
    name = "fusion.output.0.weight"
    assert not torch.allclose(anew[1][name], moments[1][name]) and moments[0].keys() == grown
    old = checkpoint.load(first)
    for group in old["optimizer"]["param_groups"]:
        assert group["weight_decay"] == 0.01  # of everything
        del group["weights"]
    checkpoint.save(old, tmp_path / "old.pth")
    given["checkpoint"] = str(tmp_path / "old.pth")
    with pytest.raises(
        CheckpointError, match="old.pth holds no state of an optimiser, or does not say of which weights"
    ):
        launch.run(released_yaml(tiny_config, tmp_path / "r.pth", "bad", {"keep_optimizer": True}, **given))
    names = {"backbone.image.network.conv1.weight", "backbone.image.network.bn1.running_mean"}
    assert names | {"backbone.text.embedding.weight", "backbone.text.gru.weight_hh_l0"} <= moved(one, two)
    assert two.vocabulary == one.vocabulary and two.backbone.text.words == one.backbone.text.words


def adam(path):
    """({weight: steps of AdamW}, {weight: its second moment}) of a checkpoint."""
    stored = checkpoint.load(path)["optimizer"]
    places = dict(
        pair for group in stored["param_groups"] for pair in zip(group["weights"], group["params"], strict=True)
    )
    states = {name: stored["state"][place] for name, place in places.items() if place in stored["state"]}
    return {name: int(s["step"]) for name, s in states.items()}, {name: s["exp_avg_sq"] for name, s in states.items()}


def test_frozen_norms_follow_the_batches_in_training_alone():
    image = {"name": "resnet", "network": "resnet18", "image_size": 32, "moving_norms": True}
    text = {"name": "glove_bigru", "word_dim": 5, "width": 8, "freeze": False}
    with pytest.warns(UserWarning, match="random weights"):
        backbone = build({"image": image, "text": text}, WORDS)
    pixels, norms = (
        torch.randn(4, 3, 32, 32),
        [p for p in backbone.image.modules() if isinstance(p, torch.nn.BatchNorm2d)],
    )
    assert not list(backbone.image.parameters()) and not backbone.freeze_image  # nothing of it is cached
    before = backbone.eval().image(pixels)["tokens"]
    assert not any(part.training for part in norms)
    assert torch.allclose(backbone.image(pixels[:1])["tokens"][0], before[0], atol=1e-4)
    trained = backbone.train().image(pixels)["tokens"]
    assert all(part.training for part in norms) and (trained - before).abs().max() > 1e-2
    after = backbone.eval().image(pixels)["tokens"]  # with the statistics that have moved
    assert (after - before).abs().max() > 1e-2


def test_the_architecture_may_not_change_between_phases(loops, tmp_path):
    model = loops[1]
    section = {**model.config, "checkpoint": str(tiny.save(model, tmp_path / "p.pth"))}
    free = copy.deepcopy(section)
    free["backbone"]["text"]["freeze_words"] = False
    loaded = NeucoreModel.from_config(free)
    assert [group["name"] for group in loaded.parameter_groups()] == ["backbone_text", "head"]
    assert any(p is loaded.backbone.text.embedding.weight for p in loaded.parameter_groups()[0]["params"])
    other = copy.deepcopy(section)
    other["backbone"]["text"]["word_dim"] = 7
    with pytest.raises(CheckpointError, match="word_dim: 5 in the checkpoint, 7 in the config"):
        NeucoreModel.from_config(other)


def test_a_word_vocabulary_comes_from_the_training_captions():
    config = {"arch": "neucore", "model_type": "official_shoes", "embed_dim": 16, "concept_alignment": {"heads": 2}}
    config["backbone"] = {"image": {"name": "features", "width": 6}, "text": {"name": "glove_bigru", "width": 16}}
    model = NeucoreModel.from_config(config, vocabulary=ConceptVocabulary(["be"]), captions=["It is RED.", "is it"])
    assert model.backbone.text.words == (*SPECIALS, "it", "is", "red")
    assert model.checkpoint_header()["words"] == [*SPECIALS, "it", "is", "red"] and model.vocabulary.words == ("<unk>",)
    config["backbone"]["text"]["captions"] = "default"
    model = NeucoreModel.from_config(config, vocabulary=ConceptVocabulary(["be"]), captions=["It is RED.", "is it"])
    assert model.backbone.text.words == (*SPECIALS, "it", "is", "red", "be") and model.vocabulary.words == ("be",)
    frozen = {**config["backbone"]["image"], "freeze": False}
    with pytest.raises(ConfigError, match="image.freeze is false, but the encoder has nothing that could be trained"):
        NeucoreModel.from_config({**config, "backbone": {**config["backbone"], "image": frozen}})
