"""Shards from web servers and object storage: fetched whole into the local cache, checked, then read as local files.

A file is opened by webdataset's own openers (curl, gsutil; s3 by the `aws` program), whose arguments are a list: no
shell sees an address. `pipe:`, which webdataset gives to a shell, is refused, as is every scheme that is not listed.
Knows no host, no model.
"""

import contextlib
import hashlib
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit, urlunsplit

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.files import atomic_write, file_errors, parse_json

PROGRAMS = {"http": "curl", "https": "curl", "s3": "aws", "gs": "gsutil"}
TRIES = 4
PAUSE = 1.0  # seconds before the second try, twice as long before each further one
STALL = 30.0  # seconds without BLOCK bytes, after which a try is given up
BLOCK = 1 << 16
MAX_UNKNOWN = 256 << 20  # bytes of a file whose size is not known before

_HOST = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_PATH = re.compile(r"[A-Za-z0-9/._~%+=,:@-]*")  # what neither a shell nor curl nor gsutil reads as a sign of its own
_QUERY = re.compile(r"[A-Za-z0-9/._~%+=,:@&?-]*")
_NONE = re.compile("")
_CURL = {  # the exit codes that a user can make something of
    6: "the host is not known",
    7: "the connection was refused",
    18: "the body was cut short",
    22: "the server answers with an error, such as 404 (not found) or 403 (forbidden)",
    28: "the connection timed out",
    35: "no TLS connection came about",
    60: "the server's certificate is not trusted",
}


class _Failed(Exception):
    """A try that another may mend."""


def is_remote(text: str) -> bool:
    """Whether a text is an address rather than a path; also of those that are refused."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", text) is not None


def checked_url(text: str) -> str:
    """An address that is safe to hand on, other letters than ASCII percent-encoded. Raises ConfigError."""
    parts = urlsplit(text) if text.isprintable() else None
    if parts is None or parts.scheme not in PROGRAMS:
        raise ConfigError(
            f"{shown(text)}: is no address that shards are fetched from; allowed: {', '.join(PROGRAMS)}, and local "
            "folders by their path. `pipe:` is refused, since it runs commands"
        )
    if "@" in parts.netloc:
        raise ConfigError(f"{shown(text)}: holds a user or password, which logs would show; use a signed address")
    web = parts.scheme.startswith("http")  # keys of object storage are no addresses: nothing is encoded in them
    path = quote(parts.path, safe="".join(map(chr, range(32, 127)))) if web else parts.path
    good = _HOST.fullmatch(parts.netloc) and _PATH.fullmatch(path) and (_QUERY if web else _NONE).fullmatch(parts.query)
    if not good or "#" in text:
        raise ConfigError(
            f"{shown(text)}: holds signs that an address of shards may not have (spaces, quotes, brackets, any of "
            "$;|&<>*!#\\); percent-encode them, such as %20 for a space"
        )
    if ".." in parts.path.split("/"):
        raise ConfigError(f"{shown(text)}: holds '..'; give the address without it")
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def beside(folder: str, name: str) -> str:
    """The address of a file in a folder; what follows a question mark, such as a signature, stays at the end."""
    parts = urlsplit(folder)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{name}", parts.query, ""))


def shown(url: str) -> str:
    """An address for messages: without password and signature."""
    text = re.sub(r"//[^/@]*@", "//", url.split("?")[0])
    return repr(text[:200])


def fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> Path:
    """The file of an address at `path`, fetched where it is not there already with that size.

    size, sha256: what it must have; without them it must be JSON. `TRIES` tries, each ended when nothing comes for
    `STALL` seconds; `path` stands only when whole. Raises DataError, and FileError where the cache cannot be written.
    """
    if size is not None and path.is_file() and path.stat().st_size == size:
        return path
    scheme = urlsplit(url).scheme
    if shutil.which(PROGRAMS[scheme]) is None:
        raise DataError(f"{shown(url)}: {scheme} is read by the program `{PROGRAMS[scheme]}`; install it")
    reason = ""
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE * 2 ** (number - 1))
        try:
            with file_errors(path, note="the environment variable NEUCORE_CACHE names another cache"):
                _sweep(path)
                with atomic_write(path) as out:
                    _copy(url, out, size, sha256)
            return path
        except _Failed as error:
            reason = str(error)
    raise DataError(
        f"{shown(url)} cannot be fetched: {reason} ({TRIES} tries). Check the address and the server, then start "
        "again; what was fetched whole is kept"
    )


def _sweep(path: Path) -> None:
    """Remove what a killed process left of this file."""
    for old in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 10 * STALL:
                old.unlink()


def _copy(url: str, out: IO[bytes], size: int | None, sha256: str | None) -> None:
    digest, count, head = hashlib.sha256(), 0, b""
    limit = MAX_UNKNOWN if size is None else size
    text = bytearray()
    with _stream(url) as read:
        while block := read():
            count += len(block)
            head = head or block[:200]
            if count > limit:
                raise _Failed(f"more than {limit:,} bytes came{_page(head)}")
            digest.update(block)
            if size is None:
                text += block
            out.write(block)
    if size is None:
        try:
            parse_json(text.decode())
        except ValueError:
            raise _Failed(f"what came is no JSON{_page(head)}") from None
    elif count != size:
        raise _Failed(f"{count:,} of {size:,} bytes came{_page(head)}")
    elif digest.hexdigest() != sha256:
        raise _Failed(f"its content is not what was written (SHA-256 does not fit){_page(head)}")


def _page(head: bytes) -> str:
    return "; it is a web page, of a login or an error" if head.lstrip()[:1] == b"<" else ""


@contextlib.contextmanager
def _stream(url: str) -> Iterator[Callable[[], bytes]]:
    """A function that reads the next bytes; its end, also by an error, ends the program that fetches them."""
    from webdataset.gopen import Pipe, gopen_schemes

    scheme = urlsplit(url).scheme
    if scheme == "s3":  # the one that webdataset has no opener for
        pipe = Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode="rb", bufsize=BLOCK)
    else:  # not gopen() itself, which would follow rewriting rules of the environment to anywhere
        pipe = gopen_schemes[scheme](url, "rb", BLOCK)
    done, stalled = threading.Event(), threading.Event()
    waiting_since = math.inf

    def watch() -> None:
        while not done.wait(min(1.0, STALL / 4)):
            if time.monotonic() - waiting_since > STALL:
                stalled.set()
                pipe.proc.kill()
                return

    def read() -> bytes:
        nonlocal waiting_since
        waiting_since = time.monotonic()
        block = pipe.stream.read(BLOCK)
        if not block and pipe.proc.wait() != 0:
            raise _Failed(_why(pipe.proc.returncode, stalled.is_set()))
        waiting_since = math.inf  # a slow disk is no stalled connection
        return block

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield read
    finally:
        done.set()
        thread.join()
        if pipe.proc.poll() is None:
            pipe.proc.kill()
        pipe.stream.close()
        pipe.proc.wait()


def _why(code: int, stalled: bool) -> str:
    if stalled:
        return f"nothing came for {STALL:g} seconds"
    return _CURL.get(code, f"the program that fetches it ended with {code}")
