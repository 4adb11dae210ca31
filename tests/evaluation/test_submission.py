"""Submission files: what the servers want, by hand-made files; and the whole way from a checkpoint."""

import argparse
import json
from pathlib import Path

import pytest

from neucore_plugin.commands import submit
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.datasets.triplets import Gallery, Triplet
from neucore_plugin.evaluation import submission

NAMES = tuple(f"test1-{number}" for number in range(60))
QUERIES = [
    Triplet("12063", NAMES[0], "a", (), members=NAMES[:6]),
    Triplet("12064", NAMES[7], "b", (), members=NAMES[5:11]),
]
SPLIT = (QUERIES, Gallery(NAMES, tuple(map(Path, NAMES))))


def recall() -> dict:
    return {"version": "rc2", "metric": "recall", "12063": list(NAMES[1:51]), "12064": list(NAMES[8:58])}


def subset() -> dict:
    return {
        "version": "rc2",
        "metric": "recall_subset",
        "12063": list(NAMES[1:4]),
        "12064": [NAMES[5], NAMES[9], NAMES[6]],
    }


def circo() -> dict:
    return {str(query): list(range(query, query + 50)) for query in range(3)}


@pytest.mark.parametrize(("content", "message"), [(recall(), "CIRR recall, 2"), (subset(), "CIRR recall_subset, 2")])
def test_good_cirr_files(tmp_path, content, message):
    path = submission.write(tmp_path / "out.json", content, SPLIT)
    assert json.loads(path.read_text()) == content
    assert submission.check(path, SPLIT) == submission.check(path) == f"{message} queries"


def test_good_circo_file_and_the_forms_that_are_written(tmp_path):
    rankings = {str(query): [str(image) for image in range(query, query + 50)] for query in range(3)}
    assert submission.circo_content(rankings) == circo()
    path = submission.write(tmp_path / "out.json", submission.circo_content(rankings))
    assert submission.check(path) == "CIRCO, 3 queries"
    made = submission.cirr_content("recall", {"12063": NAMES[1:51], "12064": NAMES[8:58]})
    assert made == recall()


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (recall, lambda c: c.pop("12064"), "query '12064' is missing"),
        (recall, lambda c: c.update({"9": c["12063"]}), "query '9' is not of this split"),
        (recall, lambda c: c["12063"].pop(), "query '12063': has 49 images; exactly 50 are wanted"),
        (recall, lambda c: c["12063"].__setitem__(3, NAMES[1]), "query '12063': 'test1-1' stands twice"),
        (recall, lambda c: c["12063"].__setitem__(3, NAMES[0]), "holds its own reference 'test1-0'"),
        (recall, lambda c: c["12063"].__setitem__(3, "test1-52.png"), "'test1-52.png' carries a suffix"),
        (recall, lambda c: c["12063"].__setitem__(3, "dev-1"), "'dev-1' is no image of the gallery"),
        (recall, lambda c: c["12063"].__setitem__(3, 7), "query '12063': needs a list of image names"),
        (recall, lambda c: c.update({"12063": "x"}), "query '12063': needs a list of image names"),
        (recall, lambda c: c.update(version="rc1"), "version is 'rc1'; allowed: rc2"),
        (recall, lambda c: c.update(metric="recal"), "metric is 'recal'; allowed: recall, recall_subset"),
        (subset, lambda c: c["12064"].__setitem__(0, NAMES[20]), "'test1-20' is no member of the query's group"),
        (subset, lambda c: c["12064"].append(NAMES[8]), "has 4 images; exactly 3 are wanted"),
        (recall, lambda c: (c.pop("12063"), c.pop("12064")), "holds no query"),
        (circo, lambda c: c["0"].pop(), "query '0': has 49 images"),
        (circo, lambda c: c["0"].__setitem__(0, "7.5"), "needs a list of image ids (whole numbers, or such as text)"),
        (circo, lambda c: c["0"].__setitem__(0, "-7"), "needs a list of image ids"),
        (circo, lambda c: c["0"].__setitem__(0, "٧"), "needs a list of image ids"),
        (circo, lambda c: c["0"].__setitem__(0, None), "needs a list of image ids"),
        (circo, lambda c: c["0"].__setitem__(0, "3"), "'3' stands twice"),
        (circo, lambda c: c["0"].__setitem__(0, True), "needs a list of image ids"),
        (circo, lambda c: c["0"].__setitem__(0, 3), "'3' stands twice"),
    ],
)
def test_each_problem_is_told_and_nothing_is_written(tmp_path, base, change, message):
    content, split = base(), None if base is circo else SPLIT
    change(content)
    with pytest.raises(DataError) as caught:
        submission.write(tmp_path / "out.json", content, split)
    assert message in str(caught.value) and not list(tmp_path.iterdir())
    path = tmp_path / "made_elsewhere.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        submission.check(path, split)
    assert message in str(caught.value) and "made_elsewhere.json: " in str(caught.value)


