"""NEUCORE as a model of the host, on its real encoders at a small image size."""

import copy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.weights import checkpoint

WORDS = ("red", "blue", "square", "dress", "long")
TEXTS = ["make it blue", "the same dress but much longer and in red", "square"]
CONFIG = {
    "arch": "neucore",
    "model_type": "embedded",
    "backbone": {"image": {"name": "efficientnet_lite0", "image_size": 64, "grid": 2}},
    "embed_dim": 32,
    "concept_alignment": {"depth": 1, "heads": 2},
    "fusion": {"steps": 2, "heads": 2, "head_dim": 16},
    "matching": {"reference_negatives": False},
    "loss": {"concept_weight": 200.0},
}


def build(**changes):
    torch.manual_seed(0)
    return NeucoreModel.from_config({**CONFIG, **changes}, vocabulary=ConceptVocabulary(WORDS))


@pytest.fixture(scope="module")
def built():
    return build()


@pytest.fixture
def model(built):
    return copy.deepcopy(built).eval()


def pictures(count, side=64):
    noise = np.random.default_rng(3).integers(0, 255, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(values) for values in noise]


@pytest.fixture
def pixels(model):
    return torch.stack([model.image_processor(image) for image in pictures(3)])


@pytest.fixture
def samples(model, pixels):
    return {
        "reference_image": pixels,
        "target_image": pixels.flip(0),
        "text_input": TEXTS,
        "concept_words": model.extract_concepts(TEXTS),
        "reference_key": torch.tensor([0, 1, 2]),
        "target_key": torch.tensor([2, 1, 0]),
        "right_keys": [(2,), (1,), (0,)],
    }


def test_load_model_without_a_type_warns_that_the_head_is_untrained():
    from lavis.models import load_model, load_model_and_preprocess, model_zoo

    with pytest.warns(UserWarning, match="alignment, fusion and matching have random weights"):
        model = load_model("neucore", is_eval=True)
    assert type(model) is NeucoreModel and not model.training
    assert "neucore" in dict(model_zoo) and "embedded" in dict(model_zoo)["neucore"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, images, texts = load_model_and_preprocess("neucore", "embedded")
    assert images["eval"](Image.new("RGB", (30, 50))).shape == (3, 224, 224)
    assert texts["eval"]("  a\tb\n c ") == "a b c"
    with pytest.raises(ConfigError, match=r"no model type 'embeded'\. Did you mean 'embedded'"):
        load_model("neucore", "embeded")


@torch.no_grad()
def test_scores_of_a_batch_are_those_of_its_queries_alone(model, pixels):
    gallery = model.encode_image(pixels)
    together = model.score(model.encode_query(pixels, TEXTS), gallery)
    for row, text in enumerate(TEXTS):
        alone = model.score(model.encode_query(pixels[row : row + 1], [text]), gallery)
        assert torch.allclose(together[row], alone[0], atol=2e-5)
    single = torch.cat([model.encode_image(image[None])["fg"] for image in pixels])
    assert torch.allclose(single, gallery["fg"], atol=2e-5)


@torch.no_grad()
def test_evaluation_is_deterministic(model, pixels):
    first, second = (model.score(model.encode_query(pixels, TEXTS), model.encode_image(pixels)) for _ in range(2))
    assert torch.equal(first, second)


@torch.no_grad()
def test_a_query_may_lack_its_image_or_its_text(model, pixels):
    gallery = model.encode_image(pixels)
    only_text = model.score(model.encode_query(None, TEXTS), gallery)
    only_image = model.score(model.encode_query(pixels, None), gallery)
    both = model.score(model.encode_query(pixels, TEXTS), gallery)
    assert only_text.shape == only_image.shape == both.shape == (3, 3)
    assert not torch.allclose(only_text, both) and not torch.allclose(only_image, both)
    # an empty caption is a missing caption
    assert torch.allclose(model.score(model.encode_query(pixels, ["", "", ""]), gallery), only_image, atol=1e-5)
    with pytest.raises(ValueError, match="a reference image, a text, or both"):
        model.encode_query(None, None)
    with pytest.raises(ValueError, match="3 reference images but 1 texts"):
        model.encode_query(pixels, TEXTS[:1])


def test_forward_gives_the_sum_of_both_losses_and_every_head_weight_a_gradient(model, samples):
    model.train()
    out = model(samples)
    assert out["loss"].item() == pytest.approx(out["loss_matching"].item() + out["loss_concept"].item(), rel=1e-6)
    model.zero_grad()
    torch.manual_seed(1)
    model.query_dropout = {"image": 0.4, "text": 0.4}  # so that the stand-ins take part
    for _ in range(8):
        model(samples)["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_losses_are_those_of_the_formulas(model, samples):
    """Matching: cross-entropy of the scores x exp(temperature); concepts: 200 x the mean focal loss."""
    out = model(samples)
    with torch.no_grad():
        query = model.encode_query(samples["reference_image"], TEXTS)
        logits = model.score(query, model.encode_image(samples["target_image"])) * model.matching.temperature.exp()
        expected = -torch.stack([logits[i, i] - logits[i].logsumexp(0) for i in range(3)]).mean()
        assert out["loss_matching"].item() == pytest.approx(expected.item(), rel=1e-4)
        r, t = (model.alignment.encode(model.image_tokens(samples[f"{s}_image"])) for s in ("reference", "target"))
        bag = model.alignment.align(r, t)["pooled"]
        p = torch.sigmoid(bag @ model.alignment.classifier.project(model.concept_embeddings).T)
        labels = [[word in words for word in WORDS] for words in samples["concept_words"]]
        total = 0.0
        for row, wanted in zip(p, labels, strict=True):
            for value, label in zip(row.tolist(), wanted, strict=True):
                total += -0.5 * (1 - value) * np.log(value) if label else -0.5 * value * np.log(1 - value)
        assert out["loss_concept"].item() == pytest.approx(200 * total / p.numel(), rel=1e-4)


def test_equal_targets_are_no_negatives(model, samples):
    same = {**samples, "target_key": torch.tensor([5, 6, 5]), "right_keys": [(5, 6), (6, 5), (5, 6)]}
    assert model(same)["loss_matching"].item() == pytest.approx(0.0, abs=1e-6)
    model.mask_duplicates = False
    assert model(same)["loss_matching"].item() > 0.1


def test_references_of_the_batch_may_be_negatives(model, samples):
    """Six columns: three targets, three references; the second query's reference is its own target and is left out."""
    model.reference_negatives = True
    out = model(samples)
    with torch.no_grad():
        query = model.encode_query(samples["reference_image"], TEXTS)
        images = torch.cat([samples["target_image"], samples["reference_image"]])
        logits = model.score(query, model.encode_image(images)) * model.matching.temperature.exp()
        kept = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 4, 5]]  # target of query i: reference 2 - i
        terms = [logits[row, columns].logsumexp(0) - logits[row, row] for row, columns in enumerate(kept)]
    assert out["loss_matching"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)


