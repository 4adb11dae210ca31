"""What comes over connections: heads that do not end or lie, too many at once, those who go, and the end."""

import contextlib
import http.client
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
import uvicorn

from neucore_plugin.serve import connection, running
from neucore_plugin.serve.app import create_app
from neucore_plugin.serve.guard import Limits


@pytest.fixture
def live(index, monkeypatch):
    """A service in this process that waits half a second for a head: (address, server, thread)."""
    monkeypatch.setattr(connection.Connection, "seconds", 0.5)
    monkeypatch.setattr(connection, "MOST", 60)
    started, servers = threading.Event(), []
    run = uvicorn.Server.run

    def kept(server, sockets):
        servers.append(server)
        run(server, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", kept)
    listening = running.bind("127.0.0.1", 0)
    app = create_app(index, limits=Limits(body_seconds=1, waiting=8))
    thread = threading.Thread(target=running.serve, args=(app, listening, lambda _: started.set()))
    thread.start()
    assert started.wait(20)
    yield running.address(listening), servers[0], thread
    servers[0].should_exit = True
    thread.join(20)


def connect(url):
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=20)


def answer_of(raw):
    """(status, JSON) that a connection says next."""
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    return answer.status, json.loads(answer.read())


def ask(url, text="blue", timeout=20):
    client = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    client.request("POST", "/search", json.dumps({"text": text, "k": 1}), {"Content-Type": "application/json"})
    answer = client.getresponse()
    return answer.status, json.loads(answer.read())


def head(url, *lines, first="POST /search HTTP/1.1"):
    return "\r\n".join([first, f"Host: {urlsplit(url).netloc}", *lines, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: -1",),
        ("Content-Length: 1e3",),
        ("Content-Length : 5",),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: xchunked",),
        ("X" * 200_000,),
        ("X-A: " + "a" * 200_000,),
        ("X-A: a\0b",),
        ("Host: other",),
    ],
    ids=range(11),
)
def test_heads_that_can_be_read_in_two_ways_are_refused_as_json_and_end_the_connection(live, lines):
    url, _, _ = live
    with connect(url) as raw, contextlib.suppress(ConnectionError):
        raw.sendall(head(url, *lines) + b"0\r\n\r\n" + head(url, first="GET /health HTTP/1.1"))
        status, content = answer_of(raw)
        assert status in (400, 501) and set(content) == {"error"}
        with contextlib.suppress(ConnectionError):
            assert raw.recv(1) == b""  # what came after it is no request
    assert ask(url)[0] == 200


@pytest.mark.parametrize(
    "noise",
    [b"\0" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET / HTTX/1.1\r\n\r\n"],
    ids=["zeros", "no address", "tls", "no protocol"],
)
def test_what_is_no_http_is_told_as_json(live, noise):
    with connect(live[0]) as raw:
        raw.sendall(noise)
        raw.sendall(b"\r\n\r\n")
        status, content = answer_of(raw)
        assert status == 400 and "no valid HTTP" in content["error"]


def test_a_head_that_does_not_end_is_refused_also_when_it_trickles(live):
    url, _, _ = live
    with connect(url) as silent, connect(url) as half, connect(url) as slow:
        half.sendall(b"GET / HTTP/1.1\r\nHost: local")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 15:
                slow.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - began < 14
        status, content = answer_of(half)
        assert status == 408 and "within 0.5 seconds" in content["error"]
        assert silent.recv(1) == b""
    assert ask(url)[0] == 200


def test_a_body_that_is_sent_on_after_the_refusal_ends_the_connection(live):
    url, _, _ = live
    with connect(url) as raw:
        raw.sendall(head(url, "Transfer-Encoding: chunked", first="POST /nothing HTTP/1.1"))
        assert answer_of(raw)[0] == 404
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 15:
                raw.sendall(b"1\r\nx\r\n")
                time.sleep(0.02)
        assert time.monotonic() - began < 14


def test_an_answer_that_nobody_reads_is_given_up(live):
    url, server, _ = live
    with connect(url) as raw:
        raw.settimeout(5)
        page = head(url, first="GET / HTTP/1.1")
        with contextlib.suppress(OSError):
            for _ in range(20_000):
                raw.sendall(page)
        until(lambda: not server.server_state.connections)
    assert ask(url)[0] == 200


def test_idle_connections_stand_in_nobodys_way_and_too_many_are_refused(live, monkeypatch):
    url, server, _ = live
    monkeypatch.setattr(connection.Connection, "seconds", 20)
    with contextlib.ExitStack() as idle:
        for number in range(58):
            raw = idle.enter_context(connect(url))
            raw.sendall(b"" if number % 2 else b"POST /search HT")
        assert ask(url)[0] == 200
        for _ in range(2):
            idle.enter_context(connect(url)).sendall(b"G")
        until(lambda: len(server.server_state.connections) == 60)
        with connect(url) as late:
            status, content = answer_of(late)
            assert status == 503 and "try again soon" in content["error"]
    until(lambda: len(server.server_state.connections) < 2)
    assert ask(url)[0] == 200


# ---- those who go, and the end ---------------------------------------------------------------------------------------


@pytest.fixture
def held(index, monkeypatch):
    """The model waits until `go` is set: (go, sizes of what it has encoded)."""
    go, sizes, encode = threading.Event(), [], index.model.encode_query

    def slow(pixels, said):
        sizes.append(len(said))
        go.wait(20)
        return encode(pixels, said)

    monkeypatch.setattr(index.model, "encode_query", slow)
    yield go, sizes
    go.set()


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def query(url, text="blue"):
    body = json.dumps({"text": text}).encode()
    return head(url, "Content-Type: application/json", f"Content-Length: {len(body)}") + body


def test_the_queries_of_those_who_went_are_dropped(held, live):
    (go, sizes), (url, server, _) = held, live
    with connect(url) as first:
        first.sendall(query(url))
        until(lambda: sizes)
        for _ in range(3):
            with connect(url) as raw:
                raw.sendall(query(url))
                until(lambda: len(server.server_state.tasks) == 2)
            until(lambda: len(server.server_state.tasks) == 1)
        go.set()
        assert answer_of(first)[0] == 200
    assert ask(url)[0] == 200 and sizes == [1, 1]


@pytest.mark.parametrize("stuck", [False, True])
def test_the_end_answers_what_waits_or_says_that_it_comes(held, live, stuck):
    (go, sizes), (url, server, thread) = held, live
    with connect(url) as first, connect(url) as second:
        first.sendall(query(url))
        until(lambda: sizes)
        second.sendall(query(url))
        until(lambda: len(server.server_state.tasks) == 2)
        began = time.monotonic()
        server.should_exit = True  # what SIGTERM sets
        time.sleep(0.5)
        if not stuck:
            go.set()
        answers = [answer_of(first), answer_of(second)]
        thread.join(20)
        assert not thread.is_alive() and time.monotonic() - began < 9.5
    for status, content in answers:
        assert (status, "ending" in str(content)) == ((503, True) if stuck else (200, False))
