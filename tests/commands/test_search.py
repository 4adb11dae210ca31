"""neucore search on an index: every option, end to end on a tiny NEUCORE; what is wrong is one error."""

import json
import re

import pytest
import tiny

from neucore_plugin import cli
from neucore_plugin.retrieval import GalleryIndex

PICTURES = 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of pictures, a checkpoint, and an index that notes it: what a user has."""
    base = tmp_path_factory.mktemp("search")
    (base / "photos").mkdir()
    for number, image in enumerate(tiny.pictures(PICTURES)):
        image.save(base / "photos" / f"{number}.png")
    checkpoint = tiny.save(tiny.build(), base / "best.pth")
    model = GalleryIndex.build(tiny.build().eval(), base / "photos", progress=False)
    priced = GalleryIndex(
        *(model.names, model.paths, model.encodings, model.model, model.root),
        attributes=[{"price": 10 * number, "kind": "even" if number % 2 == 0 else "odd"} for number in range(PICTURES)],
    )
    priced.save(base / "priced")
    GalleryIndex.build(model.model, base / "photos", out=base / "index", checkpoint=str(checkpoint), progress=False)
    return base


def search(capsys, *arguments):
    code = cli.main(["search", *map(str, arguments), "--device", "cpu"])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.filterwarnings("ignore")
def test_an_index_is_searched_by_the_model_that_it_notes(saved, tmp_path, capsys):
    query = ["--image", "0.png", "--text", "make it blue", "-k", 3]
    code, out, err = search(capsys, saved / "index", *query, "--html", tmp_path / "found.html")
    assert code == 0 and len(out.splitlines()) == 3 and "0.png" not in out
    assert "searched 6 images in " in err and " ms" in err and "page: " in err
    assert "make it blue" in (tmp_path / "found.html").read_text()
    _, rows, _ = search(capsys, saved / "index", *query, "--json")
    rows = json.loads(rows)
    assert [f"{row['rank']:3d}  {row['score']:8.4f}  {row['name']}" for row in rows] == out.splitlines()
    _, encoded, _ = search(capsys, "--folder", saved / "photos", "--checkpoint", saved / "best.pth", *query, "--json")
    encoded = json.loads(encoded)
    assert [row["name"] for row in encoded] == [row["name"] for row in rows]
    assert [row["score"] for row in encoded] == pytest.approx([row["score"] for row in rows], abs=2e-3)  # of float16


@pytest.mark.filterwarnings("ignore")
def test_every_option_reaches_the_search(saved, tmp_path, capsys):
    asked = [
        "--image",
        "0.png",
        "--image",
        saved / "photos" / "1.png",
        "--text",
        "make it blue",
        "--then",
        "a longer dress",
    ]
    asked += ["--not", "red", "--not-image", "3.png", "--filter", "price >= 20 and kind in ('even', 'odd')"]
    asked += ["--exclude", "5.png", "-k", 9, "--explain"]
    code, out, _ = search(capsys, saved / "priced", "--checkpoint", saved / "best.pth", *asked, "--json")
    answer = json.loads(out)
    index = GalleryIndex.open(saved / "priced", model=tiny.build().eval())
    expected = index.search(
        images=["0.png", "1.png"],
        text="make it blue",
        then=["a longer dress"],
        without_texts=["red"],
        without_images=["3.png"],
        where="price >= 20",
        exclude=["5.png"],
        k=9,
    )
    assert code == 0 and [hit["name"] for hit in answer["hits"]] == [hit.name for hit in expected]
    assert {"2.png", "3.png", "4.png"} == {hit.name for hit in expected}
    for row, hit in zip(answer["hits"], expected, strict=True):
        assert row["score"] == pytest.approx(hit.score, abs=1e-5) == pytest.approx(sum(row["terms"].values()), abs=1e-5)
        assert row["attributes"] == {"price": 10 * int(row["name"][0]), "kind": row["attributes"]["kind"]}
    assert [text["text"] for text in answer["texts"]] == ["make it blue", "a longer dress", "red"]
    assert "blue" in answer["texts"][0]["concepts"] and answer["texts"][2]["concepts"] == ["red"]
    page = tmp_path / "found.html"
    _, table, _ = search(capsys, saved / "priced", "--checkpoint", saved / "best.pth", *asked, "--html", page)
    assert table.startswith("concepts of 'make it blue': ")
    assert "concepts of 'red': red" in table
    for row in answer["hits"]:
        terms = " ".join(f"{value:+.4f} {term}" for term, value in row["terms"].items())
        assert f"{row['score']:8.4f}  = {terms}  {row['name']}" in table

    shown = page.read_text()
    for text in ("make it blue", "a longer dress", "explicit", "background"):
        assert text in shown
    assert shown.count("<img") == 2 + 1 + 3  # references, the picture it should not be like, results


@pytest.mark.filterwarnings("ignore")
def test_nothing_left_is_an_empty_answer(saved, capsys):
    asked = [saved / "priced", "--checkpoint", saved / "best.pth", "--text", "red", "--filter", "price > 1000"]
    code, out, err = search(capsys, *asked, "--json")
    assert (code, json.loads(out)) == (0, [])
    code, out, err = search(capsys, *asked)
    assert (code, out) == (0, "") and "no image is left that may be an answer" in err


BAD = {
    "nothing": (["{index}"], "nothing to search with; give --image, --text, or both"),
    "negatives alone": (["{index}", "--not", "red"], "nothing to search with"),
    "where": (["--text", "red"], "INDEX or --folder\\? give INDEX, which `neucore index build` writes, or --folder"),
    "both": (["{index}", "--folder", "{photos}", "--text", "red"], "INDEX or --folder\\? give one of them"),
    "gone": (["{base}/gone", "--text", "red"], "gone does not exist; make one with `neucore index build"),
    "pictures": (["{photos}", "--text", "red"], "no index .*If these are your pictures: `neucore index build .*photos"),
    "file": (["{base}/best.pth", "--text", "red"], "is a file, no index"),
    "no folder": (["--folder", "{base}/best.pth", "--text", "a"], "is no folder"),
    "no model": (["--folder", "{photos}", "--text", "red"], "give --checkpoint, or --model-type"),
    "unnoted": (["{priced}", "--text", "red"], "does not say which checkpoint built it; give --checkpoint"),
    "filter": (["{priced}", "--text", "red", "--filter", "price = 3"], "write == for equal"),
    "attribute": (["{index}", "--text", "red", "--filter", "price == 3"], "no picture has an attribute 'price'"),
    "exclude": (["{index}", "--text", "red", "--exclude", "7.png"], "no image '7.png' in the index"),
    "reference": (["{index}", "--image", "7.png"], "'7.png' is neither a file nor a name in the index"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error(saved, capsys, name):
    arguments, message = BAD[name]
    places = {"base": saved, **{key: saved / key for key in ("index", "priced", "photos")}}
    code, out, err = search(capsys, *(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "") and "Traceback" not in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert re.search(message, err), err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["attribute", "exclude", "reference"])
def test_a_wrong_name_is_told_before_a_model_is_loaded(saved, capsys, monkeypatch, name):
    monkeypatch.setattr("neucore_plugin.load_model", lambda *_, **__: pytest.fail("loaded"))
    test_bad_input_is_one_error(saved, capsys, name)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_moved_and_another_model(saved, tmp_path, capsys):
    GalleryIndex.build(
        tiny.build().eval(), saved / "photos", out=tmp_path / "moved", checkpoint="/nowhere/best.pth", progress=False
    )
    code, _, err = search(capsys, tmp_path / "moved", "--text", "red")
    assert code == 2 and "is not at /nowhere/best.pth; give --checkpoint" in err
    other = tiny.save(tiny.build("sum"), tmp_path / "other.pth")
    code, _, err = search(capsys, tmp_path / "moved", "--checkpoint", other, "--text", "red")
    assert code == 2 and "their encodings cannot be compared" in err
    manifest = tmp_path / "moved" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("/nowhere/best.pth", "someone/model"))
    code, _, err = search(capsys, tmp_path / "moved", "--text", "red")  # an index makes nobody fetch what it names
    assert code == 2 and "was built by someone/model of the hub; to use it give --checkpoint someone/model" in err
    code, out, _ = search(capsys, tmp_path / "moved", "--checkpoint", saved / "best.pth", "--text", "red")
    assert code == 0 and len(out.splitlines()) == 6
