"""neucore export: the folder, its card, its ONNX form, and the script that searches without torch."""

import functools
import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from neucore_plugin import cli, load_model
from neucore_plugin.clauses import clauses
from neucore_plugin.export import graphs
from neucore_plugin.export.card import markdown
from neucore_plugin.retrieval import GalleryIndex

ROW = {"R@1": 12.5, "R@10": 50.0, "median_rank": 3.0, "queries": 8}
EVIL = "<script>x</script> [a](http://evil) | `b` **c** _d_ \u202e @someone"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run's folder: checkpoint, config, results of this very model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    path = tiny.save(tiny.build(), folder / "checkpoint_best.pth")
    results = {"results": {"val": {EVIL: ROW}}, "checkpoint": {"fingerprint": load_model(path).fingerprint()}}
    (folder / "evaluation.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(yaml.safe_dump({"datasets": {"emoji": {}, EVIL: {}}}))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of several shapes and modes."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for number, size in enumerate([(64, 64), (90, 40), (40, 90), (200, 200), (64, 64), (33, 57)]):
        values = noise.integers(0, 256, (size[1], size[0], 4 if number == 4 else 3), dtype=np.uint8)
        path = folder / ("more" if number % 2 else "") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(path)
    return folder


def export(source, out, *options):
    return cli.main(["export", str(source), "--out", str(out), *options])


def test_the_folder_is_the_model_and_its_card_tells_of_it(run_folder, tmp_path, capsys):
    source, out = run_folder / "checkpoint_best.pth", tmp_path / "my-model"
    assert export(source, out, "--license", "cc-by-4.0") == 0
    assert load_model(out).fingerprint() == load_model(source).fingerprint()
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "cc-by-4.0" and set(front["datasets"]) == {"emoji", EVIL}
    assert {"composed-image-retrieval", "neucore"} <= set(front["tags"])
    body = text.split("---\n", 2)[2]
    assert "12.50" in body and "# my-model" in body and load_model(out).fingerprint() in body
    assert "<script>" not in body and "](http" not in body and "\u202e" not in body and "**c**" not in body
    assert list(tmp_path.iterdir()) == [out]
    assert export(out, tmp_path / "again") == 0  # a folder is a checkpoint as well
    again = (tmp_path / "again" / "README.md").read_text()
    assert "Not yet chosen" in again and "12.50" not in again
    told = capsys.readouterr()
    assert "the card names no licence" in told.err and "has no results" in told.err


def test_results_of_other_weights_do_not_get_into_the_card(run_folder, tmp_path, capsys):
    content = json.loads((run_folder / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps({**content, "checkpoint": {"fingerprint": "0"}}))
    (tmp_path / "c.pth").write_bytes((run_folder / "checkpoint_best.pth").read_bytes())
    assert export(tmp_path / "c.pth", tmp_path / "out") == 0
    assert "is of other weights" in capsys.readouterr().err and "12.50" not in (tmp_path / "out/README.md").read_text()


def test_a_mistake_is_one_error_and_leaves_nothing(run_folder, tmp_path, capsys, monkeypatch):
    source = run_folder / "checkpoint_best.pth"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    (tmp_path / "damaged.pth").write_bytes(b"PK")
    for given, out, options, expected in (
        (source, full, (), "is there already"),
        (tmp_path / "none.pth", "out", (), "no checkpoint file"),
        (tmp_path / "damaged.pth", "out", (), "damaged"),
        (source, "out", ("--license", "my own: see <b>"), "is no identifier"),
        (source, "out", ("--module", "no_such_module"), "no_such_module"),
    ):
        assert export(given, tmp_path / out, *options) == 2
        assert expected in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(source, tmp_path / "out", "--onnx") == 2
    assert "pip install 'neucore-plugin[onnx]'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.pth", "full"] and (full / "mine").is_file()


def test_markdown_keeps_plain_names_as_they_are():
    assert markdown("efficientnet_lite0 R@10 a-b.c") == "efficientnet_lite0 R@10 a-b.c"
    for mark in "<>[]()|`*~\n":
        assert mark not in markdown(f"a{mark}b")


# ---- ONNX ------------------------------------------------------------------------------------------------------------


SEARCHES = [
    ("1", "make it blue"),
    ("1", "a longer red dress, and square"),
    ("1", ""),
    ("", "the long blue dress"),
    ("1", " Red AND\u3000blue;With Dots ,and\ttwo, zeppelins and \uff24\uff25"),  # more clauses than are read apart
    ("", ", ;"),
]


def small(kind):
    """A model whose encoders have a layer each: writing a graph takes as long as the graph is deep."""
    model = tiny.build(kind).eval()
    image, text = model.backbone.image.network, model.backbone.text.network
    image.blocks = torch.nn.Conv2d(32, 320, 1, stride=16)
    text.encoder.layer, text.config.num_hidden_layers = text.encoder.layer[:1], 1
    model.restored()  # concepts as these encoders read them
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """kind -> (model, folder with its ONNX form), each written once."""

    @functools.cache
    def of(kind):
        model, folder = small(kind), tmp_path_factory.mktemp(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "whole_words", lambda text: ["make", "it", "and", "longer"])  # all take half a minute
            graphs.export_onnx(model, folder)
        return model, folder

    return of


def lines(printed):
    """(name, score) of what the script prints."""
    return [(line.split()[2], float(line.split()[1])) for line in printed.splitlines()]


@pytest.fixture
def searched(monkeypatch, capsys):
    """The exported script, run in this process."""

    def of(folder, *arguments):
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(folder / "search.py"), run_name="__main__")
        return lines(capsys.readouterr().out)

    return of


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_script_finds_what_the_index_finds(kind, exported, searched, pictures):
    model, folder = exported(kind)
    index = GalleryIndex.build(model, pictures, progress=False)
    for name, text in SEARCHES:
        image = pictures / "more" / f"{name}.png" if name else None
        if (not text and not model.reference_reads) or (image is None and kind == "image_only"):
            continue  # nothing to ask with
        wanted = index.search(image, text or None, k=None)
        found = searched(folder, pictures, *(["--image", image] if image else []), "--text", text, "-k", 99)
        assert [name for name, _ in found] == [hit.name for hit in wanted]
        assert np.allclose([score for _, score in found], [hit.score for hit in wanted], atol=1.5e-4)
    assert len(searched(folder, pictures, "--text", "red", "-k", 2)) == 2


