"""An authors' checkpoint and vocabulary become one of our checkpoints, and nothing in them runs."""

import argparse
import collections
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
from places import REAL, needs_real
from released_reference import ENGINE
from released_weights import CONCEPTS, OPT, WORDS, converted, tensors
from torchvision import models as zoo

import neucore_plugin
from neucore_plugin.common.errors import CheckpointError, ConfigError, DataError
from neucore_plugin.concepts import ConceptVocabulary, ReleasedConceptExtractor
from neucore_plugin.models.backbones.resnet_gru import released_classes, word_list
from neucore_plugin.released import convert, names, vocabulary
from neucore_plugin.released.captions import training_captions
from neucore_plugin.released.vocabulary import read_vocabulary
from neucore_plugin.weights import checkpoint


@pytest.fixture
def theirs(tmp_path):
    """An authors' file as training writes it, and captions that give its words."""
    torch.save({"args": argparse.Namespace(**OPT), "state_dict": tensors()}, tmp_path / "theirs.pth")
    texts = {"a.jpg": "red blue dress", "e.jpg": "unseen", "b.jpg": "longer; make it", "c.jpg": "SLEEVE"}
    entries = [{"ImageName": name, "ReferenceImageName": "d.jpg", "RelativeCaption": x} for name, x in texts.items()]
    (tmp_path / "cap.json").write_text(json.dumps(entries))
    (tmp_path / "train_im_names.txt").write_text("b.jpg\na.jpg\nc.jpg\nd.jpg\n")
    return tmp_path / "theirs.pth"


def test_a_file_becomes_a_checkpoint_of_its_own(theirs, tmp_path):
    captions = [tmp_path / "cap.json"]
    ConceptVocabulary(CONCEPTS).to_json(tmp_path / "concepts.json")
    done = convert.convert(theirs, tmp_path / "o.pth", captions, concepts=tmp_path / "concepts.json")
    lines = "\n".join(convert.report(done, "o.pth"))
    for part in (
        "official_shoes",
        "5 instruction types, depth 3, layers 2",
        "12 words, 3 concept classes",
        "encoder.head",
    ):
        assert part in lines
    assert "Attention_IS.attention.*.weight (2)" in lines
    for file in [theirs, *captions, tmp_path / "concepts.json"]:
        file.unlink()
    model = neucore_plugin.load_model(tmp_path / "o.pth")
    assert model.vocabulary.words == CONCEPTS and model.backbone.text.words == tuple(WORDS)
    state = done.model.state_dict()
    assert all(torch.equal(value, state[name].to(value)) for name, value in model.state_dict().items())


def test_concepts_come_from_the_captions_where_nothing_else_is_given(theirs, tmp_path):
    """The distinct rows of their lemmas, in order; of lemmas that are no words `<unk>`: "be" of "isnt" is none here."""
    done = convert.convert(theirs, tmp_path / "o.pth", [tmp_path / "cap.json"])
    words = done.model.vocabulary.words
    assert {"dress", "red", "<unk>"} <= set(words) and "SLEEVE" not in words and "sleeve" not in words
    assert list(words) == sorted(words, key=WORDS.index)


def test_a_vocabulary_alone_is_enough(theirs, tmp_path):
    """It searches; it is not trained before its concept classes are known."""
    (tmp_path / "v.json").write_text(json.dumps(WORDS))
    done = convert.convert(theirs, tmp_path / "o.pth", vocabulary=tmp_path / "v.json")
    assert "no concept classes: it searches" in "\n".join(convert.report(done, "o.pth"))
    model = neucore_plugin.load_model(tmp_path / "o.pth")
    assert model.encode_query(torch.zeros(1, 6, 7, 7), ["make it red"])["fused"].shape == (1, 8)
    with pytest.raises(ConfigError, match="without a concept vocabulary cannot be trained"):
        model({})
    both = convert.convert(theirs, tmp_path / "o.pth", [tmp_path / "cap.json"], tmp_path / "v.json")
    assert "dress" in both.model.vocabulary.words


