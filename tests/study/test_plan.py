"""A study file becomes whole, checked trials; whatever is wrong with it is told before anything runs."""

import argparse
import shlex
import sys
from pathlib import Path

import pytest
import study_case as case
import yaml

from neucore_plugin import cli
from neucore_plugin.commands import study as command
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.config import loading
from neucore_plugin.study.plan import make_plan

TIRG = {"model.arch": "cir_baseline", "model.method": "tirg"}


@pytest.fixture
def study(tiny_config, tmp_path):
    return lambda **parts: case.write_study(tmp_path, tiny_config(), **parts)


def test_the_shipped_study_has_the_methods_and_seeds_and_its_recipe_by_reference():
    plan = make_plan("study_emoji")
    baselines = ["artemis", "tirg", "combiner", "cross_attention", "sum"]
    assert plan.rows("method") == ["neucore", *baselines] and plan.main == "neucore"
    assert {trial.seed for trial in plan.trials} == {1, 2, 3, 4, 5} and len(plan.rows("ablation")) >= 5
    assert len(plan.trials) == 5 * (6 + len(plan.rows("ablation")))
    assert len({trial.fingerprint for trial in plan.trials}) == len(plan.trials)
    recipe = loading.load_config("train_emoji").to_dict()["run"]
    for trial in plan.trials:
        given = {**(plan.study.methods.get(trial.row) or {}), **(plan.study.ablations.get(trial.row) or {})}
        own = {"seed", "output_dir", "resume", *(key.removeprefix("run.") for key in {**plan.study.options, **given})}
        differs = {key for key, value in trial.checked["run"].items() if value != recipe[key]}
        assert differs <= own, trial.title
    quick = make_plan("study_emoji", quick=True)
    assert len(quick.trials) < len(plan.trials) / 5 and quick.minutes and quick.folder != plan.folder


def test_a_trial_is_the_base_with_its_layers_and_a_seed_of_its_own(study, tmp_path):
    path = study(
        options={"run": {"max_epoch": 5}},
        ablations={"one step": {"model.fusion.clauses": 1}},
        curves={"short": {"run.max_epoch": 1}},
    )
    plan = make_plan(path, ["run.init_lr=0.5"])
    by_title = {trial.title: trial for trial in plan.trials}
    assert set(by_title) == {
        *(f"{row}, seed {seed}" for row in ("neucore", "tirg", "one step") for seed in (1, 2)),
        "neucore, short, seed 1",
        "tirg, short, seed 1",
    }
    assert [trial.seed for trial in plan.trials] == [1] * 5 + [2] * 3  # one seed of everything comes first
    tirg, one = by_title["tirg, seed 2"], by_title["one step, seed 1"]
    assert tirg.content["model"]["method"] == "tirg" and "fusion" not in tirg.content["model"]
    assert tirg.checked["model"]["embed_dim"] == 32  # what both models have is kept
    assert one.checked["model"]["fusion"]["clauses"] == 1 and one.checked["model"]["embed_dim"] == 32
    assert all(trial.checked["run"]["init_lr"] == 0.5 for trial in plan.trials)
    assert {t.checked["run"]["max_epoch"] for t in plan.trials if t.kind == "curve"} == {1}
    assert {t.checked["run"]["max_epoch"] for t in plan.trials if t.kind != "curve"} == {5}
    assert len({trial.folder for trial in plan.trials}) == len(plan.trials)
    # What is written is what is trained: the file says the same config again.
    written = tmp_path / "again.yaml"
    written.write_text(loading.as_yaml(one.content))
    assert loading.load_config(written).fingerprint() == one.fingerprint
    assert tirg.pace == by_title["tirg, seed 1"].pace == tirg.lasting(9).pace != one.pace
    assert tirg.fingerprint != by_title["tirg, seed 1"].fingerprint != tirg.lasting(9).fingerprint
    assert tirg.lasting(9).checked["run"]["max_epoch"] == tirg.lasting(9).content["run"]["max_epoch"] == 9


def test_the_base_lies_beside_the_study_or_ships(study, tmp_path, monkeypatch):
    path = study(base="tiny.yaml")
    monkeypatch.chdir("/")
    assert make_plan(path).trials[0].checked["model"]["embed_dim"] == 32
    assert "emoji" in make_plan(study(base="train_emoji")).trials[0].checked["datasets"]


