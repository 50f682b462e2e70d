"""Tokenising: tenants take turns, limits come first, and nobody's text is tokenised who does not wait for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from motet.config import ServerConfig, TenantPolicy
from motet.server.turns import Turns

from .fakes import FakeGenerator, House, build, listening, run, until
from .tenants import Platform, platform


class Bench:
    """Turns over one thread whose jobs begin when they are told to."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.turns = Turns(thread)
        self.gate = threading.Semaphore(0)
        self.done: list[str] = []

    def ask(self, *jobs: str) -> list[asyncio.Task[str]]:
        """The first letter of a job is its tenant."""
        return [asyncio.create_task(self.turns.run(job[0], self._work, job)) for job in jobs]

    def _work(self, job: str) -> str:
        assert self.gate.acquire(timeout=5)
        self.done.append(job)
        if job.endswith("!"):
            raise ValueError(job)
        return job

    async def finish(self, jobs: int, *tasks: asyncio.Task[str]) -> list[str | BaseException]:
        self.gate.release(jobs)
        return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_others_come_before_a_tenants_next_job(thread: ThreadPoolExecutor) -> None:
    async def scenario() -> None:
        bench = Bench(thread)
        tasks = bench.ask("a1", "a2", "a3", "b1", "b2", "c1")
        await until(lambda: bench.turns.waiting == 5)
        assert await bench.finish(6, *tasks) == ["a1", "a2", "a3", "b1", "b2", "c1"]
        assert bench.done == ["a1", "b1", "c1", "a2", "b2", "a3"]
        assert bench.turns.waiting == 0
        assert await bench.finish(1, *bench.ask("a4")) == ["a4"]

    run(scenario())


def test_who_comes_while_a_tenant_is_served_is_next(thread: ThreadPoolExecutor) -> None:
    async def scenario() -> None:
        bench = Bench(thread)
        tasks = bench.ask("a1", "a2", "a3")
        await until(lambda: bench.turns.waiting == 2)
        bench.gate.release()
        await until(lambda: bench.done == ["a1"] and bench.turns.waiting == 1)
        tasks += bench.ask("b1", "b2")
        await until(lambda: bench.turns.waiting == 3)
        await bench.finish(4, *tasks)
        assert bench.done == ["a1", "a2", "b1", "a3", "b2"]

    run(scenario())


def test_who_leaves_is_left_out_and_keeps_nobody_from_a_turn(thread: ThreadPoolExecutor) -> None:
    async def scenario() -> None:
        bench = Bench(thread)
        tasks = bench.ask("a1", "a2", "b1", "b2", "c1!", "c2")
        await until(lambda: bench.turns.waiting == 5)
        for gone in (0, 2, 5):  # in the thread, the next, the last of its tenant
            tasks[gone].cancel()
        found = await bench.finish(4, *tasks)
        assert bench.done == ["a1", "b2", "c1!", "a2"], "what is in the thread stays there until it is done"
        assert [str(result) for result in found] == ["", "a2", "", "b2", "c1!", ""]
        assert bench.turns.waiting == 0

    run(scenario())


