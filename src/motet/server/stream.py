"""From a job to its deltas, and from deltas to what goes over the wire: server-sent events or one body.

Back-pressure: an event is made only after the one before was taken by the socket's buffer, so a slow reader
holds back its own request and nothing else. A client that leaves, streaming or not, cancels the work, and
closing a generator aborts its request in the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import cast

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from motet.engine.protocol import Generator
from motet.errors import EngineDead, MotetError
from motet.observe.metrics import Metrics
from motet.server.answers import Choice, Gathered, Tally, Writer
from motet.server.failures import GenerationFailed, body_of, count
from motet.server.flight import Flight
from motet.server.intake import Job
from motet.server.lifecycle import Lifecycle
from motet.server.openai import Answer
from motet.types import Delta

logger = logging.getLogger(__name__)
_MERGED_DELTAS = 32  # that several prompts of one request may be ahead of their reader


async def deltas_of(job: Job, generator: Generator, flight: Flight) -> AsyncGenerator[Delta, None]:
    """The deltas of all prompts of a job, counted. Raises a MotetError if one ends with an error."""
    outcome = "error"
    try:
        async with _closing(_start(job, generator)) as deltas:
            first = await flight.first(anext(deltas))
            async for delta in _chained(first, deltas):
                if delta.finish in ("error", "abort"):
                    failure = GenerationFailed if generator.alive else EngineDead
                    raise failure(delta.error or "the request was aborted")
                outcome = delta.finish or outcome
                flight.delta(delta)
                yield delta
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "cancelled"
        raise
    except BaseException:
        outcome = "error"
        raise
    finally:
        flight.end(outcome)


async def whole(deltas: AsyncGenerator[Delta, None], writer: Writer, tally: Tally) -> bytes:
    """All deltas as one body."""
    choices = [Gathered() for _ in range(writer.choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            choice = choices[delta.index]
            choice.text += delta.text
            choice.logprobs += delta.logprobs
            choice.finish = delta.finish or choice.finish
    return msgspec.json.encode(writer.whole(choices, tally.usage()))


async def events(
    deltas: AsyncGenerator[Delta, None], writer: Writer, tally: Tally, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The deltas as server-sent events; none before the first delta, so that a failure there has a status."""
    opening: Sequence[Answer[Choice]] = writer.opening()
    async with aclosing(deltas):
        async for delta in deltas:
            if chunks := [*opening, *writer.chunks(delta)]:
                opening = ()
                yield b"".join(map(_event, chunks))
    if include_usage:
        yield _event(writer.closing(tally.usage()))
    yield b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends events until they end, the client goes, or the server stops; a failure becomes the last event."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        lifecycle: Lifecycle,
        metrics: Metrics,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._lifecycle.attend(receive, self._send_events(send))
        except ClientDisconnect:
            if not self._started:
                raise
            return
        except Exception as failure:
            if not self._started:
                raise
            logger.log(
                logging.WARNING if isinstance(failure, MotetError) else logging.ERROR,
                "stream ended by %s: %s", type(failure).__name__, failure,
                exc_info=None if isinstance(failure, MotetError) else failure,
            )  # fmt: skip
            error = body_of(failure)
            count(self._metrics, scope, error.error.code or "")
            await send({"type": "http.response.body", "body": _event(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                if not self._started:
                    head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                    await send(head)
                    self._started = True
                await send({"type": "http.response.body", "body": event, "more_body": True})


async def _chained(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


def _start(job: Job, generator: Generator) -> AsyncIterator[Delta]:
    streams = [
        generator.generate(
            prompt.tokens, prompt.params, job.digest, f"{job.id}-{i}" if i else job.id, job.account
        )
        for i, prompt in enumerate(job.prompts)
    ]
    return streams[0] if len(streams) == 1 else _merge(streams, job.n)


async def _merge(streams: Sequence[AsyncIterator[Delta]], n: int) -> AsyncGenerator[Delta, None]:
    """The deltas of several prompts as they come; choice c of prompt p has index p * n + c."""
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_MERGED_DELTAS)

    async def pump(first: int, stream: AsyncIterator[Delta]) -> None:
        try:
            async with _closing(stream) as deltas:
                async for delta in deltas:
                    await queue.put(msgspec.structs.replace(delta, index=first + delta.index))
            await queue.put(None)
        except Exception as failure:  # noqa: BLE001 - handed over to the reader, which raises it
            await queue.put(failure)

    pumps = [asyncio.create_task(pump(i * n, stream)) for i, stream in enumerate(streams)]
    running = len(pumps)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _closing(stream: AsyncIterator[Delta]) -> aclosing[AsyncGenerator[Delta, None]]:
    return aclosing(cast("AsyncGenerator[Delta, None]", stream))


def _event(value: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
