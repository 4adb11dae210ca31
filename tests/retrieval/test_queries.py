"""Queries of several pictures, turns and negatives, filters and explanations: against loops, with the colour model."""

import math

import pytest
import tiny
import torch
from colour_model import COLOURS, NAMES, ColourModel, draw, names

from neucore_plugin.common.errors import DataError
from neucore_plugin.retrieval import GalleryIndex, queries
from neucore_plugin.retrieval.queries import NEGATIVE, Query

ATTRIBUTES = [
    {"price": 10, "kind": "cold"},
    {"price": 20, "kind": "cold"},
    {"price": 30},
    {},
    {"price": 50, "kind": "warm"},
]


@pytest.fixture
def index(folder):
    built = GalleryIndex.build(ColourModel(), folder, batch_size=2, progress=False)
    return GalleryIndex(built.names, built.paths, built.encodings, built.model, built.root, attributes=ATTRIBUTES)


def by_loops(index, references=(), turns=(), unlike=()):
    """{name: score}: the turns' mean of minus the distance to the mean reference and the turn's words, less the mean
    negative's share."""
    colours = {name: row.tolist() for name, row in zip(NAMES, index.encodings["fg"], strict=True)}

    def distance(point, name):
        return math.sqrt(sum((a - b) ** 2 for a, b in zip(point, colours[name], strict=True)))

    points = []
    for words in turns or [""]:
        point = [0.0, 0.0, 0.0]
        for axis in range(3):
            if references:
                point[axis] = sum(colours[name][axis] for name in references) / len(references)
            point[axis] += sum(COLOURS[word][axis] / 255 for word in words.split())
        points.append(point)
    negatives = [colours[one] if one in colours else [value / 255 for value in COLOURS[one]] for one in unlike]
    found = {}
    for name in NAMES:
        found[name] = -sum(distance(point, name) for point in points) / len(points)
        if negatives:
            found[name] += NEGATIVE * sum(distance(negative, name) for negative in negatives) / len(negatives)
    return found


