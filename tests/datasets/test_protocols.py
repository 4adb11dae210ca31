"""Protocols: what each preset asks and counts, against slow definitions that sort names."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import REAL, needs_real

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.config.published import PRESETS, STANDARD, Protocol
from neucore_plugin.datasets.protocols import presets, queries
from neucore_plugin.datasets.published.cirr import CIRR
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset
from neucore_plugin.evaluation.metrics import soft_recall_at
from neucore_plugin.evaluation.ranking import Evaluated, Ranking
from neucore_plugin.evaluation.results import _aspect_lines, with_means
from neucore_plugin.report import table_lines
from neucore_plugin.retrieval.ranks import MISS, image_ranks

NAMES = tuple(f"image-{number:02d}" for number in range(30))
PAIR = Triplet("p", "image-00", "is red and has dots", ("image-01",), captions=("is red", "has dots"))
HALF = Triplet("h", "image-02", "is long", ("image-03",), captions=("is long",))


def dataset(triplets, protocol=STANDARD, names=NAMES, **options) -> TripletDataset:
    gallery = Gallery(tuple(names), tuple(Path(name) for name in names))
    store = ImageStore({name: Path(name) for name in NAMES}, str)
    return TripletDataset("x", "val", triplets, gallery, store, protocol=protocol, **options)


def random_queries(seed: int, count: int = 24) -> list[Triplet]:
    """References inside and outside the gallery's first 25 names, one to four answers, graded ones, groups of six."""
    draw = random.Random(seed)
    queries = []
    for number in range(count):
        reference = draw.choice(NAMES)
        answers = draw.sample([name for name in NAMES[:25] if name != reference], draw.randint(1, 4))
        soft = {name: draw.choice((1.0, 0.5, 0.2, -1.0)) for name in draw.sample(NAMES[:25], draw.randint(0, 4))}
        others = [name for name in NAMES[:25] if name not in (reference, answers[0])]
        members = (reference, answers[0], *draw.sample(others, 4))
        queries.append(
            Triplet(str(number), reference, f"text {number}", tuple(answers), "", members, tuple(soft.items()))
        )
    return queries


def ranked(row, names, left_out) -> list[str]:
    """Names of the gallery, best first, ties by place."""
    kept = [(-float(row[place]), place) for place, name in enumerate(NAMES[:25]) if name in names and name != left_out]
    return [NAMES[place] for _, place in sorted(kept)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("concat", [("p", "is red and has dots"), ("h", "is long")]),
        (
            "both_orders",
            [("p/a", "is red and has dots"), ("p/b", "has dots and is red"), ("h", "is long")],
        ),
        ("separate", [("p/0", "is red"), ("p/1", "has dots"), ("h", "is long")]),
    ],
)
def test_texts_of_a_pair(text, expected):
    protocol = Protocol("x", text=text)
    assert [(t.query_id, t.caption) for t in queries(protocol, [PAIR, HALF])] == expected
    if text == "separate":  # training does not take captions apart
        assert queries(protocol, [PAIR], train=True) == [PAIR]
    plain = Triplet("1", "a", "b", ("c",))
    assert queries(protocol, [plain]) == [plain]


def test_a_mark_between_two_captions():
    """The released form's: only where two captions are joined."""
    made = {
        text: [t.caption for t in queries(Protocol("x", text=text), [PAIR, HALF], joiner="<and>")]
        for text in ("concat", "both_orders", "separate")
    }
    assert made["concat"] == ["is red <and> has dots", "is long"]
    assert made["both_orders"] == ["is red <and> has dots", "has dots <and> is red", "is long"]
    assert made["separate"] == ["is red", "has dots", "is long"]
    separate = Protocol("x", text="separate")
    assert [t.caption for t in queries(separate, [PAIR], True, "<and>")] == ["is red <and> has dots"]


