"""Config values that are texts, and files that cannot be read: what is taken as it stands, what is one clear error."""

import copy
import json

import pytest
from config_case import minimal, write

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.config import compare, loading

# ---- texts of the command line ---------------------------------------------------------------------------------------

AS_GIVEN = [
    "exp #2", "2024_01_02", "${HOME}", "a/${run.seed}/b", "\\${x}", "\\\\${x}", "${", "$${a}", "null ", "~", "on", "no",
    "true", "1e3", "0x10", "1_000", "12:30:00", "2024-01-02", "[a]", "[a", "{a}", "{a: b}", "a: b", ": ", "- a", "@x",
    "%x", "'quoted'", '"', " both ends ", "a=b=c", "=", "!!python/none", "&a", "*a", "|", ">", "é\u0301", "a\nb", "\ta",
    "x\\", "_MISSING_", "file://a?b=c", "%(asctime)s", "{}", "[]", "---", "Null", "None", "???x",
]  # fmt: skip


@pytest.mark.parametrize("text", AS_GIVEN)
def test_a_text_is_taken_as_it_is_given(tmp_path, text):
    """For a key that is a text, one that may be null, and one of a data set; in both forms; into a file and back."""
    keys = ("run.output_dir", "run.cache_dir", "datasets.emoji.build_info.cache_dir")
    for options in ([f"{key}={text}" for key in keys], [part for key in keys for part in (key, text)]):
        cfg = loading.load_config(write(tmp_path, minimal()), options)
        found = [cfg.run_cfg.output_dir, cfg.run_cfg.cache_dir, cfg.datasets_cfg.emoji.build_info.cache_dir]
        assert found == [text] * 3
        assert cfg.run.output_dir == cfg.to_dict()["run"]["cache_dir"] == text
    again = loading.load_config(write(tmp_path, loading.as_yaml(cfg.to_dict())))
    assert again.to_dict() == cfg.to_dict()
    by_pair = loading.load_config(write(tmp_path, minimal()), [("run.output_dir", text)])
    assert by_pair.run_cfg.output_dir == text


def test_null_of_a_text(tmp_path):
    content = minimal()
    content["run"]["cache_dir"] = "x"
    cfg = loading.load_config(write(tmp_path, content), ["run.cache_dir=null", "run.output_dir=null"])
    assert cfg.run_cfg.cache_dir is None
    assert cfg.run_cfg.output_dir == "null"  # it takes no null, so this is a name
    cfg = loading.load_config(write(tmp_path, content), [("run.cache_dir", "null")])
    assert cfg.run_cfg.cache_dir == "null"
    for text in ("", "  "):
        with pytest.raises(ConfigError, match=r"run\.output_dir: got .*; allowed: a text that is not empty"):
            loading.load_config(write(tmp_path, content), [f"run.output_dir={text}"])


def test_texts_in_lists_and_beside_other_types(tmp_path):
    def run(option):
        return loading.load_config(write(tmp_path, minimal()), [option]).run

    content = minimal()
    content["datasets"] = {"folder": {"build_info": {"root": str(tmp_path)}}}  # any split may be in it
    for given, found in {
        "[2024_01_02, on, '1', null]": ["2024_01_02", "on", "1", "null"],
        "['${HOME}', \"a b\"]": ["${HOME}", "a b"],
    }.items():
        assert loading.load_config(write(tmp_path, content), [f"run.train_splits={given}"]).run.train_splits == found
    assert [run(f"run.amp={value}").amp for value in ("true", "False", "bf16")] == [True, False, "bf16"]
    assert run("run.lr_scales={head: 0.5}").lr_scales == {"head": 0.5}
    assert run("run.init_lr=1e-4").init_lr == 1e-4
    assert run("run.max_epoch=${oc.decode:'7'}").max_epoch == 7  # of numbers OmegaConf's own ways stay
    with pytest.raises(ConfigError, match=r"run\.train_splits: got \"train\"; allowed: a list of names"):
        run("run.train_splits=train")


