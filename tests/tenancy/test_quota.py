"""Buckets: the same exact admissions in this process and in Redis, refunds, and what a refused client is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from motet.config import TenantPolicy
from motet.errors import ConfigError
from motet.tenancy.quota import Counters, Entry, LocalCounters, RateLimited, Visit
from motet.tenancy.shared import QuotaUnavailable, RedisCounters, connect
from motet.tenancy.tenants import Tenant

from .conftest import Connect, Run

Make = Callable[[], Counters]


def in_redis() -> Counters:
    return RedisCounters(FakeAsyncRedis(server=FakeServer()))


@pytest.fixture(params=["local", "fake redis", "redis"])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "redis":
        connected: Connect = request.getfixturevalue("connected")
        return connected
    return LocalCounters if request.param == "local" else in_redis


def tenant(name: str = "acme", **limits: Any) -> Tenant:
    return Tenant(name, TenantPolicy(**limits))


async def admitted(counters: Counters, who: Tenant, attempts: int, hold: asyncio.Event) -> int:
    """How many of `attempts` parallel visits get in while nobody leaves."""
    inside, refused = 0, list[int]()

    async def visit() -> None:
        nonlocal inside
        try:
            async with Visit(counters, who):
                inside += 1
                await hold.wait()
        except RateLimited:
            refused.append(1)

    tasks = [asyncio.create_task(visit()) for _ in range(attempts)]
    while len(refused) + inside < attempts:
        await asyncio.sleep(0.001)
        for task in tasks:
            assert not task.done() or task.exception() is None, task.exception()
    at_once = inside
    hold.set()
    await asyncio.gather(*tasks)
    return at_once


@pytest.mark.parametrize("limits", [{"requests_per_minute": 7}, {"max_concurrent": 7},
                                    {"requests_per_minute": 7, "max_concurrent": 50},
                                    {"requests_per_minute": 9, "max_concurrent": 7}])  # fmt: skip
def test_a_hundred_at_the_edge_are_admitted_exactly(run: Run, make: Make, limits: dict[str, Any]) -> None:
    async def scenario() -> None:
        counters = make()
        assert await admitted(counters, tenant(**limits), 100, asyncio.Event()) == 7
        assert await admitted(counters, tenant("other", **limits), 100, asyncio.Event()) == 7
        again = await admitted(counters, tenant(**limits), 100, asyncio.Event())
        assert again == (
            7 if limits == {"max_concurrent": 7} else 2 if limits.get("max_concurrent") == 7 else 0
        )

    run(scenario())


def test_no_limits(run: Run, make: Make) -> None:
    async def scenario() -> None:
        counters = make()
        assert await admitted(counters, tenant(), 100, asyncio.Event()) == 100
        async with Visit(counters, tenant()) as visit:
            await visit.reserve(10**12)
            assert visit.headers() == {}

    run(scenario())


def test_tokens_are_reserved_and_refunded(run: Run, make: Make) -> None:
    async def scenario() -> None:
        counters, who = make(), tenant(tokens_per_minute=10)
        async with Visit(counters, who) as first, Visit(counters, who) as second:
            await first.reserve(8)
            with pytest.raises(RateLimited) as refused:
                await second.reserve(3)
            assert refused.value.retry_after == pytest.approx(6, abs=0.5)
            assert second.headers()["x-ratelimit-remaining-tokens"] == "2"
            first.used_tokens = 5
        async with Visit(counters, who) as third:
            with pytest.raises(RateLimited):
                await third.reserve(6)
            await third.reserve(5)
            third.used_tokens = 99  # more than it reserved: nothing is given back, nothing is taken twice
        async with Visit(counters, who) as fourth:
            with pytest.raises(RateLimited) as refused:
                await fourth.reserve(11)
            assert refused.value.retry_after is None
            assert "max_tokens" in str(refused.value)

    run(scenario())


async def failing(counters: Counters, who: Tenant) -> None:
    async with Visit(counters, who) as visit:
        await visit.reserve(10)
        raise ZeroDivisionError


def test_what_fails_costs_nothing(run: Run, make: Make) -> None:
    async def scenario() -> None:
        counters, who = make(), tenant(tokens_per_minute=10, max_concurrent=1)
        for _ in range(20):
            with pytest.raises(ZeroDivisionError):
                await failing(counters, who)

    run(scenario())


def test_headers(run: Run, make: Make) -> None:
    async def scenario() -> None:
        counters, who = make(), tenant(requests_per_minute=6, tokens_per_minute=600)
        async with Visit(counters, who) as visit:
            await visit.reserve(60)
            headers = visit.headers()
        assert headers.pop("x-ratelimit-reset-requests").startswith("10.")
        assert headers.pop("x-ratelimit-reset-tokens").startswith(("6.0", "5.9"))
        assert headers == {
            "x-ratelimit-limit-requests": "6",
            "x-ratelimit-remaining-requests": "5",
            "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": "540",
        }

    run(scenario())


def test_a_bucket_fills_steadily_and_is_never_overdrawn() -> None:
    """Random visits over an hour: at no time did more go out than the bucket held and got since."""
    now, random_ = [0.0], random.Random(5)
    counters, who = LocalCounters(lambda: now[0]), tenant(requests_per_minute=30, tokens_per_minute=1000)

    async def scenario() -> None:
        requests = tokens = 0
        waits = list[float]()
        while now[0] < 3600:
            now[0] += random_.expovariate(2.0)
            amount = random_.randrange(1, 80)
            try:
                async with Visit(counters, who) as visit:
                    requests += 1
                    await visit.reserve(amount)
                    tokens += (used := random_.randrange(amount + 1))
                    visit.used_tokens = used
            except RateLimited as refused:
                waits.append(refused.retry_after or 0.0)
            assert requests <= 30 + now[0] / 2 + 1e-6
            assert tokens <= 1000 * (1 + now[0] / 60) + 1e-6
        assert 0 < min(waits) < max(waits) <= 60
        assert requests > 1790, "what the limit allows is admitted"

    asyncio.run(scenario())


def test_waiting_as_long_as_told_helps() -> None:
    now = [0.0]
    counters, who = LocalCounters(lambda: now[0]), tenant(requests_per_minute=7)

    async def scenario() -> None:
        for _ in range(50):
            try:
                async with Visit(counters, who):
                    pass
            except RateLimited as refused:
                now[0] += (refused.retry_after or 0.0) + 1e-9
                async with Visit(counters, who):
                    pass

    asyncio.run(scenario())


def test_servers_share_what_is_in_redis() -> None:
    async def scenario() -> None:
        server, who = FakeServer(), tenant(requests_per_minute=6, max_concurrent=4)
        servers = [RedisCounters(FakeAsyncRedis(server=server)) for _ in range(3)]
        hold = asyncio.Event()
        inside = await asyncio.gather(*(admitted(counters, who, 10, hold) for counters in servers))
        assert sum(inside) == 4

    asyncio.run(scenario())


def test_a_place_whose_answer_was_lost_is_given_back() -> None:
    class Lossy(LocalCounters):
        async def enter(self, tenant: Tenant, request: str) -> Entry:
            await super().enter(tenant, request)
            raise QuotaUnavailable("the answer was lost")

    async def scenario() -> None:
        counters, who = Lossy(), tenant(max_concurrent=1)
        for _ in range(3):
            with pytest.raises(QuotaUnavailable):
                async with Visit(counters, who):
                    raise AssertionError("it is not let in")
        assert (await LocalCounters.enter(counters, who, "next")).has_place

    asyncio.run(scenario())


def test_connecting() -> None:
    async def scenario() -> None:
        counters = connect("redis://127.0.0.1:9")
        with pytest.raises(QuotaUnavailable):
            await counters.enter(tenant(max_concurrent=1), "r")
        assert (await counters.enter(tenant(), "r")).admitted, "who has no limit needs no counter"
        await counters.leave(tenant(max_concurrent=1), "r", 5)  # told in the log, not to the client

    asyncio.run(scenario())
    with pytest.raises(ConfigError, match="redis"):
        connect("nonsense")


def test_redis_out_of_reach_is_said() -> None:
    async def scenario() -> None:
        server = FakeServer()
        server.connected = False
        with pytest.raises(QuotaUnavailable):
            async with Visit(RedisCounters(FakeAsyncRedis(server=server)), tenant(max_concurrent=1)):
                raise AssertionError

    asyncio.run(scenario())