def test_a_turn_that_came_as_its_owner_left_goes_on(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        bench = Bench(thread)
        tasks = bench.ask("a1", "b1", "c1")
        await until(lambda: bench.turns.waiting == 2)
        give = bench.turns._next

        def give_and_take_back() -> None:
            give()
            tasks[1].cancel()  # it has its turn, and has not heard of it yet

        with monkeypatch.context() as patch:
            patch.setattr(bench.turns, "_next", give_and_take_back)
            await bench.finish(2, *tasks)
        assert bench.done == ["a1", "c1"]
        assert await bench.finish(1, *bench.ask("d1")) == ["d1"]

    run(scenario())


class Slow(FakeGenerator):
    """Tokenises what begins with "huge" in 0.1 s, and remembers all texts in order."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__(["a"], delay)
        self.texts: list[str] = []
        self.long_tokens = False  # of 20 letters
        self.gate: threading.Event | None = None  # that huge ones wait for instead
        self.began = 0

    def encode(self, text: str) -> list[int]:
        self.began += 1
        if text.startswith("huge"):
            if self.gate is None:
                time.sleep(0.1)
            else:
                assert self.gate.wait(5)
        self.texts.append(text)
        return super().encode(text)[:: 20 if self.long_tokens else 1]


def ask(client: httpx.AsyncClient, token: str, prompt: object) -> asyncio.Task[httpx.Response]:
    body = {"model": "base", "prompt": prompt, "max_tokens": 4}
    headers = {"authorization": f"Bearer {token}"}
    return asyncio.create_task(client.post("/v1/completions", json=body, headers=headers))


@pytest.mark.parametrize("together", [False, True], ids=["many requests", "many prompts"])
def test_a_tenant_of_huge_prompts_holds_up_itself_alone(tmp_path: Path, together: bool) -> None:
    generator = Slow()
    served = platform(tmp_path, generator)
    huge = [f"huge {i}" for i in range(20)]

    async def scenario() -> None:
        async with served.house.client() as client:
            aggressor = [ask(client, served.acme, prompt) for prompt in ([huge] if together else huge)]
            await until(lambda: len(generator.texts) > 0)
            answers = [await ask(client, served.beta, f"small {i}") for i in range(3)]
            assert [answer.status_code for answer in answers] == [200] * 3
            assert len([text for text in generator.texts if "huge" in text]) <= 6
            assert {answer.status_code for answer in await asyncio.gather(*aggressor)} == {200}

    run(scenario())


def server_under_test() -> tuple[Slow, House]:
    generator = Slow()
    return generator, build(generator)


def test_who_has_left_is_not_tokenised() -> None:
    generator, house = server_under_test()
    generator.gate = threading.Event()
    lifecycle = house.app.state.lifecycle

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            first = ask(client, "nobody", "huge")
            await until(lambda: generator.began == 1)
            call = ask(client, "nobody", "gone")
            await until(lambda: lifecycle.in_flight == 2)
            await asyncio.sleep(0.05)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await until(lambda: lifecycle.in_flight == 1)
            assert generator.gate is not None
            generator.gate.set()
            assert (await first).status_code == 200
        assert generator.texts == ["huge"]

    with listening(house) as url:
        run(scenario(url))


def test_who_has_waited_too_long_is_not_tokenised(tmp_path: Path) -> None:
    generator = Slow()
    policy = TenantPolicy(queue_seconds=0.15, tokens_per_minute=1000)
    served = platform(tmp_path, generator, beta=policy)

    async def scenario() -> None:
        async with served.house.client() as client:
            tasks = [
                ask(client, token, f"huge {i}") for i, token in enumerate([served.acme, *[served.beta] * 4])
            ]
            answers = await asyncio.gather(*tasks)
            statuses = [answer.status_code for answer in answers]
            assert statuses[0] == 200
            assert statuses[-1] == 504
            assert answers[-1].json()["error"]["code"] == "queue_timeout"
            late = await ask(client, served.beta, "small")
            used = sum(len("huge 0") + 1 for status in statuses[1:] if status == 200)
            left = 1000 - used - (len("small") + 4)
            assert late.headers["x-ratelimit-remaining-tokens"] == str(left), "what was dropped cost nothing"

    run(scenario())
    assert "huge 4" not in generator.texts


@pytest.mark.parametrize("chat", [False, True])
def test_of_text_that_is_too_long_only_the_beginning_is_tokenised(chat: bool) -> None:
    """The context is 500 tokens; a text of few tokens may be longer than the beginning that is looked at."""
    generator, house = server_under_test()

    def post(text: str) -> httpx.Response:
        return (
            house.chat(messages=[{"role": "user", "content": text}]) if chat else house.complete(prompt=text)
        )

    answer = post("x" * 30_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert [len(text) for text in generator.texts] == [4000]
    generator.long_tokens = True
    assert post("x" * 5000).status_code == 200
    assert len(generator.texts[-1]) >= 5000


def refused_without_tokenising(served: Platform, generator: Slow, status: int) -> None:
    async def scenario() -> None:
        async with served.house.client() as client:
            first = ask(client, served.acme, "one that runs")
            await until(lambda: generator.running == 1)
            before = list(generator.texts)
            answer = await ask(client, served.acme, "huge")
            assert (answer.status_code, generator.texts) == (status, before)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    run(scenario())


@pytest.mark.parametrize(
    "policy",
    [TenantPolicy(max_queued=1), TenantPolicy(max_concurrent=1), TenantPolicy(requests_per_minute=1)],
)
def test_a_tenants_limits_come_before_its_text(tmp_path: Path, policy: TenantPolicy) -> None:
    generator = Slow(delay=60)
    refused_without_tokenising(platform(tmp_path, generator, acme=policy), generator, 429)


def test_a_full_server_tokenises_nothing(tmp_path: Path) -> None:
    generator = Slow(delay=60)
    config = ServerConfig(max_queued=1, adapter_roots=(str(tmp_path),))
    refused_without_tokenising(platform(tmp_path, generator, config), generator, 503)
