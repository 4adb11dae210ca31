"""A filter means the same to Qdrant as to a picture."""

import pytest

from neucore_plugin.common.errors import DataError
from neucore_plugin.retrieval import filters
from neucore_plugin.retrieval.qdrant_filters import condition

client = pytest.importorskip("qdrant_client")

ROWS = [
    {},
    *({"price": value} for value in (5, 5.0, 50.5, None, [], [1, 60], "5", True, -0.0, 2**60, 2**60 + 1, [None])),
    *({"tags": value} for value in (["red", "blue"], "redish", "Red", ["redish"], [], "red", [True], [1])),
    *({"sale": value} for value in (True, 1, False, None)),
    {"shop": {"city": "Rome"}},
    {"shop": [{"city": "Rome"}]},
    {"unit price": 3},
    {"a.b": 1},
    {"name": "x"},
    {"tags": ["red"], "price": 7},
]
FILTERS = [
    *(f"price {sign} 5" for sign in ("==", "!=", "<", "<=", ">", ">=")),
    *("not price < 50", "price == null", "price != null", 'price == "5"', "price == true", "3 < price < 55"),
    *('price in (5, 60, "5", null)', "price in ()", f"price == {2**60}", "price == 0", "1 in price", "price == 5.5"),
    *('"red" in tags', 'not ("red" in tags)', '"red" not in tags', 'tags == "red"', 'tags != "red"', "tags == null"),
    *("tags != null", "true in tags", "sale", "not sale", "sale == 1", "sale == false", 'shop.city == "Rome"'),
    *('attributes["unit price"] > 2', 'attributes["a.b"] == 1', 'attributes["name"] == "x"', 'name == "n3"'),
    *('name in ("n1", "n2") or price == 5', '"n1" in name', '"p/" in path and price != null', '"N1" in name'),
]


@pytest.fixture(scope="module")
def server():
    found, models = client.QdrantClient(":memory:"), client.models
    found.create_collection("x", models.VectorParams(size=1, distance=models.Distance.DOT))
    payloads = [{"name": f"n{n}", "path": f"p/n{n}.jpg", "attributes": row} for n, row in enumerate(ROWS)]
    found.upsert("x", models.Batch(ids=list(range(len(ROWS))), vectors=[[1.0]] * len(ROWS), payloads=payloads))
    return found


@pytest.mark.parametrize("text", FILTERS)
def test_qdrant_passes_the_same_pictures(server, text):
    tree = filters.parse(text)
    passing = [n for n, row in enumerate(ROWS) if filters.matches(tree, f"n{n}", f"p/n{n}.jpg", row)]
    found = server.scroll("x", client.models.Filter(must=[condition(tree)]), limit=1000)[0]
    assert sorted(point.id for point in found) == passing


@pytest.mark.parametrize(("text", "said"), [('name < "m"', "has no order of texts"), ("price < 1e999", "is too large")])
def test_what_qdrant_does_not_know_is_refused(text, said):
    with pytest.raises(DataError, match=said):
        condition(filters.parse(text))
