"""The form in clauses: fusion and scores against loops, reading, caches, checkpoints."""

import copy
import functools
import math
import warnings

import pytest
import reference
import tiny
import torch
from lavis.models import load_model
from tiny import exact, rand

import neucore_plugin
from neucore_plugin.clauses import cached_text, clauses
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset
from neucore_plugin.models.clause_fusion import ClauseFusion
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.neucore import ClausewiseNeucore, NeucoreModel
from neucore_plugin.processors import CaptionProcessor
from neucore_plugin.weights import checkpoint

# ---- fusion --------------------------------------------------------------------------------------------------------

B, N, C, D = 4, 5, 3, 6
PRESENT = [[True, True, True], [True, False, False], [True, False, True], [False, False, False]]


def fusion(places: bool) -> ClauseFusion:
    made = exact(ClauseFusion, dim=D, places=places)
    made.weight.data.fill_(0.7)
    return made


def fusion_inputs() -> dict[str, torch.Tensor]:
    return {
        "tokens": rand(B, N, D),
        "pooled": rand(B, D),
        "sentence": rand(B, C, D),
        "present": torch.tensor(PRESENT),
    }


@pytest.mark.parametrize("places", [True, False])
def test_fusion_is_its_formula_one_query_and_one_clause_at_a_time(places):
    made, given = fusion(places), fusion_inputs()
    fused, change = made(**given)
    w = {name: value.tolist() for name, value in made.state_dict().items()}
    for row in range(B):
        pooled, tokens = given["pooled"][row].tolist(), given["tokens"][row].tolist()
        now, whole = pooled, [0.0] * D
        for m in (given["sentence"][row, number].tolist() for number in range(C) if PRESENT[row][number]):
            asked = list(m)
            if places:
                key = reference.linear(m, *reference.both(w, "key"))
                logits = [sum(a * b for a, b in zip(token, key, strict=True)) / math.sqrt(D) for token in tokens]
                weights = reference.softmax(logits)
                looks = made.looks_at(given["tokens"][row : row + 1], torch.tensor([m], dtype=torch.float64))
                assert looks[0].tolist() == pytest.approx(weights)
                asked += reference.weighted_sum(weights, tokens, D)
            gate = reference.two_layers([*now, *asked], w, "gate.0", "gate.2")
            hidden = reference.two_layers([*now, *asked], w, "residual.0", "residual.2")
            added = reference.linear(reference.relu(hidden), *reference.both(w, "residual.4"))
            now = [reference.sigmoid(g) * f + 0.7 * r for g, f, r in zip(gate, now, added, strict=True)]
            whole = reference.add(whole, reference.two_layers([*pooled, *asked], w, "change.0", "change.2"))
        assert fused[row].tolist() == pytest.approx(now) and change[row].tolist() == pytest.approx(whole)
    assert torch.equal(fused[3], given["pooled"][3]) and not change[3].any()  # asks for nothing


def test_fusion_has_gradients_and_all_rows_at_once_give_the_same(monkeypatch):
    made, given = fusion(True), fusion_inputs()
    found = made(**given)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # where no rows are chosen
    torch.testing.assert_close(made(**given), found)
    monkeypatch.undo()
    values, present = [given[name].requires_grad_() for name in ("tokens", "pooled", "sentence")], given["present"]
    assert torch.autograd.gradcheck(lambda *x: made(*x, present), values)


# ---- matching ------------------------------------------------------------------------------------------------------

Q, G = 4, 7
TERMS = (["explicit"], ["implicit"], ["change"], ["explicit", "implicit"], ["fused", "explicit"], ["fused", "change"])
TERMS += (["explicit", "change"], ["fused", "explicit", "implicit", "change"])


def matching(terms: list[str]) -> Matching:
    return exact(Matching, dim=D, **{**tiny.MATCHING, "terms": terms})


