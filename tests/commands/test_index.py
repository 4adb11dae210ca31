"""neucore index: its commands, end to end on the tiny model, and how processes share a build."""

import json

import pytest
from colour_model import NAMES, ColourModel, draw, make_folder

from neucore_plugin import cli
from neucore_plugin.commands.index import share
from neucore_plugin.common.errors import ConfigError


@pytest.fixture
def neucore(monkeypatch, capsys):
    """Runs a command: (exit code, output, errors); `model` is what it loads."""

    def run(*arguments, model=None):
        monkeypatch.setattr("neucore_plugin.load_model", lambda *_, **__: model or ColourModel())
        code = cli.main(["index", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pictures")


def test_from_a_folder_to_an_index_that_is_kept(neucore, folder, tmp_path):
    index, best = tmp_path / "index", tmp_path / "best.pth"
    best.touch()
    (folder / "aa.jpg").write_text("no image")
    code, out, err = neucore("build", folder, "--checkpoint", best, "--out", index, "--unit-size", 2)
    assert code == 0 and "5 images" in out and f"neucore search {index}" in out
    assert "left out aa.jpg" in err and "2 hidden, 1 .txt" in err and "image/s" in err
    draw(folder / "new.png", "pink")
    code, out, _ = neucore("add", index, folder / "new.png")  # the checkpoint is the one that the index notes
    assert code == 0 and "added 1 (new.png); 6 images" in out
    code, out, _ = neucore("remove", index, "red", "new.png")
    assert code == 0 and "removed 2; 4 images" in out
    code, out, err = neucore("sync", index)
    assert code == 0 and "added 2 (new.png, red.png)" in out and "6 images, 4 as before, 1 unreadable" in out
    assert "left out aa.jpg" in err
    code, out, _ = neucore("compact", index)
    assert code == 0 and "units are now" in out
    code, out, _ = neucore("info", index, "--json", "--failures")
    facts = json.loads(out)
    assert facts["images"] == 6 and facts["removed"] == 0 and facts["checkpoint"] == str(best)
    assert {row["name"] for row in facts["unreadable"]} == {"aa.jpg"}
    code, out, _ = neucore("info", index, "--failures")
    assert code == 0 and "aa.jpg: " in out and "not finished" not in out
    code, out, _ = neucore("verify", index, "--checkpoint", best)
    assert code == 0 and "all as it was written" in out
    code, out, _ = neucore("verify", index, "--checkpoint", best, model=ColourModel("colours-2"))
    assert code == 1 and "wrong: the index" in out and "colours-2" in out
    code, _, err = neucore("add", index, folder / "aa.jpg", model=ColourModel("colours-2"))
    assert code == 2 and "built by model colours-1" in err


def test_processes_share_a_build(neucore, folder, tmp_path, monkeypatch):
    options = ("build", folder, "--model-type", "zeroshot_clip_vitb32", "--out", tmp_path / "index", "--unit-size", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, out, _ = neucore(*options)
    assert code == 0 and "2 of 3 units are still to come" in out
    assert "The build is not finished" in neucore("info", tmp_path / "index")[1]
    monkeypatch.setenv("RANK", "0")
    code, out, _ = neucore(*options)
    assert code == 0 and "5 images" in out and "still to come" not in out
    monkeypatch.setenv("RANK", "2")
    assert neucore(*options)[0] == 2


def array(task, count, first, **more):
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
    return dict(zip(names, map(str, (task, count, first)), strict=True)) | more


SHARES = [
    ({}, (0, 1)),
    ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
    (array(5, 4, 3), (2, 4)),
    (array(9, 3, 1, SLURM_ARRAY_TASK_STEP="4"), (2, 3)),
    (array(1, 2, 0, RANK="1", WORLD_SIZE="2"), (3, 4)),
]


@pytest.mark.parametrize(("environment", "expected"), SHARES)
def test_a_process_knows_its_share(environment, expected):
    assert share(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        array(0, 4, 0, SLURM_ARRAY_TASK_STEP="0"),
        array(0, 4, 0, SLURM_ARRAY_TASK_STEP="two"),
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"SLURM_ARRAY_TASK_ID": "1"},
        array(9, 2, 1),
        array(4, 3, 1, SLURM_ARRAY_TASK_STEP="4"),
    ],
)
def test_half_an_announcement_is_refused(environment):
    with pytest.raises(ConfigError):
        share(environment)


def test_bad_arguments_are_one_error_each(neucore, folder, tmp_path):
    def refused(*arguments):
        code, _, err = neucore(*arguments)
        assert code == 2 and "Traceback" not in err
        return err

    best = ("--checkpoint", "best.pth")
    assert "does not exist" in refused("build", tmp_path / "none", *best, "--out", tmp_path / "index")
    assert "nothing trained" in refused("build", folder, "--model-type", "neucore", "--out", tmp_path / "index")
    (tmp_path / "file").touch()
    assert "is a file" in refused("build", folder, *best, "--out", tmp_path / "file")
    for what in (("info",), ("verify",), ("compact",), ("sync",)):
        assert "does not exist" in refused(*what, tmp_path / "none")
    neucore("build", folder, *best, "--out", tmp_path / "index")
    assert "no image 'rot.png' in the index" in refused("remove", tmp_path / "index", "rot.png")
    assert "would remove all" in refused("remove", tmp_path / "index", *NAMES)
    assert "is not at" in refused("sync", tmp_path / "index")  # best.pth is no file
    assert "no folder" in refused("sync", tmp_path / "index", tmp_path / "none", *best)


def test_what_a_terminal_would_obey_is_printed_as_its_escape(neucore, tmp_path):
    evil = "a\x1b[31m\x9b2J\u202e.png"
    draw(tmp_path / "pictures" / evil, "red")
    draw(tmp_path / "pictures" / "other one.png", "red")
    index = tmp_path / "my index"
    code, out, err = neucore("build", tmp_path / "pictures", "--checkpoint", "best.pth", "--out", index)
    assert code == 0 and f"neucore search '{index}' --image" in out
    (tmp_path / "pictures" / evil).write_text("broken now")
    texts = [out, err, *neucore("sync", index, "--checkpoint", "best.pth")[1:], neucore("info", index, "--failures")[1]]
    texts += neucore("add", index, tmp_path / "pictures" / evil, "--checkpoint", "best.pth")[1:]
    texts += neucore("remove", index, evil + "x")[1:]
    code, out, _ = neucore("info", index, "--failures", "--json")
    assert json.loads(out)["unreadable"][0]["name"] == evil
    assert not [text for text in [*texts, out] if any(sign in text for sign in "\x1b\x9b\u202e")]
    assert sum("\\x1b[31m\\x9b2J\\u202e.png" in text for text in texts) >= 4


def test_a_picture_that_was_mended_is_no_failure_any_more(neucore, folder, tmp_path):
    (folder / "one.png").write_text("broken")
    (folder / "two.png").write_text("broken")
    index, best = tmp_path / "index", ("--checkpoint", "best.pth")
    neucore("build", folder, *best, "--out", index)
    draw(folder / "three.png", "red")
    for _ in range(2):
        assert "left out two.png: " in neucore("sync", index, *best)[2]
    draw(folder / "one.png", "pink")
    neucore("sync", index, *best)
    facts = json.loads(neucore("info", index, "--failures", "--json")[1])
    assert facts["failures"] == 1 and [failure["name"] for failure in facts["unreadable"]] == ["two.png"]
    assert facts["images"] == 7


@pytest.mark.parametrize("name", ["build", "add", "remove", "sync", "compact", "info", "verify", "accelerate", "push"])
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(["index", name, "--help"])
    assert f" index {name} " in capsys.readouterr().out.split("example")[1]
