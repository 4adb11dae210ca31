"""`python -m benchmarks`: its table, what it compares, and what it says of other input."""

import json
import subprocess
import sys

import pytest
from places import ROOT


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import benchmarks.__main__ as entry

    return entry


def stands_in(entry, monkeypatch, ours, fails=()):
    """Instead of the scripts: one row each, whose time is given."""

    def own_process(flag, code, threads):
        name = next(name for name in entry.SCRIPTS if f"import {name};" in code)
        if name in fails:
            raise subprocess.CalledProcessError(1, name)
        row = {"what": name, "ours": ours, "other": "loops", "theirs": 6.0, "memory": 2_000_000}
        return "noise\n" + json.dumps([{**row, "share": 0.5, "of": "products"}])

    monkeypatch.setattr(entry, "own_process", own_process)


def test_the_table_and_how_ratios_moved(benchmarks, monkeypatch, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    stands_in(benchmarks, monkeypatch, ours=2.0)
    assert benchmarks.main(["step", "--quick", "--out", str(old)]) == 0
    title, line = capsys.readouterr().out.splitlines()
    assert title.split() == ["what", "ours", "against", "theirs", "ratio", "peak", "memory", "share"]
    assert line.split() == ["step", "2.00", "s", "loops", "6.00", "s", "3.00", "2", "MB", "50%", "of", "products"]
    stands_in(benchmarks, monkeypatch, ours=0.5)
    assert benchmarks.main(["step", "data", "--out", str(new), "--compare", str(old)]) == 0
    _, step, data = capsys.readouterr().out.splitlines()
    assert step.split()[-2:] == ["3.00", "4.00"] and "500.00 ms" in step  # 12 times now, 3 times then
    assert data.split()[-1] == "products"  # nothing to compare with
    assert [row["what"] for row in json.loads(new.read_text())["rows"]] == ["step", "data"]


def test_a_script_that_fails_is_named_and_the_others_are_shown(benchmarks, monkeypatch, capsys):
    stands_in(benchmarks, monkeypatch, ours=1.0, fails=("data",))
    assert benchmarks.main([]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == len(benchmarks.SCRIPTS)
    assert "failed: data" in shown.err


def test_other_input_is_refused(benchmarks, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["stepp"])
    assert "no benchmark 'stepp'; there are scoring," in capsys.readouterr().err
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit, match="is no file that"):
        benchmarks.main(["--compare", str(tmp_path / "other.json")])


@pytest.mark.slow
def test_steps_and_scores_are_measured():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--quick", "step", "scoring"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert len(done.stdout.splitlines()) == 5
