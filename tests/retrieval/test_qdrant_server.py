"""Pushing an index to a Qdrant server: made equal to it, continued after a kill, refused where it is another's."""

import math
import socket
import sys

import pytest
import torch
from factor_model import D, FactorModel, random_index

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.retrieval import GalleryIndex, qdrant_server
from neucore_plugin.retrieval.encoding import Encoded
from neucore_plugin.retrieval.qdrant_server import Layout, QdrantCollection, point_id
from neucore_plugin.retrieval.queries import Query
from neucore_plugin.retrieval.rows import Row

client = pytest.importorskip("qdrant_client")


@pytest.fixture
def server():
    return client.QdrantClient(":memory:")


@pytest.fixture
def index(tmp_path):
    return random_index(tmp_path / "index", FactorModel(), count=60)


def push(index, server, name="pictures", layout=None):
    return qdrant_server.push(index, server, name, layout or Layout(), progress=False)


def add(index, *names):
    encodings = {key: torch.randn(len(names), D) for key in index.shapes}
    index._take(Encoded(encodings, [Row(name, name) for name in names], []))


def held(server, name="pictures"):
    points = server.scroll(name, limit=1000)[0]
    return sorted(str(point.payload["name"]) for point in points)


def test_a_push_makes_the_collection_equal_to_the_index(index, server):
    assert push(index, server) == (60, 60)
    assert push(index, server) == (0, 60)
    add(index, "new.jpg", "newer.jpg")
    assert push(index, server) == (2, 62)
    index.remove(["0003.jpg", "new.jpg"])
    assert push(index, server)[1] == 60
    assert held(server) == sorted(index.names)
    index.remove(["newer.jpg"])  # nothing is left of its unit
    add(index, "0003.jpg")  # was in another unit before
    push(index, server)
    assert held(server) == sorted(index.names)
    again = random_index(index.folder.parent / "rebuilt", index.model, count=50)
    assert push(again, server) == (50, 50)  # another index of the same pictures: their names keep their points
    assert held(server) == again.names
    assert server.retrieve("pictures", [point_id("0003.jpg")])[0].payload["attributes"] == again.attributes(3)


def test_units_of_the_same_name_are_sent_where_they_hold_something_else(index, server):
    push(index, server)
    again = random_index(index.folder.parent / "rebuilt", index.model, count=60, seed=1).folder
    for path in list((again / "units").iterdir()):  # as a build of pictures that changed names them
        path.rename(path.with_name(index.parts[0].unit + path.suffix))
    rebuilt = GalleryIndex.open(again, index.model)
    assert [part.unit for part in rebuilt.parts] == [part.unit for part in index.parts]
    assert push(rebuilt, server) == (60, 60) and push(rebuilt, server) == (0, 60)
    found = QdrantCollection(server, "pictures", index.model).search_many([Query(text="red")])[0]
    assert [hit.name for hit in found] == [hit.name for hit in rebuilt.search(text="red")]


@pytest.mark.parametrize("requests", [1, 2])
def test_a_push_that_was_cut_short_goes_on(index, server, monkeypatch, requests):
    for unit in range(3):
        add(index, *(f"unit{unit}-{row}.jpg" for row in range(10)))
    monkeypatch.setattr(qdrant_server, "BATCH", 40)
    upsert, done = server.upsert, []

    def cut(name, points, **more):
        if len(done) == requests:
            raise KeyboardInterrupt
        done.append(len(points.ids))
        return upsert(name, points, **more)

    monkeypatch.setattr(server, "upsert", cut)
    with pytest.raises(KeyboardInterrupt):
        push(index, server)
    assert len(held(server)) == sum(done)
    monkeypatch.setattr(server, "upsert", upsert)
    assert push(index, server)[0] == (90 if requests == 1 else 30)  # whole units are not sent again
    assert held(server) == sorted(index.names)


def test_collections_of_others_are_refused(index, server):
    with pytest.raises(DataError, match="has no collection 'pictures'; make it with `neucore index push`. It has none"):
        QdrantCollection(server, "pictures", index.model)
    models = client.models
    server.create_collection("theirs", models.VectorParams(size=3, distance=models.Distance.DOT))
    for refused in (lambda: push(index, server, "theirs"), lambda: QdrantCollection(server, "theirs", index.model)):
        with pytest.raises(DataError, match="'theirs' at the server was not made by `neucore index push`"):
            refused()
    push(index, server)
    with pytest.raises(DataError, match="was made by model factors-1, but the model given is factors-2"):
        QdrantCollection(server, "pictures", FactorModel(name="factors-2"))
    other = random_index(index.folder.parent / "other", FactorModel(name="factors-2"), count=30)
    with pytest.raises(DataError, match="was made by model factors-1, but the model given is factors-2"):
        push(other, server)
    elsewhere = random_index(index.folder.parent / "deeper" / "index", index.model, count=30)
    with pytest.raises(DataError, match="holds the pictures of .* choose another collection"):
        push(elsewhere, server)
    assert len(held(server)) == 60


