"""Canaries and shadows on live requests: seen side by side, taken back by themselves, and never in anybody's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import cast

import httpx
import pytest

from motet.config import ServerConfig
from motet.errors import AdapterLoadFailed
from motet.observe.metrics import Metrics
from motet.registry import follow
from motet.registry.follow import RegistryCatalog
from motet.registry.records import Canary, Limits
from motet.registry.release import Divergence, Ended, Figures, verdict
from motet.registry.store import Registry
from motet.server.app import create_app
from motet.server.intake import Job, Prompt
from motet.server.rollout import FAILED, MIN_TOKENS, Pace, Rollout
from motet.types import ANYBODY, Account, Delta, PreparedAdapter, SamplingParams
from tests.registry.house import adapter_at, label
from tests.registry.test_follow import examine, prepare

from .fakes import SPEC, FakeEngine, FakeGenerator, run, until


class Voices(FakeGenerator):
    """Answers with what an adapter's text says, a letter each `pace` seconds by the engine's clock alone.

    Can fail for an adapter, or have its requests wait in the queue by the world's clock.
    """

    def __init__(self) -> None:
        super().__init__()
        self.voices: dict[str, list[str]] = {}
        self.failing: set[str] = set()
        self.pace: dict[str, float] = {}
        self.queue: dict[str, float] = {}
        self.priorities: list[int] = []

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        adapter: str,
        request_id: str,
        account: Account = ANYBODY,
    ) -> AsyncIterator[Delta]:
        self.priorities.append(account.priority)
        if adapter in self.failing:
            raise AdapterLoadFailed("it does not load")
        await asyncio.sleep(self.queue.get(adapter, 0.0))
        words = self.voices[adapter][: params.max_tokens]
        for i, word in enumerate(words):
            yield Delta(
                0,
                word,
                (ord(word),),
                finish="stop" if i == len(words) - 1 else None,
                prefill_seconds=None if i else 0.25,
                at=100.0 + i * self.pace.get(adapter, 0.01),
            )
        self.calls.append((tuple(prompt), params, adapter, request_id))


class House:
    """support@1 says abcdabcd and is promoted; support@2 says abcdabxy."""

    def __init__(self, home: Path) -> None:
        def bind(folder: Path) -> PreparedAdapter:
            return prepare(folder)

        self.registry = Registry(str(home / "registry"))
        self.catalog = RegistryCatalog(
            Registry(self.registry.url), home / "copies", SPEC, "base", "/base", bind, FakeEngine()
        )
        self.generator = Voices()
        self.rollout = Rollout(self.generator, self.catalog)
        self.app = create_app(self.generator, self.catalog, ServerConfig(), Metrics("base"))
        self.digests = []
        for text in ("abcdabcd", "abcdabxy"):
            pushed = self.registry.push("support", adapter_at(home / text, text), examine, label())
            self.generator.voices[pushed.facts.digest] = list(text)
            self.digests.append(pushed.facts.digest)
        self.registry.promote("support@1", "ada")

    async def ask(self, user: str, **more: object) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        body: dict[str, object] = {"model": "support", "prompt": "x", "user": user, "temperature": 0}
        body |= more
        async with httpx.AsyncClient(transport=transport, base_url="http://motet") as client:
            return await client.post("/v1/completions", json=body)

    async def releases(self) -> dict[str, object]:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://motet") as client:
            found: dict[str, object] = (await client.get("/admin/v1/releases")).json()["releases"][
                "support@prod"
            ]
        return found


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    return House(tmp_path)


@pytest.mark.parametrize("stream", [False, True])
def test_versions_side_by_side(house: House, stream: bool) -> None:
    async def scenario() -> None:
        house.registry.canary("support", Canary(2, 0.5), "ada")
        await house.catalog.sync()
        for i in range(40):
            assert (await house.ask(f"user {i}", stream=stream)).status_code == 200
        release = house.catalog.releases()["support@prod"]
        assert release.canary is not None
        assert release.stable.requests + release.canary.requests == 40
        assert min(release.stable.requests, release.canary.requests) > 8
        assert release.stable.failures == release.canary.failures == 0
        told = await house.releases()
        assert told["canary"] == {
            "requests": release.canary.requests,
            "failures": 0,
            "pace": pytest.approx(0.01),
            "measured": release.canary.requests,
            "first_token": 0.25,
        }

    run(scenario())


@pytest.mark.parametrize("fault", ["fails", "slow"])
def test_a_bad_canary_is_taken_back_and_its_users_get_stable(house: House, fault: str) -> None:
    async def scenario() -> None:
        if fault == "fails":
            house.generator.failing.add(house.digests[1])
        else:
            house.generator.pace = {house.digests[1]: 0.04}
        limits = Limits(error_rate=0.1, latency=3.0, min_requests=10)
        house.registry.canary("support", Canary(2, 0.5, limits=limits), "ada")
        await house.catalog.sync()
        follower = asyncio.create_task(house.catalog.follow())
        statuses = [(await house.ask(f"user {i}")).status_code for i in range(60)]
        assert (503 in statuses) == (fault == "fails")
        await until(lambda: house.registry.snapshot().aliases["support@prod"].canary is None)
        await until(lambda: house.catalog.releases()["support@prod"].canary is None)
        after = [await house.ask(f"user {i}") for i in range(60)]
        assert {(answer.status_code, answer.json()["model"]) for answer in after} == {(200, "support@1")}
        event = house.registry.history("support@prod")[0]
        assert (event.who, event.action) == ("motet", "rollback")
        assert ("requests failed" in event.detail) == (fault == "fails")
        assert ("ms per token" in event.detail) == (fault == "slow")
        follower.cancel()

    run(scenario())


@pytest.mark.parametrize("cause", ["short answers", "its queue", "its readers"])
def test_a_canary_is_not_taken_back_for_what_is_not_its_doing(house: House, cause: str) -> None:
    """The world's clock sees each of these as ten times slower than the stable version."""

    async def scenario() -> None:
        canary = house.digests[1]
        more: dict[str, object] = {}
        if cause == "short answers":
            more["max_tokens"] = MIN_TOKENS - 1
            house.generator.pace = {canary: 0.1}
        elif cause == "its queue":
            house.generator.queue = {canary: 0.05}
        limits = Limits(error_rate=0.1, latency=3.0, min_requests=5)
        house.registry.canary("support", Canary(2, 0.5, limits=limits), "ada")
        await house.catalog.sync()
        for i in range(30):
            if cause == "its readers":
                await read_slowly(house, f"user {i}", 0.01)
            else:
                assert (await house.ask(f"user {i}", **more)).status_code == 200
        release = house.catalog.releases()["support@prod"]
        assert release.canary is not None
        assert release.canary.requests > 5
        measured = 0 if cause == "short answers" else release.canary.requests
        assert release.canary.measured == measured
        assert release.canary.pace == pytest.approx(0.01 if measured else 0.0)
        assert verdict(limits, release.stable, release.canary) is None

    run(scenario())