def test_query_dropout_acts_in_training_alone(model, samples):
    model.query_dropout = {"image": 0.5, "text": 0.5}
    model.eval()
    assert model(samples)["loss"] == model(samples)["loss"]
    model.train()
    torch.manual_seed(0)
    assert len({round(model(samples)["loss"].item(), 6) for _ in range(6)}) > 1


def test_cached_features_give_the_same_loss(model, samples):
    """float16 storage is the only difference."""
    with torch.no_grad():
        text = model.backbone.text(TEXTS)
        cached = {
            "reference_tokens": model.backbone.image(samples["reference_image"])["tokens"].half().float(),
            "target_tokens": model.backbone.image(samples["target_image"])["tokens"].half().float(),
            "words": text["words"].half().float(),
            "word_mask": text["mask"],
            "sentence": text["sentence"].half().float(),
        }
        rest = {
            key: samples[key] for key in ("text_input", "concept_words", "reference_key", "target_key", "right_keys")
        }
        live, stored = model(samples), model({**cached, **rest})
    for name, value in live.items():
        assert stored[name].item() == pytest.approx(value.item(), rel=3e-3)


def test_words_outside_the_vocabulary_have_their_own_embedding(model):
    concepts, mask = model.query_concepts([("red", "zeppelin"), (), ("red",)])
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert torch.allclose(concepts[0, 0], concepts[2, 0], atol=1e-6)
    expected = model.alignment.classifier.project(model.backbone.text(["zeppelin"])["sentence"])[0]
    assert torch.allclose(concepts[0, 1], expected, atol=1e-6)
    assert model.concept_labels([("red", "zeppelin"), ("long", "blue")]).tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]]


def test_frozen_encoders_stay_frozen(model, samples):
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model.train()
    assert not model.backbone.image.training and not model.backbone.text.training
    groups = model.parameter_groups()
    assert [group["name"] for group in groups] == ["head"]
    assert not {id(p) for p in groups[0]["params"]} & {id(p) for p in model.backbone.parameters()}
    optimizer = torch.optim.SGD(groups[0]["params"], lr=1.0)
    model(samples)["loss"].backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


