"""The result tables of README and docs are those of docs/study.json; the script that writes them sees what is wrong."""

import copy
import importlib.util
import json

import pytest
from places import ROOT

from neucore_plugin.common.errors import DataError


def load_script():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


@pytest.mark.parametrize("page", SCRIPT.PAGES, ids=lambda path: path.name)
def test_a_page_holds_the_tables_of_the_study(page):
    text = page.read_text(encoding="utf-8")
    assert SCRIPT.MARKED.search(text), "no table of this page is written by the script"
    assert SCRIPT.written(text, SCRIPT.load()) == text, "run: python docs/make_tables.py"


def test_another_number_changes_the_pages():
    summary = copy.deepcopy(SCRIPT.load())
    rows = [summary["rows"][summary["main"]], *([summary["job"]] if "job" in summary else [])]
    for row in rows:
        row["results"]["val"]["R@1"]["mean"] += 1
    for page in SCRIPT.PAGES:
        text = page.read_text(encoding="utf-8")
        assert SCRIPT.written(text, summary) != text, page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- study: tabel -->\n<!-- study: end -->", "tabel -->: no such part; there are facts"),
        ("<!-- study: methods -->\n", "has no end"),
        ("<!-- study: end -->", "no beginning"),
    ],
)
def test_markers_that_are_wrong(text, message):
    with pytest.raises(DataError, match=message):
        SCRIPT.written(text, SCRIPT.load())


def test_a_finished_study_takes_the_place_of_the_numbers(tmp_path, monkeypatch):
    """Of a study with seeds: the means with their spreads; what no page shows stays out of docs/study.json."""
    summary = copy.deepcopy(SCRIPT.load())
    summary.pop("job", None)
    main = summary["rows"][summary["main"]]
    main["results"]["val"]["R@1"] = {"mean": 12.34, "spread": 1.26, "values": [11.0, 13.0]}
    main["results"]["val"]["R@50"] = main["results"]["val"]["R@1"]
    main |= {"folders": ["trials/neucore/seed-1"], "partial": {"text_only": main["results"]}}
    (tmp_path / "new.json").write_text(json.dumps(summary))
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- study: half -->\nold\n<!-- study: end -->\n\nAfter.\n")
    monkeypatch.setattr(SCRIPT, "STUDY", tmp_path / "study.json")
    monkeypatch.setattr(SCRIPT, "PAGES", (page,))
    monkeypatch.setattr(SCRIPT, "ROOT", tmp_path)
    monkeypatch.setattr(SCRIPT.load, "__defaults__", (tmp_path / "study.json",))
    SCRIPT.main([str(tmp_path / "new.json")])
    text = page.read_text()
    assert "12.3** ± 1.3" in text and text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
    kept = json.loads((tmp_path / "study.json").read_text())["rows"]["neucore"]
    assert "folders" not in kept and set(kept["results"]["val"]) == {"R@1", "R@10"}
    (tmp_path / "new.json").write_text("{}")
    with pytest.raises(DataError, match="expected the format neucore-study-1"):
        SCRIPT.load(tmp_path / "new.json")
