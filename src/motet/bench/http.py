"""A streaming answer from the socket's bytes: HTTP/1.1 and server-sent events, as little of them as a benchmark needs.

httpx takes 0.24 ms for each event, which at 2,000 events a second is half a core and shows as latency of the server
(docs/benchmarking.md). This takes 0.03 ms with all that the event loop does: bytes are parsed in the callback that it
makes when they arrive, after the clock was read, and no task is woken before the answer has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

OnEvent = Callable[[bytes, float], None]
_MAX_HEAD = 1 << 16


class BadResponse(Exception):
    """What came is not HTTP/1.1."""


class Response:
    """One response as its bytes come."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.complete = False
        self._held = b""
        self._left: int | None = None  # bytes of the body still to come, if that is known
        self._chunked = False

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent on this connection."""
        return self.complete and self.headers.get(b"connection", b"").lower() != b"close"

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in `data`. Raises BadResponse."""
        if not self.status:
            self._held += data
            if not self._head():
                return b""
            data, self._held = self._held, b""
        return self._chunks(data) if self._chunked else self._plain(data)

    def close(self) -> None:
        """No more bytes will come: the end of a body that says neither its length nor its chunks."""
        if self.status and self._left is None and not self._chunked:
            self.complete = True

    def _head(self) -> bool:
        while True:
            end = self._held.find(b"\r\n\r\n")
            if end < 0:
                if len(self._held) > _MAX_HEAD:
                    raise BadResponse("a head without an end")
                return False
            first, *lines = self._held[:end].split(b"\r\n")
            self._held = self._held[end + 4 :]
            status = _status(first)
            if status >= 200:  # 100 Continue and its like come before the response
                break
        self.status = status
        for line in lines:
            name, _, value = line.partition(b":")
            self.headers[name.strip().lower()] = value.strip()
        self._chunked = b"chunked" in self.headers.get(b"transfer-encoding", b"").lower()
        if not self._chunked and b"content-length" in self.headers:
            self._left = _number(self.headers[b"content-length"], 10)
        return True

    def _plain(self, data: bytes) -> bytes:
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
            self.complete = self._left == 0
        return data

    def _chunks(self, data: bytes) -> bytes:
        """The chunks that are whole by now."""
        data, at, body = self._held + data, 0, []
        while (line := data.find(b"\r\n", at)) >= 0:
            size = _number(data[at:line].partition(b";")[0], 16)
            end = line + 2 + size
            if size == 0:  # trailers, then an empty line
                self.complete = data.find(b"\r\n\r\n", line) >= 0
                break
            if len(data) < end + 2:
                break
            body.append(data[line + 2 : end])
            at = end + 2
        self._held = data[at:]
        return b"".join(body)


def _status(line: bytes) -> int:
    version, _, rest = line.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise BadResponse(f"not HTTP/1.1: {line[:40]!r}")
    return _number(rest[:3], 10)


def _number(text: bytes, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise BadResponse(f"not a number: {text[:40]!r}") from None


class Events:
    """The data of server-sent events as their bytes come."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, body: bytes) -> list[bytes]:
        """The data lines that are whole by now; comments and other fields are passed over."""
        *lines, self._held = (self._held + body).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Exchange:
    """One request and its response. `on_event` is told each event's data and when its bytes came, in seconds of
    `time.perf_counter`; without events the body is kept."""

    def __init__(self, on_event: OnEvent) -> None:
        self.response = Response()
        self.body = b""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events = Events()
        self._on_event = on_event

    def take(self, data: bytes, now: float) -> None:
        """Bytes from the socket. Raises BadResponse."""
        body = self.response.feed(data)
        if body and b"event-stream" in self.response.headers.get(b"content-type", b""):
            for event in self._events.feed(body):
                self._on_event(event, now)
        else:
            self.body += body
        if self.response.complete:
            self.end(None)

    def end(self, failure: Exception | None) -> None:
        """Wake who waits for the answer."""
        if self.ended.done():
            return
        if failure is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(failure)


class Connection(asyncio.Protocol):
    """One connection, which carries one exchange at a time."""

    def __init__(self) -> None:
        self.open = True
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._exchange is None:
            self.close()  # nothing was asked
            return
        try:
            self._exchange.take(data, now)
        except BadResponse as error:
            self._exchange.end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._exchange is not None:
            self._exchange.response.close()
            whole = self._exchange.response.complete
            self._exchange.end(None if whole else exc or ConnectionResetError("closed by the server"))

    def close(self) -> None:
        """Close it now."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    async def perform(self, request: bytes, exchange: Exchange) -> None:
        """Send a request and wait for the end of its response. Raises OSError or BadResponse; the connection is open
        afterwards only if it can be used again."""
        assert self._transport is not None
        self._exchange = exchange
        self._transport.write(request)
        try:
            await exchange.ended
        finally:
            self._exchange = None
            if not exchange.response.reusable:
                self.close()
