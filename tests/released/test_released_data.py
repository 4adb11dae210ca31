"""The released form in whole runs: what data sets ask, CIRR's feature maps, checkpoints older than its rules."""

import json
import pickle

import numpy as np
import pytest
import torch
from encoder_case import encoder
from places import PROJECTS, REAL, needs_real
from published_case import edit, write_cirr_to_train_on, write_fashioniq
from released_weights import CONCEPTS, WORDS, converted, tensors

from neucore_plugin import launch
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.concepts import ConceptExtractor, ReleasedConceptExtractor
from neucore_plugin.config import loading
from neucore_plugin.config.published import FASHIONIQ_CATEGORIES
from neucore_plugin.models.backbones.resnet_gru import SPECIALS, released_classes
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.processors import ImageProcessor
from neucore_plugin.released.convert import convert
from neucore_plugin.task import ComposedImageRetrievalTask
from neucore_plugin.weights import checkpoint
from neucore_plugin.weights.trust import section_of

CASE = REAL / "official" / "e2e_cirr"

# ---- concepts -------------------------------------------------------------------------------------------------------


def test_concepts_are_lemmas_by_tag():
    extract = ReleasedConceptExtractor(("NOUN", "VERB", "ADJ", "ADV"))
    found, again = extract(["The Red dogs in Berlin are very small", "small dogs <and> small dogs"])
    assert sorted(found) == sorted(["dog", *2 * ["small", "very"], *(2 * ["red"] if "red" in found else 2 * ["Red"])])
    assert again == ("dog", "small", "small") and "berlin" in ConceptExtractor()(["dogs in Berlin"])[0]
    third = ReleasedConceptExtractor(("NOUN", "ADJ"), 3)(["a small dog", "", " <and> "])
    assert third == [("dog", "small", "small", "small"), (), ()]
    assert "dress" in lemmas_of(extract, "half \ud83d a letter\x00\nred dress")


def test_have_is_a_verb_where_the_parser_says_so():
    extract = ReleasedConceptExtractor(("VERB",), 1)
    found = extract(["has longer sleeves", "has been shortened", "have no straps <and> is red"])
    assert found == [("have",), ("shorten",), ("have",)]


@needs_real("official", "e2e_cirr")
@pytest.mark.parametrize("pos", ["NOUN", "VERB", "ADJ", "ADV"])
def test_lemmas_of_every_tag_are_the_recorded_ones(pos):
    entries = json.loads((CASE / "cap.rc2.train.json").read_text(encoding="utf-8"))
    found = ReleasedConceptExtractor((pos,), 1)([entry["caption"] for entry in entries])
    assert [set(lemmas) for lemmas in found] == [set(entry[pos.lower()]) for entry in entries]


def lemmas_of(extract, caption):
    """The lemmas of a caption among others, which are the same whatever stands beside it."""
    assert extract([caption]) == extract(["first", caption, "last"])[1:2]
    return extract([caption])[0]


def test_captions_of_a_pair_are_read_one_by_one():
    """Together, a tagger may see another sentence."""
    extract, pair = ReleasedConceptExtractor(("NOUN", "VERB", "ADJ", "ADV"), 1), ("is more  of a", "light tan shirt.")
    alone = extract(pair)
    assert extract([" <and> ".join(pair)])[0] == tuple(
        lemma
        for pos in extract.pos
        for lemma in sorted({x for text in pair for x in ReleasedConceptExtractor((pos,), 1)([text])[0]})
    )
    assert set(extract([" <and> ".join(pair)])[0]) == set(alone[0]) | set(alone[1])


def test_classes_are_rows():
    assert released_classes(WORDS, ["sleeve", "Red", "red", "unheard", "red"]) == ["<unk>", "red", "sleeve"]
    model = converted().model
    assert model.concept_labels([("sleeve", "Red"), ("dress", "dress")]).tolist() == [[0, 0, 1], [0, 1, 0]]
    model.vocabulary = type(model.vocabulary)(("<unk>", *CONCEPTS))
    assert model.concept_labels([("sleeve", "Red"), ("dress", "dress")]).tolist() == [[1, 0, 0, 1], [0, 0, 1, 0]]