async def read_slowly(house: House, user: str, seconds: float) -> None:
    """As a client that the canary answers would: it takes an event every `seconds`."""
    record = house.catalog.resolve("support", user)
    assert record is not None
    job = Job(
        "id", "support", record.name, record.digest, "fp", ANYBODY, (Prompt((1,), SamplingParams()),), True, False
    )  # fmt: skip
    deltas = house.generator.generate((1,), SamplingParams(), record.digest, "id")
    async for _ in house.rollout.watch(cast("AsyncGenerator[Delta, None]", deltas), job):
        await asyncio.sleep(seconds if record.name == "support@2" else 0)


def test_only_requests_by_the_alias_count(house: House) -> None:
    async def scenario() -> None:
        house.registry.promote("support@1", "ada", to="best")
        house.registry.canary("support", Canary(2, 1.0), "ada")
        await house.catalog.sync()
        house.generator.failing.add(house.digests[1])
        fine_tune = house.registry.version("support@2").fine_tune("base")
        for model in ("support@2", fine_tune, "support@1", "base"):
            await house.ask("user", model=model)
        release = house.catalog.releases()["support@prod"]
        assert release.canary is not None
        assert release.stable.requests == release.canary.requests == 0
        for model in ("support", "support@prod"):
            assert (await house.ask("user", model=model)).status_code == 503
        assert (await house.ask("user", model="support@best")).status_code == 200
        releases = house.catalog.releases()
        assert releases["support@prod"].canary == Figures(2, 2)
        assert releases["support@best"].stable.requests == 1
        assert releases["support@prod"].stable.requests == 0, "the same version by another alias"

    run(scenario())