def asked(made: Matching) -> tuple[dict, dict, dict]:
    """Encodings of queries, their inputs, and a gallery with a zero vector and one that hides behind zeros."""
    given = {"fused": rand(Q, D), "sentence": rand(Q, C, D), "reference": rand(Q, D), "present": torch.tensor(PRESENT)}
    given |= {"change": rand(Q, D), "origin": rand(Q, D)}
    fg = rand(G, D)
    fg[2], given["reference"][1], given["change"][2], given["origin"][3] = 0.0, 0.0, 0.0, 3 * fg[1]
    return made.query(**given), given, {"fg": fg}


def loop(made: Matching, given: dict, gallery: dict, q: int, g: int) -> dict[str, float]:
    """The terms of one score, from the formulas."""
    w = {name: value.tolist() for name, value in made.state_dict().items()}
    target, found = gallery["fg"][g].tolist(), {}
    there = [given["sentence"][q, c].tolist() for c in range(C) if given["present"][q, c]]
    if "fused" in made.terms:
        found["fused"] = reference.cosine(given["fused"][q].tolist(), target)
    if "explicit" in made.terms:
        found["explicit"] = 0.0
        for m in there:
            weights = reference.softmax(reference.two_layers(m, w, "attention.0", "attention.2"))
            wanted = reference.linear(m, *reference.both(w, "transform"))
            found["explicit"] += reference.explicit_score(wanted, weights, target)
    if "implicit" in made.terms:
        logits = [reference.two_layers(m, w, "implicit_attention.0", "implicit_attention.2") for m in there]
        mean = [sum(row[d] for row in logits) / max(len(logits), 1) for d in range(D)]
        weights = reference.softmax(mean)
        kept = [a * b for a, b in zip(weights, given["reference"][q].tolist(), strict=True)]
        found["implicit"] = reference.explicit_score(kept, weights, target)
    if "change" in made.terms:
        d, r, t = (unit(vector) for vector in (given["change"][q].tolist(), given["origin"][q].tolist(), target))
        difference = [b - a for a, b in zip(r, t, strict=True)]
        length = math.sqrt(2 - 2 * sum(a * b for a, b in zip(r, t, strict=True)) + 1e-3)
        found["change"] = sum(a * b for a, b in zip(d, difference, strict=True)) / length
    return found


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length if length else 0.0 for value in vector]


@pytest.mark.parametrize("terms", TERMS, ids="+".join)
@torch.no_grad()
def test_scores_of_clauses_equal_loops(terms):
    """In one product, each term by itself, one query alone, in chunks, with gradient, and from factors."""
    made = matching(terms)
    query, given, gallery = asked(made)
    apart = {name: torch.zeros(Q, G).double() for name in terms}
    for q in range(Q):
        for g in range(G):
            for name, value in loop(made, given, gallery, q, g).items():
                apart[name][q, g] = value
    total = sum(apart.values())
    torch.testing.assert_close(made.score(query, gallery), total)
    torch.testing.assert_close(made.score(query, gallery, chunk=1), total)
    found = made.score_terms(query, gallery)
    assert list(found) == list(made.terms)
    for name, value in found.items():
        torch.testing.assert_close(value, apart[name])
    torch.testing.assert_close(sum(found.values()), total)
    for q in range(Q):
        torch.testing.assert_close(made.score({k: v[q : q + 1] for k, v in query.items()}, gallery), total[q : q + 1])
    with torch.enable_grad():
        tracked = {name: value.clone().requires_grad_() for name, value in query.items()}
        torch.testing.assert_close(made.score(tracked, gallery).detach(), total)
    factors, images = made.query_factors(query), made.gallery_factors(gallery)
    if count := C * ("explicit" in terms) + ("implicit" in terms):
        assert factors["weighted"].shape == factors["squares"].shape == (Q, count, D)
    for q in range(Q):
        for g in range(G):
            score = float(factors["cosines"][q] @ images["cosines"][g]) if "fused" in terms else 0.0
            pairs = zip(factors["weighted"][q], factors["squares"][q], strict=True) if count else ()
            for upper, lower in pairs:
                if (squared := float(lower @ images["squares"][g])) > 1e-24:
                    score += float(upper @ images["weighted"][g]) / math.sqrt(squared)
            if "change" in terms:
                moved, away = (float(factors[name][q] @ images["units"][g]) for name in ("change", "origin"))
                score += (moved - float(factors["change"][q] @ factors["origin"][q])) / math.sqrt(2.001 - 2 * away)
            assert score == pytest.approx(total[q, g].item(), abs=1e-12)