def test_quotes_that_the_shell_has_left_are_told(tmp_path, caplog):
    for given in ("'output/x'", '"output/x"'):
        assert loading.load_config(write(tmp_path, minimal()), [f"run.output_dir={given}"]).run.output_dir == given
        assert f"run.output_dir={given}: the quotes are taken as part of the text" in caplog.text
        caplog.clear()
    for given in ("it's", "'a' b", r"C:\x", "~nobody/x", "a=b", "\u3000x"):
        assert loading.load_config(write(tmp_path, minimal()), [f"run.output_dir={given}"]).run.output_dir == given
    assert not caplog.text


def test_texts_that_no_file_name_holds(tmp_path):
    for given in ("a\0b", "\0", "a\udcff"):
        content = minimal()
        content["run"]["output_dir"] = given
        (tmp_path / "x.yaml").write_text(json.dumps(content), encoding="utf-8")
        for path, options in ((tmp_path / "x.yaml", []), (write(tmp_path, minimal()), [("run.output_dir", given)])):
            if given == "a\udcff" and not options:
                continue  # no yaml holds it
            with pytest.raises(ConfigError, match=r"run\.output_dir: got .*; a null byte and bytes that are no UTF-8"):
                loading.load_config(path, options)


def test_a_device_is_no_config():
    with pytest.raises(ConfigError, match="^config file /dev/null is no regular file"):
        loading.read_yaml("/dev/null")


def test_a_config_that_the_system_refuses(tmp_path, monkeypatch):
    path = write(tmp_path, minimal())
    refused = PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(loading.OmegaConf, "load", lambda _: (_ for _ in ()).throw(refused))
    with pytest.raises(ConfigError, match=f"^config file {path}: Permission denied; check the permissions"):
        loading.load_config(path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.seed=${HOME}", r"'run.seed=\$\{HOME\}' cannot be read: Interpolation key 'HOME' not found"),
        ("run.seed=${", "cannot be read"),
        ("run.seed=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
        ("run.seed=${run.seed}", "cannot be read"),
        ("run.seed=[" * 3, "cannot be read"),
        ("run.seed=???", r"run\.seed: \?\?\? stands for a value that is still to be given"),
        ("run.output_dir=???", r"run\.output_dir: \?\?\? stands for a value"),
    ],
)
def test_what_cannot_be_read_is_one_error(tmp_path, option, message):
    with pytest.raises(ConfigError, match=message) as error:
        loading.load_config(write(tmp_path, minimal()), [option])
    assert "\n" not in str(error.value)


def test_interpolation_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "far")
    content = minimal()
    for given, found in {"${oc.env:SOME_FOLDER}/${run.seed}": "far/42", r"\${HOME}": "${HOME}"}.items():
        content["run"] |= {"output_dir": given, "seed": 42}
        assert loading.load_config(write(tmp_path, content)).run.output_dir == found
    for given in ("${HOME}", "${run.output_dir}", "${oc.env:NO_SUCH_VARIABLE}", "a/${", "${nothing:x}"):
        content["run"]["output_dir"] = given
        with pytest.raises(ConfigError, match=r"cannot be read: .*is written \\\$\{") as error:
            loading.load_config(write(tmp_path, content))
        assert "\n" not in str(error.value)


def test_a_run_goes_on_with_another_pixel_limit_or_none_yet():
    """What is refused changes no pixel; a run of before the key holds no such key."""
    run = {"run": {"seed": 1}, "datasets": {"emoji": {"vis_processor": {"eval": {"name": "cir_image", "fit": "pad"}}}}}
    raised = copy.deepcopy(run)
    raised["datasets"]["emoji"]["vis_processor"]["eval"]["max_pixels"] = 10**9
    assert compare.config_differences(run, raised) == []
    assert compare.config_fingerprint(run) == compare.config_fingerprint(raised)
    raised["datasets"]["emoji"]["vis_processor"]["eval"]["fit"] = "crop"
    assert len(compare.config_differences(run, raised)) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"model: " + b"[" * 3000,
        b"run: {seed: " + b"9" * 5000 + b"}",
        b"\xff\xfe\0",
        b"run: {a: caf\xe9}",
        b"a: 1\na: 2",
        b"",
    ],
)
def test_a_file_that_is_no_yaml_of_ours_is_one_error(tmp_path, content):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config file .*mine\.yaml") as caught:
        loading.read_yaml(tmp_path / "mine.yaml")
    assert len(str(caught.value)) < 1000
