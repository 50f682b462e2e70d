"""One job under way: who waits for it, what it has said, and what it cost, told to everybody who counts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import TypeVar

from motet.observe.metrics import Meter
from motet.observe.tracing import Trace
from motet.server.answers import Tally
from motet.tenancy.load import QueueTimeout
from motet.tenancy.quota import Visit
from motet.types import Delta

T = TypeVar("T")


class Place:
    """A request's place in the queue for a first token, from before it is tokenised on."""

    def __init__(self, place: ExitStack, seconds: float | None) -> None:
        """It may be kept for `seconds`; closing `place` gives it back."""
        self._place = place
        self._seconds = seconds
        self._until = None if seconds is None else asyncio.get_running_loop().time() + seconds

    async def within(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the time is up. Raises QueueTimeout then."""
        timeout = asyncio.timeout_at(self._until)
        try:
            async with timeout:
                return await work
        except TimeoutError:
            if not timeout.expired():
                raise
            raise QueueTimeout(f"no token came in the {self._seconds:g} s that a request may wait") from None

    def leave(self) -> None:
        """Give it back."""
        self._place.close()


class Flight:
    """Measures a job from its start to its one end."""

    def __init__(self, tally: Tally, meter: Meter, visit: Visit, place: Place, trace: Trace) -> None:
        self.tally = tally
        self._meter = meter
        self._visit = visit
        self._place = place
        self._trace = trace
        self._began = False

    async def first(self, delta: Awaitable[Delta]) -> Delta:
        """The first delta, which ends the wait. Raises QueueTimeout when it does not come in time."""
        try:
            return await self._place.within(delta)
        finally:
            self._place.leave()

    def delta(self, delta: Delta) -> None:
        """A piece of the answer."""
        if not self._began:
            self._trace.event("first_token")
        if delta.queue_seconds is not None:
            self._trace.set({"motet.queue_seconds": delta.queue_seconds})
        self._began = True
        self._meter.delta(delta)
        self.tally.add(delta)

    def end(self, outcome: str) -> None:
        """`outcome` is stop, length, error or cancelled. What an error of ours kept from beginning costs nothing."""
        self._place.leave()
        usage = self.tally.usage()
        if self._began or outcome == "cancelled":
            self._visit.used_tokens = usage.total_tokens
        self._trace.set(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "motet.cached_tokens": self.tally.cached_tokens,
                "motet.outcome": outcome,
            }
        )
        self._meter.end(outcome, self.tally.cached_tokens)
