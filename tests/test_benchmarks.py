"""`python -m benchmarks`: its table, what it compares, and what it says of other input."""

import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from places import PROJECTS, ROOT

from neucore_plugin.models.inputs import partial_rows


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import benchmarks.__main__ as entry

    return entry


@pytest.fixture
def step(benchmarks):
    import step

    return step


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


def test_plots_are_the_growth_s_alone(benchmarks, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["step", "--plots", str(tmp_path)])
    assert "name it as well" in capsys.readouterr().err
    asked = []

    def own_process(flag, code, threads):
        asked.append(code)
        return "[]"

    monkeypatch.setattr(benchmarks, "own_process", own_process)
    assert benchmarks.main(["step", "growth", "--quick", "--plots", str(tmp_path)]) == 0
    assert "step.rows(True)" in asked[0] and f"growth.rows(True, {str(tmp_path)!r})" in asked[1]


def test_forms_of_a_step_have_the_recipe_of_the_main_job(step):
    """Of which the released form alone has none: it is given less to do."""
    recipe = OmegaConf.load(PROJECTS / "train_emoji.yaml").model
    small = step.Sizes(batch=40, gallery=50, concepts=12, tokens=4)
    for form in step.FORMS:
        model, same = step.build(form, small), form != "released"
        assert (model.feature_dropout == recipe.feature_dropout) == same
        assert (model.batch_loss.wanted == recipe.matching.negatives) == same
        assert (model.batch_loss.partial_weight is not None) == same
        losses = model(step.pairs(model, small))
        assert ("loss_partial" in losses) == same and losses["loss"].isfinite()
        if same:  # as many rows without image or text as there are on average
            assert len(partial_rows(model.query_dropout, step.noise(model, 40))[0]) == 4
    widths = [step.build(form, small).matching.dim for form in ("default", "artemis", "released")]
    assert len(set(widths)) == 1


def test_growth_is_drawn_and_against_proportion(benchmarks, monkeypatch, tmp_path):
    import growth

    class Measured:
        def __init__(self, form, sizes):
            self.cpu = sizes.gallery * sizes.tokens**1.5

        def measure(self):
            pass

    monkeypatch.setattr(growth.step, "stepper", Measured)
    ratios = {row.name: row.ratio for row in growth.rows(True, str(tmp_path / "plots"))}
    assert ratios["training step, default type, 2,000 training images against 4 times that of 500"] == 1.0
    assert ratios["training step, default type, 1,000 concepts of the vocabulary against 4 times that of 250"] == 4.0
    assert ratios["training step, embedded_paper, 64 tokens of an image against 4 times that of 16"] == 0.5
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == [
        f"{axis}.svg" for axis in sorted(growth.AXES)
    ]
    assert "<polyline" in (tmp_path / "plots" / "tokens.svg").read_text()


@pytest.mark.slow
def test_quick_benchmarks_are_measured(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--quick", "step", "scoring", "growth", "grad_cache"]
    command += ["--plots", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert len(done.stdout.splitlines()) == 1 + 3 + 2 + 8 + 1
    assert len(list(tmp_path.glob("*.svg"))) == 4
