"""What NEUCORE and every baseline have in common, on the embedded encoders at a small image size."""

import copy
import math
import warnings

import pytest
import tiny
import torch
from tiny import TEXTS

import neucore_plugin
from neucore_plugin.clauses import joined
from neucore_plugin.datasets.triplets import collate
from neucore_plugin.models.backbones.resnet_gru import SPECIALS, GloveBiGRU


@pytest.fixture(scope="module")
def built():
    return {kind: tiny.build(kind) for kind in tiny.KINDS}


@pytest.fixture(params=tiny.KINDS)
def model(built, request):
    return copy.deepcopy(built[request.param]).eval()


@pytest.fixture(scope="module")
def pixels(built):
    return tiny.pixels(built["neucore"])


@pytest.fixture
def samples(pixels):
    return tiny.samples(pixels)


def read_alone(model, text):
    """What a cache of texts gives of one, which it keeps clause by clause."""
    parts = [model.backbone.text([part]) for part in model.clauses_of(text)]
    parts = [(part["words"][0], part["sentence"][0]) for part in parts]
    return joined(parts) if model.clauses > 1 else dict(zip(("words", "sentence"), parts[0], strict=True))


def scores(model, pixels, *query):
    return model.score(model.encode_query(*query), model.encode_image(pixels))


def test_every_trainable_parameter_gets_a_gradient(model, samples):
    """None is idle, so that counts are fair and processes need not wait for one another."""
    model.train()
    model.query_dropout = {"image": 0.4, "text": 0.4}  # so that the stand-ins take part
    torch.manual_seed(1)
    for _ in range(8):
        out = model(samples)
        out["loss"].backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    assert not idle
    assert out["loss"].item() == pytest.approx(sum(value.item() for name, value in out.items() if name != "loss"))


@pytest.mark.parametrize("negatives", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_scores(model, samples, negatives):
    """Columns are the targets, then the references; the third target is the first query's reference and left out."""
    model.matching_loss.reference_negatives = negatives
    out = model(samples)
    with torch.no_grad():
        images = [samples[f"{side}_image"] for side in ("target", "reference")[: 1 + negatives]]
        logits = scores(model, torch.cat(images), samples["reference_image"], TEXTS) * model.matching.temperature.exp()
    keys, total = [2, 3, 0, 0, 1, 2][: logits.shape[1]], 0.0
    for row, right in enumerate((2, 3, 0)):
        rivals = [math.exp(z) for k, z in enumerate(logits[row].tolist()) if k == row or keys[k] != right]
        total += math.log(sum(rivals)) - logits[row, row].item()
    assert out["loss_matching"].item() == pytest.approx(total / 3, rel=1e-4)


@torch.no_grad()
def test_a_score_is_explained_by_its_terms_and_concepts(model, pixels):
    query, gallery = model.encode_query(pixels, TEXTS), model.encode_image(pixels)
    terms = model.explain(query, gallery)
    torch.testing.assert_close(sum(terms.values()), model.score(query, gallery), atol=1e-5, rtol=0)
    assert list(terms) == list(model.matching.terms)
    reads = model.arch == "neucore"  # of the form in clauses the alignment alone
    assert model.concepts_read(TEXTS) == (model.extract_concepts(TEXTS) if reads else [()] * 3)


@torch.no_grad()
def test_scores_do_not_depend_on_batch_mates_or_padding(model, pixels):
    gallery = model.encode_image(pixels)
    together = model.score(model.encode_query(pixels, TEXTS), gallery)
    for row, text in enumerate(TEXTS):
        alone = model.score(model.encode_query(pixels[row : row + 1], [text]), gallery)
        assert torch.allclose(together[row], alone[0], atol=2e-5)
    single = torch.cat([model.encode_image(image[None])["fg"] for image in pixels])
    assert torch.allclose(single, gallery["fg"], atol=2e-5)
    assert torch.equal(scores(model, pixels, pixels, TEXTS), together)


@torch.no_grad()
def test_a_query_may_lack_its_image_or_its_text(model, pixels):
    whole, only_text, only_image = (
        scores(model, pixels, *query) for query in ((pixels, TEXTS), (None, TEXTS), (pixels, None))
    )
    assert only_text.shape == only_image.shape == (3, 3)
    assert torch.equal(only_text, whole) is (model.title == "text_only")
    assert torch.equal(only_image, whole) is (model.title == "image_only")
    empty = scores(model, pixels, pixels, [""] * 3)  # an empty caption is a missing caption
    assert torch.allclose(empty, only_image, atol=1e-5)
    with pytest.raises(ValueError, match="a reference image, a text, or both"):
        model.encode_query(None, None)
    with pytest.raises(ValueError, match="3 reference images but 1 texts"):
        model.encode_query(pixels, TEXTS[:1])


@torch.no_grad()
def test_cached_features_give_the_same(model, samples, pixels):
    image, features = model.backbone.image(pixels), collate([read_alone(model, text) for text in TEXTS])
    cached = {key: value for key, value in samples.items() if "image" not in key} | features
    cached |= {f"reference_{name}": image[name] for name in ("tokens", "pooled")}
    cached |= {f"target_{name}": image[name].flip(0) for name in ("tokens", "pooled")}
    live, stored = model(samples), model(cached)
    for name, value in live.items():
        assert stored[name].item() == pytest.approx(value.item(), rel=1e-5)
    found = model.score(model.encode_query(texts=TEXTS, **image, text_features=features), model.encode_image(**image))
    assert torch.allclose(found, scores(model, pixels, pixels, TEXTS), atol=1e-5)
    other = "tokens" if model.gallery_reads == "pooled" else "pooled"
    with pytest.raises(ValueError, match=f"give an image as pixels, or its cached {model.gallery_reads}"):
        model.encode_image(**{other: image[other]})


@torch.no_grad()
def test_a_checkpoint_is_self_contained(model, pixels, tmp_path):
    path = tiny.save(model, tmp_path / "best.pth")
    assert path.stat().st_size < 3e6  # no frozen encoder in it
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the head is trained: nothing to warn of
        loaded = neucore_plugin.load_model(path)
    assert type(loaded) is type(model) and loaded.title == model.title and not loaded.training
    assert loaded.vocabulary == model.vocabulary and loaded.backbone.image.image_size == 64
    assert torch.equal(*(scores(m, pixels, pixels, TEXTS) for m in (model, loaded)))
    assert loaded.fingerprint() == model.fingerprint()


def test_captions_of_which_nothing_is_read_are_told_once(built, pixels, caplog):
    model = built["neucore"]
    texts = ["\u2603\u2603", "\ud83d", "make it blue", "\u2603\u2603"]  # [UNK] alone; half a letter, so nothing
    model.encode_query(pixels[:1].expand(4, -1, -1, -1), texts)
    (record,) = caplog.records
    assert "2 of 3 captions hold nothing that the text encoder knows" in record.getMessage()
    caplog.clear()
    model.encode_query(pixels[:1], ["\u2603 red"])
    model.encode_query(pixels[:1], None)
    model.encode_query(pixels[:1], ["\u2603"], concept_words=[()])  # of a data set, which is told as a whole
    assert not caplog.records
    built["image_only"].encode_query(pixels[:1], ["\u2603"])  # reads no text
    assert not caplog.records


def test_what_a_word_vocabulary_lacks_is_unknown():
    encoder = GloveBiGRU(4, 4, None, None, 5, "default", False, words=(*SPECIALS, "red"))
    assert [encoder.known(text) for text in ("red", "blue <and> RED", "blue", "blue <and> green", "...")] == [
        True, True, False, False, False
    ]  # fmt: skip