def test_the_command(theirs, tmp_path, capsys):
    command = importlib.import_module("neucore_plugin.commands.convert")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    files = ["--captions", str(tmp_path / "cap.json"), str(tmp_path / "train_im_names.txt")]
    command.run(parser.parse_args([str(theirs), "--out", str(tmp_path / "o.pth"), *files]))
    assert "official_shoes, width 8, images: features" in capsys.readouterr().out
    (tmp_path / "s.json").write_text("[1]")
    with pytest.raises(DataError, match="s.json: expected a JSON object, given list; give the authors' settings"):
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
            read(path)

    state = tensors()
    refused({"state_dict": state, "x": Hostile()}, "is refused: it contains code that would run .*system")
    refused(pickle.dumps(Hostile()), "refused|damaged")
    assert not (tmp_path / "HARMED").exists()
    refused(theirs.read_bytes()[:3000], "truncated, damaged, or no file of weights .3,000 bytes")
    refused(b"", "truncated, damaged, or no file of weights .0 bytes")
    refused([1, 2], "holds a list")
    refused({"epoch": 3}, "holds no weights, .*; it holds the keys epoch")
    refused({"layer.weight": torch.zeros(2)}, "no checkpoint of the released NEUCORE: txt_enc.embed.weight is absent")
    refused({"state_dict": state}, "does not say which data set .* give the model type: official_cirr")
    refused({"format": checkpoint.FORMAT}, "a checkpoint of ours already")
    lacking = {name: value for name, value in state.items() if name != "Transform_m.0.bias"}
    refused({"state_dict": lacking, "opt": OPT}, "missing in the file: matching.transform.bias")
    refused({"state_dict": {**state, "temperature": torch.tensor([np.nan])}, "opt": OPT}, "hold NaN .* temperature")
    lstm = torch.zeros(16, 4)
    refused({"state_dict": {**state, "txt_enc.sent_enc.weight_hh_l0": lstm}, "opt": OPT}, "no GRU: .*16, 4")
    with pytest.raises(CheckpointError, match="no file .*none.pth"):
        convert.load_released(tmp_path / "none.pth")


def read(path):
    return converted(*convert.load_released(path))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("txt_enc.embed.weight", torch.zeros(5), "txt_enc.embed.weight has 1 axes, not 2"),
        ("txt_enc.sent_enc.weight_hh_l0", torch.zeros(5), "weight_hh_l0 has 1 axes, not 2"),
        ("img_enc.proj.weight", torch.zeros(5), "img_enc.proj.weight has 1 axes, not 4"),
        ("temperature", torch.zeros(2), "temperature has 2 numbers, not 1"),
        (
            "Transform_m.0.weight",
            torch.eye(8).to_sparse(),
            "1 sparse or quantised weights, such as Transform_m.0.weight",
        ),
        ("Transform_m.0.weight", torch.zeros(()), r"other shape: matching.transform.weight \[\]"),
    ],
)
def test_weights_of_another_form(tmp_path, name, value, match):
    torch.save({"opt": OPT, "state_dict": {**tensors(), name: value}}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=match):
        read(tmp_path / "bad.pth")


def test_settings_that_are_no_numbers():
    def refused(error, match, **settings):
        with pytest.raises(error, match=match):
            converted(settings={**OPT, **settings})

    for name in ("concept_heads", "module_heads"):
        for value in ("abc", 0, -2, 2.5, True, [2]):
            refused(ConfigError, f"the setting {name} is .*a whole number of at least 1", **{name: value})
    refused(CheckpointError, "the width 8 is no multiple of 3 concept_heads", concept_heads=3)
    refused(CheckpointError, "width 6 is no multiple of 4 heads", module_heads=4)