@torch.no_grad()
def test_places_of_clauses_that_are_not_there_change_nothing():
    made = matching(TERMS[-1])
    query, given, gallery = asked(made)
    more = {**given, "sentence": torch.cat([given["sentence"], rand(Q, 2, D)], 1)}
    more["present"] = torch.cat([given["present"], torch.zeros(Q, 2, dtype=torch.bool)], 1)
    more["sentence"][~more["present"]] = 1e3
    wider = made.query(**more)
    torch.testing.assert_close(made.score(wider, gallery), made.score(query, gallery))
    torch.testing.assert_close(made.score_terms(wider, gallery), made.score_terms(query, gallery))
    assert not wider["text"][~more["present"]].any() and not wider["attention"][~more["present"]].any()
    one = {**given, "sentence": given["sentence"][:, 0], "present": None}
    alone = made.query(**{**given, "present": torch.tensor([[True, False, False]] * Q)})
    torch.testing.assert_close(made.score(made.query(**one), gallery), made.score(alone, gallery))


def test_scores_of_clauses_have_gradients_and_zero_where_a_clause_is_not():
    made = matching(TERMS[-1])
    query, _, gallery = asked(made)
    query, fg = {k: v.detach().requires_grad_() for k, v in query.items()}, rand(3, D).requires_grad_()
    whole = [value[:1].detach().requires_grad_() for value in query.values()]  # without a zero vector
    assert torch.autograd.gradcheck(
        lambda *x: made.score(dict(zip(query, x[:-1], strict=True)), {"fg": x[-1]}), [*whole, fg]
    )
    made.score(query, gallery).sum().backward()
    assert not query["text"].grad[1, 1:].any() and query["text"].grad[0].any()
    assert all(torch.isfinite(value.grad).all() for value in query.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_scores_of_clauses_in_half_precision(dtype):
    made = matching(TERMS[-1])
    query, _, gallery = asked(made)
    query, gallery = ({k: v.to(dtype) for k, v in side.items()} for side in (query, gallery))
    whole = made.score(*({k: v.double() for k, v in side.items()} for side in (query, gallery)))
    for scores in (made.score(query, gallery), made.score({k: v[:1] for k, v in query.items()}, gallery)):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), whole[: len(scores)], atol=2e-6, rtol=0)


@pytest.mark.parametrize("lost", ["text", "attention", "image", "image_attention", "change", "origin"])
def test_encodings_that_lack_something_are_named(lost):
    made = matching(TERMS[-1])
    query, _, gallery = asked(made)
    del query[lost]
    for call in (made.score, made.score_terms):
        with pytest.raises(ValueError, match=f"encodings lack {lost}; make them with query"):
            call(query, gallery)


# ---- the model -----------------------------------------------------------------------------------------------------

CAPTIONS = ["make it blue", "blue, longer and with red squares", "", ", ;", "a zeppelin and dots, blue, red; long, two"]


@pytest.fixture(scope="module")
def built():
    return tiny.build("clauses").eval()


@pytest.fixture
def model(built):
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def pixels(built):
    return tiny.pixels(built)


@functools.cache
def other(**fusion) -> NeucoreModel:
    """Of other settings; without any, with an encoder of texts in which nothing is read of "!!"."""
    text = {"name": "glove_bigru", "width": 32, "word_dim": 8, "captions": "default", "glove": None}
    changes = {"fusion": fusion} if fusion else {"backbone": {**tiny.BACKBONE, "text": text}}
    section = {**tiny.CLAUSES, **changes}
    return NeucoreModel.from_config(section, ConceptVocabulary(tiny.WORDS), captions=tiny.TEXTS).eval()


