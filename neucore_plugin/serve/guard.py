"""Who may ask, and how much: hosts, origins, the token, the size and the pace of what is sent. Pure ASGI.

Against DNS rebinding only known names of this machine are answered; but for links to the pages, a request must come
from our own page or from no page at all; nothing here allows another site to read an answer (no CORS).
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neucore_plugin.serve.answers import Refused, problem

log = logging.getLogger(__name__)

COOKIE = "neucore_session"
OPEN = ("/", "/health", "/login", "/favicon.ico")  # answered without the token: no picture, no name, no search
PAGES = ("/", "/docs")  # another site may link to them
_GONE = 499  # counted where the client went before its answer
_DRAINED = 8  # times the limit that is read and thrown away, so that the sender gets to read the refusal


@dataclass(frozen=True)
class Limits:
    """What one process takes. Bytes of a request; seconds for all of it; requests at once; queries that wait for the
    model, and that it answers together; pixels of a picture; threads that decode."""

    body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    requests: int = 256
    waiting: int = 64
    together: int = 32
    max_pixels: int = 64_000_000
    decoders: int = 2


@dataclass(frozen=True)
class Access:
    """Names under which the service is reached, besides addresses in numbers and whatever the port, and the token."""

    hosts: Collection[str] = ("localhost",)
    token: str | None = None
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def knows(self, host: str) -> bool:
        """Whether a Host header names this service. A number cannot be rebound to another address."""
        name = urlsplit(f"//{host}").hostname or ""
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name.rstrip(".") in self.hosts

    def is_token(self, given: str) -> bool:
        """Compared in constant time."""
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def session(self) -> str:
        """What the page's cookie holds: proof of the token, not the token; worth nothing after a restart."""
        return hmac.new(self._key, (self.token or "").encode(), hashlib.sha256).hexdigest()

    def lets_in(self, headers: dict[str, str]) -> bool:
        """Whether a request brings the token (`Authorization: Bearer ...`) or the page's cookie; or none is asked."""
        if self.token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.is_token(given.strip()):
            return True
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self.session().encode())


class Guard:
    """The outermost layer: refuses, bounds what is read, adds headers, and turns every failure into JSON.

    counted(path, method, status, seconds): called once a request.
    """

    def __init__(
        self, app: ASGIApp, access: Access, limits: Limits, counted: Callable[[Scope, int, float], None]
    ) -> None:
        self.app, self.access, self.limits, self.counted = app, access, limits, counted
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name, value) for name, value in _HEADERS if name not in given),
                ]
            await send(message)

        body = _Body(receive, self.limits)
        self.running += 1
        try:
            refusal = self._refusal(scope) or body.too_long(scope)
            if refusal is None:
                await self._unless_gone(scope, body, answer)
            else:
                await self._refuse(refusal, scope, body, answer)
        except Refused as refusal:  # raised in the midst of a body
            if not status:
                await self._refuse(refusal, scope, body, answer)
        except asyncio.CancelledError:  # the service ends and has waited for its requests long enough
            if not status:
                await problem(503, "the service is ending", {"Connection": "close"})(scope, body.receive, answer)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"][:200].encode("ascii", "backslashreplace"))
            if not status:
                text = "the service failed on this request; its log says why"
                await problem(500, text)(scope, body.receive, answer)
        finally:
            self.running -= 1
            self.counted(scope, status or _GONE, time.perf_counter() - began)

    async def _unless_gone(self, scope: Scope, body: "_Body", answer: Send) -> None:
        """Answer; where the client goes before that, what still waits for it is dropped."""
        work, gone = asyncio.create_task(self.app(scope, body.receive, answer)), asyncio.create_task(body.gone())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            left = work.cancel()
        try:
            await work
        except asyncio.CancelledError:
            if not left:
                raise
        except ClientDisconnect:
            pass

    async def _refuse(self, refusal: Refused, scope: Scope, body: "_Body", answer: Send) -> None:
        if refusal.status == 413:
            await body.drain()
        await refusal.response()(scope, body.receive, answer)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        try:
            known = self.access.knows(host)
        except ValueError:
            known = False
        if not known:
            return Refused(421, f"this service does not answer to the name {host[:80]!r}; start it with --allowed-host")
        if "transfer-encoding" in headers and "content-length" in headers:
            close = {"Connection": "close"}  # a proxy may read the other one, and see another request
            return Refused(400, "a request says its length in one way, not in two", close)
        linked = scope["method"] in ("GET", "HEAD") and scope["path"] in PAGES
        if not linked and not _own_page(headers, host):
            return Refused(403, "a page of another site asks; only the service's own page may, or a program")
        if scope["path"] not in OPEN and not self.access.lets_in(headers):
            text = "this service wants its token: send the header `Authorization: Bearer TOKEN`"
            return Refused(401, text, {"WWW-Authenticate": "Bearer"})
        if self.running > self.limits.requests:
            return Refused(
                503, f"more than {self.limits.requests} requests at once; try again soon", {"Retry-After": "1"}
            )
        return None


def _own_page(headers: dict[str, str], host: str) -> bool:
    """Browsers say where a request comes from; programs say nothing."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or (origin != "null" and origin.partition("://")[2].lower() == host.lower())


class _Body:
    """A request's body, counted while it comes."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self.limits = receive, limits
        self.read, self.whole, self._end = 0, False, None
        self._all = asyncio.Event()

    def too_long(self, scope: Scope) -> Refused | None:
        """The refusal of a body that says itself that it is too long."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        return self._refused() if length.isdigit() and int(length) > self.limits.body_bytes else None

    def _refused(self) -> Refused:
        most = self.limits.body_bytes
        return Refused(413, f"more than {most >> 20} MB are not taken in one request; send smaller pictures")

    async def receive(self) -> Message:
        if self.whole:
            return await self._receive()  # waits for the other side to go
        clock = asyncio.get_running_loop().time
        self._end = self._end or clock() + self.limits.body_seconds
        try:
            message = await asyncio.wait_for(self._receive(), max(0.001, self._end - clock()))
        except asyncio.TimeoutError:
            self.whole = True
            seconds = f"{self.limits.body_seconds:g}"
            raise Refused(
                408, f"the request did not arrive within {seconds} seconds", {"Connection": "close"}
            ) from None
        self.read += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.read > self.limits.body_bytes:
            raise self._refused()
        if self.whole:
            self._all.set()
        return message

    async def gone(self) -> None:
        """Returns when the other side goes, after it has sent all."""
        await self._all.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def drain(self) -> None:
        """Throw away what still comes, within bounds."""
        left, clock = _DRAINED * self.limits.body_bytes, asyncio.get_running_loop().time
        end = clock() + self.limits.body_seconds / 3
        while not self.whole and left > 0 and clock() < end:
            try:
                message = await asyncio.wait_for(self._receive(), end - clock())
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            self.whole = not message.get("more_body", False)


_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox"),
    (b"cache-control", b"no-store"),
)


def page_policy(script: str, style: str) -> str:
    """The Content-Security-Policy of the page: this script, this style, this service, and nothing else."""
    return (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def login(access: Access, given: str, secure: bool) -> Response:
    """The cookie for the page, where the token is right. Raises Refused."""
    if access.token is not None and not access.is_token(given):
        raise Refused(401, "this is not the token of the service")
    response = Response(status_code=204)
    response.set_cookie(COOKIE, access.session(), httponly=True, samesite="strict", secure=secure)
    return response
