"""Whatever a user can cause ends in one `error: ...` line, never in a traceback: causes by commands."""

import argparse
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from released_weights import OPT, tensors
from shapes import write_tiny

from neucore_plugin import cli, launch

PLACES = {  # what may be given where a file or a folder is wanted, made below a root
    "below a file": lambda root: root / "file" / "x",
    "a name too long": lambda root: root / ("x" * 300),
    "links in a circle": lambda root: root / "circle",
    "a folder that cannot be": lambda root: Path("/proc/none/x"),
    "no home": lambda root: "~/x",
}
COMMANDS = {  # {p}: the place; the others are good
    "train: config": "train --cfg-path {p}",
    "train: output": "train --cfg-path {yaml} --options run.output_dir={p}",
    "train: cache": "train --cfg-path {yaml} --options run.cache_dir={p}",
    "train: resume": "train --cfg-path {yaml} --options run.resume={p}",
    "train: data": "train --cfg-path {yaml} --options datasets.folder.build_info.root={p}",
    "evaluate: checkpoint": "evaluate --cfg-path {yaml} --checkpoint {p}",
    "evaluate: output": "evaluate --cfg-path {yaml} --checkpoint {best} --options run.output_dir={p}",
    "search: checkpoint": "search --checkpoint {p} --folder {images} --text red",
    "search: folder": "search --checkpoint {best} --folder {p} --text red",
    "search: image": "search --checkpoint {best} --folder {images} --image {p}",
    "search: page": "search --checkpoint {best} --folder {images} --text red --html {p}",
    "report: folder": "report {p}",
    "report: page": "report {results} --html {p}",
    "report: chart": "report {results} --svg {p}",
    "compare: run": "compare {results} {p}",
    "compare: page": "compare {results} --html {p}",
    "configs copy": "configs copy train_emoji {p}",
    "data emoji": "data emoji --cache-dir {p}",
    "data check": "data check cirr --root {p}",
    "vocab: root": "vocab folder --root {p}",
    "vocab: out": "vocab folder --root {root} --out {p}",
    "shards: root": "shards folder --root {p} --out {new}",
    "shards: out": "shards folder --root {root} --out {p}",
    "shards: verify": "shards --verify --out {p}",
    "submit: check": "submit cirr --check {p}",
    "submit: root": "submit cirr --check {submission} --root {p}",
    "convert: source": "convert {p} --out {new}",
    "convert: captions": "convert {theirs} --out {new} --captions {p}",
    "convert: vocabulary": "convert {theirs} --out {new} --vocabulary {p}",
    "convert: settings": "convert {theirs} --out {new} --settings {p}",
}


LOADS_A_MODEL = ("train: output", "evaluate: output", "search: image", "search: page")  # takes seconds


def _pairs():
    """Each command with each place; of those that load a model first, all but one place are slow."""
    for command in COMMANDS:
        for kind in PLACES:
            slow = command in LOADS_A_MODEL and kind != "below a file"
            yield pytest.param(command, kind, marks=[pytest.mark.slow] * slow, id=f"{command}-{kind}")


@pytest.fixture(scope="module")
def made(shapes_root, tmp_path_factory):
    """What commands are given that is good; they leave it as it is."""
    root = tmp_path_factory.mktemp("made")
    (root / "results").mkdir()
    (root / "results" / "results.json").write_text(
        '{"val": {"neucore": {"R@1": 1.0, "R@10": 2.0, "median_rank": 4, "queries": 3}}}'
    )
    (root / "submission.json").write_text('{"version": "rc2", "metric": "recall", "1": ["a"]}')
    torch.save({"args": argparse.Namespace(**OPT), "state_dict": tensors()}, root / "theirs.pth")
    (root / "few").mkdir()
    for path in sorted((shapes_root / "images").iterdir())[:3]:
        shutil.copy(path, root / "few")
    return {
        "best": tiny.save(tiny.build(), root / "best.pth"),
        "images": root / "few",
        "root": shapes_root,
        "results": root / "results",
        "submission": root / "submission.json",
        "theirs": root / "theirs.pth",
    }


