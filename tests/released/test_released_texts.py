"""The released form from raw captions: words, vocabularies, concepts, and the scores of whole queries.

Cases of the released code and real captions are no part of the project: NEUCORE_TEST_DATA names their folder.
"""

import json

import numpy as np
import pytest
import torch
from places import REAL, needs_real

import neucore_plugin
from neucore_plugin.common.text import released_words
from neucore_plugin.released.convert import convert

CASE = REAL / "official" / "e2e_cirr"


@needs_real("official", "words.json")
def test_words_of_every_recorded_caption():
    cases = json.loads((REAL / "official" / "words.json").read_text(encoding="utf-8"))
    assert len(cases) > 200
    for case in cases:
        assert released_words(case["caption"]) == case["words"], case


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Has 3/4-length sleeves", "has length sleeves"),
        ("ﬁne ½ naïve\u00a0dress", "ne navedress"),
        ("is (very) short(er)", "is ( very ) short ( er )"),
        ("CANNOT do; cannots", "can not do cannots"),
        ("tab\tnew\nline  two", "tabnewline two"),
        ("is red <and> is  blue ", "is red <and> is blue"),
        (" <and> is blue", "<and> is blue"),
        ("is red <and> ", "is red <and>"),
        ("<and>", "<and>"),
        ("red<and>blue", "redandblue"),
        ("4,5%", ""),
    ],
)
def test_words_of_other_captions(text, words):
    assert released_words(text) == words.split()


@pytest.fixture(scope="module", params=["pickle", "captions", "json"])
def released(request, tmp_path_factory):
    """The case's checkpoint, converted with its words from each place that they may come from."""
    if not CASE.is_dir():
        pytest.skip(f"{CASE} is absent; NEUCORE_TEST_DATA names the folder of real data")
    folder = tmp_path_factory.mktemp("released")
    given = {"vocabulary": CASE / "cirr_vocab.pkl"}
    if request.param == "captions":
        given = {"captions": [CASE / "cap.rc2.train.json"]}
    elif request.param == "json":
        words = convert(CASE / "ckpt.pth", folder / "first.pth", **given).model.backbone.text.words
        (folder / "words.json").write_text(json.dumps(words))
        given = {"vocabulary": folder / "words.json"}
    convert(CASE / "ckpt.pth", folder / "model.pth", **given)
    return neucore_plugin.load_model(folder / "model.pth")


@torch.no_grad()
def test_scores_of_raw_captions(released):
    """One text at a time, and all at once: the released scores to 1e-6, every rank the same."""
    case, entries = np.load(CASE / "case.npz"), json.loads((CASE / "cap.rc2.train.json").read_text(encoding="utf-8"))
    maps, row = torch.from_numpy(case["maps"]), {name: row for row, name in enumerate(case["names"])}
    asked = {entry["pairid"]: entry for entry in entries}
    order = [asked[pair] for pair in case["pairids"]]
    texts, references = [one["caption"] for one in order], maps[[row[one["reference"]] for one in order]]
    targets = torch.tensor([row[one["target_hard"]] for one in order])
    gallery = released.encode_image(maps)

    def check(scores, expected):
        expected = torch.from_numpy(expected)
        assert (scores - expected).abs().max() < 1e-6
        ranks = [(of > of.gather(1, targets[:, None])).sum(1) for of in (scores, expected)]
        assert torch.equal(*ranks)

    alone = [released.encode_query(references[n : n + 1], texts[n : n + 1]) for n in range(len(texts))]
    check(torch.cat([released.score(query, gallery) for query in alone]), case["scores_batch1"])
    check(released.score(released.encode_query(references, texts), gallery), case["scores_batch1"])
    released.fusion.attend_padding = True
    try:
        scores = torch.empty(len(texts), len(maps))
        for rows in np.split(case["batches32"], case["batch_sizes32"].cumsum()[:-1]):
            query = released.encode_query(references[rows], [texts[n] for n in rows])
            scores[rows] = released.score(query, gallery)
        check(scores, case["scores_batch32"])
    finally:
        released.fusion.attend_padding = False