@pytest.mark.slow
def test_the_script_needs_neither_torch_nor_this_package(exported, searched, pictures, tmp_path):
    _, folder = exported("neucore")
    query = [str(pictures), "--image", str(pictures / "0.png"), "--text", "make it blue"]
    without = ("torch", "torchvision", "transformers", "lavis", "spacy", "neucore_plugin")
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({without})); sys.argv[0] = 'search.py'"
    code += f"; runpy.run_path({str(folder / 'search.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *query], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout) == searched(folder, *query)
    with pytest.raises(SystemExit):
        searched(folder, tmp_path)


def pieces_by_hand(model, pieces, texts):
    """[texts, L], or of a model that reads clauses [texts, C, L]."""
    if model.clauses == 1:
        return graphs.numbers(pieces, texts)
    parts = [clauses(model.caption_processor(text), model.clauses) for text in texts]
    rows = [[pieces.encode(part).ids for part in (*one, *[""] * (model.clauses - len(one)))] for one in parts]
    longest, end = max(len(row) for one in rows for row in one), graphs.padding_of(model.backbone.text)
    return np.array([[row + [end] * (longest - len(row)) for row in one] for one in rows], dtype=np.int64)


def hold(model, images, queries):
    """Assert that two graphs, {input: array} -> {output: array}, give the model's scores of any number of each."""
    pieces = graphs.word_pieces(model.backbone.text)
    pixels = np.random.default_rng(1).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    read = torch.stack([model.image_processor(Image.fromarray(picture)) for picture in pixels])
    texts = [
        "red",
        "make it blue and longer " * 20,
        "",
        "the same \u0000dress but square, with two ze\ufb01bras",
        "[PAD] 日 and it, red; with dots, blue",
    ]
    has_image, words = np.array([True, False, True, True, False]), model.extract_concepts(texts)
    with torch.inference_mode():
        own = [
            model.encode_query(picture[None] if there else None, [text] if text else None)
            for picture, there, text in zip(read, has_image, texts, strict=False)
        ]
        gallery = model.encode_image(read)
        wanted = torch.cat([model.score(one, gallery) for one in own]).numpy()
    for count, first, last in ((1, 0, 5), (9, 1, 2), (4, 0, 3), (2, 2, 3), (3, 1, 5)):
        longest = max(1, *map(len, words[first:last]), 0)
        flat = [row[k] if k < len(row) else "" for row in words[first:last] for k in range(longest)]
        given = {
            "pixels": pixels[first:last],
            "has_image": has_image[first:last],
            "pieces": pieces_by_hand(model, pieces, texts[first:last]),
            "concepts": graphs.numbers(pieces, flat).reshape(last - first, longest, -1),
        }
        found = graphs.scores(queries(given), images({"pixels": pixels[:count]}))
        assert np.abs(found - wanted[first:last, :count]).max() < graphs.TOLERANCE


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_is_written_computes_the_models_scores(kind):
    """Before torch writes it, which takes long."""
    model = small(kind)

    def of(side):
        def run(given):
            with torch.inference_mode():
                found = side(*(torch.from_numpy(given[name]) for name in side.inputs))
            return {name: value.numpy() for name, value in zip(side.outputs, found, strict=True)}

        return run

    hold(model, of(graphs.ImageSide(model)), of(graphs.QuerySide(model)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_graphs_hold_for_any_number_of_images_and_queries(kind, exported):
    import onnxruntime

    def of(path):
        graph = onnxruntime.InferenceSession(path)
        outputs, inputs = ([one.name for one in side] for side in (graph.get_outputs(), graph.get_inputs()))
        return lambda given: dict(zip(outputs, graph.run(None, {name: given[name] for name in inputs}), strict=True))

    model, folder = exported(kind)
    hold(model, of(folder / "image.onnx"), of(folder / "query.onnx"))


@pytest.mark.slow
def test_the_command_writes_a_whole_model(tmp_path, searched, pictures):
    path = tiny.save(tiny.build(), tmp_path / "c.pth")
    assert export(path, tmp_path / "out", "--onnx") == 0
    index = GalleryIndex.build(load_model(tmp_path / "out"), pictures, progress=False)
    wanted = index.search(pictures / "0.png", "make it blue", k=None)
    found = searched(tmp_path / "out", pictures, "--image", pictures / "0.png", "--text", "make it blue")
    assert [name for name, _ in found] == [hit.name for hit in wanted]
    assert "search.py" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_graphs_that_differ_are_refused(tmp_path, monkeypatch, capsys):
    path = tiny.save(tiny.build("image_only"), tmp_path / "c.pth")
    monkeypatch.setattr("neucore_plugin.load_model", lambda _: small("image_only"))
    monkeypatch.setattr(graphs.ImageSide, "normalised", lambda self, pixels: pixels.permute(0, 3, 1, 2).float() / 255)
    assert export(path, tmp_path / "out", "--onnx") == 2
    assert "in onnxruntime the scores of this model differ by" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_what_has_no_onnx_form_is_refused_with_the_reason(tmp_path, capsys):
    from neucore_plugin.concepts import ConceptVocabulary
    from neucore_plugin.models.neucore import NeucoreModel

    text = {"name": "glove_bigru", "width": 32, "word_dim": 8, "captions": "default", "glove": None}
    section = {**tiny.NEUCORE, "backbone": {**tiny.BACKBONE, "text": text}}
    model = NeucoreModel.from_config(section, vocabulary=ConceptVocabulary(tiny.WORDS), captions=tiny.TEXTS)
    assert export(tiny.save(model, tmp_path / "c.pth"), tmp_path / "out", "--onnx") == 2
    told = capsys.readouterr().err
    assert "the word pieces of the text encoder glove_bigru are not BERT's" in told and "minilm_l6" in told
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_the_tokenizer_and_the_forms_give_what_the_model_reads():
    model = tiny.build()
    pieces = graphs.word_pieces(model.backbone.text)
    texts = [
        *tiny.TEXTS,
        "Crème brûlée, ÇA va?",
        "日本 dress",
        "co-operate don't",
        "x" * 300,
        "",
        "[CLS] it",
        "red " * 99,
        "ze\ufb01bras\u0000and\u200bmore\tof \uff24\uff25",
        "[PAD] it",
    ]
    clean = [model.caption_processor(text) for text in texts]
    own = model.backbone.text.tokenizer(clean, truncation=True, max_length=model.backbone.text.max_words + 2)
    assert [pieces.encode(text).ids for text in texts] == own["input_ids"]
    model.extract_concepts([""])
    further = ["children", "zebras", "sleeping", "the", "one", "is", "with"]
    assert {"children", "sleeping", "the"} <= set(graphs.whole_words(model.backbone.text))
    forms = graphs.form_table(
        ("confuse", "dress", "long", "child", "run", "baby", "confused"), further, model._extractor
    )
    known = {"dresses": "dress", "longer": "long", "children": "child", "running": "run", "babies": "baby"}
    known |= {"confused": "confuse", "zebras": "zebra", "sleeping": "sleep"}  # of two, the frequent one; and unknown
    assert {form: forms.get(form) for form in known} == known and not {"the", "is", "one", "with"} & set(forms)
