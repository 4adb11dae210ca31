"""neucore vocab: counts, rules and captions as they come."""

import json

import pytest

from neucore_plugin import cli
from neucore_plugin.concepts import ConceptExtractor, ConceptVocabulary

CAPTIONS = [
    "is red and has long sleeves",
    "the red dress is longer",
    "",
    "   ",
    "a dog\x00 sleeps\u200b on the\tgreen grass 😀",
    "red " * 4000,
    "???",
]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (root / "images" / name).write_bytes(b"never opened")
    entries = [{"reference": "a.png", "target": "b.png", "caption": caption or "-"} for caption in CAPTIONS]
    (root / "train.json").write_text(json.dumps(entries))
    return root


def ask(root, capsys, *more) -> dict:
    assert cli.main(["vocab", "folder", "--root", str(root), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts_and_the_file(root, capsys, tmp_path):
    found = ask(root, capsys, "--min-count", "2", "--out", str(tmp_path / "concepts.json"))
    assert found["captions"] == len(CAPTIONS) and found["most_frequent"]["red"] == 3
    vocabulary = ConceptVocabulary.from_json(tmp_path / "concepts.json")
    assert len(vocabulary) == found["concepts"] and vocabulary.fingerprint == found["fingerprint"]
    everything = ask(root, capsys, "--min-count", "1")
    assert {"dog", "grass", "green", "sleeve"} <= set(everything["most_frequent"]) and everything["lemmas"] > found[
        "concepts"
    ]
    nouns = ask(root, capsys, "--min-count", "1", "--pos", "NOUN")
    assert "dog" in nouns["most_frequent"] and "green" not in nouns["most_frequent"]


def test_the_second_time_nothing_is_parsed(root, capsys, monkeypatch):
    first = ask(root, capsys)
    monkeypatch.setattr(ConceptExtractor, "__call__", lambda *_, **__: pytest.fail("parsed again"))
    assert ask(root, capsys) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder"], "--root is needed"),
        (["cirr", "--root", "x", "--split", "dev"], "CIRR has no split 'dev'. Allowed: test1, train, val."),
        (["folder", "--root", "ROOT", "--pos", "NUON"], "Did you mean 'NOUN'"),
        (["folder", "--root", "ROOT", "--min-count", "0"], "min_count: got 0; allowed: a whole number of at least 1"),
    ],
)
def test_bad_arguments(root, capsys, arguments, message):
    assert cli.main(["vocab", *(str(root) if part == "ROOT" else part for part in arguments)]) == 2
    assert message in capsys.readouterr().err