def test_a_scalar_temperature_none_and_numpy_scalars_beside_the_weights(tmp_path):
    state = {**tensors(), "temperature": torch.tensor(1.3)}
    extra = {"best": np.float64(41.5), "epoch": np.int64(3), "done": np.bool_(True), "rate": np.float32(0.1)}
    torch.save({"opt": OPT, "state_dict": state, **extra}, tmp_path / "theirs.pth")
    assert read(tmp_path / "theirs.pth").model.matching.temperature.tolist() == pytest.approx([1.3])
    del state["temperature"]
    with pytest.raises(ConfigError, match="the setting temperature is 'warm'; a finite number"):
        converted(state, {**OPT, "temperature": "warm"})
    done = converted(state, {**OPT, "temperature": 2})
    assert done.model.matching.temperature.tolist() == [2] and done.notes == [
        "temperature: absent in the file, set to 2"
    ]
    torch.save({"opt": OPT, "state_dict": state, "x": np.array(["text"], dtype=object)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="code that would run on loading, or a type that is unknown here .*numpy"):
        read(tmp_path / "odd.pth")


def test_heads_that_the_file_does_not_tell_are_reported(tmp_path):
    given = {key: value for key, value in OPT.items() if key != "concept_heads"}
    done = converted(settings=given)
    lines = convert.report(done, "o.pth")
    assert "concept_heads 8: not in the file's settings but taken from official_shoes" in "\n".join(lines)
    assert not any("module_heads" in line for line in lines)
    assert not converted().notes


def test_a_place_that_cannot_be_written(theirs, tmp_path):
    files = [tmp_path / "cap.json"]
    ConceptVocabulary(CONCEPTS).to_json(tmp_path / "concepts.json")
    for output, match in ((tmp_path, "is a folder; give the file"), (theirs / "o.pth", "cannot be written: ")):
        with pytest.raises(ConfigError, match=match):
            convert.convert(theirs, output, files, concepts=tmp_path / "concepts.json")


def test_errors_of_a_cnn_name_its_file(theirs, tmp_path):
    resnet = zoo.resnet18(weights=None).state_dict()

    def refused(content, match):
        torch.save(content, tmp_path / "cnn.pth")
        with pytest.raises(CheckpointError, match=match):
            convert.convert(theirs, tmp_path / "o.pth", [tmp_path / "cap.json"], cnn=tmp_path / "cnn.pth")

    refused({"layer.weight": torch.zeros(2)}, "the CNN .*cnn.pth is not torchvision's state dict of one of resnet18")
    refused(resnet, "the CNN .*cnn.pth is a resnet18 with 512 channels; the checkpoint was trained on 6")
    refused({"epoch": 1}, "cnn.pth holds no weights, a mapping")
    torch.save({"opt": OPT, "state_dict": tensors(width=512)}, theirs)
    refused({**resnet, "bn1.bias": torch.full((64,), np.nan)}, "the CNN .*cnn.pth: 1 weights hold NaN")
    with pytest.raises(CheckpointError, match="no file .*none.pth; give torchvision's state dict"):
        convert.convert(theirs, tmp_path / "o.pth", [tmp_path / "cap.json"], cnn=tmp_path / "none.pth")


def test_words_that_do_not_belong_to_the_embedding(theirs, tmp_path):
    for words in (WORDS[:-1], ["<start>", "<pad>", *WORDS[2:]]):
        with pytest.raises(CheckpointError, match="word vocabulary does not belong .* the embedding has 12 rows"):
            converted(words=words)
    with pytest.raises(ConfigError, match=r"give --captions \(relative_captions_shoes.json, .* or --vocabulary"):
        convert.convert(theirs, tmp_path / "o.pth")
    (tmp_path / "train_im_names.txt").write_text("a.jpg\nd.jpg\n")
    with pytest.raises(CheckpointError, match="it has 8 words .* 12 rows, .*relative_captions_shoes.json, with"):
        convert.convert(theirs, tmp_path / "o.pth", [tmp_path / "cap.json"])
    assert not (tmp_path / "o.pth").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_vocabularys_come_in_as_plain_data(tmp_path, protocol, monkeypatch):
    module = types.ModuleType("their_vocab")
    kind = type("Vocabulary", (), {"__module__": "their_vocab"})
    module.Vocabulary = kind
    monkeypatch.setitem(sys.modules, "their_vocab", module)
    value = kind()
    value.word2idx = {word: row for row, word in enumerate(WORDS)}
    value.idx2word, value.idx = dict(enumerate(WORDS)), len(WORDS)
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(value, protocol))
    monkeypatch.delitem(sys.modules, "their_vocab")  # it is read without their code
    assert read_vocabulary(tmp_path / "v.pkl") == WORDS
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({word: row for row, word in enumerate(WORDS)}, protocol))
    assert read_vocabulary(tmp_path / "d.pkl") == WORDS