# ---- text encoder ---------------------------------------------------------------------------------------------------


def test_texts_without_words_are_read_too():
    torch.manual_seed(0)
    read = encoder("text", "glove_bigru", words=WORDS, word_dim=5, width=8, captions="released", max_words=2)
    out = read(["", "4%", "red unheard dress it"])
    assert out["mask"].sum(1).tolist() == [2, 2, 6]  # not cut
    assert out["sentence"][0].norm() > 0.9 and torch.equal(out["sentence"][0], out["sentence"][1])
    assert read.rows("Red unheard <and> it") == [1, 5, 4, 2, WORDS.index("it"), 3]


def test_an_image_alone_is_not_an_empty_text():
    model = converted().model.eval()
    model.backbone.image.grid = (2, 2)
    maps = torch.randn(2, 6, 2, 2).double()
    empty, alone = model.encode_query(maps, ["", ""]), model.encode_query(maps)
    assert not torch.allclose(empty["fused"], alone["fused"])
    assert torch.allclose(model.encode_query(maps, ["", "red dress"])["fused"][0], empty["fused"][0])


def test_words_without_a_vector_stay_normal(tmp_path):
    """Word vectors are looked up letter by letter: "Red" is not "red"."""
    (tmp_path / "glove.840B.txt").write_text("Red 9 9 9 9 9\nblue 1 2 3 4 5\nDRESS 9 9 9 9 9\n")
    names = {
        "words": [*SPECIALS, "red", "blue", "dress", *(f"x{row}" for row in range(4000))],
        "word_dim": 5,
        "width": 8,
    }
    torch.manual_seed(0)
    made = encoder("text", "glove_bigru", **names, glove=tmp_path / "glove.840B.txt", captions="released")
    table = made.embedding.weight.detach()
    assert table[6].tolist() == [1, 2, 3, 4, 5] and table[[5, 7]].abs().max() < 6
    assert abs(table.std() - 1) < 0.02 and abs(table.mean()) < 0.02
    torch.manual_seed(0)
    other = encoder("text", "glove_bigru", **names, glove=tmp_path / "glove.840B.txt")
    assert other.embedding.weight.std() < 0.1  # as before


# ---- FashionIQ ------------------------------------------------------------------------------------------------------

RAW = [(" is T-shirt's red ", "has 3/4\u00a0sleeves"), ("", "is blue"), ("two", "  ")]


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    root = write_fashioniq(tmp_path / "fashioniq")
    for category in FASHIONIQ_CATEGORIES:
        for split in ("train", "val"):

            def change(pairs):
                for pair, captions in zip(pairs, RAW, strict=False):
                    pair["captions"] = list(captions)

            edit(root / f"captions/cap.{category}.{split}.json", change)
    return root


def datasets(root, *options):
    options = [f"datasets.fashioniq.build_info.root={root}", *options]
    cfg = loading.load_config(PROJECTS / "train_official_fashioniq.yaml", options, launch.registry_tables())
    cfg.config.run.rank = 0
    return ComposedImageRetrievalTask.setup_task(cfg=cfg).build_datasets(cfg)["fashioniq"]


