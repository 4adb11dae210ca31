"""neucore configs, and --cfg-path with the bare name of a shipped yaml."""

import pytest
from places import PROJECTS

from neucore_plugin import cli, launch
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.config.loading import read_yaml
from neucore_plugin.config.shipped import find_config, shipped_configs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_line_each(capsys):
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in PROJECTS.glob("*.yaml"))
    assert any(line.startswith("train_emoji ") and "The main job: NEUCORE on OpenMoji" in line for line in lines)


def test_copies_and_overwrites_nothing(tmp_path, capsys):
    assert cli.main(["configs", "copy", "train_cirr"]) == 0
    assert cli.main(["configs", "copy", "train_cirr.yaml", "my/new"]) == 0
    assert capsys.readouterr().out == "train_cirr.yaml\nmy/new/train_cirr.yaml\n"
    whole = (PROJECTS / "train_cirr.yaml").read_text()
    assert (tmp_path / "train_cirr.yaml").read_text() == (tmp_path / "my/new/train_cirr.yaml").read_text() == whole
    (tmp_path / "train_cirr.yaml").write_text("run: {}")
    assert cli.main(["configs", "copy", "train_cirr"]) == 2
    assert "train_cirr.yaml is there already; move it away, or give another folder" in capsys.readouterr().err
    assert (tmp_path / "train_cirr.yaml").read_text() == "run: {}"
    assert cli.main(["configs", "copy", "train_ciir"]) == 2
    assert "'train_ciir' ships with the package. Did you mean 'train_cirr'?" in capsys.readouterr().err
    assert cli.main(["configs", "copy", "train_emoji", "train_cirr.yaml"]) == 2
    assert "a part of this path is a file where a folder is wanted" in capsys.readouterr().err


def test_a_bare_name_is_found_where_no_such_file_lies(tmp_path):
    for name in ("train_cirr", "train_cirr.yaml"):
        assert find_config(name) == shipped_configs()["train_cirr"]
    (tmp_path / "train_cirr").mkdir()  # as an output folder may be called
    assert read_yaml("train_cirr")["model"]["model_type"] == "blip_cirr"
    (tmp_path / "train_cirr.yaml").write_text("run: {seed: 7}")
    assert read_yaml("train_cirr.yaml") == {"run": {"seed": 7}}
    (tmp_path / "mine.yaml").write_text("run: {}")
    for path, message in (
        (tmp_path / "mines.yaml", "mines.yaml does not exist. Did you mean 'mine.yaml'?"),
        (tmp_path, "is a folder"),
        ("train_emojis", "config file train_emojis does not exist. Did you mean 'train_emoji'? Give"),
        ("train_emojis.yaml", "Did you mean 'train_emoji.yaml'?"),
        ("configs/train_emoji.yaml", "does not exist. Give the path of a yaml file, or a name that `neucore configs`"),
    ):
        with pytest.raises(ConfigError) as caught:
            find_config(path)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        (cli.main, ["train"]),
        (cli.main, ["evaluate"]),
        (cli.main, ["submit", "cirr", "--checkpoint", "best.pth"]),
        (cli.run_train, []),
        (cli.run_evaluate, []),
    ],
)
def test_every_command_with_a_config_knows_the_names(entry, arguments, capsys, monkeypatch):
    monkeypatch.setattr(launch.distributed, "init_distributed", lambda _: pytest.fail("it went on"))
    options = ["run.seed=x", "run.evaluate=false"]
    assert entry([*arguments, "--cfg-path", "train_cirr", "--options", *options]) == 2
    assert "run.seed: got" in capsys.readouterr().err
