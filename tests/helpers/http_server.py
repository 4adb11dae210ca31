"""A web server on loopback that serves a folder, and misbehaves as it is told."""

import contextlib
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


class Server:
    """Serves `folder`. faults: {last part of a path: what its next requests get, one after the other; then the file}.

    A fault is a status, or: "stall" (headers, then nothing), "trickle" (a byte now and then), "cut" (half of the body,
    then the connection ends), "long" (says twice the length), "short" (says half), "half" (sends and says half),
    "more" (the file and 100 bytes), "html" (a page in its place), "other" (as many other bytes), "away" (no answer),
    "moved" (it lies elsewhere on this server), "circle" (it lies where it was asked for), "ftp" (it lies there). Not
    wrong are "chunked" and "gzip", the file in these codings, and "typed", a type that it does not have.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.faults: dict[str, list] = {}
        self.requests: list[str] = []
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append(self.path)
                path = unquote(urlsplit(self.path).path)
                file = folder / path.lstrip("/")
                waiting = outer.faults.get(file.name) or []
                fault = waiting.pop(0) if waiting else None
                if fault is None and not file.is_file():
                    fault = 404
                with contextlib.suppress(OSError):  # the other side may have gone
                    self.answer(fault, file.read_bytes() if file.is_file() else b"")

            def answer(self, fault, body: bytes) -> None:
                if fault == "away":
                    self.close_connection = True
                    return
                status = 302 if fault in ("moved", "circle", "ftp") else fault if isinstance(fault, int) else 200
                body = {"html": PAGE, "half": body[: len(body) // 2], "other": bytes(len(body))}.get(fault, body)
                body = body + bytes(100) if fault == "more" else PAGE if isinstance(fault, int) else body
                body = gzip.compress(body) if fault == "gzip" else body
                length = {"long": 2 * len(body), "short": len(body) // 2}.get(fault, len(body))
                self.send_response(status)
                self.send_header("Connection", "close")
                if fault == "chunked":
                    self.send_header("Transfer-Encoding", "chunked")
                    halves = body[: len(body) // 2], body[len(body) // 2 :]
                    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*halves, b""))
                else:
                    self.send_header("Content-Length", str(length))
                if fault == "gzip":
                    self.send_header("Content-Encoding", "gzip")
                if fault == "typed":
                    self.send_header("Content-Type", "text/html; charset=latin-1")
                places = {"moved": f"/.{self.path}", "circle": self.path}
                if status == 302:
                    self.send_header("Location", places.get(fault, f"ftp://127.0.0.1:9{self.path}"))
                self.end_headers()
                if fault == "stall":
                    outer.over.wait(30)
                elif fault == "trickle":
                    while not outer.over.wait(0.2):
                        self.wfile.write(b"x")
                else:
                    self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextlib.contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[Server]:
    found = Server(folder, port)
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.over.set()
        found.server.shutdown()
        found.server.server_close()
        thread.join()
