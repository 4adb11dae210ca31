"""The first stage of large local galleries: a cache that is used only where it is whole and of this index."""

import logging
import math
import subprocess
import sys

import pytest
import torch
from factor_model import ARTEMIS, IMPLICIT, TERMS, D, FactorModel, random_index

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.retrieval import GalleryIndex, qdrant_edge, recall
from neucore_plugin.retrieval.nearest import FirstOrder
from neucore_plugin.retrieval.qdrant_edge import EdgeCache

edge = pytest.importorskip("qdrant_edge")
SUBSETS = [
    TERMS,
    IMPLICIT,
    ARTEMIS,
    ("implicit",),
    ("fused", "explicit"),
    ("explicit", "background"),
    ("explicit",),
    ("fused",),
    ("background",),
]


@pytest.fixture
def index(tmp_path, monkeypatch):
    for constant, value in (("WORTH_FROM", 0), ("EXACT_ROWS", 20), ("CANDIDATES", 40)):
        monkeypatch.setattr(qdrant_edge, constant, value)
    return random_index(tmp_path / "index", FactorModel(), count=300)


def used(index, caplog):
    """Whether a search went through the first stage, and what was warned of; its answer is right in any case."""
    caplog.clear()
    index.first_stage = None
    with caplog.at_level(logging.WARNING):
        hits = index.search(text="red", k=3)
    assert [hit.name for hit in hits] == [hit.name for hit in index.search(text="red", k=3, exact=True)]
    through = index.first_stage[1] is not None
    index.first_stage = None
    return through, caplog.text


def larger(index, name, rows):
    """The index with a further unit of random images."""
    from neucore_plugin.retrieval.encoding import Encoded
    from neucore_plugin.retrieval.rows import Row

    encodings = {key: torch.randn(rows, D).to(index.dtype) for key in index.shapes}
    index._take(Encoded(encodings, [Row(f"{name}{row}.jpg", f"{name}{row}.jpg") for row in range(rows)], []))


# ---- to first order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
def test_the_first_order_is_exact_where_attention_is_even(terms):
    """All components weigh the same: the denominator is then the same for all images, so nothing is estimated."""
    model = FactorModel(terms)
    gallery = model.encode_image(torch.randn(40, 48))
    query = {**model.encode_query(torch.randn(1, 48), ["red, longer"])}
    query |= {key: torch.full_like(value, 1 / D) for key, value in query.items() if key.endswith("attention")}
    factors = model.gallery_factors(gallery)
    order = FirstOrder.of(factors)
    vectors = order.gallery(factors)
    scores = vectors @ order.query([(1.0, model.query_factors(query)), (-0.5, model.query_factors(query))])
    torch.testing.assert_close(scores, 0.5 * model.score(query, gallery)[0])
    weighted = bool({"explicit", "implicit"} & set(terms))  # all weighted terms share columns, with "fused" too
    assert vectors.shape[1] == D * (("fused" in terms or weighted) + ("background" in terms))


