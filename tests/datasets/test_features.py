"""Feature caches: equal to what was encoded, resumed after a kill, never stale."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from neucore_plugin.common.errors import DataError, FileError
from neucore_plugin.datasets.feature_cache import build_cache, content_fingerprints

NAMES = [f"item-{number}" for number in range(50)]


def rows_of(name: str) -> np.ndarray:
    """Ragged: 0 to 4 rows of width 3, the values follow from the name."""
    number = int(name.split("-")[1])
    return np.full((number % 5, 3), number / 64, dtype=np.float32) + np.arange(number % 5)[:, None]


def encode(part):
    for name in part:
        yield rows_of(name), np.array([int(name.split("-")[1]), -1.0], dtype=np.float32)


def check(cache):
    for name in NAMES:
        assert torch.equal(cache.tokens(name), torch.from_numpy(rows_of(name)))
        assert cache.pooled(name).tolist() == [float(name.split("-")[1]), -1.0]


def build(root, encoder="a", names=NAMES, contents=None, encode=encode):
    return build_cache(root, "images", encoder, names, contents or [""] * len(names), encode, batch_size=4)


def test_holds_what_was_encoded_and_is_read_again_without_encoding(tmp_path):
    check(build(tmp_path))

    def refuse(part):
        raise AssertionError("a complete cache must not be encoded again")

    check(build(tmp_path, encode=refuse))


def test_survives_pickling_for_loader_workers(tmp_path):
    cache = build(tmp_path)
    cache.tokens("item-1")
    check(pickle.loads(pickle.dumps(cache)))


@pytest.mark.parametrize(
    "change", [{"encoder": "b"}, {"contents": ["x"] * 50}, {"names": NAMES[:-1]}, {"names": NAMES[::-1]}]
)
def test_another_encoder_content_or_item_list_is_another_cache(tmp_path, change):
    first = build(tmp_path)
    calls = []

    def counting(part):
        calls.extend(part)
        return encode(part)

    second = build(tmp_path, **change, encode=counting)
    assert second.folder != first.folder
    assert sorted(calls) == sorted(change.get("names", NAMES))


def test_content_fingerprint_sees_a_changed_file_of_the_same_size_and_time(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    stat = path.stat()
    before = content_fingerprints([path])
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_fingerprints([path]) != before


def test_killed_build_goes_on_where_it_stopped(tmp_path):
    script = (
        f"import os, signal, sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_features as t\n"
        "seen = []\n"
        "def dying(part):\n"
        "    seen.extend(part)\n"
        "    if len(seen) > 40: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return t.encode(part)\n"
        f"t.build({str(tmp_path)!r}, encode=dying)\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert not (folder / "manifest.json").exists()
    recorded = json.loads((folder / "progress.json").read_text())["items"]
    assert recorded == 32  # eight batches of four were recorded, the ninth and tenth were not
    again = []

    def counting(part):
        again.extend(part)
        return encode(part)

    check(build(tmp_path, encode=counting))
    assert again == NAMES[32:]


def test_build_whose_files_lost_their_end_begins_again(tmp_path):
    """Otherwise the gap would be filled with zeros."""
    cache = build(tmp_path)
    (cache.folder / "manifest.json").unlink()
    path = cache.folder / "pooled.f16"
    os.truncate(path, path.stat().st_size - 2)
    check(build(tmp_path))


def test_truncated_file_is_refused_with_the_remedy(tmp_path):
    cache = build(tmp_path)
    path = cache.folder / "tokens.f16"
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(DataError, match=r"tokens\.f16: damaged feature cache .* Delete"):
        build(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_two_processes_without_locks_never_mix(tmp_path, monkeypatch, caplog, number):
    """Each fills a folder of its own; the first to finish gives it the name."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    def slow(part):
        time.sleep(0.002)
        yield from encode(part)

    monkeypatch.setattr("fcntl.flock", flock)
    with ThreadPoolExecutor(3) as pool:
        for cache in pool.map(lambda _: build(tmp_path, encode=slow), range(3)):
            check(cache)
    assert "no locks on this file system" in caplog.text
    check(build(tmp_path))
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_what_was_begun_with_locks_is_filled_without(tmp_path, monkeypatch):
    def stop(part):
        if "item-40" in part:
            raise KeyboardInterrupt
        yield from encode(part)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, encode=stop)
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no locks")))
    check(build(tmp_path))


def test_a_complete_cache_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    build(tmp_path)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "mkdir", "replace"):
        monkeypatch.setattr(os, name, refuse)
    check(build(tmp_path))
    with pytest.raises(FileError, match="Read-only file system; choose .*run.cache_dir, or the environment variable"):
        build(tmp_path / "new")
