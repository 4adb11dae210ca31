"""An authors' checkpoint and vocabulary become one of our checkpoints, and nothing in them runs."""

import argparse
import importlib
import json
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import neucore_plugin

neucore_plugin.register()

import released_reference as slow  # noqa: E402

from neucore_plugin import checkpoint, convert, released  # noqa: E402
from neucore_plugin.concepts import ConceptVocabulary  # noqa: E402
from neucore_plugin.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from neucore_plugin.models.backbones.resnet_gru import SPECIALS  # noqa: E402
from neucore_plugin.vocabulary_pickle import read_vocabulary_pickle  # noqa: E402

WORDS = [*SPECIALS, "red", "blue", "dress", "longer", "make", "it", "sleeve"]
CONCEPTS = ("red", "dress", "sleeve")
OPT = {"data_name": "shoes", "concept_heads": 2, "module_heads": 2, "module_dim_head": 3, "embed_dim": 8}


def tensors(width=6):
    w = slow.random_weights(4, len(WORDS), 5, 8, width, depth=2, types=5, layers=2, module_depth=3, heads=2, head_dim=3)
    return {name: torch.from_numpy(value) for name, value in w.items()}


@pytest.fixture
def theirs(tmp_path):
    """An authors' file as training writes it, and captions that give its words."""
    torch.save({"args": argparse.Namespace(**OPT), "state_dict": tensors()}, tmp_path / "theirs.pth")
    (tmp_path / "cap.json").write_text(json.dumps([{"captions": ["red blue dress", "longer"]}, {"caption": "make it"}]))
    (tmp_path / "rest.json").write_text(json.dumps([{"RelativeCaption": "SLEEVE"}]))
    return tmp_path / "theirs.pth"


def test_a_file_becomes_a_checkpoint_of_its_own(theirs, tmp_path):
    captions = [tmp_path / "cap.json", tmp_path / "rest.json"]
    ConceptVocabulary(CONCEPTS).to_json(tmp_path / "concepts.json")
    done = convert.convert(theirs, tmp_path / "o.pth", captions, concepts=tmp_path / "concepts.json")
    lines = "\n".join(convert.report(done, "o.pth"))
    for part in (
        "official_shoes",
        "5 instruction types, depth 3, layers 2",
        "12 words, 3 concepts (0 of",
        "encoder.head",
    ):
        assert part in lines
    assert "Attention_IS.attention.*.weight (2)" in lines and "only their number could be checked" in lines
    for file in [theirs, *captions, tmp_path / "concepts.json"]:
        file.unlink()
    model = neucore_plugin.load_model(tmp_path / "o.pth")
    assert model.vocabulary.words == CONCEPTS and model.backbone.text.words == tuple(WORDS)
    state = done.model.state_dict()
    assert all(torch.equal(value, state[name].to(value)) for name, value in model.state_dict().items())


def test_concepts_come_from_the_captions_where_nothing_else_is_given(theirs, tmp_path):
    done = convert.convert(theirs, tmp_path / "o.pth", [tmp_path / "cap.json", tmp_path / "rest.json"])
    assert {"dress", "red"} <= set(done.model.vocabulary.words)


def test_the_command(theirs, tmp_path, capsys):
    command = importlib.import_module("neucore_plugin.commands.convert")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    files = ["--captions", str(tmp_path / "cap.json"), str(tmp_path / "rest.json")]
    command.run(parser.parse_args([str(theirs), "--out", str(tmp_path / "o.pth"), *files]))
    assert "official_shoes, width 8, images: features" in capsys.readouterr().out
    (tmp_path / "s.json").write_text("[1]")
    with pytest.raises(ConfigError, match="expected an object of names and values"):
        command.run(parser.parse_args([str(theirs), "--out", "x", "--settings", str(tmp_path / "s.json")]))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch HARMED",)