@pytest.mark.parametrize("captions", [("is red", ""), ("", "is red"), (" ", "is red")])
def test_an_empty_caption_still_counts_as_one_pair(captions):
    pair = Triplet("p", "image-00", "is red", ("image-01",), captions=captions)
    asked = queries(Protocol("x", text="both_orders"), [pair])
    assert [(t.query_id, t.caption) for t in asked] == [("p/a", "is red"), ("p/b", "is red")]
    assert [t.caption for t in queries(Protocol("x", text="separate"), [pair])] == ["is red"]
    assert [t.caption for t in queries(Protocol("x"), [pair])] == ["is red"]
    first, second = (t.caption.split() for t in queries(Protocol("x", text="both_orders"), [pair], joiner="<and>"))
    assert [first, second][:: 1 if captions[0].strip() else -1] == [["is", "red", "<and>"], ["<and>", "is", "red"]]
    blank = Triplet("b", "image-00", "", ("image-01",), captions=("", ""))
    assert [t.caption for t in queries(Protocol("x", text="both_orders"), [blank])] == ["", ""]


@pytest.mark.parametrize(
    ("captions", "text"),
    [
        (("is a tan shirt.", "has dots ?"), "is a tan shirt and has dots"),
        (("..., is red, blue and green?.", "v-neck, 3.5 in."), "is red, blue and green and v-neck, 3.5 in"),
        (("Darker and not as shiny", "."), "Darker and not as shiny"),  # nothing is left of the second
        (("is red.",), "is red"),
        (("! is red!", "(a.)"), "! is red! and (a.)"),  # only those marks
    ],
)
def test_clip4cir_strips_each_caption(captions, text):
    pair = Triplet("p", "image-00", " and ".join(captions), ("image-01",), captions=captions)
    for train in (False, True):
        assert [t.caption for t in queries(PRESETS["fashioniq"]["clip4cir"], [pair], train)] == [text]
    for name in ("neucore", "covr", "tgcir"):  # the others leave captions as they are
        assert queries(PRESETS["fashioniq"][name], [pair])[0].caption == " and ".join(captions)