def test_part_of_a_study(study):
    quick = {"methods": ["tirg"], "ablations": [], "seeds": [5], "options": {"run.max_epoch": 1}}
    path = study(ablations={"a": {"model.fusion.clauses": 1}}, quick=quick)
    assert make_plan(path, only=["tirg", "a"]).wanted == {"tirg", "a"}
    assert {trial.seed for trial in make_plan(path, seeds=[7]).trials} == {7}
    [trial] = make_plan(path, quick=True).trials
    assert trial.title == "tirg, seed 5" and trial.checked["run"]["max_epoch"] == 1


def test_the_command_that_a_page_shows_repeats_the_study(study):
    path = study(quick={"seeds": [5]})
    typed = ["run.init_lr=0.5", "model.concepts.pos=[NOUN, ADJ]"]
    told = shlex.split(make_plan(path, typed, seeds=[7, 8], quick=True).command)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = parser.parse_args(told[2:])
    assert told[:2] == ["neucore", "study"] and given.cfg_path == str(path)
    assert (given.options, given.seeds, given.quick) == (typed, [7, 8], True)
    assert make_plan(path).command == f"neucore study --cfg-path {shlex.quote(str(path))}"


WRONG = [
    ({"methods": {}}, "study.methods"),
    ({"method": {}}, "study.method: unknown key .* Did you mean 'methods'"),
    ({"seeds": [1, 1]}, "study.seeds: got \\[1, 1\\]"),
    ({"seeds": [-1]}, "study.seeds"),
    ({"seeds": [True]}, "study.seeds"),
    ({"minutes": 0}, "study.minutes: got 0"),
    ({"main": "tirgg"}, "study.main: got 'tirgg'.*Did you mean 'tirg'"),
    ({"ablations": {"tirg": {}}}, "study.ablations.tirg"),
    ({"quick": {"methods": ["neucor"]}}, "study.quick.methods: got 'neucor'.*Did you mean 'neucore'"),
    ({"base": "nowhere"}, "config file nowhere does not exist"),
    ({"base": "study_emoji"}, "no section `run`"),
    ({"options": {"run.seed": 3}}, "run.seed: set by the study itself"),
    ({"methods": {"a": {"run": {"output_dir": "x"}}}}, "run.output_dir: set by the study itself"),
    ({"methods": {"a": {"modell.arch": "x"}}}, "the trial a has 1 problem:\\s+modell: unknown section"),
    (
        {"methods": {"a": {"run.max_epochs": 1}, "b": {"run.init_lr": -1}}},
        "(?s)trial a .*max_epochs.*trial b .*init_lr",
    ),
    ({"methods": {"a b": {}, "a-b": {}}}, "'a b' and 'a-b' give the same folder"),
    ({"methods": {"a": {"run.runner": "runner_base"}}}, "run.runner"),
    ({"methods": {"a": 3}}, "study.methods"),
    ({"goals": {"ahead": {"val": "much"}}}, "study.goals.ahead"),
]


@pytest.mark.parametrize(("parts", "message"), WRONG, ids=[str(parts)[:40] for parts, _ in WRONG])
def test_what_is_wrong_is_told_by_name(study, parts, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(study(**parts))


def test_files_that_are_no_study_and_a_study_that_is_trained(tiny_config, study, tmp_path, capsys):
    with pytest.raises(ConfigError, match="is no study.*study_emoji"):
        make_plan(tiny_config())
    path = study()
    path.write_text(path.read_text() + "run: {seed: 1}\n")
    with pytest.raises(ConfigError, match="run: stands outside of `study`"):
        make_plan(path)
    with pytest.raises(ConfigError, match="neucore study --cfg-path"):
        loading.load_config(study())
    with pytest.raises(ConfigError, match="--only: 'tirgg' is no row.*Did you mean 'tirg'"):
        make_plan(study(), only=["tirgg"])
    with pytest.raises(ConfigError, match="--options: run.seed=3: set by the study itself; see --seeds"):
        make_plan(study(), ["run.seed=3"])
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["study", "--cfg-path", "x", "--seeds", "-4"])
    assert "whole number from 0" in capsys.readouterr().err


def test_the_plan_needs_neither_torch_nor_the_host():
    import subprocess

    code = (
        "import sys; from neucore_plugin.study.plan import make_plan; make_plan('study_emoji'); "
        "from neucore_plugin.study import running; assert not {'torch', 'lavis'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_names_with_any_letters_become_folders(study):
    plan = make_plan(study(methods={"a/../b": {}, "größer: ja": {}, "日本": {}}))
    folders = {trial.folder.parent.name for trial in plan.trials}
    assert len(folders) == 3 and all(name.isascii() and "/" not in name and ".." not in name for name in folders)
    assert yaml.safe_load(loading.as_yaml(plan.trials[0].content))
