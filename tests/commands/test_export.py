"""neucore export: the folder, its card, its ONNX form, and the script that searches without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from neucore_plugin import cli, load_model
from neucore_plugin.export import graphs
from neucore_plugin.export.card import markdown
from neucore_plugin.models.composers import COMPOSERS
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


def searched(folder, pictures, *query, without=("torch", "transformers", "neucore_plugin", "spacy")):
    """(name, score) of what the exported script prints, in a process that cannot import `without`."""
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({list(without)})); sys.argv[0] = 'search.py'"
    code += f"; runpy.run_path({str(folder / 'search.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(pictures), *map(str, query)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return [(line.split()[2], float(line.split()[1])) for line in done.stdout.splitlines()]


def exported(kind, tmp_path):
    """A model, and its folder with ONNX, written by the command."""
    path = tiny.save(tiny.build(kind), tmp_path / "c.pth")
    assert export(path, tmp_path / "out", "--onnx") == 0
    return load_model(path), tmp_path / "out"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["neucore", *COMPOSERS])
def test_the_script_finds_what_the_index_finds(kind, tmp_path, pictures):
    model, folder = exported(kind, tmp_path)
    index = GalleryIndex.build(model, pictures, progress=False)
    reference = pictures / "more" / "1.png"
    queries = [(reference, "make it blue"), (reference, "a longer red dress, and square"), (reference, None)]
    queries += [(None, "the long blue dress")]
    for image, text in queries:
        if (text is None and not index.model.reference_reads) or (image is None and kind == "image_only"):
            continue
        options = [*(["--image", image] if image else []), *(["--text", text] if text else []), "-k", 99]
        wanted = index.search(image, text, k=None)
        for without in (("torch", "transformers", "neucore_plugin", "spacy"), ("torch", "neucore_plugin")):
            found = searched(folder, pictures, *options, without=without)
            assert [name for name, _ in found] == [hit.name for hit in wanted]
            assert np.allclose([score for _, score in found], [hit.score for hit in wanted], atol=1.5e-4)
            if kind != "neucore":
                break  # no concepts: spaCy changes nothing


@pytest.mark.slow
def test_the_graphs_hold_for_any_number_of_images_and_queries(tmp_path):
    import onnxruntime

    model, folder = exported("neucore", tmp_path)
    images, queries = (onnxruntime.InferenceSession(folder / name) for name in ("image.onnx", "query.onnx"))
    pieces = graphs.word_pieces(model.backbone.text)
    pixels = np.random.default_rng(1).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    read = torch.stack([model.image_processor(Image.fromarray(picture)) for picture in pixels])
    texts = ["red", "make it blue and longer " * 20, "", "the same dress but square, with two zebras", "blue"]
    words = model.extract_concepts(texts)
    for gallery, count in ((1, 5), (9, 1), (4, 3)):
        factors = images.run(None, {"pixels": pixels[:gallery]})
        side = dict(zip([output.name for output in images.get_outputs()], factors, strict=True))
        longest = max(1, *map(len, words[:count]))
        concepts = [pieces.encode(word).ids for row in words[:count] for word in row]
        flat = iter(concepts)
        rows = [next(flat) if k < len(row) else [] for row in words[:count] for k in range(longest)]
        given = {
            "pixels": pixels[:count],
            "has_image": np.array([True, False, True, True, False])[:count],
            "pieces": graphs.numbers([pieces.encode(model.caption_processor(text)).ids for text in texts[:count]]),
            "concepts": graphs.numbers(rows).reshape(count, longest, -1),
        }
        query = dict(zip([o.name for o in queries.get_outputs()], queries.run(None, given), strict=True))
        with torch.inference_mode():
            encoded = model.encode_image(read[:gallery])
            wanted = torch.cat(
                [
                    model.score(model.encode_query(read[i : i + 1] if given["has_image"][i] else None, [text]), encoded)
                    for i, text in enumerate(texts[:count])
                ]
            )
        assert np.abs(graphs.scores(query, side) - wanted.numpy()).max() < 1e-4


@pytest.mark.slow
def test_graphs_that_differ_are_refused(tmp_path, monkeypatch, capsys):
    path = tiny.save(tiny.build("sum"), tmp_path / "c.pth")
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
    ]
    own = model.backbone.text.tokenizer(texts, truncation=True, max_length=model.backbone.text.max_words + 2)
    assert [pieces.encode(text).ids for text in texts] == own["input_ids"]
    model.extract_concepts([""])
    forms = graphs.form_table(("dress", "long", "child", "run", "stripe", "baby"), model._extractor)
    known = {"dresses": "dress", "longer": "long", "children": "child", "running": "run", "babies": "baby"}
    assert {form: forms.get(form) for form in known} == known and not {"the", "is", "one"} & set(forms)
