"""Cases 19, 20, 22 and 23 of the catalogue of faults, as far as `test_refusals.py` and `test_disconnect.py` leave them
open: how long bad input keeps the event loop, bombs for parsers, 500 clients that leave, a client that never reads."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from .fakes import FakeGenerator, House, build, listening, run, until
from .test_refusals import BOMBS

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
HEADERS = {"content-type": "application/json"}


@contextmanager
def longest_callback(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Processor time of each callback of the event loop: what others wait for, whatever else the machine does."""
    took: list[float] = []
    original = asyncio.events.Handle._run

    def timed(self: asyncio.Handle) -> None:
        began = time.thread_time()
        original(self)
        took.append(time.thread_time() - began)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.events.Handle, "_run", timed)
        yield took


@pytest.mark.parametrize("name", BOMBS)
def test_case_19_bombs_do_not_hold_the_loop(house: House, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            with longest_callback(monkeypatch) as took:
                answer = await client.post("/v1/chat/completions", content=BOMBS[name], headers=HEADERS)
            assert answer.status_code == 400
            assert max(took) < 0.05

    with listening(house) as url:
        run(scenario(url))


REGEX = "(" * 50 + "a+" + ")+" * 50 + "$"
SCHEMA: dict[str, object] = {"type": "object"}
for _ in range(60):
    SCHEMA = {"type": "object", "properties": {"x": SCHEMA, "y": SCHEMA}}
DEEP = json.loads('{"anyOf":[' * 200 + "{}" + "]}" * 200)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": DEEP}}},
        {"response_format": {"type": "regex", "pattern": REGEX}},
        {"guided_regex": REGEX},
        {"guided_json": DEEP},
        {"guided_grammar": "root ::= root root | root"},
        {"structured_outputs": {"regex": REGEX}},
        {"tools": [{"type": "function", "function": {"name": "x", "parameters": DEEP}}]},
        {
            "chat_template": "{% for a in range(10**9) %}{% for b in range(10**9) %}{{ a }}{% endfor %}{% endfor %}"
        },
        {"chat_template_kwargs": {"x": "{{ cycler.__init__.__globals__ }}"}},
        {"stop": [REGEX] * 17},
        {"logit_bias": {REGEX: 1}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_case_20_bombs_for_parsers_are_refused_by_name(house: House, fields: dict[str, object]) -> None:
    began = time.process_time()
    answer = house.chat(**fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(next(iter(fields)))
    assert time.process_time() - began < 0.1
    assert not house.generator.calls
    assert house.chat().status_code == 200


def test_case_20_what_looks_like_a_template_is_text(house: House) -> None:
    text = "{% raw %}{{ 7 * 7 }}{% endraw %}"
    assert house.chat(messages=[{"role": "user", "content": text}]).status_code == 200
    ((tokens, *_),) = house.generator.calls
    assert text.encode() in bytes(tokens)


def request(body: dict[str, object]) -> bytes:
    text = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(text), text)
    )


def test_case_22_five_hundred_clients_leave() -> None:
    """A third before a byte of their request is read, a third while they wait, a third in the middle of the answer."""
    house = build(FakeGenerator(["word "] * 400, delay=0.05))
    generator = house.generator

    async def leave(address: tuple[str, int], number: int) -> None:
        reader, writer = await asyncio.open_connection(*address)
        body = {**CHAT, "stream": number % 2 == 0, "n": 1 + number % 3, "max_tokens": 400}
        writer.write(request(body))
        if number % 3 == 1:
            await writer.drain()
            await asyncio.sleep(0.02)
        elif number % 3 == 2 and number % 2 == 0:
            await reader.readuntil(b"data: ")
        writer.transport.abort()

    async def scenario(url: str) -> None:
        where = urlsplit(url)
        assert where.hostname is not None
        assert where.port is not None
        address = (where.hostname, where.port)
        for _ in range(10):
            await asyncio.gather(*(leave(address, number) for number in range(50)))
        await until(lambda: generator.running == 0 and house.app.state.lifecycle.in_flight == 0, 20)
        assert len(generator.aborted) == len(generator.calls)
        assert len(generator.calls) >= 80, (
            "those who read the beginning of an answer; others may leave before"
        )
        yielded = generator.yielded
        await asyncio.sleep(0.2)
        assert generator.yielded == yielded, "nobody's work goes on"
        generator.delay = 0
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    with listening(house) as url:
        run(scenario(url))


def test_case_23_a_client_that_never_reads_holds_back_itself_alone() -> None:
    """Its answer is made only as far as buffers reach; others' gaps between events stay as they were."""
    house = build(FakeGenerator(["x" * 3000] * 400, delay=0.02))
    generator = house.generator

    async def gaps(url: str) -> list[float]:
        """Between the events of four readers."""
        async with httpx.AsyncClient(base_url=url) as client:

            async def one() -> list[float]:
                body = {**CHAT, "stream": True, "max_tokens": 400}
                found, last = [], 0.0
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    async for _ in answer.aiter_bytes():
                        now = time.perf_counter()
                        found.append(now - last)
                        last = now
                        if len(found) > 40:
                            break
                return found[2:]

            return [gap for reader in await asyncio.gather(*(one() for _ in range(4))) for gap in reader]

    def p95(values: list[float]) -> float:
        return sorted(values)[int(0.95 * len(values))]

    async def scenario(url: str) -> None:
        where = urlsplit(url)
        alone = min([p95(await gaps(url)) for _ in range(3)])
        before = generator.yielded
        with socket.socket() as mute:
            mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            mute.connect((where.hostname, where.port))
            mute.sendall(request({**CHAT, "stream": True, "max_tokens": 400}))
            await until(lambda: generator.yielded > before)
            beside = min([p95(await gaps(url)) for _ in range(3)])
            await until(lambda: generator.running == 1)  # its own request: it has been here all the time
        await until(lambda: generator.running == 0)
        assert beside < 1.2 * alone

    with listening(house) as url:
        run(scenario(url))