def close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=2e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_a_query_is_encoded_as_if_alone(model, pixels):
    """Of one clause, of several, of none, of more than there are places; with and without its image."""
    seen = pixels[[0, 1, 2, 0, 1]]
    for images in (seen, None):
        together = model.encode_query(images, CAPTIONS)
        assert together["text"].shape == together["attention"].shape == (5, 4, 32)
        for row, text in enumerate(CAPTIONS):
            alone = model.encode_query(None if images is None else images[row : row + 1], [text])
            close({name: value[row : row + 1] for name, value in together.items()}, alone)
    close(model.encode_query(pixels, [""] * 3), model.encode_query(pixels))


@torch.no_grad()
def test_two_clauses_are_two_changes(model, pixels):
    query = model.image_features(["tokens", "pooled"], pixels)
    tokens, fused = model.alignment.encode(query["tokens"])["tokens"], query["pooled"]
    for part in ("make it blue", "longer"):
        text = model.text_features([part] * 3)
        assert text["present"].tolist() == [[True, False, False, False]] * 3
        fused, _ = model.fusion(tokens, fused, text["sentence"], text["present"])
    both, first, second = (
        model.encode_query(pixels, [text] * 3) for text in ("make it blue, longer", "make it blue", "longer")
    )
    torch.testing.assert_close(both["fused"], fused, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(both["text"][:, :2], torch.cat([first["text"][:, :1], second["text"][:, :1]], 1))
    assert not both["text"][:, 2:].any() and not torch.allclose(both["fused"], first["fused"])


@torch.no_grad()
def test_a_clause_of_which_nothing_is_read_is_none():
    model = other()
    pixels = tiny.pixels(model)
    for text in ("!!, make it blue", "make it blue, !!", "!!; make it blue; ?!"):
        found, wanted = model.encode_query(pixels, [text] * 3), model.encode_query(pixels, ["make it blue"] * 3)
        assert torch.allclose(found["fused"], wanted["fused"], atol=1e-6)
        gallery = model.encode_image(pixels)
        torch.testing.assert_close(model.score(found, gallery), model.score(wanted, gallery), atol=1e-5, rtol=0)
    close(model.encode_query(pixels, ["!!, ??"] * 3), model.encode_query(pixels))


@torch.no_grad()
def test_a_caption_read_as_a_whole_is_one_clause(pixels):
    """`fusion.clauses: 1`."""
    model = other(clauses=1)
    found = model.encode_query(pixels, tiny.TEXTS)
    assert found["text"].shape == (3, 1, 32)
    seen = model.image_features(["tokens", "pooled"], pixels)
    sentence = model.sentence_projection(model.backbone.text(tiny.TEXTS)["sentence"])
    tokens = model.alignment.encode(seen["tokens"])["tokens"]
    fused, _ = model.fusion(tokens, seen["pooled"], sentence[:, None], torch.ones(3, 1, dtype=torch.bool))
    torch.testing.assert_close(found["fused"], fused, atol=1e-5, rtol=1e-4)
    gallery = model.encode_image(pixels)
    for row, text in enumerate(tiny.TEXTS):
        alone = model.score(model.encode_query(pixels[row : row + 1], [text]), gallery)
        torch.testing.assert_close(alone, model.score(found, gallery)[row : row + 1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"clauses": 1}, {"places": False}], ids=str)
def test_no_parameter_is_idle_in_its_variants(settings, pixels):
    model, samples = copy.deepcopy(other(**settings)).train(), tiny.samples(pixels)
    model.query_dropout = {"image": 0.4, "text": 0.4}
    torch.manual_seed(1)
    for _ in range(8):
        model(samples)["loss"].backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


class Texts:
    """A cache of the texts' features, clause by clause, that counts what is read."""

    def __init__(self, model):
        self._encode = functools.cache(lambda text: model.backbone.text([text]))
        self.read = []

    def tokens(self, text):
        self.read.append(text)
        return self._encode(text)["words"][0]

    def pooled(self, text):
        return self._encode(text)["sentence"][0]


