"""An OpenAI-compatible endpoint with known delays and a log of its own clock.

    python -m tests.bench.fake_endpoint        # prints its port; GET /log answers with what it did

A request's model says how it behaves. Times are `time.perf_counter`'s, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Behaviour:
    """First piece after `ttft` seconds (the model's first request: `cold` later), then one every `gap`, each of
    `per_piece` tokens. `fault` is how it goes wrong: busy, event, cut, drop, hang, garbage, silent."""

    ttft: float
    gap: float
    per_piece: int = 1
    cold: float = 0.0
    fault: str = ""


@dataclass
class Seen:
    """One request by the server's clock: when it was there, and when each piece was written."""

    model: str
    path: str
    body: dict[str, Any]
    received: float
    written: list[float] = field(default_factory=list)


class FakeEndpoint:
    """Behaviours by model, and the log."""

    def __init__(self, behaviours: Mapping[str, Behaviour]) -> None:
        self.behaviours = behaviours
        self.seen: list[Seen] = []
        self.connections = 0
        self.open: list[asyncio.Transport] = []
        self._asked: Counter[str] = Counter()

    def begin(self, seen: Seen) -> Behaviour | None:
        """None for a model that is not served."""
        self.seen.append(seen)
        self._asked[seen.model] += 1
        behaviour = self.behaviours.get(seen.model)
        if behaviour is not None and behaviour.cold and self._asked[seen.model] == 1:
            return Behaviour(behaviour.ttft + behaviour.cold, behaviour.gap, behaviour.per_piece)
        return behaviour


class _Peer(asyncio.Protocol):
    """One client."""

    def __init__(self, endpoint: FakeEndpoint) -> None:
        self._endpoint = endpoint
        self._held = b""
        endpoint.connections += 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._endpoint.open.append(transport)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._held += data
        head, found, rest = self._held.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode().split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        self._held = rest[length:]
        self._answer(lines[0].split(" ")[1], rest[:length], now)

    def _answer(self, path: str, raw: bytes, now: float) -> None:
        if path.endswith("/log"):
            self._whole(200, [asdict(seen) for seen in self._endpoint.seen])
        elif path.endswith("/models"):
            self._whole(200, {"data": [{"id": name} for name in self._endpoint.behaviours]})
        else:
            body = json.loads(raw)
            seen = Seen(body["model"], path, body, now)
            behaviour = self._endpoint.begin(seen)
            if behaviour is None:
                self._whole(404, {"error": {"message": f"no model {seen.model}"}})
            elif behaviour.fault == "busy":
                self._whole(503, {"error": {"message": "busy"}})
            elif behaviour.fault == "drop":
                self._transport.abort()
            elif behaviour.fault == "garbage":
                self._transport.write(b"SMTP ready\r\n\r\n")
            elif behaviour.fault != "hang":
                self._stream(seen, behaviour)

    def _whole(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self._transport.write(b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n%b" % (status, len(data), data))

    def _stream(self, seen: Seen, behaviour: Behaviour) -> None:
        tokens = seen.body["max_tokens"]
        pieces = -(-tokens // behaviour.per_piece)
        chat = seen.path.endswith("/chat/completions")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        call_at, begin = asyncio.get_running_loop().call_at, asyncio.get_running_loop().time()
        first = begin + behaviour.ttft - (time.perf_counter() - seen.received)
        if chat:  # a role before any token, as some servers send it
            call_at(
                begin,
                self._write,
                head + _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
            )
            head = b""
        if behaviour.fault == "silent":
            call_at(first, self._end, head, tokens, seen)
            return
        choice = {"delta": {"content": " word"}} if chat else {"text": " word"}
        filler = {
            "id": "cmpl-0123456789abcdef0123456789abcdef",
            "object": "text_completion",
            "created": 1700000000,
        }
        event = _event({**filler, "model": seen.model, "choices": [{"index": 0, **choice}], "usage": None})
        for i in range(pieces):
            if behaviour.fault and i == 2:
                self._fail(first + i * behaviour.gap, behaviour.fault)
                return
            call_at(first + i * behaviour.gap, self._piece, head + event, seen)
            head = b""
        call_at(first + (pieces - 1) * behaviour.gap + 1e-3, self._end, b"", tokens, seen)

    def _fail(self, at: float, fault: str) -> None:
        call_at = asyncio.get_running_loop().call_at
        if fault == "event":
            call_at(at, self._write, _event({"error": {"message": "the engine failed"}}) + b"0\r\n\r\n")
        elif fault == "cut":
            call_at(at, self._write, b"0\r\n\r\n")
        else:
            call_at(at, self._transport.abort)

    def _piece(self, data: bytes, seen: Seen) -> None:
        seen.written.append(time.perf_counter())
        self._write(data)

    def _end(self, head: bytes, tokens: int, seen: Seen) -> None:
        usage = {"prompt_tokens": prompt_tokens(seen.body), "completion_tokens": tokens}
        closing = _event({"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]})
        self._write(head + closing + _event({"choices": [], "usage": usage}) + _chunk(b"data: [DONE]\n\n"))
        self._write(b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


def prompt_tokens(body: dict[str, Any]) -> int:
    """As this endpoint counts: 1.3 tokens per word and 5 around them, or the ids given."""
    prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    return len(prompt) if isinstance(prompt, list) else 5 + round(1.3 * len(prompt.split()))


def _event(said: object) -> bytes:
    return _chunk(b"data: " + json.dumps(said).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def fake_endpoint(**behaviours: Behaviour) -> AsyncIterator[tuple[str, FakeEndpoint]]:
    """An endpoint in this event loop: its URL, and its log."""
    endpoint = FakeEndpoint(behaviours)
    server = await asyncio.get_running_loop().create_server(lambda: _Peer(endpoint), "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", endpoint
    finally:
        server.close()
        for transport in endpoint.open:
            transport.abort()


async def _main() -> None:
    async with fake_endpoint(steady=Behaviour(0.2, 0.0264)) as (url, _):
        print(url, flush=True)  # noqa: T201
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
