"""Kill -9 at any moment of a build, an add, a removal, a sync, a compaction: what was acknowledged is there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from colour_model import ColourModel, draw

from neucore_plugin.common.errors import DataError, FileError
from neucore_plugin.retrieval import GalleryIndex

HELPERS = Path(__file__).parents[1] / "helpers"
KILLS = 20


def follow(lines, there, doubtful):
    """What is acknowledged after these lines: names there for certain, and those that may be either."""
    for line in lines:
        what, names = json.loads(line)
        if what in ("built", "added"):
            there |= set(names)
        elif what == "removing":
            there -= set(names)
            doubtful |= set(names)
        elif what == "removed":
            doubtful -= set(names)
    return there, doubtful


@pytest.mark.slow
def test_twenty_kills_lose_nothing_that_was_acknowledged(tmp_path):
    chance = random.Random(11)
    for number in range(12):
        draw(tmp_path / "pictures" / "first" / f"p{number:02d}.png", (20 * number, 9, 9))
    index, there, doubtful, seen = tmp_path / "index", set(), set(), []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS), *sys.path])}
    for kill in range(KILLS):
        log = tmp_path / f"{kill}.txt"
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, HELPERS / "crash_case.py", index, tmp_path / "pictures", str(kill)],
                stdout=stream, stderr=subprocess.PIPE, env=environment,
            )  # fmt: skip
            end = time.monotonic() + 120
            while kill > 2 and not log.stat().st_size and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)  # until it has opened the index; the first kills fall into the build
            time.sleep(chance.uniform(0.05, 1.5) if kill > 2 else chance.uniform(4, 8))
            process.send_signal(signal.SIGKILL)
            _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
        lines = log.read_text().splitlines(keepends=True)
        lines = [line for line in lines if line.endswith("\n")]
        seen += [json.loads(line)[0] for line in lines]
        there, doubtful = follow(lines, there, doubtful)
        if not (index / "manifest.json").exists():
            assert not there
            continue
        found = GalleryIndex.open(index, ColourModel())
        assert found.verify(ColourModel())["problems"] == []
        names = found.names
        assert len(names) == len(set(names))
        assert there <= set(names), sorted(there - set(names))
        # What is there beyond what was acknowledged was the call in progress, or is of the folder that is built.
        extra = {name for name in set(names) - there - doubtful if not name.startswith(("p", "s"))}
        assert len([name for name in extra if f"/{kill}-" in name or name.startswith(f"{kill}-")]) <= 1
        doubtful &= set(names)
        there |= doubtful | set(names)
        doubtful.clear()
    assert {"built", "added", "removed", "compacted"} <= set(seen), seen


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a small file system, which root alone may")
def test_a_full_file_system_leaves_the_index_as_it_was(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for number in range(200):
            draw(tmp_path / "pictures" / f"{number:03d}.png", (number, 0, 0))
        files = sorted((tmp_path / "pictures").glob("*.png"))
        options = {"progress": False, "workers": 1}
        index = GalleryIndex.build(ColourModel(), files[:20], out=place / "index", **options)
        names = index.names

        def fill():
            for file in files[20:]:
                names.extend(index.add([file], **options))

        with pytest.raises(FileError, match="free space there|disk is full"):
            fill()
        assert GalleryIndex.load(place / "index").names == names
        assert len(names) > 20
    finally:
        subprocess.run(["umount", "-l", place], check=False)
    with pytest.raises(DataError):
        GalleryIndex.open(place / "index")