@pytest.mark.parametrize("form", [int, str], ids=["numbers", "texts"])
def test_circo_files_hold_numbers_or_texts_and_may_hold_the_reference(tmp_path, form):
    """As the files that its authors give as examples."""
    names = tuple(str(number) for number in range(1000, 1060))
    split = ([Triplet(str(n), names[n], "x", ()) for n in range(3)], Gallery(names, tuple(map(Path, names))))
    content = {str(query): [form(name) for name in names[:50]] for query in range(3)}
    path = submission.write(tmp_path / "out.json", content, split)
    assert submission.check(path, split) == "CIRCO, 3 queries"
    content["2"][0] = form(7)
    with pytest.raises(DataError, match="query '2': '7' is no image of the gallery"):
        submission.write(tmp_path / "out.json", content, split)
    content["2"][0] = form(names[1])
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"query '2': '{names[1]}' stands twice"):
        submission.check(path)


def test_an_id_that_stands_twice_a_file_too_large_and_files_that_are_none(tmp_path):
    path = tmp_path / "out.json"
    text = json.dumps(recall())
    path.write_text(text[:-1] + f', "12063": {json.dumps(list(NAMES[1:51]))}}}')
    with pytest.raises(DataError, match="'12063' stands 2 times"):
        submission.check(path, SPLIT)
    path.write_text(text + " " * 5_000_000)
    with pytest.raises(DataError, match=r"has 5,00\d,\d+ bytes; the server takes 5,000,000 at most"):
        submission.check(path, SPLIT)
    for content, message in (
        ("[1]", "a JSON object of lists"),
        ("{", "no valid JSON"),
        ("7", "a JSON object of lists"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            submission.check(path)
    with pytest.raises(DataError, match="gone.json: No such file or directory; check the path"):
        submission.check(tmp_path / "gone.json")
    with pytest.raises(DataError, match="Is a directory; give the path of a file"):
        submission.check(tmp_path)


def test_many_problems_are_counted(tmp_path):
    content = recall() | {str(number): [] for number in range(30)}
    with pytest.raises(DataError, match="60 problems(?s:.)*and 50 more"):
        submission.write(tmp_path / "out.json", {**content}, SPLIT)


def command(*arguments) -> None:
    parser = argparse.ArgumentParser()
    submit.add_arguments(parser)
    submit.run(parser.parse_args(list(map(str, arguments))))


def test_the_command_wants_a_checkpoint_or_a_file():
    with pytest.raises(ConfigError, match="--cfg-path and --checkpoint"):
        command("cirr")


def test_a_check_without_a_root_wants_the_data_sets_form_and_all_queries(tmp_path, monkeypatch, capsys):
    """A test split's number of queries is public; that the pairs were not compared is printed."""
    for variable in ("NEUCORE_CIRR_ROOT", "NEUCORE_CIRCO_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    ranking, cirr_file, circo_file = list(NAMES[:50]), tmp_path / "cirr.json", tmp_path / "circo.json"
    cirr = submission.cirr_content("recall", {str(pair): ranking for pair in range(12000, 16148)})
    circo_full = {str(query): list(range(50)) for query in range(800)}

    def refused(name, path, content, message, *more):
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            command(name, "--check", path, *more)

    refused("circo", cirr_file, cirr, "has the form of CIRR .its metric is recall.; a file for CIRCO is wanted")
    refused("cirr", circo_file, circo_full, "has the form of CIRCO .it names no metric.; a file for CIRR is wanted")
    refused("cirr", tmp_path / "one.json", recall(), "has 2 queries; test1 has 4,148")
    refused("cirr", cirr_file, cirr, "has 4,148 queries; val has 4,181", "--split", "val")
    refused("circo", circo_file, {"0": circo_full["0"]}, "799 problems\n  query '1' is missing")
    without = {key: value for key, value in circo_full.items() if key != "7"} | {"800": list(range(50))}
    refused("circo", circo_file, without, r"query '800' is not of this split .0 to 799.\n  query '7' is missing")
    for name, path, content in (("cirr", cirr_file, cirr), ("circo", circo_file, circo_full)):
        path.write_text(json.dumps(content))
        command(name, "--check", path)
    printed = capsys.readouterr().out
    assert "good: CIRR recall, 4,148 queries (pair ids and image names were not compared)" in printed
    assert "good: CIRCO, 800 queries (image ids were not compared)" in printed
    with pytest.raises(ConfigError, match="no split 'train' to submit; allowed: val, test1"):
        command("cirr", "--check", cirr_file, "--split", "train")