def test_files_that_are_refused(theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(content, match):
        path = tmp_path / "bad.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(CheckpointError, match=match):
            convert.convert_state(*convert.load_released(path), WORDS, ConceptVocabulary(CONCEPTS))

    state = tensors()
    refused({"state_dict": state, "x": Hostile()}, "is refused: it holds more than weights")
    refused(pickle.dumps(Hostile()), "refused|damaged")
    assert not (tmp_path / "HARMED").exists()
    refused(theirs.read_bytes()[:3000], "truncated, damaged, or no checkpoint at all .3000 bytes")
    refused(b"", "truncated, damaged, or no checkpoint at all .0 bytes")
    refused([1, 2], "holds a list")
    refused({"epoch": 3}, "holds no weights; it has the keys epoch")
    refused({"layer.weight": torch.zeros(2)}, "no checkpoint of the released NEUCORE: txt_enc.embed.weight is absent")
    refused({"state_dict": state}, "does not say which data set .* give the model type: official_cirr")
    refused({"format": checkpoint.FORMAT}, "a checkpoint of ours already")
    lacking = {name: value for name, value in state.items() if name != "Transform_m.0.bias"}
    refused({"state_dict": lacking, "opt": OPT}, "missing: matching.transform.bias")
    refused({"state_dict": {**state, "temperature": torch.tensor([np.nan])}, "opt": OPT}, "hold NaN .* temperature")
    lstm = torch.zeros(16, 4)
    refused({"state_dict": {**state, "txt_enc.sent_enc.weight_hh_l0": lstm}, "opt": OPT}, "no GRU: .*16, 4")
    with pytest.raises(CheckpointError, match="no file .*none.pth"):
        convert.load_released(tmp_path / "none.pth")


def test_words_that_do_not_belong_to_the_embedding(theirs, tmp_path):
    for words in (WORDS[:-1], ["<start>", "<pad>", *WORDS[2:]]):
        with pytest.raises(CheckpointError, match="word vocabulary does not belong .* the embedding has 12 rows"):
            convert.convert_state(tensors(), OPT, words, ConceptVocabulary(CONCEPTS))
    with pytest.raises(DataError, match="give the training captions, or the vocabulary pickle"):
        convert.convert(theirs, tmp_path / "o.pth")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_vocabulary_pickles_come_in_as_plain_data(tmp_path, protocol, monkeypatch):
    module = types.ModuleType("their_vocab")
    kind = type("Vocabulary", (), {"__module__": "their_vocab"})
    module.Vocabulary = kind
    monkeypatch.setitem(sys.modules, "their_vocab", module)
    value = kind()
    value.word2idx = {word: row for row, word in enumerate(WORDS)}
    value.idx2word, value.idx, value.nouns = dict(enumerate(WORDS)), len(WORDS), {"sleeve", "red"}
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(value, protocol))
    monkeypatch.delitem(sys.modules, "their_vocab")  # it is read without their code
    assert read_vocabulary_pickle(tmp_path / "v.pkl") == (WORDS, ["red", "sleeve"])
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({word: row for row, word in enumerate(WORDS)}, protocol))
    assert read_vocabulary_pickle(tmp_path / "d.pkl") == (WORDS, None)


def test_vocabulary_pickles_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "v.pkl"
    for content, match in (
        (pickle.dumps(Hostile()), r"refused: it asks for (posix|nt)\.system, which no vocabulary needs"),
        (pickle.dumps({"word2idx": subprocess.Popen}), "refused: it asks for subprocess.Popen"),
        (pickle.dumps(eval), "refused: it asks for builtins.eval"),
        (b"cbuiltins\ngetattr\n.", "refused: it asks for builtins.getattr"),
        (pickle.dumps(WORDS), "holds no table of words"),
        (pickle.dumps({"a": 0, "b": 2}), "does not map words to the rows 0 to 1, each once"),
        (pickle.dumps({"a": 0, "b": 0}), "does not map words"),
        (pickle.dumps({"a": 0})[:-4], "is no pickled vocabulary"),
        (b"", "is no pickled vocabulary"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=match):
            read_vocabulary_pickle(path)
    assert not (tmp_path / "HARMED").exists()
    with pytest.raises(DataError, match="cannot read the vocabulary"):
        read_vocabulary_pickle(tmp_path / "none.pkl")


def test_captions_files_that_hold_none(tmp_path):
    for content in ("{}", "[]", '[{"text": "x"}]', "not json"):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(DataError, match="c.json"):
            convert.captions_of([tmp_path / "c.json"])


def test_names_that_nothing_uses_are_listed_in_groups():
    assert released.grouped(["a.0.c", "a.12.c", "e"]) == ["a.*.c (2)", "e"]
    assert released.renamed("something.else") is None
