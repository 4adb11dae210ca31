"""Processes that load data: room in shared memory, time limits, and one clear error for each way they may end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial

import pytest
import torch

from neucore_plugin.common import workers
from neucore_plugin.common.errors import ConfigError, DataError, FileError, NeucoreError
from neucore_plugin.common.workers import Batches
from neucore_plugin.training.loaders import BatchLoader

Usage = namedtuple("Usage", "total used free")


def make(plan, cause=None):
    """A batch of 1 MiB a sample; at the second something happens."""
    if plan == [2, 3]:
        if cause == "hangs":
            time.sleep(60)
        elif isinstance(cause, signal.Signals):
            os.kill(os.getpid(), cause)
        elif cause == "leaves":
            os._exit(7)
        elif isinstance(cause, Exception):
            raise cause
    return {"image": torch.zeros(len(plan), 1 << 18), "names": ["a"] * len(plan), "more": [(torch.ones(0), None)]}


PLANS = [[0, 1], [2, 3], [4, 5], [6]]


@pytest.mark.parametrize("count", [0, 2])
def test_batches_come_in_order(count):
    batches = Batches(make, PLANS, count, 30)
    assert len(batches) == 4
    for _ in range(2):
        assert [len(batch["image"]) for batch in batches] == [2, 2, 2, 1]


OPEN = "^too many files are open; fewer workers.*ulimit -n"


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        ("hangs", NeucoreError, "gave nothing for 2 s.*run.num_workers=0.*run.loader_timeout"),
        (signal.SIGBUS, NeucoreError, "was killed by signal: Bus error.*--shm-size=8g.*run.num_workers=0"),
        (signal.SIGKILL, NeucoreError, "was killed by signal: Killed.*a kill that memory is"),
        (signal.SIGSEGV, NeucoreError, "was killed by signal: Segmentation fault"),
        ("leaves", NeucoreError, "a process that loads data exited unexpectedly"),
        (DataError("picture 3 is broken"), DataError, "^picture 3 is broken$"),
        (FileNotFoundError(2, "No such file or directory", "/x/3.png"), FileError, "^/x/3.png: No such file or dir"),
        (RuntimeError("unable to open shared memory object </torch_1>: Too many open files (24)"), NeucoreError, OPEN),
        (RuntimeError("received 0 items of ancdata"), NeucoreError, OPEN),
        (OSError(24, "Too many open files"), FileError, "^Too many open files; fewer workers"),
    ],
)
def test_each_end_is_one_error(cause, kind, message):
    with pytest.raises(kind, match=message) as error:
        list(Batches(partial(make, cause=cause), PLANS, 1, 2))
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_of_the_program_is_not_dressed_up():
    for cause in (RuntimeError("shapes do not match"), KeyError("x")):
        with pytest.raises(type(cause)):
            list(Batches(partial(make, cause=cause), PLANS, 1, 30))


def test_little_shared_memory_is_told_at_the_start(monkeypatch):
    """A sample has 1 MiB; two batches of four a worker are kept, and the one that is trained on."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 44 << 20, 20 << 20))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    many = [[number] for number in range(100)]
    with pytest.raises(ConfigError, match=r"36\.0 MiB in shared memory, but /dev/shm has 20\.0 MiB left") as error:
        Batches(make, many, 4, 30).check_room([0], 4)
    assert all(remedy in str(error.value) for remedy in ("run.num_workers=0", "--shm-size=2g", "--ipc=host"))
    Batches(make, many, 2, 30).check_room([0], 4)  # 20 MiB
    Batches(make, many[:5], 4, 30).check_room([0], 4)  # there are no more
    Batches(make, many, 0, 30).check_room([0], 999)
    Batches(make, [], 4, 30).check_room([0], 999)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="batches of 40"):
        Batches(make, many, 2, 30).check_room([0], 4)
    monkeypatch.setattr(workers, "SHARED_MEMORY", "/none")
    Batches(make, many, 4, 30).check_room([0], 999)


@pytest.mark.parametrize("kind", ["too long", "none at all"])
def test_a_folder_for_temporary_files_that_cannot_be_used(tmp_path, kind):
    """torch would lose every batch in the workers, and wait."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    code = (
        "import sys, tempfile, torch\n"
        "from neucore_plugin import cli\n"
        "from neucore_plugin.common.workers import Batches\n"
        f"if {kind == 'none at all'}: tempfile._candidate_tempdir_list = lambda: ['/none']\n"
        "sys.exit(cli.guarded(lambda: Batches(lambda plan: torch.ones(3), [[1]], 2, 30).check_room([0], 1)))"
    )
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: run.num_workers: the folder for temporary files, TMPDIR={folder}, cannot be")
    assert done.stderr.count("\n") == 1
    assert os.listdir(folder) == []


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.zeros(1 << 16)


@pytest.mark.parametrize("training", [True, False])
def test_the_loaders_of_a_run_look_before_they_start(monkeypatch, training):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 20, 0, 1 << 20))
    with pytest.raises(ConfigError, match="or give the container more"):
        next(iter(BatchLoader(Pictures(), 4, shuffle=training, num_workers=1)))
    assert next(iter(BatchLoader(Pictures(), 4, shuffle=training))).shape == (4, 1 << 16)


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="no mount of its own",
)
@pytest.mark.parametrize("looks", [True, False])
def test_a_real_small_shared_memory(looks):
    """As Docker gives it, and smaller: told before, or where the estimate is wrong, by the bus error."""
    code = (
        "import sys, torch\n"
        "from neucore_plugin import cli\n"
        "from neucore_plugin.common.workers import Batches\n"
        "def make(plan): return torch.ones(len(plan), 1 << 18)\n"
        "def run():\n"
        "    batches = Batches(make, [[n] * 4 for n in range(9)], 2, 30)\n"
        f"    if {looks}: batches.check_room([0], 4)\n"
        "    for batch in batches: pass\n"
        "sys.exit(cli.guarded(run))"
    )
    command = f"mount -t tmpfs -o size=2m tmpfs /dev/shm && exec {sys.executable} -c '{code}'"
    done = subprocess.run(["unshare", "-m", "bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert ("has 2.0 MiB left" if looks else "shared memory is full") in done.stderr