@pytest.mark.parametrize("name", [*PRESETS["fashioniq"], "standard"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_of_every_preset_by_sorting_names(name, seed):
    protocol = PRESETS["fashioniq"].get(name, STANDARD)
    queries = [Triplet(t.query_id, t.reference, t.caption, t.targets) for t in random_queries(seed)]
    data = dataset(queries, protocol, NAMES[:25])
    scores = torch.randint(0, 5, (len(queries), 25), generator=torch.Generator().manual_seed(seed)).float()
    found = Ranking(data)(scores, range(len(queries)))
    union = {name for t in queries for name in (t.reference, *t.targets)}
    for number, query in enumerate(queries):
        names = union if protocol.gallery == "union" else set(NAMES)
        order = ranked(scores[number], names, query.reference if protocol.remove_reference else None)
        assert found[number].rank == 1 + min(order.index(name) for name in query.targets)
        assert [NAMES[place] for place in found[number].top] == order[:10]
        assert found[number].top_scores == tuple(float(scores[number, NAMES.index(name)]) for name in order[:10])
        assert (found[number].subset_rank, found[number].soft, found[number].best) == (None, (), ())


@pytest.mark.parametrize("within", [None, 50, 7, 2])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_soft_recalls_by_looking_at_the_top(seed, within):
    """within: R_subset@K looks at the members among that many images of the whole ranking alone."""
    queries = random_queries(seed)
    data = dataset(queries, replace(PRESETS["cirr"]["soft"], subset_top=within), NAMES[:25])
    scores = torch.randint(0, 4, (len(queries), 25), generator=torch.Generator().manual_seed(seed)).float()
    values = Evaluated(data, {"neucore": Ranking(data)(scores, range(len(queries)))}).table["neucore"]
    for prefix, ks, in_group in (("R", (1, 5, 10, 50), False), ("R_subset", (1, 2, 3), True)):
        for k in ks:
            total = 0.0
            for number, query in enumerate(queries):
                top = ranked(scores[number], set(NAMES), query.reference)
                if in_group:
                    top = [name for name in top[:within] if name in query.members]
                top = top[:k]
                weights = dict(query.soft)
                total += max(0.0, *(weights.get(name, 0.0) for name in top), 0.0)
            assert values[f"{prefix}@{k}"] == pytest.approx(100 * total / len(queries)), (prefix, k)


def test_soft_and_hard_by_hand():
    # scores rank b, a, c, d; a is the hard target, c weighs 1, d 0.5, b -1; the reference r weighs 1 and is removed
    query = Triplet(
        "1",
        "image-05",
        "t",
        ("image-00",),
        "",
        (),
        (("image-02", 1.0), ("image-03", 0.5), ("image-01", -1.0), ("image-05", 1.0)),
    )
    scores = torch.tensor([[3.0, 4.0, 2.0, 1.0, 0.0, 9.0]])
    (found,) = Ranking(dataset([query], PRESETS["cirr"]["soft"], NAMES[:6]))(scores, [0])
    assert found.rank == 2
    assert found.soft == ((3, 3, 1.0), (4, 4, 0.5))
    assert soft_recall_at([[(3, 1.0), (4, 0.5)]], (1, 2, 3, 4)) == {"R@1": 0, "R@2": 0, "R@3": 100, "R@4": 100}
    assert soft_recall_at([[(2, 0.2)], []], (1, 2)) == {"R@1": 0, "R@2": pytest.approx(10)}


@needs_real("cirr")
def test_soft_scores_of_real_queries_by_their_definition():
    """Scores that favour the target somewhat; each query's top is looked at by name."""
    triplets, gallery = CIRR.read(REAL / "cirr", "val")
    triplets, ids = triplets[::16], gallery.ids
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(len(triplets), len(ids), generator=generator)
    place = {name: number for number, name in enumerate(ids)}
    for row, triplet in enumerate(triplets):
        scores[row, [place[name] for name in triplet.members]] += 1.2
        scores[row, place[triplet.targets[0]]] += 0.8
    order = scores.argsort(dim=1, descending=True).tolist()
    tops = [[ids[n] for n in row if ids[n] != t.reference] for row, t in zip(order, triplets, strict=True)]
    found = {}
    for name, within in (("soft", None), ("soft_top50", 50)):
        store = ImageStore(gallery.files, str)
        data = TripletDataset("cirr", "val", triplets, gallery, store, protocol=PRESETS["cirr"][name])
        found[name] = Evaluated(data, {"neucore": Ranking(data)(scores, range(len(triplets)))}).table["neucore"]
        for k in (1, 2, 3):
            weights = []
            for top, t in zip(tops, triplets, strict=True):
                first = [image for image in top[:within] if image in t.members][:k]
                weights.append(max(0.0, *(dict(t.soft).get(image, 0.0) for image in first), 0.0))
            assert found[name][f"R_subset@{k}"] == pytest.approx(100 * sum(weights) / len(weights))
    assert all(found["soft"][f"R@{k}"] == found["soft_top50"][f"R@{k}"] for k in (1, 5, 10, 50))
    assert all(found["soft"][f"R_subset@{k}"] > found["soft_top50"][f"R_subset@{k}"] > 0 for k in (1, 2, 3))


def test_soft_top50_leaves_out_members_behind_the_top_50():
    """Sixty images; the group's one good member stands at place 50, then at 51."""
    names = tuple(f"i{number}" for number in range(62))
    store = ImageStore({name: Path(name) for name in names}, str)
    gallery = Gallery(names, tuple(Path(name) for name in names))
    members = ("i0", "i50", "i51", "i57", "i58", "i59")
    values = {}
    for target, place in (("i50", 50), ("i51", 51)):
        query = Triplet("1", "i0", "t", (target,), "", members, ((target, 1.0),))
        scores = -torch.arange(62.0)[None]
        for name in ("soft", "soft_top50"):
            data = TripletDataset("cirr", "val", [query], gallery, store, protocol=PRESETS["cirr"][name])
            found = Evaluated(data, {"neucore": Ranking(data)(scores, [0])}).metrics()
            assert found["R@50"] == (100.0 if place == 50 else 0.0)
            values[name, place] = found["R_subset@1"], found["R_subset@2"], found["agg_metrics"]
    assert values["soft", 50] == values["soft_top50", 50] == (100.0, 100.0, 50.0)
    assert values["soft", 51] == (0.0, 100.0, 0.0) and values["soft_top50", 51] == (0.0, 0.0, 0.0)


def test_ranks_of_given_images_leave_out_who_is_no_member():
    scores = torch.tensor([[1.0, 1.0, 0.5, 2.0]])
    assert image_ranks(scores, [(0, 1, 3)]).tolist() == [[2, 3, 1]]
    assert image_ranks(scores, [(1, 2)], [3]).tolist() == [[2, 3]]
    assert image_ranks(scores, [(1, 2)], [3], [(1, 0, 3)]).tolist() == [[2, 0]]


def test_average_precision_counts_all_answers_and_recall_the_target():
    # ranking of the 7 others: 3 6 1 2 4 5 7; answers 1 (the target), 6, 7
    query = Triplet("1", "image-00", "t", ("image-01", "image-06", "image-07"))
    scores = torch.tensor([[9.0, 5.0, 4.0, 7.0, 3.0, 2.0, 6.0, 1.0]])
    data = dataset([query], PRESETS["circo"]["circo_removed"], NAMES[:8])
    found = Evaluated(data, {"neucore": Ranking(data)(scores, [0])})
    values = found.table["neucore"]
    assert found.rows["neucore"][0].rank == 3  # of the target, although another answer stands before it
    assert values["mAP@5"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 3)
    assert "mAP@10" not in values  # this gallery has seven images to rank
    assert values["R@1"] == 0 and values["R@5"] == 100


OWN = (
    Triplet("own", NAMES[3], "x", (NAMES[3],), members=NAMES[:6]),
    Triplet("first", NAMES[3], "y", (NAMES[3], NAMES[5]), members=NAMES[:6]),
    Triplet("plain", NAMES[3], "z", (NAMES[4],), members=NAMES[:6]),
)


@pytest.mark.parametrize(
    ("protocol", "ranks", "in_group", "missed"),
    [  # scores fall with the place, so the reference, which stands fourth, moves the images behind it
        (STANDARD, [MISS, 5, 4], [MISS, 5, 4], 1),
        (PRESETS["shoes"]["shoes"], [MISS, 5, 4], [MISS, 5, 4], 1),
        (PRESETS["fashioniq"]["tgcir"], [MISS, 2, 1], [MISS, 2, 1], 1),  # of the three images that the queries name
        (PRESETS["fashioniq"]["clip4cir"], [4, 4, 5], [4, 4, 5], 0),
        (PRESETS["circo"]["circo"], [4, 4, 5], [4, 4, 5], 0),
        (PRESETS["circo"]["circo_removed"], [MISS, MISS, 4], [MISS, 5, 4], 2),  # R@K counts the target alone
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_query_whose_target_is_its_reference_is_a_miss_where_that_is_removed(protocol, ranks, in_group, missed):
    data = dataset(list(OWN), protocol)
    found = Ranking(data)(-torch.arange(30.0).expand(3, -1), [0, 1, 2])
    assert [query.rank for query in found] == ranks
    assert [query.subset_rank for query in found] == in_group
    text = (
        "{} of 3 queries have their reference as target, which the protocol removes from the ranking; they count as "
        "misses"
    )
    assert data.notices == ([text.format(missed)] if missed else [])
    values = Evaluated(data, {"neucore": found}).table["neucore"]
    assert values["queries"] == 3 and values["R@50"] == pytest.approx(100 * (3 - missed) / 3)
    if protocol.precision_at:  # the reference stays one of the right answers
        own = [1 / 4, (1 / 4 + 2 / 6) / 2, 1 / 5] if not missed else [0, (1 / 5) / 2, 1 / 4]
        assert values["mAP@10"] == pytest.approx(100 * sum(own) / 3)


def test_nothing_but_misses_is_a_result_too():
    data = dataset([OWN[0]], names=NAMES[:4])
    values = Evaluated(data, {"neucore": Ranking(data)(torch.zeros(1, 4), [0])}).table["neucore"]
    assert values == {"R@1": 0, "R@5": 0, "R@10": 0, "R@50": 0, "median_rank": 4.0, "queries": 1} | {
        f"R_subset@{k}": 0 for k in (1, 2, 3)
    }


def test_circo_counts_recall_at_25_and_each_aspect():
    """A query counts for every aspect it has; a model that puts the images in the order of the gallery."""
    pairs = [(9, 0, ("negation", "addition")), (9, 14, ("addition",)), (9, 29, ("viewpoint",))]
    asked = [
        Triplet(str(n), NAMES[reference], "x", (NAMES[target],), aspects=aspects)
        for n, (reference, target, aspects) in enumerate(pairs)
    ]
    for name, rank in (("circo", 30), ("circo_removed", 29)):
        data = dataset(asked, PRESETS["circo"][name])
        found = Evaluated(data, {"neucore": Ranking(data)(-torch.arange(30.0).expand(3, -1), [0, 1, 2])})
        assert found.rows["neucore"][2].rank == rank
        own = found.table["neucore"]
        assert [own[f"R@{k}"] for k in (1, 5, 10, 25, 50)] == pytest.approx([100 / 3] * 3 + [200 / 3, 100])
        assert {aspect: row["mAP@10"] for aspect, row in found.per_change.items()} == {
            "addition": 50.0,
            "negation": 100.0,
            "viewpoint": 0.0,
        }
        assert _aspect_lines("val", found) == ["val: mAP@10 by aspect: addition 50.00, negation 100.00, viewpoint 0.00"]
        head, line = table_lines({"val": found.table})
        assert "R@25" in head and " 66.67 " in line
    assert list(PRESETS["circo"]) == ["circo", "circo_removed"]
    assert PRESETS["circo"]["circo"].summary.startswith("gallery: the split's own list; reference kept;")


def evaluated(protocol, splits, left_out=None):
    found = {}
    for number, split in enumerate(splits):
        data = SimpleNamespace(protocol=protocol, family="val_mean", left_out=left_out or {})
        table = {"neucore": {"R@10": 10.0 * number, "queries": 5, "median_rank": 1.0}}
        found[split] = SimpleNamespace(dataset=data, table=table)
    return found


def test_means_over_categories_and_the_protocol_of_every_row():
    first = evaluated(
        PRESETS["fashioniq"]["neucore"],
        ["val_dress", "val_shirt", "val_toptee"],
        {"missing_images": 2, "skipped_queries": 3},
    )
    second = evaluated(PRESETS["fashioniq"]["covr"], ["val_dress@covr", "val_shirt@covr", "val_toptee@covr"])
    results, means = with_means({**first, **second})
    assert list(results)[-2:] == ["val_mean", "val_mean@covr"]
    assert means["val_mean"] == ["val_dress", "val_shirt", "val_toptee"]
    assert results["val_mean"]["neucore"] == {
        "R@10": 10.0,
        "queries": 15,
        "median_rank": 1.0,
        "protocol": "neucore",
        "missing_images": 6,
        "skipped_queries": 9,
    }
    assert results["val_shirt@covr"]["neucore"]["protocol"] == "covr"
    full = {
        split: {row: {f"R@{k}": 1.0 for k in (1, 5, 10, 50)} | values for row, values in rows.items()}
        for split, rows in results.items()
    }
    lines = table_lines(full)
    assert lines[0].endswith("protocol") and lines[1].endswith("neucore (3 skipped)") and lines[-1].endswith("covr")


def test_presets_by_name():
    assert [p.name for p in presets("cirr", None)] == ["hard"]
    assert [p.name for p in presets("fashioniq", ["covr", "val"])] == ["covr", "val"]
    assert presets("mine", None) == [STANDARD]
    with pytest.raises(ConfigError, match=r"no preset 'covrr'\. Did you mean 'covr'"):
        presets("fashioniq", ["covrr"])
    for known in PRESETS.values():
        assert all("gallery:" in p.summary and "reference " in p.summary for p in known.values())


def test_a_split_without_answers_can_be_ranked_only():
    query = Triplet("1", "image-00", "t", ())
    with pytest.raises(DataError, match="1 queries without a target, such as 1(?s:.)*neucore submit"):
        dataset([query])
    data = dataset([query], answers=False)
    assert data.triplets[0].targets == ()