def test_fashioniq_is_asked_raw_in_both_orders_with_the_mark(fashion):
    """Without a setting by hand, in training and in evaluation."""
    found = datasets(fashion)
    for split in ("train", "val_dress"):
        first, second = RAW[0]
        assert found[split].texts[:6] == [
            f"{first} <and> {second}",
            f"{second} <and> {first}",
            " <and> is blue",
            "is blue <and> ",
            "two <and>   ",
            "   <and> two",
        ]
    assert len(found["train"]) == 2 * 8 * 3 and len(found["val_dress"]) == 2 * 6
    times = {split: [c.count("blue") for c in found[split].concepts[2:4]] for split in ("train", "val_dress")}
    assert times == {"train": [3, 3], "val_dress": [2, 2]}
    one = datasets(fashion, "datasets.fashioniq.build_info.one_process=true")["val_dress"]
    assert [concepts.count("blue") for concepts in one.concepts[2:4]] == [2, 3]
    plain = datasets(fashion, "model.backbone.text.captions=default")["val_dress"]
    assert plain.texts[0] == "is T-shirt's red and has 3/4 sleeves" and plain.texts[2] == "is blue"


# ---- CIRR -----------------------------------------------------------------------------------------------------------


@needs_real("official", "e2e_cirr")
def test_an_evaluation_of_feature_maps_counts_as_the_released_scores(tmp_path, monkeypatch):
    """`neucore evaluate` from pickles of maps: by single texts, and with padding attended in batches of 32."""
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    root, case = tmp_path / "cirr", np.load(CASE / "case.npz")
    entries = json.loads((CASE / "cap.rc2.train.json").read_text(encoding="utf-8"))
    places = json.loads((CASE / "split.rc2.val.json").read_text(encoding="utf-8"))
    for folder, name, content in (("captions", "cap", entries), ("image_splits", "split", places)):
        (root / folder).mkdir(parents=True)
        (root / folder / f"{name}.rc2.val.json").write_text(json.dumps(content))
    for number, (name, values) in enumerate(zip(case["names"], case["maps"], strict=True)):
        path = (root / "patch_feat_res152" / places[name]).with_suffix(".pkl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(values[None] if number % 2 else values, 2 + number % 4))
    convert(CASE / "ckpt.pth", tmp_path / "model.pth", vocabulary=CASE / "cirr_vocab.pkl")
    options = [
        f"model.checkpoint={tmp_path / 'model.pth'}",
        f"datasets.cirr.build_info.root={root}",
        "datasets.cirr.build_info.features=patch_feat_res152",
        "datasets.cirr.build_info.protocol=[hard]",
        f"run.output_dir={tmp_path / 'out'}",
        "run.batch_size_eval=32",
    ]
    row = {name: place for place, name in enumerate(case["names"])}
    asked = {entry["pairid"]: entry for entry in entries}
    order = [asked[pair] for pair in case["pairids"]]
    for name, more in (("scores_batch1", []), ("scores_batch32", ["model.fusion.attend_padding=true"])):
        result = launch.run(PROJECTS / "eval_cirr.yaml", [*options, *more], evaluate=True)
        scores = torch.from_numpy(case[name]).clone()
        scores[range(len(order)), [row[one["reference"]] for one in order]] = -torch.inf
        target = scores[range(len(order)), [row[one["target_hard"]] for one in order]]
        rank = (scores > target[:, None]).sum(1)
        for k in (1, 5, 10, 50):
            assert result["val"][f"R@{k}"] == pytest.approx(100 * (rank < k).double().mean().item()), (name, k)


# ---- older checkpoints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_older_than_the_rules_keeps_its_meaning(tmp_path):
    """Keys that it lacks mean what was before, whatever its model type says now."""
    model = converted(tensors()).model
    header, (state, frozen) = model.checkpoint_header(), checkpoint.model_state(model)
    del header["config"]["backbone"]["text"]["captions"], header["config"]["fusion"]["attend_padding"]
    header["config"]["fusion"]["dropout"] = 0.0
    header["image_processor"]["fit"] = "pad"
    path = tmp_path / "old.pth"
    checkpoint.save({"architecture": header, "model": state, "frozen": frozen}, path)
    old = NeucoreModel.from_checkpoint(path)
    assert old.caption_processor.clean and not old.raw_captions and old.backbone.text.captions == "default"
    assert old.image_processor.fit == "pad" and type(old._extractor or ConceptExtractor()) is ConceptExtractor
    assert old.backbone.text.rows("it's red <and> it") == [1, 4, 5, 2, WORDS.index("it"), 3]
    options = [f"model.checkpoint={path}"]
    tables = launch.registry_tables()
    found = loading.load_config(PROJECTS / "eval_fashioniq.yaml", options, tables, section_of).to_dict()
    assert found["model"]["backbone"]["text"]["captions"] == "default"
    assert found["datasets"]["fashioniq"]["text_processor"]["eval"]["clean"]
    with pytest.raises(
        Exception, match=r"backbone.text.captions: 'default' in the checkpoint, 'released' in the config"
    ):
        NeucoreModel.from_config({"model_type": "official_shoes", "checkpoint": str(path)})


def test_a_new_checkpoint_says_how_it_reads(tmp_path):
    state, frozen = checkpoint.model_state(model := converted(tensors()).model)
    path = tmp_path / "new.pth"
    checkpoint.save({"architecture": model.checkpoint_header(), "model": state, "frozen": frozen}, path)
    new = NeucoreModel.from_checkpoint(path)
    assert new.raw_captions and not new.caption_processor.clean
    assert type(new.image_processor) is ImageProcessor
    found = loading.load_config(
        PROJECTS / "eval_fashioniq.yaml", [f"model.checkpoint={path}"], launch.registry_tables(), section_of
    ).to_dict()["datasets"]["fashioniq"]
    assert not found["text_processor"]["eval"]["clean"] and found["build_info"]["joiner"] is None


def test_training_from_feature_maps(tmp_path, monkeypatch):
    """CIRR's released form from maps alone: no picture is there, nothing is cached, and the run's checkpoint ranks."""
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    root = write_cirr_to_train_on(tmp_path / "cirr")
    random = np.random.default_rng(0)
    for path in (root / "img_raw").rglob("*.png"):
        place = (root / "maps" / path.relative_to(root / "img_raw")).with_suffix(
            ".npy" if "img2" in path.name else ".pkl"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        values = random.normal(size=(1, 4, 2, 2)).astype(np.float32)
        np.save(place, values) if place.suffix == ".npy" else place.write_bytes(pickle.dumps(values))
        path.unlink()
    options = [
        f"datasets.cirr.build_info.root={root}",
        "datasets.cirr.build_info.features=maps",
        "model.backbone.image={name: features, width: 4, grid: 2}",
        "model.backbone.text.word_dim=6",
        "model.backbone.text.width=8",
        "model.embed_dim=8",
        "model.concept_alignment={depth: 1, heads: 2}",
        "model.fusion={heads: 2, head_dim: 4}",
        "run.max_epoch=2",
        "run.batch_size_train=8",
        f"run.output_dir={tmp_path / 'out'}",
    ]
    first = launch.run(PROJECTS / "train_official_cirr.yaml", options)
    assert set(first["val"]) >= {"R@1", "R_subset@1"}
    best = next((tmp_path / "out").glob("*/checkpoint_best.pth"))
    model = NeucoreModel.from_checkpoint(best)
    assert model.vocabulary.words == tuple(sorted(model.vocabulary.words, key=model.backbone.text.words.index))
    assert set(model.vocabulary.words) == {"<unk>", "red", "blue", "cat"} and model.raw_captions  # "dog" is no word
    assert not any((tmp_path / "cache").rglob("tokens.f16"))
    broken = next((root / "maps" / "train").rglob("*.pkl"))
    broken.write_bytes(b"cut")
    with pytest.raises(DataError, match=f"1 images cannot be read.*\n.*{broken.name} is no feature map"):
        launch.run(PROJECTS / "train_official_cirr.yaml", [*options, "run.resume=never"])
    broken.unlink()
    with pytest.raises(ConfigError, match=r"maps: 1 of .* images of train, such as maps/train/"):
        launch.run(PROJECTS / "train_official_cirr.yaml", [*options, "run.resume=never"])
