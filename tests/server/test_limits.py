"""Limits over HTTP: exact admissions, the right status and headers, deadlines, and everything given back.

Case 24 of the catalogue of faults.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import pytest

from motet.config import ServerConfig, TenantPolicy
from motet.errors import CapacityExceeded

from .fakes import FakeGenerator, build, run, until
from .tenants import CHAT, Platform, platform


async def many(served: Platform, token: str, count: int, **fields: object) -> list[httpx.Response]:
    headers = {"authorization": f"Bearer {token}"}
    async with served.house.client() as client:
        body = {**CHAT, **fields}
        calls = (client.post("/v1/chat/completions", json=body, headers=headers) for _ in range(count))
        return list(await asyncio.gather(*calls))


def statuses(answers: list[httpx.Response]) -> dict[int, int]:
    return dict(Counter(answer.status_code for answer in answers))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        TenantPolicy(requests_per_minute=7),
        TenantPolicy(max_concurrent=7),
        TenantPolicy(max_queued=7),
        TenantPolicy(tokens_per_minute=7 * 16 + 3),  # 8 of the prompt and 8 of the answer
    ],
    ids=["requests", "concurrent", "queued", "tokens"],
)
def test_case_24_a_hundred_at_the_edge(tmp_path: Path, policy: TenantPolicy, stream: bool) -> None:
    served = platform(tmp_path, FakeGenerator(["a"], delay=1.0), acme=policy)
    answers = asyncio.run(many(served, served.acme, 100, stream=stream))
    assert statuses(answers) == {200: 7, 429: 93}
    assert len(served.house.generator.calls) == 7
    for answer in answers:
        if answer.status_code == 429:
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert int(answer.headers["retry-after"]) >= 1
    assert statuses(asyncio.run(many(served, served.beta, 20))) == {200: 20}, (
        "another tenant's limits are its own"
    )
    if policy.max_concurrent or policy.max_queued:
        assert statuses(asyncio.run(many(served, served.acme, 100))) == {200: 7, 429: 93}, (
            "places were given back"
        )


def test_case_24_a_full_server_is_503() -> None:
    house = build(FakeGenerator(["a"], delay=0.7), ServerConfig(max_queued=5))

    async def scenario() -> list[httpx.Response]:
        async with house.client() as client:
            calls = (client.post("/v1/chat/completions", json=CHAT) for _ in range(40))
            return list(await asyncio.gather(*calls))

    answers = asyncio.run(scenario())
    assert statuses(answers) == {200: 5, 503: 35}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.json()["error"]["code"] == "overloaded"
    assert refused.headers["retry-after"] == "1"
    assert statuses(asyncio.run(scenario())) == {200: 5, 503: 35}


@pytest.mark.parametrize("stream", [False, True])
def test_case_24_a_deadline_is_504_and_costs_nothing(tmp_path: Path, stream: bool) -> None:
    policy = TenantPolicy(queue_seconds=0.05, tokens_per_minute=16, max_concurrent=1, max_queued=1)
    served = platform(tmp_path, FakeGenerator(["a"] * 3, delay=60), acme=policy)
    for _ in range(3):
        answer = served.chat(served.acme, stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "queue_timeout")
        assert answer.headers["retry-after"] == "1"
    generator = served.house.generator
    assert len(generator.aborted) == 3, "the engine was told"
    assert generator.running == 0
    generator.delay = 0.0
    assert served.chat(served.acme, stream=stream).status_code == 200


def test_a_deadline_of_several_prompts_ends_them_all() -> None:
    house = build(FakeGenerator(["a"], delay=60), ServerConfig(queue_seconds=0.05))
    answer = house.complete(prompt=["a", "b", "c"], n=2)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "queue_timeout")
    assert len(house.generator.aborted) == 3
    assert house.generator.running == 0


def test_a_deadline_ends_with_the_first_token(tmp_path: Path) -> None:
    served = platform(tmp_path, FakeGenerator(["a"] * 8, delay=0.05), acme=TenantPolicy(queue_seconds=0.3))
    assert served.chat(served.acme).status_code == 200
    house = build(FakeGenerator(["a"], delay=60), ServerConfig(queue_seconds=0.05))
    assert house.chat().status_code == 504, "the server's own deadline"


def test_unused_tokens_come_back(tmp_path: Path) -> None:
    served = platform(tmp_path, acme=TenantPolicy(tokens_per_minute=100))
    first = served.chat(served.acme, max_tokens=80)
    assert first.headers["x-ratelimit-limit-tokens"] == "100"
    assert first.headers["x-ratelimit-remaining-tokens"] == "12"
    assert first.json()["usage"]["total_tokens"] == 11
    second = served.chat(served.acme, max_tokens=80)
    assert (second.status_code, second.headers["x-ratelimit-remaining-tokens"]) == (200, "1")
    third = served.chat(served.acme, max_tokens=80)
    assert third.status_code == 429
    assert "78 of 100" in third.json()["error"]["message"]
    too_many = served.chat(served.acme, max_tokens=99)
    assert "set a smaller max_tokens" in too_many.json()["error"]["message"]
    assert "retry-after" not in too_many.headers
    assert "x-ratelimit-limit-requests" not in first.headers


@pytest.mark.parametrize(
    ("fields", "status"), [({"temperature": 9}, 400), ({"model": "nobody"}, 404), ({"max_tokens": 499}, 400)]
)
def test_a_refused_request_counts_as_one_and_costs_no_tokens(
    tmp_path: Path, fields: dict[str, object], status: int
) -> None:
    served = platform(
        tmp_path, acme=TenantPolicy(requests_per_minute=2, tokens_per_minute=16, max_concurrent=1)
    )
    refused = served.chat(served.acme, **fields)
    assert refused.status_code == status
    assert refused.headers["x-ratelimit-remaining-requests"] == "1"
    assert served.chat(served.acme).status_code == 200
    third = served.chat(served.acme)
    assert (third.status_code, third.headers["x-ratelimit-remaining-requests"]) == (429, "0")
    assert third.headers["retry-after"] == "30"


def test_what_the_engine_refuses_costs_no_tokens(tmp_path: Path) -> None:
    served = platform(tmp_path, acme=TenantPolicy(tokens_per_minute=16))
    served.house.generator.refusal = CapacityExceeded("too large")
    for _ in range(3):
        assert served.chat(served.acme).status_code == 400
    served.house.generator.refusal = None
    assert served.chat(served.acme).status_code == 200


def test_a_client_that_leaves_pays_for_what_was_computed(tmp_path: Path) -> None:
    served = platform(
        tmp_path, FakeGenerator(["a"] * 400, delay=0.01), acme=TenantPolicy(tokens_per_minute=1000)
    )

    async def scenario() -> None:
        headers = {"authorization": f"Bearer {served.acme}"}
        async with served.house.client() as client:
            body = {**CHAT, "max_tokens": 400, "n": 2}
            call = asyncio.create_task(client.post("/v1/chat/completions", json=body, headers=headers))
            await until(lambda: served.house.generator.yielded > 20)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await until(lambda: served.house.generator.running == 0)
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        left = int(answer.headers["x-ratelimit-remaining-tokens"])
        assert 900 < left < 1000 - 8 - 20 - 16

    run(scenario())


def test_adapters_in_use_are_bounded(tmp_path: Path) -> None:
    policy = TenantPolicy(adapter_bytes=5000, adapters=("*",))
    served = platform(tmp_path, FakeGenerator(["a"] * 3, delay=0.2), acme=policy)

    async def scenario() -> dict[int, int]:
        headers = {"authorization": f"Bearer {served.acme}"}
        async with served.house.client() as client:
            models = ["acme/poet", "acme/poet", "beta/poet", "base"]
            calls = (
                client.post("/v1/chat/completions", json={**CHAT, "model": m}, headers=headers)
                for m in models
            )
            return statuses(list(await asyncio.gather(*calls)))

    assert asyncio.run(scenario()) == {200: 3, 429: 1}
    assert served.chat(served.acme, model="beta/poet").status_code == 200


def test_limits_that_are_not_set_have_no_headers() -> None:
    house = build()
    assert not [name for name in house.chat().headers if name.startswith("x-ratelimit")]
