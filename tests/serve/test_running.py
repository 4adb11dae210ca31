"""A real process: what it takes from the network, from whom, and how it ends."""

import http.client
import json
import signal
import socket
import sys
import time
from urllib.parse import urlsplit

import pytest
from serve_case import picture
from serve_process import serving

from neucore_plugin import cli
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.serve import running


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from colour_model import make_folder
    from serve_case import MappedColours

    from neucore_plugin.retrieval import GalleryIndex

    folder = tmp_path_factory.mktemp("served")
    GalleryIndex.build(MappedColours(), make_folder(folder / "pictures"), progress=False).save(folder / "index")
    return folder / "index"


@pytest.fixture(scope="module")
def service(place, tmp_path_factory):
    with serving(place, "--feedback", str(tmp_path_factory.mktemp("votes") / "kept")) as (url, process):
        yield url, process


def ask(url, method, path, body=None, headers=()):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    return answer.status, answer.read()


def search(url, text="blue"):
    status, data = ask(url, "POST", "/search", json.dumps({"text": text, "k": 1}), {"Content-Type": "application/json"})
    return status, json.loads(data)


def test_a_real_service_answers_and_ends_by_a_signal(place):
    with serving(place) as (url, process):
        assert url.startswith("http://127.0.0.1:")
        status, found = search(url)
        assert status == 200 and found["results"][0]["name"] == "blue.png"
        process.send_signal(signal.SIGINT)
        process.wait(20)


def test_a_hundred_megabytes_are_refused_with_a_sentence_that_arrives(service):
    url, _ = service
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    length = {"Content-Type": "multipart/form-data; boundary=x"}
    status, data = ask(url, "POST", "/search", head + bytes(100 << 20), length)
    assert status == 413 and "32 MB" in json.loads(data)["error"]
    assert search(url)[0] == 200


def test_cut_requests_and_noise_leave_the_service_as_it_was(service):
    url, process = service
    where = (urlsplit(url).hostname, urlsplit(url).port)
    head = f"POST /search HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    for data in (b"\x00" * 1000, b"GET", f"{head}Content-Length: 500\r\n\r\n{{".encode(), b"\r\n" * 500):
        with socket.create_connection(where) as connection:
            connection.sendall(data)
    assert process.poll() is None and search(url)[0] == 200


def test_an_upload_that_comes_too_slowly_is_refused_while_others_are_answered(serving_slow):
    url = serving_slow
    where = (urlsplit(url).hostname, urlsplit(url).port)
    with socket.create_connection(where) as connection:
        connection.sendall(
            f"POST /search HTTP/1.1\r\nHost: {where[0]}\r\nContent-Type: application/json\r\n".encode()
            + b"Content-Length: 9\r\n\r\n{"
        )
        assert search(url)[0] == 200
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 408 and "within 1 seconds" in json.loads(answer.read())["error"]


@pytest.fixture
def serving_slow(index):
    """A service in this process that waits a second for a request."""
    import threading

    import uvicorn

    from neucore_plugin.serve.app import create_app
    from neucore_plugin.serve.guard import Limits

    listening = running.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(index, limits=Limits(body_seconds=1)), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield running.address(listening)
    server.should_exit = True
    thread.join(20)


# ---- what is refused before anything is loaded -----------------------------------------------------------------------


def said(capsys, *words):
    assert cli.main(list(words)) == 2
    return capsys.readouterr().err


def test_other_hosts_want_a_token_which_stands_on_no_command_line(place, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("NEUCORE_TOKEN", raising=False)
    for words in (("--host", "0.0.0.0"), ("--allowed-host", "search.example")):
        assert "give a token by --token-file, or by NEUCORE_TOKEN" in said(capsys, "serve", str(place), *words)
    monkeypatch.setenv("NEUCORE_TOKEN", "short")
    assert "at least 16" in said(capsys, "serve", str(place), "--host", "0.0.0.0")
    (tmp_path / "token").write_text("\n")
    assert "is empty" in said(capsys, "serve", str(place), "--token-file", str(tmp_path / "token"))


def test_a_token_of_a_file_or_of_the_environment_is_taken(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("of-a-file-and-long-enough\n")
    monkeypatch.setenv("NEUCORE_TOKEN", "of-the-environment-and-long")
    assert running.find_token(tmp_path / "token", needed=True) == "of-a-file-and-long-enough"
    assert running.find_token(None, needed=False) == "of-the-environment-and-long"
    monkeypatch.delenv("NEUCORE_TOKEN")
    assert running.find_token(None, needed=False) is None


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(place, capsys):
    with running.bind("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert "choose another with --port" in said(capsys, "serve", str(place), "--port", port)


def test_what_is_no_index_is_told(capsys, tmp_path):
    assert "does not exist; build the index again" in said(capsys, "serve", str(tmp_path / "nothing"))


@pytest.mark.parametrize("port", ["-1", "65536", "x", "²"])
def test_a_port_that_is_none_is_told(capsys, port):
    with pytest.raises(SystemExit):
        cli.main(["serve", "index", f"--port={port}"])
    assert "is no port" in capsys.readouterr().err


def test_an_option_is_spelt_in_full(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "index", "--token", "a-token-of-sixteen-letters"])
    assert "unrecognized arguments: --token" in capsys.readouterr().err


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None if name == "fastapi" else object())
    with pytest.raises(ConfigError, match=r"needs fastapi: pip install 'neucore-plugin\[serve\]'"):
        running.require()


def test_loopback_and_the_names_of_this_machine():
    assert all(map(running.is_loopback, ("127.0.0.1", "::1", "localhost", "127.9.9.9")))
    assert not any(map(running.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "search.example")))
    assert running.names("127.0.0.1", ()) == {"localhost", "127.0.0.1"}
    assert socket.gethostname().lower().rstrip(".") in running.names("0.0.0.0", ["Search.Example."])
    assert "search.example" in running.names("0.0.0.0", ["Search.Example."])


@pytest.mark.slow
def test_ten_thousand_requests_of_random_bodies_leave_the_service_as_it_was(service):
    """In one process over kept connections; its memory does not grow with them."""
    import random
    from pathlib import Path

    url, process = service
    chance, connection = random.Random(1), http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    good = (
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="r.png"\r\n\r\n'
        + picture("red")
        + b"\r\n--x--\r\n"
    )

    def memory():
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096

    before = 0
    for number in range(10_000):
        body = bytearray(chance.choice((good, b'{"text": "red", "k": 3}', chance.randbytes(200))))
        for _ in range(chance.randrange(4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        kind = chance.choice(("application/json", "multipart/form-data; boundary=x", "image/png"))
        connection.request(
            "POST", chance.choice(("/search", "/maps", "/feedback")), bytes(body), {"Content-Type": kind}
        )
        answer = connection.getresponse()
        data = json.loads(answer.read())
        assert answer.status < 300 or (answer.status < 500 and set(data) == {"error"}), (answer.status, data)
        if number == 2000:
            before = memory()
    assert memory() - before < 64 << 20
    assert search(url)[0] == 200