def test_vocabularies_as_json(tmp_path):
    path = tmp_path / "v.json"
    rows = {word: row for row, word in enumerate(WORDS)}
    for content in (WORDS, dict(sorted(rows.items())), {"idx": 12, "word2idx": rows}):
        path.write_text(json.dumps(content))
        assert read_vocabulary(path) == WORDS
    for content, match in (
        ([], "holds no table of words"),
        (["a", 3], "does not map words to the rows 0 to 1"),
        (["a", "b", "a"], "does not map words to the rows"),
        ({"a": 0, "b": True}, "does not map words to the rows"),
        ({"a": 0, "b": 1.0}, "does not map words to the rows"),
        ("a", "holds no table of words"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=match):
            read_vocabulary(path)


def test_vocabularys_that_are_refused(tmp_path, monkeypatch):
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
        (b"\x80\x02}r\xff\xff\xff\x7f.", "refused: it numbers its parts beyond its own size"),
        (b"\x80\x02)" + b"2\x86" * 60 + b"K\x00}" + b".", "refused: it nests tuples"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=match):
            read_vocabulary(path)
    assert not (tmp_path / "HARMED").exists()
    with pytest.raises(DataError, match="cannot read the vocabulary"):
        read_vocabulary(tmp_path / "none.pkl")


@pytest.mark.parametrize(
    "named",
    [("collections", "Counter"), ("copyreg", "_reconstructor"), ("their_vocab", "Vocabulary"), ("builtins", "dict")],
)
def test_a_pickle_cannot_change_a_class(tmp_path, named):
    """BUILD sets attributes of what it is handed: handed Counter itself, it would change it for the whole process."""
    path = tmp_path / "v.pkl"
    path.write_bytes("\x80\x02c{}\n{}\n(N}}X\x0b\x00\x00\x00most_commonK\x05stb.".format(*named).encode("latin-1"))
    with pytest.raises(DataError, match="is no pickled vocabulary"):
        read_vocabulary(path)
    assert collections.Counter("aab").most_common(1) == [("a", 2)]
    held = [vocabulary.Record, vocabulary._Table, vocabulary._Reconstructed]
    assert not any(hasattr(kind, "most_common") for kind in held)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_tables_of_collections_are_read(tmp_path, protocol):
    rows = {word: row for row, word in enumerate(WORDS)}
    filled = collections.defaultdict(int, rows)
    for table in (collections.OrderedDict(rows), collections.Counter(rows), filled):
        (tmp_path / "v.pkl").write_bytes(pickle.dumps({"word2idx": table}, protocol))
        assert read_vocabulary(tmp_path / "v.pkl") == WORDS


FASHION = {  # by category: first and second captions of its pairs
    "toptee": [("is red", "has b sleeves")],
    "dress": [("is (very) long", "new"), ("", "it's blue")],
    "shirt": [("is red", "3/4 wide")],
}


def captions(tmp_path, model_type, contents):
    paths = []
    for name, content in contents.items():
        paths.append(tmp_path / name)
        paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
    return training_captions(paths, model_type)


def test_captions_come_in_the_released_order(tmp_path):
    """FashionIQ: whatever the order of the files, category by category, all first captions before all second ones."""
    files = {f"cap.{c}.train.json": [{"captions": pair} for pair in pairs] for c, pairs in FASHION.items()}
    expected = ["is (very) long", "", "new", "it's blue", "is red", "3/4 wide", "is red", "has b sleeves"]
    assert captions(tmp_path, "official_fashioniq", files) == expected
    texts = ["b  a", "c"]
    assert captions(tmp_path, "official_cirr", {"any.json": [{"caption": text} for text in texts]}) == texts


@needs_real("official", "vocabulary_shoes.json")
def test_the_real_captions_of_shoes_give_the_released_rows():
    expected = json.loads((REAL / "official" / "vocabulary_shoes.json").read_text(encoding="utf-8"))
    texts = training_captions([REAL / "shoes" / "relative_captions_shoes.json"], "official_shoes")
    words = word_list(texts, rule="released")
    assert len(texts) == 8990 and words == expected
    found = ReleasedConceptExtractor(("NOUN", "VERB", "ADJ", "ADV"))(texts)
    assert len(released_classes(words, (lemma for lemmas in found for lemma in lemmas))) == 884


SHOES = [{"ImageName": "a", "RelativeCaption": "x"}]


@pytest.mark.parametrize(
    ("model_type", "contents", "match"),
    [
        ("official_cirr", {"c.json": "{}"}, "expected a JSON list"),
        ("official_cirr", {"c.json": "[]"}, "c.json holds no caption"),
        ("official_cirr", {"c.json": ["a text"]}, "entry 0 has no 'caption'.* takes cap.rc2.train.json"),
        ("official_cirr", {"c.json": [{"caption": "x"}], "d.json": [{"caption": "x"}]}, "2 files are given"),
        ("official_cirr", {"c.json": SHOES}, "entry 0 has no 'caption'"),
        ("official_shoes", {"c.json": SHOES}, "train_im_names.txt is missing: it says which"),
        ("official_shoes", {"c.json": SHOES, "n.txt": "b\n"}, "n.txt names no image of .*c.json"),
        ("official_shoes", {"c.json": SHOES, "d.json": SHOES, "n.txt": "a"}, "2 files of captions and 1 lists"),
        ("official_fashioniq", {"cap.dress.train.json": [{"captions": ["a", "b"]}]}, "of shirt and toptee is missing"),
        ("official_fashioniq", {"cap.dress.val.json": [{"captions": ["a", "b"]}]}, "no further category's training"),
        ("official_fashioniq", {"captions.json": [{"captions": ["a", "b"]}]}, "no further category's training"),
        ("official_fashioniq", {f"cap.{c}.train.json": [{"captions": ["a"]}] for c in FASHION}, "has not two captions"),
    ],
)
def test_captions_that_are_not_those_of_the_training(tmp_path, model_type, contents, match):
    with pytest.raises(DataError, match=match):
        captions(tmp_path, model_type, contents)


def test_names_that_nothing_uses_are_listed_in_groups():
    assert names.grouped(["a.0.c", "a.12.c", "e"]) == ["a.*.c (2)", "e"]
    for name in ("something.else", "program_engine.out_proj.model.x.fc.weight", f"{ENGINE}executors.layer0.x"):
        assert names.renamed(name) is None
    for rest in ("module.layers.0", "params_generator.model.0.fc.fc.weight", "module.layers.a.0.fn.to_qkv.weight"):
        assert names.renamed(f"{ENGINE}executors.layer0.instruction_type0.{rest}") is None


def test_a_pickle_of_tuples_in_tuples_takes_no_time(tmp_path):
    """As a key of a table, each holding the one before twice: 2^40 parts to be hashed."""
    (tmp_path / "v.pkl").write_bytes(b"\x80\x02})" + b"2\x86" * 40 + b"K\x00s.")
    with pytest.raises(DataError, match="is no pickled vocabulary: refused: it nests tuples"):
        read_vocabulary(tmp_path / "v.pkl")