@torch.no_grad()
def test_concept_maps_lie_in_the_unit_interval_on_the_grid(model, pixels):
    maps = model.concept_maps(pixels, TEXTS, pixels.flip(0))
    assert [[entry["concept"] for entry in entries] for entries in maps] == [
        list(words) for words in model.extract_concepts(TEXTS)
    ]
    for entry in (entry for entries in maps for entry in entries):
        both = torch.stack([entry["reference"], entry["candidate"]])
        assert both.shape == (2, 2, 2) and both.min() >= 0 and (both.max() == 0 or abs(both.max() - 1) < 1e-5)


def save(model, path):
    state, frozen = checkpoint.model_state(model)
    content = {"architecture": model.checkpoint_header(), "model": state, "frozen": frozen}
    checkpoint.save(content, path)
    return path


@torch.no_grad()
def test_a_checkpoint_is_self_contained(model, pixels, tmp_path):
    from lavis.models import load_model

    path = save(model, tmp_path / "best.pth")
    assert path.stat().st_size < 3e6  # no frozen encoder in it
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the head is trained: nothing to warn of
        loaded = load_model("neucore", checkpoint=str(path), is_eval=True)
    assert loaded.vocabulary == model.vocabulary and loaded.backbone.image.image_size == 64
    assert loaded.fingerprint() == model.fingerprint()
    scores = [m.score(m.encode_query(pixels, TEXTS), m.encode_image(pixels)) for m in (model, loaded)]
    assert torch.equal(*scores)


def test_checkpoints_that_do_not_fit_are_refused(model, tmp_path):
    path = save(model, tmp_path / "best.pth")
    stored = checkpoint.load(path)
    stored["architecture"]["config"]["embed_dim"] = 64
    checkpoint.save(stored, tmp_path / "wider.pth")
    with pytest.raises(CheckpointError, match=r"wider\.pth does not fit the model"):
        NeucoreModel.from_checkpoint(tmp_path / "wider.pth")
    stored["architecture"] = {"arch": "blip", "config": {}}
    checkpoint.save(stored, tmp_path / "blip.pth")
    with pytest.raises(CheckpointError, match="holds a model of architecture 'blip', not 'neucore'"):
        NeucoreModel.from_checkpoint(tmp_path / "blip.pth")
    other = copy.deepcopy(CONFIG)
    other["backbone"]["image"]["image_size"] = 96
    message = r"other settings.*\n.*image_size: 64 in the checkpoint, 96 in the config"
    with pytest.raises(CheckpointError, match=message):
        NeucoreModel.from_config({**other, "checkpoint": str(path)})


def test_a_checkpoint_keeps_how_images_are_made_square(model, tmp_path):
    model.image_processor = type(model.image_processor)(64, mean=(0.1, 0.2, 0.3), fit="stretch")
    loaded = NeucoreModel.from_checkpoint(save(model, tmp_path / "best.pth"))
    assert loaded.image_processor.settings == model.image_processor.settings
    wide = pictures(1)[0].resize((64, 32))
    assert torch.equal(loaded.image_processor(wide), model.image_processor(wide))


def test_settings_of_the_training_may_change_with_a_checkpoint_and_others_may_not(model, tmp_path):
    path = save(model, tmp_path / "best.pth")
    changed = {**CONFIG, "loss": {"concept_weight": 3.0}, "query_dropout": {"image": 0.5}, "checkpoint": str(path)}
    loaded = NeucoreModel.from_config(changed)
    assert loaded.concept_loss.weight == 3.0 and loaded.query_dropout["image"] == 0.5
    for other in ({"matching": {"terms": ["fused"]}}, {"concepts": {"pos": ["NOUN"]}}, {"embed_dim": 64}):
        with pytest.raises(CheckpointError, match=f"other settings.*\n.*model.{next(iter(other))}"):
            NeucoreModel.from_config({**CONFIG, "checkpoint": str(path), **other})


def test_a_panorama_is_padded_in_little_memory(model):
    """60,000 x 2 pixels: a square of the longer side would take 10 GB."""
    pixels = model.image_processor(Image.new("RGB", (60_000, 2), "black"))
    white = pixels[:, 0].mean().item()
    assert pixels.shape == (3, 64, 64) and white == pytest.approx(1.0) and pixels.min().item() == pytest.approx(-1.0)


def test_a_model_without_concepts_cannot_be_trained(samples):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NeucoreModel.from_config(CONFIG)
    with pytest.raises(ConfigError, match="without a concept vocabulary"):
        model(samples)


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": {**CONFIG["fusion"], "mode": "mixture", "gumbel": True}},
        {"concept_alignment": {**CONFIG["concept_alignment"], "bag": "joint"}},
        {"matching": {"terms": ["fused"]}},
    ],
)
def test_variants_train_and_score(changes, samples, pixels):
    model = build(**changes)
    model.train()(samples)["loss"].backward()
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model.score(model.encode_query(pixels, TEXTS), model.encode_image(pixels))).all()