@torch.no_grad()
def test_a_data_set_caches_clauses_in_further_wordings_too(model, pixels):
    wordings = ["in red and smaller", "blue", "square, long; with dots", "x", "one, two, three, four, five"]
    asked = enumerate(zip(CAPTIONS, wordings, strict=True))
    triplets = [Triplet(str(number), "0", text, ("1",), wordings=(other,)) for number, (text, other) in asked]
    files = {"0": "0.png", "1": "1.png"}
    data = TripletDataset("set", "val", triplets, Gallery.of(files), ImageStore(files, str), CaptionProcessor())
    data.clauses, data.text_cache = model.clauses_of, Texts(model)
    data.images.load = lambda name: {"image": pixels[int(name)]}
    batch = data.collater([data[row] for row in range(5)])
    wanted = [part for text in CAPTIONS for part in clauses(text, 4)]
    assert data.text_cache.read == wanted
    assert list(data.read_texts) == wanted + [part for text in wordings for part in clauses(text, 4)]
    for samples in (batch, data.reworded(batch, 0)):
        found = model.encode_query(
            samples["reference_image"],
            samples["text_input"],
            text_features=cached_text(samples),
            concept_words=samples["concept_words"],
        )
        close(found, model.encode_query(pixels[[0] * 5], CAPTIONS if samples is batch else wordings))


def test_texts_that_were_read_as_a_whole_are_one_clause(model, pixels):
    read = model.backbone.text(CAPTIONS[:2])
    features = {"words": read["words"], "word_mask": read["mask"], "sentence": read["sentence"]}
    found = model.encode_query(pixels[:2], CAPTIONS[:2], text_features=features)
    model.clauses = 1
    one = model.encode_query(pixels[:2], CAPTIONS[:2])
    torch.testing.assert_close(found["text"][:, :1], one["text"])
    torch.testing.assert_close(found["fused"], one["fused"])


def test_a_training_query_without_its_image_has_no_origin_of_it(pixels):
    """As retrieval has it: else the change term would learn from an image that is not there."""
    model = tiny.build("clauses", query_dropout={"image": 0.999, "text": 0.0, "mode": "replace", "weight": 0.1}).train()
    encoded = model.encode_pairs(tiny.samples(pixels))
    count = len(encoded["query.origin"])
    torch.testing.assert_close(encoded["query.origin"], model.absent_image.expand(count, -1))
    assert not torch.allclose(encoded["reference.fg"], model.absent_image.expand(count, -1))


# ---- building and checkpoints --------------------------------------------------------------------------------------


def test_it_is_what_the_default_type_builds(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its head is untrained
        loaded = load_model("neucore", is_eval=True)
    assert type(model) is type(loaded) is ClausewiseNeucore and loaded.clauses == 4
    assert (loaded.reference_reads, loaded.gallery_reads) == (("tokens", "pooled"), "pooled")
    assert loaded.image_reads == ("tokens", "pooled") and loaded.cheap_gallery
    assert type(tiny.build()) is NeucoreModel


@torch.no_grad()
def test_checkpoints_from_before_are_of_the_form_that_there_was(pixels, tmp_path):
    model = tiny.build().eval()
    stored = checkpoint.load(tiny.save(model, tmp_path / "new.pth"))
    section = stored["architecture"]["config"]
    section["model_type"] = "embedded"  # whose form was this
    del section["form"], section["fusion"]["clauses"], section["fusion"]["places"]
    checkpoint.save(stored, tmp_path / "old.pth")
    loaded = neucore_plugin.load_model(tmp_path / "old.pth")
    assert type(loaded) is NeucoreModel and loaded.clauses == 1
    found = [one.score(one.encode_query(pixels, tiny.TEXTS), one.encode_image(pixels)) for one in (model, loaded)]
    assert torch.equal(*found)