def test_the_engines_pace_of_several_choices() -> None:
    pace = Pace()
    for index, tokens, step in ((0, 11, 0.1), (1, MIN_TOKENS, 0.2), (2, MIN_TOKENS - 1, 9.0)):
        for i in range(tokens):
            pace.add(Delta(index, "a", (1,), at=5.0 + i * step, prefill_seconds=None if i else 0.5 + index))
    pace.add(Delta(0, "", finish="stop"))
    ended = pace.ended()
    assert ended.pace == pytest.approx((10 * 0.1 + 7 * 0.2) / 17), "the third choice is too short"
    assert ended.first_token == 2.5
    assert Pace().ended() == Ended()


def test_two_servers_take_back_one_canary_once(house: House) -> None:
    canary = Canary(2, 0.5)
    house.registry.promote("support@2", "ada")
    house.registry.promote("support@1", "ada")
    house.registry.canary("support", canary, "ada")
    for _ in range(2):
        assert house.registry.rollback("support", "motet", "bad", only=canary).stable == 1
    assert [event.action for event in house.registry.history("support@prod")].count("rollback") == 1


def test_a_new_canary_begins_with_a_clean_slate(house: House) -> None:
    async def scenario() -> None:
        house.registry.canary("support", Canary(2, 0.5), "ada")
        await house.catalog.sync()
        house.catalog.monitor.record("support@prod", "support@2", FAILED)
        house.registry.promote("support@1", "bob", to="other")
        await house.catalog.sync()
        assert house.catalog.monitor.figures("support@prod", "support@2").requests == 1
        house.registry.rollback("support", "ada")
        house.registry.canary("support", Canary(2, 0.6), "ada")
        await house.catalog.sync()
        assert house.catalog.monitor.figures("support@prod", "support@2").requests == 0

    run(scenario())


def test_a_shadow_answers_nobody_and_says_how_it_differs(house: House) -> None:
    async def scenario() -> None:
        house.registry.canary("support", Canary(2, 1.0, shadow=True), "ada")
        await house.catalog.sync()
        for i in range(3):
            answer = await house.ask(f"user {i}")
            assert (answer.json()["model"], answer.json()["choices"][0]["text"]) == ("support@1", "abcdabcd")
            await until(lambda: house.catalog.monitor.figures("support@prod", "support@2").requests == i + 1)  # noqa: B023
        await house.ask("user", temperature=1)
        await until(lambda: house.catalog.monitor.figures("support@prod", "support@2").requests == 4)
        release = house.catalog.releases()["support@prod"]
        assert release.divergence == Divergence(3, 0, 0.75), "abcdab; a random answer is not compared"
        assert release.canary is not None
        assert release.canary.measured == 0, "its pace is that of whoever comes last"
        assert set(house.generator.priorities[::2]) == {0}
        assert max(house.generator.priorities[1::2]) < -1000, "behind everybody"
        house.generator.failing.add(house.digests[1])
        assert (await house.ask("user")).status_code == 200
        await until(lambda: house.catalog.monitor.figures("support@prod", "support@2").failures == 1)

    run(scenario())


def test_a_client_that_leaves_says_nothing_of_the_version(house: House) -> None:
    async def scenario() -> None:
        await house.catalog.sync()
        house.generator.queue = {house.digests[0]: 10.0}
        asking = asyncio.create_task(house.ask("user"))
        await until(lambda: bool(house.generator.priorities))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert house.catalog.monitor.figures("support@prod", "support@1").requests == 0

    run(scenario())