def test_the_mean_is_over_all_blocks():
    model = FactorModel()
    factors = model.gallery_factors(model.encode_image(torch.randn(40, 48)))
    whole, parts = FirstOrder.of(factors), FirstOrder.of(factors)
    whole.gallery(factors)
    for start in (0, 7, 30):
        stop = {0: 7, 7: 30, 30: 40}[start]
        parts.gallery({key: value[start:stop] for key, value in factors.items()})
    torch.testing.assert_close(parts.squares, whole.squares)
    units = torch.nn.functional.normalize(factors["weighted"], dim=1)
    torch.testing.assert_close(whole.squares, units.double().square().mean(0), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("key", ["cosines", "weighted", "squares"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(key, value):
    model = FactorModel()
    factors = model.gallery_factors(model.encode_image(torch.randn(4, 48)))
    order = FirstOrder.of(factors)
    factors[key][2, 1] = value
    with pytest.raises(DataError, match="the gallery holds NaN or infinite numbers"):
        order.gallery(factors)
    query = model.query_factors(model.encode_query(None, ["red"]))
    query["cosines"][0, 1] = value
    with pytest.raises(DataError, match="the query holds NaN or infinite numbers"):
        order.query([(1.0, query)])


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_is_made_once_extended_and_made_anew(index, caplog):
    assert used(index, caplog) == (False, "")  # there is none, and none is missed
    assert EdgeCache.build(index, progress=False) == 300
    assert EdgeCache.build(index, progress=False) == 0
    assert used(index, caplog) == (True, "")
    larger(index, "new", 15)
    assert used(index, caplog) == (True, "")  # few: scored beside the candidates
    larger(index, "more", 15)
    through, said = used(index, caplog)
    assert not through and "30 images came after" in said and "index accelerate" in said
    assert EdgeCache.build(index, progress=False) == 30
    assert used(index, caplog) == (True, "")
    index.remove(["0000.jpg", "more3.jpg"])
    assert used(index, caplog) == (True, "")
    shards = list((index.folder / "nearest").glob("shard-*"))
    assert len(shards) == 1
    another = random_index(index.folder.parent / "another", index.model, count=300, seed=1)
    (another.folder / "nearest").mkdir()
    (index.folder / "nearest").rename(another.folder / "nearest")  # of other units
    through, said = used(another, caplog)
    assert not through and "was made of other units" in said
    assert qdrant_edge.check(another) is None  # no damage
    assert EdgeCache.build(another, progress=False) == 300
    assert used(another, caplog) == (True, "")
    assert [path for path in (another.folder / "nearest").glob("shard-*") if path in shards] == []


def test_new_images_are_found_beside_the_cache(index, caplog):
    EdgeCache.build(index, progress=False)
    query = index.model.encode_query(None, ["red"])
    from neucore_plugin.retrieval.encoding import Encoded
    from neucore_plugin.retrieval.rows import Row

    best = {"fg": query["fused"].clone(), "bg": torch.zeros(1, D)}
    index._take(Encoded(best, [Row("best.jpg", "best.jpg")], []))
    index.first_stage = None
    hits = index.search(text="red", k=5)
    assert index.first_stage[1] is not None
    assert [hit.name for hit in hits] == [hit.name for hit in index.search(text="red", k=5, exact=True)]
    assert "best.jpg" in [hit.name for hit in hits]


def files(index):
    return sorted(path for path in (index.folder / "nearest").rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("damage", ["cut", "missing", "more", "manifest", "format", "squares", "elsewhere"])
def test_a_damaged_cache_is_not_used_and_made_anew(index, caplog, damage):
    EdgeCache.build(index, progress=False)
    manifest = index.folder / "nearest" / "manifest.json"
    largest = max(files(index), key=lambda path: path.stat().st_size)
    text = manifest.read_text()
    if damage == "cut":
        with open(largest, "rb+") as stream:
            stream.truncate(largest.stat().st_size // 2)
    elif damage == "missing":
        largest.unlink()
    elif damage == "more":
        (largest.parent / "stranger").write_text("x")
    elif damage == "manifest":
        manifest.write_text(text[: len(text) // 2])
    elif damage == "format":
        manifest.write_text(text.replace("neucore-nearest-1", "neucore-nearest-9"))
    elif damage == "squares":
        manifest.write_text(text.replace('"squares": [', '"squares": [-1.0, '))
    else:
        manifest.write_text(text.replace('"shard": "', '"shard": "../'))
    through, said = used(index, caplog)
    assert not through and "searching exactly: " in said and "index accelerate" in said
    assert qdrant_edge.check(index)
    assert EdgeCache.build(index, progress=False) == 300
    assert used(index, caplog) == (True, "")
    assert qdrant_edge.check(index) is None


def test_a_changed_byte_is_seen_by_the_sums(index):
    EdgeCache.build(index, progress=False)
    path = next(path for path in files(index) if path.name != "manifest.json")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"{path} is not the file that was written" in qdrant_edge.check(index)


def test_a_build_cut_short_leaves_no_cache(index, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            qdrant_edge, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space left"):
            EdgeCache.build(index, progress=False)
    assert used(index, caplog) == (False, "")
    assert EdgeCache.build(index, progress=False) == 300
    larger(index, "new", 30)
    with monkeypatch.context() as patch:
        patch.setattr(FirstOrder, "gallery", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            EdgeCache.build(index, progress=False)
    assert used(index, caplog) == (False, "")
    assert EdgeCache.build(index, progress=False) == 330
    assert used(index, caplog) == (True, "")


def test_one_process_at_a_time(index, caplog):
    EdgeCache.build(index, progress=False)
    index.search(text="red")  # it is open from now on
    code = (
        "import fcntl, os, sys\n"
        "handle = os.open(sys.argv[1], os.O_RDONLY)\n"
        "try: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: print('held')"
    )
    place = str(index.folder / "nearest")
    assert subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True).stdout == "held\n"
    another = GalleryIndex.open(index.folder, index.model)
    through, said = used(another, caplog)
    assert not through and "is in use by another process" in said
    with pytest.raises(DataError, match="in use by another process: end its search or service"):
        EdgeCache.build(another, progress=False)
    assert EdgeCache.build(index, progress=False) == 0  # which lets go of it
    assert used(another, caplog) == (True, "")


def test_what_cannot_have_a_first_stage(index, monkeypatch):
    with pytest.raises(DataError, match="held in memory"):
        EdgeCache.build(GalleryIndex(["a"], ["a"], {"fg": torch.ones(1, 2)}, index.model), progress=False)
    index.model = type("Opaque", (), {"fingerprint": lambda self: "factors-1"})()
    with pytest.raises(ConfigError, match="Opaque does not say what its score is made of"):
        EdgeCache.build(index, progress=False)


def test_a_unit_with_nan_is_refused(tmp_path):
    index = random_index(tmp_path / "index", FactorModel(), count=50)
    index.parts[0].arrays["fg"][7] = math.nan
    with pytest.raises(DataError, match="the gallery holds NaN"):
        EdgeCache.build(index, progress=False)
    assert not (index.folder / "nearest" / "manifest.json").exists()
    assert not list((index.folder / "nearest").glob("shard-*"))


def test_without_the_package(index, caplog, monkeypatch):
    EdgeCache.build(index, progress=False)
    monkeypatch.setitem(sys.modules, "qdrant_edge", None)
    through, said = used(index, caplog)
    assert not through and "pip install 'neucore-plugin[qdrant]'" in said
    with pytest.raises(ConfigError, match=r"pip install 'neucore-plugin\[qdrant\]'"):
        EdgeCache.build(index, progress=False)


def test_the_recall_is_that_of_the_candidates(index, monkeypatch):
    from neucore_plugin.retrieval.queries import Query

    assert recall.recall(index) is None
    EdgeCache.build(index, progress=False)
    index.remove(["0007.jpg"])
    monkeypatch.setattr(recall, "CANDIDATES", 300)
    assert recall.recall(index, [Query(text="red")]) == {"made": 1.0, "asked": 1.0}
    monkeypatch.setattr(recall, "CANDIDATES", 25)
    found = recall.recall(index, [Query(text="red")], top=50)
    assert 0.2 < found["made"] <= 0.5 and found["asked"] <= 0.5  # half of 50 fit into 25
    nearest = EdgeCache.nearest
    monkeypatch.setattr(EdgeCache, "nearest", lambda *given: nearest(*given)[:0])
    assert recall.recall(index)["made"] == 0.0
