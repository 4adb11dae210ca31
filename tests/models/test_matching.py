"""Matching: against loops, closed forms and numerical gradients; chunks, one query, zero vectors, half precision."""

import importlib.util
import itertools
import math

import pytest
import reference
import tiny
import torch
from places import ROOT
from tiny import rand

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models import matching as module
from neucore_plugin.models.matching import Matching

Q, G, D = 5, 7, 6
TERMS = ("fused", "explicit", "background", "implicit")  # of a caption as a whole
SUBSETS = [list(c) for size in (1, 2, 3, 4) for c in itertools.combinations(TERMS, size)]


def build(**settings: object) -> Matching:
    return Matching(dim=D, **{**tiny.MATCHING, **settings}).double()


def encodings(queries: int = Q, images: int = G) -> tuple[dict, dict]:
    query = {"fused": rand(queries, D), "text": rand(queries, D), "background": rand(queries, D)}
    query |= {name: rand(queries, D).softmax(dim=-1) for name in ("attention", "image_attention")}
    query["image"] = query["image_attention"] * rand(queries, D)
    return query, {"fg": rand(images, D), "bg": rand(images, D)}


def loops(query: dict, gallery: dict, terms: list[str]) -> torch.Tensor:
    rows = []
    for q in range(len(query["fused"])):
        row = []
        for g in range(len(gallery["fg"])):
            fg, bg = gallery["fg"][g].tolist(), gallery["bg"][g].tolist()
            parts = {
                "fused": reference.cosine(query["fused"][q].tolist(), fg),
                "explicit": reference.explicit_score(query["text"][q].tolist(), query["attention"][q].tolist(), fg),
                "background": reference.cosine(query["background"][q].tolist(), bg),
                "implicit": reference.explicit_score(
                    query["image"][q].tolist(), query["image_attention"][q].tolist(), fg
                ),
            }
            row.append(sum(parts[term] for term in terms))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
def test_every_way_to_score_equals_loops(terms: list[str]) -> None:
    matching, (query, gallery) = build(terms=terms), encodings()
    query["fused"][1] = query["text"][2] = query["background"][3] = gallery["fg"][4] = gallery["bg"][5] = 0.0
    expected = loops(query, gallery, terms)
    torch.testing.assert_close(matching.score(query, gallery), expected)  # in place
    tracked = {key: value.requires_grad_() for key, value in query.items()}
    torch.testing.assert_close(matching.score(tracked, gallery), expected)  # differentiable
    with torch.no_grad():
        for q in range(Q):  # matrix-vector products
            one = {key: value[q : q + 1] for key, value in query.items()}
            torch.testing.assert_close(matching.score(one, gallery), expected[q : q + 1])


@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
def test_each_term_and_the_factors_equal_loops(terms: list[str]) -> None:
    matching, (query, gallery) = build(terms=terms), encodings()
    query["fused"][1] = query["text"][2] = query["background"][3] = gallery["fg"][4] = gallery["bg"][5] = 0.0
    apart = matching.score_terms(query, gallery)
    assert set(apart) == set(terms)
    for term, scores in apart.items():
        torch.testing.assert_close(scores, loops(query, gallery, [term]))
    asked, images = matching.query_factors(query), matching.gallery_factors(gallery)
    assert set(asked) == set(images)
    total = torch.zeros(Q, G, dtype=torch.float64)
    for q, g in itertools.product(range(Q), range(G)):
        products = {key: (asked[key][q] * images[key][g]).sum(-1) for key in asked}  # a number, or one a weighted term
        if "cosines" in products:
            total[q, g] += products["cosines"]
        for weighted, squares in zip(products.get("weighted", ()), products.get("squares", ()), strict=True):
            if squares > 0:
                total[q, g] += weighted / math.sqrt(squares)
    torch.testing.assert_close(total, loops(query, gallery, terms))


@pytest.mark.parametrize("queries", [1, Q])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, chunk: int, queries: int) -> None:
    matching, (query, gallery) = build(), encodings(queries)
    whole = matching.score(query, gallery)
    monkeypatch.setattr(module, "GALLERY_BLOCK", 3)
    monkeypatch.setattr(module, "VECTOR_BLOCK", 1)
    monkeypatch.setattr(module, "VECTOR_SPAN", 5)
    torch.testing.assert_close(matching.score(query, gallery, chunk=chunk), whole)


