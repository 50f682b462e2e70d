"""Places that servers share: who has died gives them back, who lives keeps them, whatever Redis does meanwhile."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from motet.tenancy.quota import RateLimited, Visit
from motet.tenancy.shared import LEASE_SECONDS, MAX_CONNECTIONS, RedisCounters
from tests.databases import RedisServer

from .conftest import Connect, Run
from .test_quota import admitted, tenant

ROOT = Path(__file__).parents[2]
LEASE = 1.5
REPLICA = """
import asyncio, sys
from redis.asyncio import Redis
from motet.tenancy.shared import RedisCounters
from tests.tenancy.test_quota import tenant

async def serve():
    counters = RedisCounters(Redis.from_url(sys.argv[1]), float(sys.argv[2]))
    for request in sys.argv[3:]:
        assert (await counters.enter(tenant(max_concurrent=3), request)).admitted
    print("in", flush=True)
    await asyncio.sleep(60)

asyncio.run(serve())
"""


@contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[None]:
    """The process is killed at the end of the block, however that comes."""
    with process:
        try:
            yield
        finally:
            process.kill()


class Clock:
    """The time that Redis tells."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1e9
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_places_of_the_dead_are_free_within_a_minute_and_those_of_the_living_are_kept(clock: Clock) -> None:
    async def scenario() -> None:
        server, who = FakeServer(), tenant(max_concurrent=3)
        dead, living = (RedisCounters(FakeAsyncRedis(server=server)) for _ in range(2))
        for request in ("a", "b"):
            assert (await dead.enter(who, request)).has_place
        assert (await living.enter(who, "c")).has_place
        for _ in range(2):
            clock.now += LEASE_SECONDS / 3
            await living.renew()
            assert not (await living.enter(who, "early")).has_place
        clock.now += LEASE_SECONDS / 3 + 0.001
        assert clock.now < 1e9 + 61
        await living.renew()
        assert [(await living.enter(who, name)).has_place for name in "def"] == [True, True, False]
        for _ in range(100):
            clock.now += LEASE_SECONDS / 3
            await living.renew()
        assert not (await living.enter(who, "g")).has_place, "a long answer keeps its place"

    asyncio.run(scenario())


def test_who_left_while_it_was_renewed_has_left(clock: Clock) -> None:
    """Its lease is extended by a script that was under way as it gave its place back."""

    class Slow(RedisCounters):
        async def _call(self, script: object, keys: list[str], arguments: list[object]) -> object:
            if script is self._renew:
                await self.leave(who, "a", 0)
            return await super()._call(script, keys, arguments)

    who = tenant(max_concurrent=1)

    async def scenario() -> None:
        counters = Slow(FakeAsyncRedis(server=FakeServer()))
        assert (await counters.enter(who, "a")).has_place
        await counters.renew()
        assert (await counters.enter(who, "b")).has_place

    asyncio.run(scenario())
    assert clock.now == 1e9


def test_leases_that_redis_forgot_come_back(clock: Clock) -> None:
    async def scenario() -> None:
        server, who = FakeServer(), tenant(max_concurrent=1)
        counters, client = RedisCounters(FakeAsyncRedis(server=server)), FakeAsyncRedis(server=server)
        assert (await counters.enter(who, "a")).has_place
        await client.flushall()
        await counters.renew()
        assert not (await counters.enter(who, "b")).has_place
        server.connected = False
        clock.now += 10 * LEASE_SECONDS
        await counters.renew()  # told in the log
        server.connected = True
        await counters.renew()
        assert not (await counters.enter(who, "b")).has_place

    asyncio.run(scenario())


def test_what_has_no_limit_of_places_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        client = FakeAsyncRedis(server=FakeServer())
        async with Visit(RedisCounters(client), tenant(requests_per_minute=5)):
            pass
        assert await client.keys("*running*") == []

    asyncio.run(scenario())


def test_a_killed_replica_gives_its_places_back_and_a_living_one_does_not(
    run: Run, connected: Connect, redis: RedisServer
) -> None:
    who = tenant(max_concurrent=3)
    program = [sys.executable, "-c", REPLICA, redis.url, str(LEASE), "a", "b"]

    async def scenario() -> None:
        counters = connected(LEASE)
        replica = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT)  # noqa: ASYNC220 - only begun
        with killed(replica):
            assert replica.stdout is not None
            assert replica.stdout.readline() == "in\n"
            assert (await counters.enter(who, "mine")).has_place
            await asyncio.sleep(2 * LEASE)
            assert not (await counters.enter(who, "early")).has_place, "both live and renew"
        moment = time.monotonic()
        while not (await counters.enter(who, "later")).has_place:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0.02)
        assert time.monotonic() - moment < LEASE + 0.5
        await asyncio.sleep(2 * LEASE)
        places = [(await counters.enter(who, name)).has_place for name in ("last", "none")]
        assert places == [True, False], "mine and later still run"

    run(scenario())


def test_more_at_once_than_there_are_connections(run: Run, connected: Connect) -> None:
    async def scenario() -> None:
        servers, hold = [connected() for _ in range(3)], asyncio.Event()
        attempts = 10 * MAX_CONNECTIONS
        inside = [admitted(server, tenant(max_concurrent=7), attempts, hold) for server in servers]
        assert sum(await asyncio.gather(*inside)) == 7
        assert await admitted(servers[0], tenant(max_concurrent=7), attempts, asyncio.Event()) == 7

    run(scenario())


def test_a_redis_that_was_started_again(run: Run, connected: Connect, redis: RedisServer) -> None:
    """It has forgotten scripts, buckets and places; connections to the old one are not used again."""

    async def scenario() -> None:
        counters, who = connected(LEASE), tenant(max_concurrent=2)
        async with Visit(counters, who):
            redis.stop()
            redis.start()
            await asyncio.sleep(LEASE)
            assert [(await counters.enter(who, name)).has_place for name in "ab"] == [True, False]

    run(scenario())


def test_visits_that_are_cut_off_anywhere_leave_nothing(run: Run, connected: Connect) -> None:
    """300 visits, each cancelled at a random moment: while it enters, reserves, runs, or leaves."""
    random_ = random.Random(7)

    async def visit(counters: RedisCounters) -> None:
        try:
            async with Visit(counters, tenant(max_concurrent=40, tokens_per_minute=10**9)) as visit:
                await visit.reserve(10)
                await asyncio.sleep(0.005)
        except RateLimited:
            pass

    async def scenario() -> None:
        counters = connected(LEASE)
        tasks = []
        for _ in range(300):
            tasks.append(asyncio.create_task(visit(counters)))
            await asyncio.sleep(0.0005)
            random_.choice(tasks[-10:]).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(LEASE + 0.1)
        assert await admitted(counters, tenant(max_concurrent=40), 60, asyncio.Event()) == 40

    run(scenario())
