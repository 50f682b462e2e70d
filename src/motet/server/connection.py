"""One client's connection: what it may keep waiting, and for how long.

A server that waits for ever is held by clients that send a byte a minute, or read one. So a head has to come within
`head_seconds` of its first byte, and a body within `body_seconds` and a second more for each `body_rate` bytes of it
that have come: a slow line is waited for, one that stands still is not. Who is too slow is answered 408 and hung up on.
Only waiting for the client counts: a body that lies in our buffers because nobody has read it yet is not late.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from motet.config import ServerConfig
from motet.server.failures import RequestTimeout, response_to

logger = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 65  # longer than load balancers keep an idle connection, so that they close it first
_STALLED_SECONDS = 30.0  # a client that takes nothing of 64 KiB for so long is cut off
_LINGER_SECONDS = 30.0  # for the rest of a body that was answered before it had come; nginx's lingering_time
_READ_BYTES = 4 << 10  # of 1-byte HTTP chunks: 10-20 ms of parsing; asyncio's own 256 KiB are 600 ms


class Connection(H11Protocol):
    """uvicorn's, with limits. It reads in small bites, so that no client can keep the event loop busy, and hangs up on
    one that has stopped reading: asyncio's own close would wait for it for ever."""

    def __init__(self, head_seconds: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._head_seconds = head_seconds
        self._late: Callable[[], None] | None = (
            None  # what happens when what is awaited does not come in time
        )
        self._clock: asyncio.TimerHandle | None = None  # of that
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = _READ_BYTES
        # As idle as one between two requests, which is the only kind that uvicorn has a clock for.
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._forgive()
        self._expect(None, 0)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(_STALLED_SECONDS, self._hang_up)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forgive()

    def _watch(self) -> None:
        """A head that has begun has to end, and so has a body that nobody reads any more."""
        client = self.conn.their_state
        if client is h11.IDLE and self.conn.trailing_data[0]:
            self._expect(self._refuse, self._head_seconds)
        elif client is h11.SEND_BODY and self.cycle.response_complete:
            self._expect(self.transport.abort, _LINGER_SECONDS)
        else:
            self._expect(None, 0)

    def _expect(self, late: Callable[[], None] | None, seconds: float) -> None:
        if late == self._late:
            return
        self._late = late
        if self._clock is not None:
            self._clock.cancel()
        self._clock = self.loop.call_later(seconds, late) if late is not None else None

    def _refuse(self) -> None:
        """Answer 408 to half a head."""
        if self.transport.is_closing():
            return
        logger.info("a request's head did not come in %g s", self._head_seconds)
        answer = response_to(
            RequestTimeout(f"the request's head did not come within {self._head_seconds:g} s")
        )
        head = h11.Response(
            status_code=answer.status_code, headers=answer.raw_headers, reason=b"Request Timeout"
        )
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _hang_up(self) -> None:
        logger.warning("a client stopped reading for %.0f s", _STALLED_SECONDS)
        self.transport.abort()

    def _forgive(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def with_patience(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """`app`, in which waiting for a request's body ends in time, with RequestTimeout."""

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = _patient(receive, config.body_seconds, config.body_rate)
        await app(scope, receive, send)

    return bounded


def _patient(receive: Receive, seconds: float, rate: float) -> Receive:
    waited, came, whole = 0.0, 0, False

    async def next_message() -> Message:
        nonlocal waited, came, whole
        if whole:  # what comes now is that the client has gone
            return await receive()
        began = time.monotonic()
        try:
            async with asyncio.timeout(seconds + came / rate - waited):
                message = await receive()
        except TimeoutError:
            raise RequestTimeout(
                f"{came} bytes of the request's body came in {seconds + came / rate:.0f} s, and no more"
            ) from None
        waited += time.monotonic() - began
        came += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        return message

    return next_message
