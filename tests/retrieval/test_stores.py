"""The three ways to search one gallery find the same: exactly, through the first stage, in a Qdrant server."""

import os

import numpy as np
import pytest
import torch
from factor_model import ARTEMIS, CLAUSES, TERMS, FactorModel, random_index
from PIL import Image

from neucore_plugin.common.errors import DataError
from neucore_plugin.retrieval import GalleryIndex, qdrant_edge, qdrant_server
from neucore_plugin.retrieval.qdrant_edge import EdgeCache
from neucore_plugin.retrieval.queries import Query

pytest.importorskip("qdrant_edge")
client = pytest.importorskip("qdrant_client")


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8))


def first_stage_from_few(monkeypatch, candidates):
    for constant, value in (("WORTH_FROM", 0), ("EXACT_ROWS", 20), ("CANDIDATES", candidates)):
        monkeypatch.setattr(qdrant_edge, constant, value)


QUERIES = {
    "image": Query(picture(1)),
    "text": Query(text="longer sleeves"),
    "both": Query(picture(2), "the same in red"),
    "clauses": Query(picture(2), "the same in red, longer and with dots"),
    "dialogue": Query(picture(2), "the same in red", then=["but longer"]),
    "several references": Query(images=[picture(3), picture(4)], text="blue"),
    "negatives": Query(picture(5), without_texts=["zebra"], without_images=[picture(6)]),
    "a name": Query("0005.jpg", "as it is"),
    "the name itself": Query("0005.jpg", exclude_reference=False),
    "filter": Query(picture(7), where='category == "dress" and price < 300'),
    "wide filter": Query(picture(7), where='not (category == "dress" and price < 60)'),
    "narrow filter": Query(picture(8), where="price in (3, 100, 101, 102) or price < 2"),
    "filter of nothing": Query(picture(8), where="price < 0"),
    "filter and exclude": Query(picture(9), "red", where='"new" in tags', exclude=["0003.jpg", "0300.jpg"]),
    "one": Query(picture(10), k=1),
    "all": Query(picture(11), k=None),
}


@pytest.fixture(
    scope="module",
    params=[TERMS, CLAUSES, ARTEMIS, ("explicit", "background"), CLAUSES[1:], ("fused", "change")],
    ids="+".join,
)
def gallery(request, tmp_path_factory):
    """A saved index with removed images, its model, and a client that holds the same."""
    place = tmp_path_factory.mktemp("stores")
    model = FactorModel(request.param)
    index = random_index(place / "index", model, count=700)
    (place / "pictures").mkdir()
    picture(0).save(place / "pictures" / "0005.jpg")
    index.remove(["0010.jpg", "0011.jpg", "0599.jpg"])
    EdgeCache.build(index, progress=False)
    server = client.QdrantClient(":memory:")
    qdrant_server.push(index, server, "pictures", qdrant_server.Layout(), progress=False)
    return place / "index", model, server


@pytest.fixture(params=["edge", "server", "server, nearest", "real server"])
def found(request, gallery, monkeypatch):
    """A function that answers queries in one of the stores."""
    folder, model, server = gallery
    if request.param == "edge":
        first_stage_from_few(monkeypatch, candidates=160)
        yield GalleryIndex.open(folder, model).search_many
        return
    if request.param == "server, nearest":
        monkeypatch.setattr(qdrant_server, "EXACT_UP_TO", 0)
        monkeypatch.setattr(qdrant_server, "CANDIDATES", 160)
    if request.param != "real server":
        yield qdrant_server.QdrantCollection(server, "pictures", model).search_many
        return
    if not os.environ.get("QDRANT_URL"):
        pytest.skip("QDRANT_URL is not set: no Qdrant server to try")
    server, name = qdrant_server.connect(os.environ["QDRANT_URL"]), f"neucore-test-{os.getpid()}"
    qdrant_server.push(GalleryIndex.open(folder, model), server, name, qdrant_server.Layout(), progress=False)
    yield qdrant_server.QdrantCollection(server, name, model).search_many
    server.delete_collection(name)


def test_every_store_finds_the_same(gallery, found):
    folder, model, _ = gallery
    true = GalleryIndex.open(folder, model).search_many(list(QUERIES.values()))
    hits = found(list(QUERIES.values()))
    for kind, expected, given in zip(QUERIES, true, hits, strict=True):
        assert [hit.name for hit in given] == [hit.name for hit in expected], kind
        assert [hit.score for hit in given] == pytest.approx([hit.score for hit in expected], abs=1e-6), kind
        assert [(hit.rank, hit.path, hit.attributes) for hit in given] == [
            (hit.rank, hit.path, hit.attributes) for hit in expected
        ], kind


def test_equal_scores_come_in_the_order_of_the_gallery(gallery, found):
    folder, model, _ = gallery
    index = GalleryIndex.open(folder, model)
    wanted = {key: value[:1] for key, value in index.candidates(torch.tensor([0])).items()}
    model.encode_query, encode = (
        lambda pixels, texts: model.compose(wanted["fg"], wanted["fg"][:, None], wanted["bg"]),
        model.encode_query,
    )
    try:
        names = [hit.name for hit in found([Query(text="like the first", k=30)])[0]]
        place = names.index("0000.jpg")
        assert names[place : place + 3] == ["0000.jpg", "0001.jpg", "0002.jpg"]
    finally:
        model.encode_query = encode


def test_the_first_stage_is_what_answers(gallery, monkeypatch):
    folder, model, _ = gallery
    index = GalleryIndex.open(folder, model)
    asked = []
    nearest = EdgeCache.nearest
    monkeypatch.setattr(
        EdgeCache, "nearest", lambda self, parts, wanted: asked.append(wanted) or nearest(self, parts, wanted)
    )
    index.search(picture(1))
    assert not asked  # a small gallery
    first_stage_from_few(monkeypatch, candidates=60)
    index.search(picture(1))
    assert asked == [60]
    index.search(picture(1), where='category == "dress"')
    assert asked == [60, 120]  # a filter that leaves half of them
    index.search_many([Query(picture(1), exact=True), Query(picture(1), where="price < 15"), Query(picture(1), k=None)])
    assert asked == [60, 120]


def test_a_search_in_a_server_cannot_be_explained(gallery):
    _, model, server = gallery
    collection = qdrant_server.QdrantCollection(server, "pictures", model)
    with pytest.raises(DataError, match="cannot be explained; search the index itself"):
        collection.search_many([Query(text="red", explain=True)])
    with pytest.raises(DataError, match="no image 'nothing.jpg' in collection 'pictures'"):
        collection.search_many([Query(text="red", exclude=["nothing.jpg"])])
    with pytest.raises(DataError, match="'nothing.jpg' is neither a file nor a name in collection 'pictures'"):
        collection.search_many([Query("nothing.jpg")])
    with pytest.raises(DataError, match="Qdrant has no order of texts"):
        collection.search_many([Query(text="red", where='name < "m"')])
