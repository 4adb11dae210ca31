"""Shards from web servers and object storage: fetched whole into the local cache, checked, then read as local files.

A program fetches a file, as with webdataset and through its `Pipe`; the arguments are ours, since webdataset's curl
repeats a server's error 30 times in silence and follows a redirect to FTP. They are a list: no shell sees an address.
`pipe:`, which webdataset gives to a shell, is refused, as is every scheme that is not listed.
Knows no host, no model.
"""

import contextlib
import hashlib
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit, urlunsplit

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.files import atomic_write, file_errors, parse_json

SCHEMES = ("http", "https", "s3", "gs")
TRIES = 6
PAUSE = 1.0  # seconds before the second try, twice as long before each further one: half a minute in all
STALL = 30  # seconds without a byte, or with less than SLOWEST in each, after which a try is given up
SLOWEST = 2000  # bytes
BLOCK = 1 << 16
MAX_UNKNOWN = 256 << 20  # bytes of a file whose size is not known before

_HOST = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_PATH = re.compile(r"[A-Za-z0-9/._~%+=,:@-]*")  # what neither a shell nor curl nor gsutil reads as a sign of its own
_QUERY = re.compile(r"[A-Za-z0-9/._~%+=,:@&?-]*")
_NONE = re.compile("")


class _Failed(Exception):
    """A try that another may mend."""


def is_remote(text: str) -> bool:
    """Whether a text is an address rather than a path; also of those that are refused."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", text) is not None


def _command(url: str) -> list[str]:
    """What writes the content of an address to its output, and why it cannot to the other one."""
    scheme = urlsplit(url).scheme
    if scheme == "s3":
        return ["aws", "s3", "cp", "--only-show-errors", url, "-"]
    if scheme == "gs":
        return ["gsutil", "cat", url]
    # What comes in another coding (gzip) is decoded; the limits also end it where this process has been killed.
    limits = ["--connect-timeout", str(STALL), "--speed-time", str(STALL), "--speed-limit", str(SLOWEST)]
    return ["curl", "-sSfNL", "--compressed", "--proto", "=http,https", *limits, url]


def checked_url(text: str) -> str:
    """An address that is safe to hand on, other letters than ASCII percent-encoded. Raises ConfigError."""
    parts = urlsplit(text) if text.isprintable() else None
    if parts is None or parts.scheme not in SCHEMES:
        raise ConfigError(
            f"{shown(text)}: is no address that shards are fetched from; allowed: {', '.join(SCHEMES)}, and local "
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
    `STALL` seconds; why one failed is logged. `path` stands only when whole. Raises DataError, and FileError where the
    cache cannot be written.
    """
    if size is not None and path.is_file() and path.stat().st_size == size:
        return path
    program = _command(url)[0]
    if shutil.which(program) is None:
        raise DataError(f"{shown(url)}: {urlsplit(url).scheme} is read by the program `{program}`; install it")
    reason = ""
    for number in range(TRIES):
        if number:
            pause = PAUSE * 2 ** (number - 1)
            logging.warning("%s: %s; try %d of %d in %g seconds", shown(url), reason, number + 1, TRIES, pause)
            time.sleep(pause)
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
    """Remove what killed processes left in the folder: the file that one was fetching may be there by now."""
    for old in path.parent.glob(".*.tmp"):
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
    from webdataset.gopen import Pipe

    with tempfile.TemporaryFile("w+b") as told:
        pipe = Pipe(_command(url), mode="rb", bufsize=0, stderr=told)

        def read() -> bytes:
            if not wait([pipe.stream], STALL):
                raise _Failed(f"nothing came for {STALL} seconds")
            block = pipe.stream.read(BLOCK)
            if not block and (code := pipe.proc.wait()) != 0:
                told.seek(0)
                words = told.read(BLOCK).decode("utf-8", errors="replace").replace(url, shown(url)).split()
                raise _Failed(" ".join(words)[:300] or f"the program that fetches it ended with {code}")
            return block

        try:
            yield read
        finally:
            pipe.proc.kill()
            pipe.stream.close()
            pipe.proc.wait()
