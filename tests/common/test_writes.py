"""Atomic writes to whatever a path may be; what the system refuses; homes and locks that are not there."""

import errno
import logging
import os
import pickle
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from neucore_plugin.common import files
from neucore_plugin.common.errors import ConfigError, FileError, NeucoreError
from neucore_plugin.weights import checkpoint

linux = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="devices of Linux")


def test_nobody_has_a_home(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("NEUCORE_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    for call in (files.cache_dir, lambda: files.expanded("~"), lambda: files.expanded(Path("~/x"))):
        with pytest.raises(ConfigError, match="no home folder; set HOME, or give a whole path"):
            call()
    for name in ("~nobody-of-this-name/x", "a/~", "x~", ""):
        assert files.expanded(name) == Path(name)


# ---- atomic writes -------------------------------------------------------------------------------------------------


def put(path, text="new"):
    with files.atomic_write(path, "w") as stream:
        stream.write(text)


def test_links_are_followed(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real.txt").write_text("old")
    (tmp_path / "one").symlink_to("far/real.txt")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "new").symlink_to("far/not-there-yet")
    (tmp_path / "folder").symlink_to("far")
    put(tmp_path / "two")
    put(tmp_path / "new", "made")
    put(tmp_path / "folder" / "third", "third")
    assert all((tmp_path / name).is_symlink() for name in ("one", "two", "new", "folder"))
    assert (tmp_path / "far" / "real.txt").read_text() == "new"
    assert (tmp_path / "far" / "not-there-yet").read_text() == "made"
    assert sorted(os.listdir(tmp_path / "far")) == ["not-there-yet", "real.txt", "third"]


def test_permissions_are_those_of_a_plain_write(tmp_path):
    before = os.umask(0o027)
    try:
        put(tmp_path / "new")
        (tmp_path / "plain").write_text("")
        (tmp_path / "kept").write_text("old")
        (tmp_path / "kept").chmod(0o604)
        put(tmp_path / "kept")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"new": 0o640, "plain": 0o640, "kept": 0o604}


def test_a_long_name_is_written(tmp_path):
    for name in ("x" * 255, "ä" * 127):
        put(tmp_path / name)
        assert (tmp_path / name).read_text() == "new"
    assert len(os.listdir(tmp_path)) == 2


@linux
def test_what_takes_a_stream_is_written_into(tmp_path):
    put("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (tmp_path / "link").symlink_to("/dev/null")
    put(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    seen = []
    reader = threading.Thread(target=lambda: seen.append((tmp_path / "pipe").read_text()))
    reader.start()
    put(tmp_path / "pipe", "through")
    reader.join(10)
    assert seen == ["through"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


@linux
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_keeps_what_was_printed(tmp_path, path):
    """Also where it is a file: renaming another over it would lose what stands there."""
    code = (
        "from neucore_plugin.common.files import atomic_write\n"
        "print('before', flush=True)\n"
        f"with atomic_write({path!r}, 'w') as stream: stream.write('page\\n')\n"
        "print('after')"
    )
    (tmp_path / "link").symlink_to(tmp_path / "out.txt")
    with open(tmp_path / "link", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    assert (tmp_path / "out.txt").read_text().split()[:2] == piped.stdout.split()[:2] == ["before", "page"]
    assert piped.stdout.split() == ["before", "page", "after"]
    assert sorted(os.listdir(tmp_path)) == ["link", "out.txt"]


def wrong_targets(root: Path) -> dict[str, tuple[Path, str]]:
    (root / "file").write_text("kept")
    (root / "folder").mkdir()
    (root / "circle").symlink_to(root / "back")
    (root / "back").symlink_to(root / "circle")
    (root / "to-folder").symlink_to(root / "folder")
    return {
        "folder": (root / "folder", "is a folder; give the path of a file"),
        "link to a folder": (root / "to-folder", "is a folder; give the path of a file"),
        "circle": (root / "circle", "these links lead in a circle"),
        "below a file": (root / "file" / "x", "a part of this path is a file where a folder is wanted"),
        "deeper below a file": (root / "file" / "x" / "y", "a part of this path is a file where a folder is wanted"),
        "long": (root / ("x" * 300), "choose a shorter name"),
        "long folder": (root / ("x" * 300) / "y", "choose a shorter name"),
    }


def test_what_cannot_be_written_is_told(tmp_path):
    for path, reason in wrong_targets(tmp_path).values():
        with pytest.raises(FileError) as error:
            put(path)
        assert reason in str(error.value)
        assert str(tmp_path) in str(error.value)
        assert isinstance(error.value, NeucoreError)
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # it travels between processes
    place = socket.socket(socket.AF_UNIX)
    place.bind(str(tmp_path / "s"))
    with pytest.raises(FileError, match="is a device or a socket; give the path of a file"):
        put(tmp_path / "s")
    place.close()
    assert (tmp_path / "file").read_text() == "kept"


@linux
def test_a_drive_is_not_replaced(tmp_path):
    try:
        os.mknod(tmp_path / "drive", stat.S_IFBLK | 0o600, os.makedev(7, 250))
    except PermissionError:
        pytest.skip("only root makes device nodes")
    with pytest.raises(FileError, match="is a device or a socket"):
        put(tmp_path / "drive")
    assert stat.S_ISBLK(os.stat(tmp_path / "drive").st_mode)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_nothing_is_left_of_what_failed(tmp_path, monkeypatch, number, call):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "x").write_text("old")
    if call != "write":
        monkeypatch.setattr(os, call, refuse)

    def write():
        with files.atomic_write(tmp_path / "x") as stream:
            stream.write(b"new")
            if call == "write":
                refuse()

    with pytest.raises(FileError) as error:
        write()
    assert error.value.errno == number
    assert str(error.value).startswith(f"{tmp_path / 'x'}: {os.strerror(number)}; ")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_full_drive_while_a_checkpoint_is_written(tmp_path):
    """torch.save turns the reason into a RuntimeError of its own."""
    code = (
        "import resource, sys, torch\n"
        "from neucore_plugin.weights import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.save({'model': {'w': torch.zeros(300_000)}}, sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    path = tmp_path / "checkpoint_last.pth"
    checkpoint.save({"model": {"w": torch.ones(3)}}, path)
    done = subprocess.run([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout.startswith(f"FileError {path}: File too large; the file system, or `ulimit -f`")
    assert os.listdir(tmp_path) == ["checkpoint_last.pth"]
    assert torch.load(path)["model"]["w"].tolist() == [1, 1, 1]


def test_a_read_only_file_stays(tmp_path, monkeypatch):
    """Renaming over it would work. As root everything may be written, so the answer is that of another user."""
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(FileError, match="Permission denied; check the permissions"):
        put(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"


# ---- locks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EIO])
@pytest.mark.parametrize("name", ["folder", "lock-file"])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog, number, name):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("fcntl.flock", flock)
    with caplog.at_level(logging.WARNING), files.locked(tmp_path / name, without="be alone") as held:
        assert not held
    assert "no locks on this file system: be alone" in caplog.text


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
@pytest.mark.parametrize("whole_process", [False, True])
def test_busy_is_busy(tmp_path, monkeypatch, number, whole_process):
    def busy(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", busy)
    monkeypatch.setattr("fcntl.lockf", busy)
    handle = files.open_lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        files.lock(handle, whole_process=whole_process)
    os.close(handle)


def test_locked_waits(tmp_path):
    order = []

    def second():
        with files.locked(tmp_path) as held:
            order.append(("second", held))

    with files.locked(tmp_path) as held:
        other = threading.Thread(target=second)
        other.start()
        other.join(0.3)
        order.append(("first", held))
    other.join(10)
    assert order == [("first", True), ("second", True)]