def test_closed_forms() -> None:
    matching = build()
    query = {
        "fused": torch.tensor([[3.0, 0, 0, 0, 0, 0]]),
        "text": torch.tensor([[0.0, 0, 5.0, 0, 0, 0]]),
        "attention": torch.tensor([[0.0, 0, 0.5, 0.5, 0, 0]]),
        "background": torch.tensor([[0.0, 0, 0, 0, 1.0, 1.0]]),
    }
    fg = torch.tensor([[2.0, 0, 0, 0, 0, 0], [-1.0, 0, 1.0, 0, 0, 0], [9.0, 9.0, 4.0, 3.0, 0, 0]])
    bg = torch.tensor([[0.0, 0, 0, 0, 1.0, 0], [0.0, 0, 0, 0, -2.0, -2.0], [1.0, 0, 0, 0, 0, 0]])
    expected = [
        [1 + 0 + math.sqrt(0.5), -math.sqrt(0.5) + 1 - 1, 9 / math.sqrt(187) + 0.8 + 0],  # attention blanks out the 9s
    ]
    torch.testing.assert_close(matching.score(query, {"fg": fg, "bg": bg}), torch.tensor(expected))


def test_scores_do_not_depend_on_lengths_and_stay_within_the_number_of_terms() -> None:
    matching, (query, gallery) = build(terms=TERMS), encodings()
    scores = matching.score(query, gallery)
    longer = {key: value * (1 if key.endswith("attention") else 37.0) for key, value in query.items()}
    torch.testing.assert_close(matching.score(longer, {key: 0.01 * value for key, value in gallery.items()}), scores)
    assert scores.abs().max() <= 4
    itself = {**query, "background": gallery["bg"][:Q], "fused": gallery["fg"][:Q]}
    torch.testing.assert_close(
        build(terms=["fused", "background"]).score(itself, gallery).diag(), torch.full((Q,), 2.0).double()
    )


def test_text_and_attention_of_a_query() -> None:
    matching, sentence = build(), rand(Q, D)
    encoding = matching.query(rand(Q, D), sentence, rand(Q, D))
    assert set(encoding) == {"fused", "text", "attention", "background"}
    weight, bias = matching.transform.weight.tolist(), matching.transform.bias.tolist()
    for q in range(Q):
        expected = reference.linear(sentence[q].tolist(), weight, bias)
        torch.testing.assert_close(encoding["text"][q], torch.tensor(expected, dtype=torch.float64))
        first, last = ((m.weight.tolist(), m.bias.tolist()) for m in (matching.attention[0], matching.attention[2]))
        logits = reference.linear(reference.relu(reference.linear(sentence[q].tolist(), *first)), *last)
        expected = torch.tensor(reference.softmax(logits), dtype=torch.float64)
        torch.testing.assert_close(encoding["attention"][q], expected)
    assert set(build(terms=["fused"]).query(rand(Q, D), sentence, rand(Q, D))) == {"fused", "background"}
    assert [name for name, _ in build(terms=["fused"]).named_parameters()] == ["temperature"]


def test_gradients_of_scores() -> None:
    matching, (query, gallery) = build(terms=TERMS), encodings(3, 3)
    values = [v.requires_grad_() for v in (*query.values(), *gallery.values())]

    def sides(tensors: tuple[torch.Tensor, ...]) -> tuple[dict, dict]:
        return dict(zip(query, tensors[:6], strict=True)), dict(zip(gallery, tensors[6:], strict=True))

    assert torch.autograd.gradcheck(lambda *t: matching.score(*sides(t)), values)


