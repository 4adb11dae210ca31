"""Whole samples from a real web server on loopback, also one that stalls, cuts, lies, and answers with errors."""

import contextlib
import os
import resource
import shutil
import signal
import stat
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import stream_case as case
from http_server import serving

from neucore_plugin.common.errors import ConfigError, DataError, FileError
from neucore_plugin.datasets.shards import remote, stream
from neucore_plugin.training.loaders import StreamLoader

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; and short waits."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "STALL", 1)
    return tmp_path / "cache" / "streams"


@pytest.fixture
def server(whole):
    with serving(whole.parent) as found:
        yield found


def read_all(url: str, workers: int = 0) -> list[int]:
    loader = StreamLoader(case.streamed(url), 9, seed=3, num_workers=workers)
    return [index for batch in case.indices(loader) for index in batch]


TWO = "train-{00002..00003}.tar"  # enough for one of them to fail


def kept(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_samples_in_the_same_order_as_from_the_folder(server, cache, whole, workers):
    expected = read_all(str(whole), workers)
    assert read_all(f"{server.url}/out", workers) == expected
    asked = list(server.requests)
    assert len(asked) == len(set(asked)) == 1 + 1 + 16 + 3  # manifest, triplets, shards, what is evaluated on
    assert {path.read_bytes() for path in whole.rglob("*") if path.is_file()} == set(kept(cache).values())
    assert read_all(f"{server.url}/out/", workers) == expected
    assert server.requests[len(asked) :] == ["/out/stream.json"]  # the shards may have been written anew
    found = stream.open_stream(f"{server.url}/out", "folder", allow_remote=True)
    assert {image.read() for image in found.images.values()} == {
        image.read() for image in stream.open_stream(str(whole)).images.values()
    }


def test_shards_are_fetched_when_they_are_read_and_by_pattern(server, cache, whole):
    stream.open_stream(f"{server.url}/out/train-{{00003..00004}}.tar", wanted=["train"], allow_remote=True)
    assert sorted(server.requests) == ["/out/stream.json", "/out/triplets-train.json"]
    batch = next(iter(StreamLoader(case.streamed(f"{server.url}/out/train-00003.tar"), 9)))
    assert [path for path in server.requests if "/train-" in path] == ["/out/train-00003.tar"]
    numbers = stream.open_stream(f"{whole}/train-00003.tar").train["train"][1][0].numbers
    assert set(batch["index"].tolist()) <= set(numbers)


def test_a_signature_goes_with_every_file_and_into_no_message(server, cache):
    root = f"{server.url}/out/?sig=a%2Fb&se=2030"
    assert len(read_all(root)) == 144
    assert {path.split("?")[1] for path in server.requests} == {"sig=a%2Fb&se=2030"}
    server.faults["stream.json"] = ["html"] * 9
    with pytest.raises(DataError) as caught:
        read_all(root)
    assert "sig" not in str(caught.value)


def test_letters_beyond_ascii_are_percent_encoded(server, cache, whole):
    folder = whole.parent / "modèle"
    if not folder.exists():
        folder.symlink_to(whole)
    assert len(read_all(f"{server.url}/modèle")) == 144
    assert server.requests[0] == "/mod%C3%A8le/stream.json"


PASSING = {
    "manifest": [("stream.json", fault) for fault in ("cut", "long", "short", "html", "away", 404, 500, "stall")],
    "shard": [
        ("train-00002.tar", fault)
        for fault in (
            "cut",
            "long",
            "short",
            "half",
            "more",
            "html",
            "other",
            "away",
            403,
            404,
            503,
            "stall",
            "trickle",
        )
    ],
    "evaluated on": [("shard-00000.tar", fault) for fault in ("half", "html")],
}


@pytest.mark.parametrize(("file", "fault"), [pair for pairs in PASSING.values() for pair in pairs])
def test_a_fault_that_passes_is_tried_again(server, cache, whole, file, fault):
    server.faults[file] = [fault]
    assert read_all(f"{server.url}/out/{TWO}") == read_all(f"{whole}/{TWO}") != []
    assert sum(path.endswith(f"/{file}") for path in server.requests) == 2
    assert set(kept(cache).values()) <= {path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert len(kept(cache)) == 1 + 1 + 2 + 3


@pytest.mark.parametrize("kind", ["moved", "chunked", "gzip", "typed"])
@pytest.mark.parametrize("file", ["stream.json", "train-00002.tar"])
def test_other_ways_to_send_a_file_are_no_faults(server, cache, whole, kind, file):
    server.faults[file] = [kind]
    assert read_all(f"{server.url}/out/{TWO}") == read_all(f"{whole}/{TWO}") != []
    assert sum(path.endswith(f"/{file}") for path in server.requests) == (2 if kind == "moved" else 1)


def test_a_server_that_is_started_anew_meanwhile_is_waited_for(whole, cache, monkeypatch, caplog):
    monkeypatch.setattr(remote, "PAUSE", 0.2)
    with serving(whole.parent) as server:
        samples = iter(StreamLoader(case.streamed(f"{server.url}/out"), 9, seed=3))
        next(samples)
    port = server.server.server_port
    later = threading.Timer(0.5, lambda: started.append(stack.enter_context(serving(whole.parent, port))))
    started: list = []
    with contextlib.ExitStack() as stack:
        later.start()
        assert len(list(samples)) == 15
        assert started[0].requests and "Couldn't connect to server; try 2 of 6" in caplog.text


def test_a_shard_that_was_replaced_is_told_unless_it_was_fetched_before(server, cache, whole, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 1)
    loader = StreamLoader(case.streamed(f"{server.url}/out"), 9, seed=3)
    assert len(list(loader)) == 16
    server.faults["train-00002.tar"] = ["other"] * 9
    loader.set_position(1)
    assert len(list(loader)) == 16
    shutil.rmtree(cache)
    loader.set_position(2)
    with pytest.raises(DataError, match=r"SHA-256 does not fit"):
        list(loader)


def test_processes_that_fetch_one_shard_do_not_disturb_each_other(server, cache, whole):
    (file,) = stream.open_stream(f"{server.url}/out/train-00000.tar", wanted=["train"], allow_remote=True).train[
        "train"
    ][1]
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        paths = {found.result() for found in [pool.submit(file.local) for _ in range(8)]}
    assert {path.read_bytes() for path in paths} == {(whole / "train-00000.tar").read_bytes()}
    assert not list(cache.rglob("*.tmp"))


def test_a_full_drive_of_the_cache_is_told_at_once(server, cache, whole, monkeypatch):
    dataset = case.streamed(f"{server.url}/out")
    size = max(shard.size for shard in dataset.shards)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # a limit of files stands for the drive: the system refuses to write in the middle of a shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
        with pytest.raises(FileError, match="NEUCORE_CACHE names another cache"):
            list(StreamLoader(dataset, 9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sum("/train-" in path for path in server.requests) == 1
    assert not list(cache.rglob("*.tmp"))


LASTING = {
    "cut": r"curl: \(18\) .*remaining to read",
    "long": r"curl: \(18\) .*remaining to read",
    "half": r"[\d,]+ of [\d,]+ bytes came",
    "short": r"[\d,]+ of [\d,]+ bytes came",
    "more": r"more than [\d,]+ bytes came",
    "html": "it is a web page, of a login or an error",
    "other": r"its content is not what was written \(SHA-256 does not fit\)",
    404: "error: 404",
    "circle": r"curl: \(47\) Maximum .* redirects followed",
    "ftp": r"curl: \(1\) Protocol \"ftp\" not supported",
    "stall": r"nothing came for 1 seconds|curl: \(28\) Operation too slow",
    "trickle": r"curl: \(28\) Operation too slow",
    500: "error: 500",
    503: "error: 503",
}


@pytest.mark.parametrize(("fault", "workers"), [*((fault, 0) for fault in LASTING), ("cut", 1), ("stall", 2)])
def test_a_fault_that_lasts_is_one_error_after_a_few_tries(server, cache, whole, fault, workers, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    server.faults["train-00002.tar"] = [fault] * 999
    with pytest.raises(DataError, match=rf"train-00002.tar' cannot be fetched: .*({LASTING[fault]})") as caught:
        read_all(f"{server.url}/out/{TWO}", workers)
    assert "(2 tries)" in str(caught.value) and "\n" not in str(caught.value)
    assert sum(path.endswith("/train-00002.tar") for path in server.requests) == (102 if fault == "circle" else 2)
    whole_files = {path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert set(kept(cache).values()) <= whole_files  # nothing half-written, nothing that is something else


def test_a_manifest_that_never_comes_leaves_nothing(server, cache, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    for fault in ("html", "cut", 404):
        server.faults["stream.json"] = [fault] * 2
        with pytest.raises(DataError, match=r"stream.json' cannot be fetched"):
            stream.open_stream(f"{server.url}/out", allow_remote=True)
        assert kept(cache) == {}
    with pytest.raises(DataError, match="cannot be fetched: curl: .*Couldn't connect to server"):
        stream.open_stream("http://127.0.0.1:9/out", allow_remote=True)


def test_what_a_killed_download_left_is_removed(server, cache, whole):
    (file,) = stream.open_stream(f"{server.url}/out/train-00000.tar", wanted=["train"], allow_remote=True).train[
        "train"
    ][1]
    left, fresh = (Path(file.path).with_name(f".{n}.tar.{n}.tmp") for n in "ab")
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (1, 1))
    assert file.local().read_bytes() == (whole / "train-00000.tar").read_bytes()
    assert not left.exists() and fresh.exists()  # another process may still be writing that one


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs a folder that is refused")
def test_a_cache_that_cannot_be_written_is_no_fault_of_the_server(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FileError, match="NEUCORE_CACHE names another cache"):
        stream.open_stream(f"{server.url}/out", allow_remote=True)
    assert len(server.requests) <= 1


REFUSED = [
    *("pipe:curl http://x/y", "pipe:touch exploded", "file:///etc/passwd", "ftp://x/y", "hf://x/y", "ais://b/x"),
    *("sftp://x/y", "javascript://x", "http://x/a b", "http://x/a;touch exploded", "http://x/$(touch exploded)"),
    *("http://x/`touch exploded`", "http://x/a|b", "http://x/a&touch", "http://x/a>b", "http://x/a'b", 'http://x/a"b'),
    *("http://x/a\\b", "http://x/a\nb", "http://x/a\x00b", "http://x/[1-9]", "http://x/a*", "http://x/a#b"),
    *(
        "http://user:secret@x/a",
        "http://-o/tmp/x",
        "http:///a",
        "http://x/../a",
        "gs://b/a?*",
        "gs://b/**",
        "s3://b/a b",
    ),
    *("s3://--profile/x", "http://x:99999999/a", "http://x/a?b=`c`", "http://x/a?b=$HOME", "http://x/a\u202eb"),
]


@pytest.mark.parametrize("url", REFUSED)
@pytest.mark.parametrize("tail", ["", "/train-{00000..00001}.tar"])
def test_addresses_that_might_reach_a_shell_or_a_program_are_refused(url, tail, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail(f"a program was started: {a}"))
    with pytest.raises(ConfigError) as caught:
        stream.open_stream(url + tail, allow_remote=True)
    assert "secret" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_nothing_is_fetched_unless_it_is_allowed(server, cache):
    with pytest.raises(ConfigError, match="set build_info.allow_remote=true if you trust it"):
        stream.open_stream(f"{server.url}/out")
    assert server.requests == [] and not cache.exists()


def test_rewriting_rules_of_the_environment_are_not_followed(server, cache, monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", f"{server.url}=pipe:touch exploded;")
    assert len(read_all(f"{server.url}/out")) == 144


@pytest.mark.parametrize(("scheme", "program"), [("s3", "aws"), ("gs", "gsutil")])
def test_object_storage_is_read_by_its_program(scheme, program, cache, whole, tmp_path, monkeypatch):
    """A stand-in for the program, which is given an address as one word and writes the object to its output."""
    tool = tmp_path / "bin" / program
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f'for word; do case "$word" in {scheme}://*) found=$word;; esac; done\n'
        f'exec cat "{whole.parent}/${{found#{scheme}://bucket/}}"\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    assert sorted(read_all(f"{scheme}://bucket/out")) == sorted(read_all(str(whole)))
    calls = (tmp_path / "calls").read_text().splitlines()
    expected = {
        "aws": "s3 cp --only-show-errors s3://bucket/out/stream.json -",
        "gsutil": "cat gs://bucket/out/stream.json",
    }
    assert calls[0] == expected[program]
    monkeypatch.setattr(remote, "TRIES", 1)
    tool.write_text("#!/bin/sh\necho 'fatal error: (403)\n Forbidden' >&2\nexit 1\n")
    with pytest.raises(DataError, match=r"cannot be fetched: fatal error: \(403\) Forbidden \(1 tries\)"):
        stream.open_stream(f"{scheme}://bucket/out", allow_remote=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=f"is read by the program `{program}`; install it"):
        stream.open_stream(f"{scheme}://bucket/out", allow_remote=True)