@pytest.fixture
def good(made, tiny_config, tmp_path):
    """The same, with a yaml and places below the test's own folder."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "circle").symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(tmp_path / "circle")
    return {**made, "yaml": tiny_config(), "new": tmp_path / "new"}


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home: as `docker run --user 12345` has it."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("NEUCORE_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])


def one_error(code: int, err: str) -> str:
    """The one line of an error, after whatever was logged."""
    assert code == 2, err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    return err[err.index("error: ") :]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("command", "kind"), _pairs())
def test_a_place_that_cannot_be_used(command, kind, good, tmp_path, capsys, request):
    place = PLACES[kind](tmp_path)
    if kind == "no home":
        request.getfixturevalue("homeless")
    before = sorted(os.listdir(tmp_path))
    words = [word.format(p=place, **good) for word in COMMANDS[command].split()]
    code = cli.main(words)
    captured = capsys.readouterr()
    if command == "data check" and code == 1:
        assert "missing" in captured.out
    else:
        text = one_error(code, captured.err)
        if kind != "no home" or "home" not in text:  # ~/x is the place, or the cache's own home is missing
            assert any(str(named) in text for named in (place, Path(place).parent))
        assert "[Errno" not in text
    assert set(os.listdir(tmp_path)) - set(before) <= {"output"}
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("given", ["exp #2/${x}.pth", "null", "2024_01_02", "~", "a: [b"])
def test_a_checkpoint_is_taken_as_it_is_given(given, monkeypatch):
    seen = []

    def stop(path, options=None, evaluate=False):
        seen.extend(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", stop)
    monkeypatch.setattr(launch, "prepared", stop)
    words = ["--cfg-path", "eval_cirr", "--checkpoint", given, "--options", f"run.output_dir={given}"]
    for command in (["evaluate"], ["submit", "cirr"]):
        assert cli.main([*command, *words]) == 130
        assert ("model.checkpoint", given) in seen
        assert f"run.output_dir={given}" in seen
        seen.clear()


# ---- what the system refuses, wherever it is met ---------------------------------------------------------------------

RAISED = {
    "a full drive": (
        OSError(errno.ENOSPC, "No space left on device", "/x/y"),
        2,
        "/x/y: No space left on device; free",
    ),
    "an output that is full": (OSError(errno.ENOSPC, "No space left on device"), 2, "a file, or the output: No space"),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), 2, "/x: Disk quota exceeded; free space there"),
    "a read-only drive": (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "/x: Read-only file system; choose"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", b"/x"), 2, "/x: Permission denied; check the"),
    "too many files": (OSError(errno.EMFILE, "Too many open files", "/x"), 2, "fewer workers"),
    "a drive that fails": (OSError(errno.EIO, "Input/output error", "/x"), 2, "/x: Input/output error; check the path"),
    "a mount that is gone": (OSError(errno.ESTALE, "Stale file handle", "/x"), 2, "/x: Stale file handle; check"),
    "no folder for temporary files": (
        FileNotFoundError("No usable temporary directory found in ['/x']"),
        2,
        "['/x']; ",
    ),
    "no memory": (MemoryError(), 2, "out of memory (MemoryError); use smaller batches"),
    "no memory for numpy": (MemoryError("Unable to allocate 9. TiB"), 2, "out of memory (Unable to allocate 9. TiB)"),
    "no memory for torch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: x"),
        2,
        "out of memory",
    ),
    "no memory on the GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 2, "out of memory (CUDA"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped"),
    "a reader that has gone": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
}


@pytest.mark.parametrize("cause", RAISED)
@pytest.mark.parametrize("entry", ["neucore", "lavis.train", "lavis.evaluate"])
def test_what_the_system_refuses(cause, entry, monkeypatch, capsys):
    error, code, message = RAISED[cause]

    def run(*_, **__):
        raise error

    monkeypatch.setattr(launch, "run", run)
    call = {"neucore": cli.main, "lavis.train": cli.run_train, "lavis.evaluate": cli.run_evaluate}[entry]
    assert call([*(["train"] if entry == "neucore" else []), "--cfg-path", "train_emoji"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == (1 if message else 0) + (code == 130)


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch):
    for mistake in (RuntimeError("shapes do not match"), KeyError("x"), AssertionError()):
        monkeypatch.setattr(launch, "run", lambda *_, mistake=mistake, **__: (_ for _ in ()).throw(mistake))
        with pytest.raises(type(mistake)):
            cli.main(["train", "--cfg-path", "train_emoji"])


FILES = (
    "concepts-",
    "checkpoint_last",
    "results.json",
    "progress.json",
    "checkpoint_best",
    "evaluation.json",
    "run.json",
)


@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names of open files as Linux has them")
@pytest.mark.parametrize("files", [FILES[:3], pytest.param(FILES[3:], marks=pytest.mark.slow)])
def test_a_drive_that_gets_full_in_a_training(files, shapes_root, tmp_path, monkeypatch, capsys):
    """At each file that a training writes; then there is space again, and it goes on to its end."""
    fsync, full = os.fsync, []

    def refuse(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if any(name in os.path.basename(path) for name in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    def change(config):
        config["run"] |= {"max_epoch": 2, "resume": "auto", "report": False}
        config["datasets"]["folder"]["build_info"] |= {"max_train": 16, "max_eval": 4}

    yaml = write_tiny(shapes_root, tmp_path / "cache", tmp_path, change)
    monkeypatch.setattr(os, "fsync", refuse)
    for name in files:
        full[:] = [name]
        text = one_error(cli.main(["train", "--cfg-path", str(yaml)]), capsys.readouterr().err)
        assert name in text
        assert "No space left on device; free space there, or choose another folder" in text
        assert ("goes on from its last checkpoint with run.resume=auto" in text) == name.startswith("checkpoint")
        left = [path.name for path in tmp_path.rglob("*.tmp")]
        assert not left
    full.clear()
    assert cli.main(["train", "--cfg-path", str(yaml)]) == 0
    assert (tmp_path / "output" / "results.json").is_file()


@pytest.mark.skipif(not hasattr(os, "setuid") or os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("configs copy train_emoji {root}", "{root}/.*: Permission denied; check the permissions"),
        ("report {results} --html {root}/page.html", "{root}/page.html: Permission denied; check the permissions"),
        ("report {results} --svg {root}/locked.svg", "{root}/locked.svg: Permission denied; check the permissions"),
        ("data emoji --cache-dir {root}/cache", "{root}/cache.*: Permission denied.* Another folder for the drawings"),
        ("data emoji", "~/.cache/neucore: this user has no home folder; set HOME"),
        ("report {root}/secret", "{root}/secret.*: Permission denied; check the permissions"),
    ],
)
def test_another_user_without_a_home(words, message, good, tmp_path, monkeypatch):
    """In a process of a user id that has neither an entry nor permissions."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("NEUCORE_CACHE", raising=False)
    root, place = tmp_path / "root", tmp_path / "open"
    root.mkdir()
    (root / "locked.svg").write_text("kept")
    (root / "secret").mkdir(mode=0o700)
    for folder in (root, *root.parents, good["results"], *good["results"].parents):
        if folder != Path("/tmp") and folder.is_relative_to("/tmp"):
            folder.chmod(0o755)
    place.mkdir()
    place.chmod(0o777)
    words = [word.format(**{**good, "root": root}) for word in words.split()]
    child = os.fork()
    if not child:
        with open(place / "err", "w") as sys.stderr:
            os.setgroups([])
            os.setgid(54321)
            os.setuid(54321)
            os._exit(cli.main(words))
    _, status = os.waitpid(child, 0)
    text = one_error(os.waitstatus_to_exitcode(status), (place / "err").read_text())
    assert re.search(message.format(root=root), text)
    assert (root / "locked.svg").read_text() == "kept"
    assert sorted(os.listdir(root)) == ["locked.svg", "secret"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full of Linux")
@pytest.mark.parametrize(
    ("shell", "code", "message"),
    [
        ("configs > /dev/full", 2, "error: a file, or the output: No space left on device; free space there"),
        ("configs >&-", 0, ""),
        ("configs 2> /dev/full > /dev/full", 2, ""),
        ("configs | true; exit ${{PIPESTATUS[0]}}", None, ""),
        ("report {results} --html /dev/null --svg /dev/stdout | grep -q '</svg>'", 0, "page: /dev/null"),
        ("vocab folder --root {root} --out {new}.json <&- >&- 2>&-; test -s {new}.json", 0, ""),
        ("report {results} --html /dev/full", 2, "error: /dev/full: No space left on device"),
        pytest.param("report {results} --html {new}/a/b/c.html", 0, "page: ", marks=pytest.mark.slow),
    ],
)
def test_real_processes_and_their_output(shell, code, message, good):
    """What only shows when the interpreter ends."""
    command = f"{sys.executable} -m neucore_plugin {shell.format(**good)}"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert done.returncode in ((0, 141) if code is None else (code,)), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert message in done.stderr
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")