@pytest.mark.parametrize("zero", ["query", "gallery", "both"])
def test_zero_vectors_have_score_and_gradient_zero(zero: str) -> None:
    matching, sides = build(terms=TERMS), dict(zip(("query", "gallery"), encodings(), strict=True))
    for name in sides if zero == "both" else [zero]:
        sides[name] = {k: v if k.endswith("attention") else torch.zeros_like(v) for k, v in sides[name].items()}
    query, gallery = ({k: v.requires_grad_() for k, v in side.items()} for side in sides.values())
    scores = matching.score(query, gallery)
    scores.sum().backward()
    assert not scores.any()
    for value in (*query.values(), *gallery.values()):
        assert not value.grad.any()
    with torch.no_grad():
        assert not matching.score(query, gallery).any()
        assert not matching.score({k: v[:1] for k, v in query.items()}, gallery).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    matching = Matching(dim=D, **{**tiny.MATCHING, "terms": TERMS})
    query, gallery = ({k: v.to(dtype) for k, v in side.items()} for side in encodings())
    exact = matching.score(*({k: v.double() for k, v in side.items()} for side in (query, gallery)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for scores in (matching.score(query, gallery), matching.score({k: v[:1] for k, v in query.items()}, gallery)):
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores.double(), exact[: len(scores)], atol=2e-6, rtol=0)


@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
def test_one_query_equals_many_whatever_is_stored(monkeypatch: pytest.MonkeyPatch, terms: list[str]) -> None:
    monkeypatch.setattr(module, "VECTOR_SPAN", 16)
    matching = Matching(dim=D, **{**tiny.MATCHING, "terms": terms})
    query, gallery = ({k: v.float() for k, v in side.items()} for side in encodings(3, 50))
    gallery["fg"][4] = gallery["bg"][5] = query["text"][1] = 0.0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        stored = {key: value.to(dtype) for key, value in gallery.items()}
        kept = {key: value.clone() for key, value in stored.items()}
        with torch.inference_mode():
            many = matching.score(query, stored)
            for row in range(3):
                one = matching.score({key: value[row : row + 1] for key, value in query.items()}, stored)
                torch.testing.assert_close(one[0], many[row], atol=1e-6, rtol=0)
        assert all(torch.equal(stored[key], kept[key]) for key in kept), "scoring changed the gallery"


def test_empty_sides() -> None:
    matching = build()
    query, gallery = encodings(0, G)
    assert matching.score(query, gallery).shape == (0, G)
    for queries in (1, Q):
        query, gallery = encodings(queries, 0)
        assert matching.score(query, gallery).shape == (queries, 0)


def test_the_factor_is_learned_and_bounded() -> None:
    matching = build()
    matching.factor().backward()
    assert matching.temperature.grad.abs() > 0
    assert build(learn_temperature=False).temperature.requires_grad is False
    assert "temperature" in build(learn_temperature=False).state_dict()
    with torch.no_grad():
        matching.temperature.fill_(50.0)
    assert matching.factor().item() == pytest.approx(100.0)
    assert build(temperature=5.0, released=True).factor().item() == pytest.approx(math.exp(5.0))


BAD_SETTINGS = {
    "unknown": ({"terms": ["fused", "other"]}, r"\['fused', 'other'\].*of: fused, explicit, background, implicit"),
    "empty": ({"terms": []}, "one or more"),
    "twice": ({"terms": ["fused", "fused"]}, "each once"),
    "temperature": ({"temperature": 14.0}, r"logarithm of the factor on scores, at most log\(100\)"),
    "nan": ({"temperature": float("nan")}, "temperature is nan"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_setting(name: str) -> None:
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ConfigError, match=message):
        build(**settings)


BAD = {
    "fused": (lambda m, q, g: m.score({**q, "fused": rand(Q, 7)}, g), r"query fused \[Q,D\] has shape \[5, 7\]"),
    "text": (lambda m, q, g: m.score({**q, "text": rand(6, D)}, g), r"query text .* \[6, 6\], expected \[5, 6\]"),
    "bg": (lambda m, q, g: m.score(q, {**g, "bg": rand(8, D)}), r"gallery bg .* \[8, 6\], expected \[7, 6\]"),
    "keys": (lambda m, q, g: m.score({"fused": q["fused"]}, g), "lack text, attention, background; make them with"),
    "bg missing": (lambda m, q, g: m.score(q, {"fg": g["fg"]}), "lack bg"),
    "chunk": (lambda m, q, g: m.score(q, g, chunk=0), "chunk is 0"),
    "factors": (lambda m, q, g: m.query_factors({"fused": q["fused"]}), "lack text, attention, background"),
    "terms": (lambda m, q, g: m.score_terms(q, {**g, "bg": rand(8, D)}), r"gallery bg .* \[8, 6\], expected \[7, 6\]"),
    "sentence": (lambda m, q, g: m.query(rand(Q, D), rand(6, D), rand(Q, D)), r"sentence vectors .* \[6, 6\]"),
    "gallery": (lambda m, q, g: m.gallery(rand(G, D), rand(G)), r"gallery backgrounds .* \[7\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(build(), *encodings())


def test_benchmark_compares_equal_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = ROOT / "benchmarks" / "scoring.py"
    spec = importlib.util.spec_from_file_location("scoring_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for queries, images in ((9, 40), (1, 40)):
        differences = benchmark.differences(queries, images, width=16)
        assert differences["float64"] < 1e-14
        assert 0 < differences["float32"] < 1e-5
