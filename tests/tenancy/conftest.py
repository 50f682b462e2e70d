"""Fixtures for counters in a real Redis: connections are closed in the event loop that they were opened in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator

import pytest

from motet.tenancy.shared import LEASE_SECONDS, RedisCounters, connect
from tests.databases import RedisServer

Run = Callable[[Coroutine[object, object, None]], None]
Connect = Callable[..., RedisCounters]


@pytest.fixture
def run() -> Iterator[Run]:
    """As asyncio.run, in one loop for the whole test."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def connected(run: Run, redis: RedisServer) -> Iterator[Connect]:
    """Counters of one more server, given the seconds of a lease."""
    made = list[RedisCounters]()

    def one_more(lease_seconds: float = LEASE_SECONDS) -> RedisCounters:
        made.append(connect(redis.url, lease_seconds))
        return made[-1]

    async def close() -> None:
        for counters in made:
            await vars(counters)["_enter"].registered_client.aclose()

    yield one_more
    run(close())
