"""One connection: uvicorn's HTTP/1.1 by h11, with bounds on slowness and number, and refusals as JSON.

What `guard` cannot see: it is asked once a request has a whole head, and until its answer is written.
"""

import asyncio
import socket
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from neucore_plugin.serve.answers import problem

MOST = 512  # connections at once
SECONDS = 30.0  # for the head of a request, and for the other side to read on


class Connection(H11Protocol):
    """Lets go of a client that sends no whole head, or does not read its answer, and of those that are too many."""

    seconds = SECONDS
    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _heard = False  # browsers open connections in advance; one that said nothing is closed without a word

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        # Head and body are two writes; asyncio sets it for no socket of `create_server`, and 40 ms would pass between.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        if len(self.connections) > MOST:
            self._end(503, f"more than {MOST} connections at once; try again soon", {"Retry-After": "1"})
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request."""
        self._heard = True
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._late, self._stuck = _stopped(self._late), _stopped(self._stuck)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read on."""
        super().pause_writing()
        self._stuck = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads on."""
        self._stuck = _stopped(self._stuck)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where the bytes are no HTTP."""
        self._end(400, "this is no valid HTTP/1.1 request, or its head is too long")

    def _watch(self) -> None:
        """The clock runs while no whole head has come; also while a body is sent on that was refused already."""
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            self._late = _stopped(self._late)
        elif self._late is None:
            self._late = self.loop.call_later(self.seconds, self._too_late)

    def _too_late(self) -> None:
        self._late = None
        if self._heard:
            self._end(408, f"the request did not arrive within {self.seconds:g} seconds")
        self.transport.close()

    def _end(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        """Refuse, where no answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = problem(status, text, {"Connection": "close", **(headers or {})})
            reason = HTTPStatus(status).phrase.encode()
            head = h11.Response(status_code=status, headers=answer.raw_headers, reason=reason)
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
