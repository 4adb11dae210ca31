"""NEUCORE as a model of the host, on its real encoders at a small image size."""

import copy
import warnings

import pytest
import reference
import tiny
import torch
from PIL import Image
from tiny import NEUCORE, TEXTS

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.weights import checkpoint


@pytest.fixture(scope="module")
def built():
    return tiny.build()


@pytest.fixture
def model(built):
    return copy.deepcopy(built).eval()


@pytest.fixture
def pixels(model):
    return tiny.pixels(model)


@pytest.fixture
def samples(pixels):
    return tiny.samples(pixels)


def test_load_model_without_a_type_warns_that_the_head_is_untrained():
    from lavis.models import load_model, load_model_and_preprocess, model_zoo

    with pytest.warns(UserWarning, match="alignment, fusion and matching have random weights"):
        model = load_model("neucore", is_eval=True)
    assert isinstance(model, NeucoreModel) and not model.training
    assert "neucore" in dict(model_zoo) and "embedded" in dict(model_zoo)["neucore"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, images, texts = load_model_and_preprocess("neucore", "embedded")
    assert images["eval"](Image.new("RGB", (30, 50))).shape == (3, 224, 224)
    assert texts["eval"]("  a\tb\n c ") == "a b c"
    with pytest.raises(ConfigError, match=r"no model type 'embeded'\. Did you mean 'embedded'"):
        load_model("neucore", "embeded")


def test_concepts_are_read_as_in_the_sample_batch(model):
    assert model.extract_concepts(TEXTS) == tiny.CONCEPTS


def test_the_concept_loss_is_that_of_the_formula(model, samples):
    """20 x the mean focal loss of the union of both images' tokens."""
    out = model(samples)
    with torch.no_grad():
        r, t = (
            model.alignment.encode(model.image_features(["tokens"], samples[f"{side}_image"])["tokens"])
            for side in ("reference", "target")
        )
        bag, _ = model.alignment.pool_bag(r, t)
        logits = bag @ model.alignment.classifier.project(model.concept_embeddings).T
    labels = [[int(word in words) for word in tiny.WORDS] for words in samples["concept_words"]]
    expected = 20 * reference.focal_loss(logits.tolist(), labels, 0.5, 1.0)
    assert out["loss_concept"].item() == pytest.approx(expected, rel=1e-4)


def test_equal_targets_are_no_negatives(model, samples):
    model.matching_loss.reference_negatives = False
    same = {**samples, "target_key": torch.tensor([5, 6, 5]), "right_keys": [(5, 6), (6, 5), (5, 6)]}
    assert model(same)["loss_matching"].item() == pytest.approx(0.0, abs=1e-6)
    model.matching_loss.mask_duplicates = False
    assert model(same)["loss_matching"].item() > 0.1


def test_query_dropout_acts_in_training_alone(model, samples):
    model.query_dropout = {"image": 0.5, "text": 0.5}
    model.eval()
    assert model(samples)["loss"] == model(samples)["loss"]
    model.train()
    torch.manual_seed(0)
    assert len({round(model(samples)["loss"].item(), 6) for _ in range(6)}) > 1


def test_words_outside_the_vocabulary_have_their_own_embedding(model):
    concepts, mask = model.query_concepts([("red", "zeppelin"), (), ("red",)])
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert torch.allclose(concepts[0, 0], concepts[2, 0], atol=1e-6)
    expected = model.alignment.classifier.project(model.backbone.text(["zeppelin"])["sentence"])[0]
    assert torch.allclose(concepts[0, 1], expected, atol=1e-6)
    assert model.concept_labels([("red", "zeppelin"), ("long", "blue")]).tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]]


@torch.no_grad()
def test_concept_maps_lie_in_the_unit_interval_on_the_grid(model, pixels):
    maps = model.concept_maps(pixels, TEXTS, pixels.flip(0))
    assert [[entry["concept"] for entry in entries] for entries in maps] == [
        list(words) for words in model.extract_concepts(TEXTS)
    ]
    for entry in (entry for entries in maps for entry in entries):
        both = torch.stack([entry["reference"], entry["candidate"]])
        assert both.shape == (2, 2, 2) and both.min() >= 0 and (both.max() == 0 or abs(both.max() - 1) < 1e-5)


def test_checkpoints_that_do_not_fit_are_refused(model, tmp_path):
    stored = checkpoint.load(tiny.save(model, tmp_path / "best.pth"))
    stored["architecture"]["config"]["embed_dim"] = 64
    checkpoint.save(stored, tmp_path / "wider.pth")
    with pytest.raises(CheckpointError, match=r"wider\.pth does not fit the model"):
        NeucoreModel.from_checkpoint(tmp_path / "wider.pth")
    stored["architecture"] = {"arch": "blip", "config": {}}
    checkpoint.save(stored, tmp_path / "blip.pth")
    with pytest.raises(CheckpointError, match="holds a model of architecture 'blip', not 'neucore'"):
        NeucoreModel.from_checkpoint(tmp_path / "blip.pth")


def test_a_checkpoint_keeps_how_images_are_made_square(model, tmp_path):
    model.image_processor = type(model.image_processor)(64, mean=(0.1, 0.2, 0.3), fit="stretch")
    loaded = NeucoreModel.from_checkpoint(tiny.save(model, tmp_path / "best.pth"))
    assert loaded.image_processor.settings == model.image_processor.settings
    wide = tiny.pictures(1)[0].resize((64, 32))
    assert torch.equal(loaded.image_processor(wide), model.image_processor(wide))


def test_settings_of_the_training_may_change_with_a_checkpoint_and_others_may_not(model, tmp_path):
    path = tiny.save(model, tmp_path / "best.pth")
    changed = {**NEUCORE, "loss": {"concept_weight": 3.0}, "query_dropout": {"image": 0.5}, "checkpoint": str(path)}
    loaded = NeucoreModel.from_config(changed)
    assert loaded.concept_loss.weight == 3.0 and loaded.query_dropout["image"] == 0.5
    larger = {"backbone": {"image": {**tiny.BACKBONE["image"], "image_size": 96}}}
    for other in ({"matching": {"terms": ["fused"]}}, {"concepts": {"pos": ["NOUN"]}}, {"embed_dim": 64}, larger):
        with pytest.raises(CheckpointError, match=f"other settings.*\n.*model.{next(iter(other))}.* in the checkpoint"):
            NeucoreModel.from_config({**NEUCORE, "checkpoint": str(path), **other})


def test_a_panorama_is_padded_in_little_memory(model):
    """60,000 x 2 pixels: a square of the longer side would take 10 GB."""
    pixels = model.image_processor(Image.new("RGB", (60_000, 2), "black"))
    white = pixels[:, 0].mean().item()
    assert pixels.shape == (3, 64, 64) and white == pytest.approx(1.0) and pixels.min().item() == pytest.approx(-1.0)


def test_a_model_without_concepts_cannot_be_trained(samples):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NeucoreModel.from_config(NEUCORE)
    with pytest.raises(ConfigError, match="without a concept vocabulary"):
        model(samples)


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": {**NEUCORE["fusion"], "mode": "mixture", "gumbel": True}},
        {"concept_alignment": {**NEUCORE["concept_alignment"], "bag": "joint"}},
        {"matching": {"terms": ["fused"]}},
    ],
)
def test_variants_train_and_score(changes, samples, pixels):
    model = tiny.build(**changes)
    model.train()(samples)["loss"].backward()
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model.score(model.encode_query(pixels, TEXTS), model.encode_image(pixels))).all()