def test_an_index_that_was_moved_is_still_the_same(index, server):
    push(index, server)
    manifest = index.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('/pictures"', '/moved"'))
    moved = GalleryIndex.open(index.folder, index.model)
    assert push(moved, server) == (0, 60)
    hit = QdrantCollection(server, "pictures", index.model).search_many([Query(text="red")])[0][0]
    assert hit.path == moved.root / hit.name
    assert moved.root.name == "moved"


def test_names_that_are_no_utf8(index, server):
    add(index, "half\udce9.jpg")
    push(index, server)
    collection = QdrantCollection(server, "pictures", index.model)
    hits = collection.search_many([Query(text="red", k=None)])[0]
    assert "half\udce9.jpg" in [hit.name for hit in hits]
    assert len(collection.search_many([Query(text="red", k=None, exclude=["half\udce9.jpg"])])[0]) == 60


def test_numbers_that_are_not_finite_are_refused(index, server):
    index.parts[0].arrays["bg"][50] = math.nan
    with pytest.raises(DataError, match="the gallery holds NaN or infinite numbers"):
        push(index, server)


def test_an_index_that_cannot_be_pushed(index, server):
    memory = GalleryIndex(["a"], ["a"], {"fg": torch.ones(1, 2)}, index.model)
    with pytest.raises(DataError, match="held in memory cannot be pushed; save it first"):
        push(memory, server)
    index.model = object()
    with pytest.raises(ConfigError, match="object does not say what its score is made of"):
        push(index, server)
    assert not server.get_collections().collections


def test_the_layout_is_what_was_asked_for(index, monkeypatch):
    asked = {}

    class Recorder(client.QdrantClient):
        def create_collection(self, name, **settings):
            asked.update(settings)
            return super().create_collection(name, **settings)

    push(index, Recorder(":memory:"), layout=Layout(6, 2, on_disk=True, quantization=True))
    vectors = asked["vectors_config"]
    assert (asked["shard_number"], asked["replication_factor"]) == (6, 2)
    assert {key: (value.size, value.on_disk) for key, value in vectors.items()} == {
        "nearest": (2 * D, True),
        "weighted": (D, True),
        "squares": (D, True),
    }
    assert vectors["nearest"].quantization_config.scalar.always_ram and vectors["nearest"].hnsw_config is None
    assert vectors["weighted"].quantization_config is None and vectors["weighted"].hnsw_config.m == 0


def test_attributes_are_indexed_by_their_kind(index, server, monkeypatch):
    made = []
    monkeypatch.setattr(
        server, "create_payload_index", lambda _, key, kind, **more: made.append((key, str(kind.value)))
    )
    push(index, server)
    assert made == [
        *(("unit", "keyword"), ("name", "keyword"), ("path", "keyword")),
        *(("attributes.price", "float"), ("attributes.category", "keyword"), ("attributes.tags", "keyword")),
    ]


def test_a_server_that_does_not_answer(index):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(DataError, match=rf"Qdrant at {url} does not answer \(.*refused.*\); is the server running"):
        QdrantCollection.connect(url, "pictures", index.model)
    nobody = qdrant_server.connect(url)
    with pytest.raises(DataError, match=f"Qdrant at {url} does not answer"):
        qdrant_server.push(index, nobody, "pictures", Layout(), url, progress=False)


@pytest.mark.parametrize("url", ["somewhere", ":memory:", "ftp://host", ""])
def test_no_address(url):
    with pytest.raises(ConfigError, match="give the server's address, such as http://127.0.0.1:6333"):
        qdrant_server.connect(url)


@pytest.mark.parametrize(("status", "said"), [(401, "set QDRANT_API_KEY to its key"), (500, "refused: 500 broken")])
def test_what_the_server_refuses_is_told(index, status, said, monkeypatch):
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    keys = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            keys.append(self.headers.get("api-key"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"broken")

        def log_message(self, *_):
            pass

    monkeypatch.setenv("QDRANT_API_KEY", "secret-key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(DataError, match=said) as raised, pytest.warns(UserWarning, match="insecure"):
            QdrantCollection.connect(f"http://127.0.0.1:{server.server_port}", "pictures", index.model)
    finally:
        server.shutdown()
        server.server_close()
    assert keys == ["secret-key"] and "secret-key" not in str(raised.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'neucore-plugin\[qdrant\]'"):
        qdrant_server.connect("http://127.0.0.1:6333")
