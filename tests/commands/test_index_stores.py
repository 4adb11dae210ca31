"""neucore index accelerate and push, and the searches that use what they made."""

import json

import pytest
from factor_model import FactorModel, random_index

from neucore_plugin import cli
from neucore_plugin.retrieval import qdrant_edge, qdrant_server, recall

client = pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")
URL = "http://127.0.0.1:6333"


@pytest.fixture
def index(tmp_path):
    return random_index(tmp_path / "index", FactorModel(), count=300).folder


@pytest.fixture
def neucore(monkeypatch, capsys):
    """Runs a command: (exit code, output, errors). The server is the client's own memory."""
    server = client.QdrantClient(":memory:")
    monkeypatch.setattr("neucore_plugin.retrieval.qdrant_server.connect", lambda url: server)
    monkeypatch.setattr("neucore_plugin.load_model", lambda *_, **__: FactorModel())

    def run(*arguments):
        code = cli.main([*map(str, arguments), "--model-type", "zeroshot_x"])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_an_index_is_accelerated_verified_and_searched(index, neucore, tmp_path, monkeypatch):
    code, out, err = neucore("index", "accelerate", index)
    assert code == 0 and "300 images put into the first stage; 300 images in all" in out
    assert "100.0 % are among its candidates" in out and "from 100,000 images on" in out and "first stage" in err
    code, out, _ = neucore("index", "accelerate", index)
    assert code == 0 and "0 images put into the first stage" in out
    (tmp_path / "asked.json").write_text(json.dumps([{"text": "red"}, {"image": None, "text": "blue"}]))
    code, out, _ = neucore("index", "verify", index, "--queries", tmp_path / "asked.json", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["recall"] == {"made": 1.0, "asked": 1.0}
    assert "100.0 % (made queries)" in neucore("index", "verify", index)[1]
    monkeypatch.setattr(recall, "CANDIDATES", 5)
    code, out, _ = neucore("index", "verify", index, "--json")
    assert json.loads(out)["recall"]["made"] <= 0.1
    for constant, value in (("WORTH_FROM", 0), ("EXACT_ROWS", 20), ("CANDIDATES", 60)):
        monkeypatch.setattr(qdrant_edge, constant, value)
    nearest, asked = qdrant_edge.EdgeCache.nearest, []
    monkeypatch.setattr(qdrant_edge.EdgeCache, "nearest", lambda *given: asked.append(given) or nearest(*given))
    _, through, _ = neucore("search", index, "--text", "red")
    assert len(asked) == 1
    assert neucore("search", index, "--text", "red", "--exact")[1] == through
    assert len(asked) == 1
    damaged = max((index / "nearest").rglob("*"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, out, _ = neucore("index", "verify", index)
    assert code == 1 and "is not the file that was written" in out
    assert neucore("search", index, "--text", "red")[1] == through


def test_verify_measures_the_first_stage_with_the_model_that_the_index_notes(index, neucore, tmp_path, capsys):
    assert neucore("index", "accelerate", index)[0] == 0
    assert cli.main(["index", "verify", str(index)]) == 0  # it notes none
    out, err = capsys.readouterr()
    assert "all as it was written" in out and "recall" not in out and "was not measured" in err
    manifest = json.loads((index / "manifest.json").read_text())
    (tmp_path / "best.pth").touch()
    (index / "manifest.json").write_text(json.dumps({**manifest, "checkpoint": str(tmp_path / "best.pth")}))
    assert cli.main(["index", "verify", str(index)]) == 0
    assert "100.0 % (made queries)" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['[{"picture": "x"}]', "[1]", '[{"text": 3}]', "{}", "["])
def test_a_file_of_queries_that_is_none(index, neucore, tmp_path, content):
    (tmp_path / "asked.json").write_text(content)
    code, _, err = neucore("index", "verify", index, "--queries", tmp_path / "asked.json")
    assert code == 2 and "asked.json" in err and len(err.strip().splitlines()) == 1


def test_an_index_is_pushed_and_searched_in_the_server(index, neucore):
    at = ["--qdrant", URL, "--collection", "photos"]
    code, out, err = neucore("index", "push", index, *at)
    assert code == 0 and "photos: 300 images written, 300 there" in out and "to photos" in err
    code, out, _ = neucore("index", "push", index, *at)
    assert code == 0 and "photos: 0 images written, 300 there" in out
    query = [
        "--text",
        "red",
        "--filter",
        'category == "dress" and price < 100',
        "--exclude",
        "0004.jpg",
        "--not",
        "blue",
    ]
    code, found, err = neucore("search", *at, *query)
    assert code == 0 and "searched 300 images" in err and len(found.splitlines()) == 10
    assert neucore("search", index, *query)[1] == found
    assert neucore("search", *at, *query, "--exact")[1] == found
    code, _, err = neucore("search", *at, "--text", "red", "--explain")
    assert code == 2 and "cannot be explained" in err
    code, _, err = neucore("search", "--qdrant", URL, "--collection", "other", "--text", "red")
    assert code == 2 and "has no collection 'other'" in err and "It has 'photos'" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--qdrant", URL], "--qdrant and --collection go together"),
        (["--collection", "x", "--folder", "."], "--qdrant and --collection go together"),
        (["--qdrant", URL, "--collection", "x", "--folder", "."], "--qdrant, INDEX or --folder? give one of them"),
    ],
)
def test_what_is_searched_must_be_said_once(neucore, arguments, said):
    code, _, err = neucore("search", *arguments, "--text", "red")
    assert code == 2 and said in err


def test_a_collection_needs_a_model_and_an_address(capsys):
    assert cli.main(["search", "--qdrant", URL, "--collection", "x", "--text", "red"]) == 2
    assert "does not hold its model; give --checkpoint" in capsys.readouterr().err
    where = ["--collection", "x", "--checkpoint", "best.pth"]
    assert cli.main(["search", "--qdrant", "somewhere", *where, "--text", "red"]) == 2
    assert "give the server's address" in capsys.readouterr().err
    assert cli.main(["index", "push", "nothing", "--qdrant", "somewhere", "--collection", "x"]) == 2
    assert "give the server's address" in capsys.readouterr().err


def test_the_layout_reaches_the_server(index, neucore, monkeypatch):
    asked = []
    monkeypatch.setattr(
        qdrant_server, "push", lambda index, server, name, layout, where: asked.append(layout) or (0, 0)
    )
    where = ["--qdrant", URL, "--collection", "x"]
    neucore("index", "push", index, *where, "--shards", 6, "--replicas", 2, "--on-disk", "--quantize")
    neucore("index", "push", index, *where)
    assert asked == [qdrant_server.Layout(6, 2, True, True), qdrant_server.Layout()]