CASES = {
    "one": ({"image": "red.png"}, (["red.png"], [], [])),
    "two references": ({"images": ["red.png", "blue.png"]}, (["red.png", "blue.png"], [], [])),
    "three and a text": (
        {"image": "red.png", "images": ["blue.png", "more/Grey.JPG"], "text": "green"},
        (["red.png", "blue.png", "more/Grey.JPG"], ["green"], []),
    ),
    "a dialogue": ({"text": "red", "then": ["green", "blue pink"]}, ([], ["red", "green", "blue pink"], [])),
    "turns alone": ({"image": "red.png", "then": ["green", " "]}, (["red.png"], ["green"], [])),
    "not a text": ({"text": "red", "without_texts": ["pink"]}, ([], ["red"], ["pink"])),
    "not a picture": ({"text": "red", "without_images": ["red.png"]}, ([], ["red"], ["red.png"])),
    "everything": (
        {
            "images": ["red.png", "blue.png"],
            "text": "green",
            "then": ["grey"],
            "without_texts": ["pink", "red"],
            "without_images": ["more/Grey.JPG"],
        },
        (["red.png", "blue.png"], ["green", "grey"], ["pink", "red", "more/Grey.JPG"]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_loops(index, name):
    asked, said = CASES[name]
    expected = by_loops(index, *said)
    for left_out in (True, False):
        hits = index.search(**asked, k=None, exclude_reference=left_out)
        answers = [one for one in NAMES if not (left_out and one in said[0])]
        assert names(hits) == sorted(answers, key=lambda one: (-expected[one], NAMES.index(one)))
        assert [hit.score for hit in hits] == pytest.approx([expected[hit.name] for hit in hits], abs=1e-6)
        assert [hit.rank for hit in hits] == list(range(1, len(answers) + 1))


def test_one_value_is_as_good_as_a_list_of_one(index, folder):
    lists = index.search(images=["red.png"], then=["blue"], without_texts=["pink"], exclude=["green.png"])
    assert index.search(images="red.png", then="blue", without_texts="pink", exclude="green.png") == lists
    assert index.search(folder / "red.png", "blue", without_texts=["pink", ""], exclude=("green.png",)) == lists


def test_many_queries_are_answered_as_each_alone(index, monkeypatch):
    asked = [Query(**given, k=3) for given, _ in CASES.values()] + [Query(text="red", where="price < 40", k=2)]
    alone = [index.search_many([query])[0] for query in asked]
    assert [len(hits) for hits in alone] == [3, 3, 2, 3, 3, 3, 3, 3, 2]
    for cells in (queries._CELLS, 12, 1):
        monkeypatch.setattr(queries, "_CELLS", cells)
        monkeypatch.setattr(queries, "_FEW", 2)
        for together, one in zip(index.search_many(asked), alone, strict=True):
            assert names(together) == names(one)
            assert [hit.score for hit in together] == pytest.approx([hit.score for hit in one], abs=1e-6)
    assert index.search_many([("red.png", None), (None, "blue")], k=2) == [
        index.search("red.png", k=2),
        index.search(text="blue", k=2),
    ]


@pytest.mark.parametrize(
    ("where", "passing"),
    [
        ("price < 25", ["blue.png", "green.png"]),
        ("kind == 'warm' or price == 30", ["more/Grey.JPG", "red.png"]),
        ("price == null", ["more/deep/pink.webp"]),
        ("'more/' in name", ["more/Grey.JPG", "more/deep/pink.webp"]),
        ("price > 100", []),
        ("price < 100", ["blue.png", "green.png", "more/Grey.JPG", "red.png"]),
        ("  ", NAMES),
    ],
)
@pytest.mark.parametrize("without", [(), ("pink",)])
def test_a_filter_takes_others_away_and_changes_no_score(index, where, passing, without):
    everything = index.search(text="red", k=None, without_texts=without)
    expected = [hit for hit in everything if hit.name in passing]
    for k in (None, 99, 1):
        hits = index.search(text="red", where=where, k=k, without_texts=without)
        assert names(hits) == names(expected)[:k]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected][:k], abs=1e-6)


def test_k_beyond_what_is_left_gives_all(index):
    assert len(index.search(text="red", k=99)) == 5
    assert len(index.search("red.png", k=99)) == 4
    assert len(index.search("red.png", k=5, exclude=["BLUE.png", "blue.png"])) == 3
    assert index.search("red.png", exclude=[name for name in NAMES if name != "red.png"]) == []
    assert len(index.search(images=["red.png", "blue.png"], without_images=["green.png"], k=9)) == 3


def test_removed_images_are_never_found(index):
    index.remove(["red.png", "green.png"])
    for asked in ({"text": "red"}, {"text": "red", "without_texts": ["red"]}, {"text": "red", "where": "price > 0"}):
        hits = index.search(**asked, k=None)
        assert not {"red.png", "green.png"} & set(names(hits))
        assert all(math.isfinite(hit.score) for hit in hits)
    assert len(index.search(text="red", k=99)) == 3


def test_equal_scores_stand_by_position(tmp_path):
    for name in ("b", "a", "c"):
        draw(tmp_path / f"{name}.png", "red")
    index = GalleryIndex.build(ColourModel(), tmp_path, progress=False)
    assert names(index.search(text="blue", without_texts=["pink"], exclude=["a.png"])) == ["b.png", "c.png"]


BAD = {
    "nothing": ({}, "neither image nor text given; give a reference, a caption, or both"),
    "blank": ({"text": " ", "then": ["", " "]}, "neither image nor text"),
    "negatives alone": (
        {"without_texts": ["red"], "without_images": ["red.png"]},
        "only what the images should not be",
    ),
    "k": ({"text": "red", "k": 0}, "k=0: give a whole number of at least 1"),
    "k negative": ({"text": "red", "k": -3}, "k=-3"),
    "k text": ({"text": "red", "k": "5"}, "k=5"),
    "name": ({"images": ["red.png", "rad.png"]}, "'rad.png' is neither a file nor a name.*Did you mean 'red.png'"),
    "negative": ({"text": "red", "without_images": ["gren.png"]}, "'gren.png' is neither a file nor a name"),
    "exclude": ({"text": "red", "exclude": ["rad.png"]}, "no image 'rad.png' in the index.*Did you mean 'red.png'"),
    "filter": ({"text": "red", "where": "kind == cold"}, 'put a text in quotes: kind == "cold"'),
    "attribute": ({"text": "red", "where": "prize < 3"}, "no picture has an attribute 'prize'. Did you mean 'price'"),
    "explain": ({"text": "red", "explain": True}, "ColourModel does not say what its scores are made of"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(index, name):
    asked, message = BAD[name]
    with pytest.raises(DataError, match=message):
        index.search(**asked)


def test_the_pair_that_asks_nothing_is_named(index):
    with pytest.raises(DataError, match="query 1: neither image nor text given"):
        index.search_many([("red.png", None), (None, " ")])


def test_a_filter_without_any_attributes(built):
    with pytest.raises(DataError, match="no picture has an attribute 'price', or any other; filter by name or path"):
        built.search(text="red", where="price < 3")
    assert names(built.search(text="red", where="name == 'red.png'")) == ["red.png"]


# ---- with NEUCORE itself ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def neucore(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(tiny.pictures(6)):
        image.save(root / f"{number}.png")
    return GalleryIndex.build(tiny.build().eval(), root, progress=False)


@pytest.mark.parametrize("kind", ["one", "several", "negatives"])
def test_terms_sum_to_the_score_and_equal_loops(neucore, kind):
    asked = {"image": "0.png", "text": "make it blue"}
    if kind != "one":
        asked |= {"images": ["1.png"], "then": ["a longer dress"]}
    if kind == "negatives":
        asked |= {"without_texts": ["red"], "without_images": ["3.png"]}
    hits = neucore.search(**asked, explain=True, k=None)
    model, plain = neucore.model, neucore.search(**asked, k=None)
    assert names(hits) == names(plain) and all(hit.terms is None for hit in plain)
    pixels = torch.stack([model.image_processor(image) for image in tiny.pictures(6)])
    turns, count = (["make it blue"], 1) if kind == "one" else (["make it blue", "a longer dress"], 2)
    with torch.no_grad():
        gallery, parts = model.encode_image(pixels), []
        for turn in turns:
            each = [model.encode_query(pixels[row : row + 1], [turn]) for row in range(count)]
            parts.append((1 / len(turns), {key: sum(query[key] for query in each) / count for key in each[0]}))
        if kind == "negatives":
            parts += [(-NEGATIVE / 2, model.encode_query(None, ["red"]))]
            parts += [(-NEGATIVE / 2, model.encode_query(pixels[3:4], None))]
        expected = dict.fromkeys(model.matching.terms, 0.0)
        for weight, query in parts:
            for term, scores in model.matching.score_terms(query, gallery).items():
                expected[term] = expected[term] + weight * scores[0]
    for hit in hits:
        assert sum(hit.terms.values()) == pytest.approx(hit.score, abs=1e-5)
        row = int(hit.name.split(".")[0])
        assert dict(hit.terms) == pytest.approx({term: float(of[row]) for term, of in expected.items()}, abs=1e-5)


def test_the_words_taken_as_concepts(neucore):
    turns = ["the same dress", "in red, a red one"]
    read = queries.concepts(neucore.model, Query("0.png", turns[0], then=turns[1:], without_texts=["a square"]))
    assert [text for text, _ in read] == [*turns, "a square"]
    expected = neucore.model.extract_concepts([text for text, _ in read])
    assert [words for _, words in read] == [tuple(dict.fromkeys(words)) for words in expected]
    assert "dress" in read[0][1] and "red" in read[1][1] and read[2][1] == ("square",)
    assert queries.concepts(neucore.model, Query("0.png")) == []
    assert queries.concepts(ColourModel(), Query(text="red")) == [("red", ())]
