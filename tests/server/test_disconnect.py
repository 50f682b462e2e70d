"""Clients that leave, and clients that stay but do not read: their work stops, others notice nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

import motet.server.connection

from .fakes import FakeGenerator, House, build, listening, run, until

PATHS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "base", "prompt": ["a", "b"], "n": 2, "max_tokens": 400},
}


def endless(delay: float = 0.02) -> House:
    return build(FakeGenerator(["word "] * 400, delay))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queued", "decode"])
def test_a_client_that_leaves_stops_its_work(path: str, stream: bool, phase: str) -> None:
    house = endless(delay=60 if phase == "queued" else 0.02)
    generator = house.generator

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            call = asyncio.create_task(client.post(path, json={**PATHS[path], "stream": stream}))
            await until(lambda: generator.running > 0 if phase == "queued" else generator.yielded > 4)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            yielded = generator.yielded
            await until(lambda: generator.running == 0)
            assert generator.yielded - yielded <= 2 * 4  # two steps of up to four choices
            assert len(generator.aborted) == len(generator.calls) > 0
            generator.delay = 0
            assert (await client.post(path, json=PATHS[path])).status_code == 200
            await until(lambda: house.app.state.lifecycle.in_flight == 0)

    with listening(house) as url:
        run(scenario(url))
    assert 'outcome="cancelled"' in house.metrics.render(None, []).decode()


def test_many_clients_leave_at_once() -> None:
    house = endless(delay=0.03)

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        path = list(PATHS)[number % 2]
        call = asyncio.create_task(client.post(path, json={**PATHS[path], "stream": number % 3 == 0}))
        await until(
            lambda: house.generator.running > 0 or bool(house.generator.aborted)
        )  # the first have arrived
        await asyncio.sleep(0.02 * (number % 7))
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, limits=httpx.Limits()) as client:
            await asyncio.gather(*(leave(client, number) for number in range(100)))
            await until(lambda: house.generator.running == 0 and house.app.state.lifecycle.in_flight == 0)
            assert house.generator.aborted
            house.generator.delay = 0
            assert (await client.get("/health")).status_code == 200
            assert (await client.post("/v1/completions", json=PATHS["/v1/completions"])).status_code == 200

    with listening(house) as url:
        run(scenario(url))


def test_a_client_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motet.server.connection, "_STALLED_SECONDS", 0.3)
    house = build(FakeGenerator(["x" * 50_000] * 400))
    body = json.dumps({"model": "base", "prompt": "x", "stream": True, "max_tokens": 400}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )

    async def scenario(url: str) -> None:
        address = urlsplit(url)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((address.hostname, address.port))
            client.sendall(request)
            await until(lambda: bool(house.generator.aborted), 5)
            assert house.generator.yielded < 400
            async with httpx.AsyncClient(base_url=url) as other:
                assert (await other.get("/health")).status_code == 200
            await until(lambda: house.app.state.lifecycle.in_flight == 0)

    with listening(house) as url:
        run(scenario(url))


def test_a_body_in_tiny_chunks_leaves_others_alone() -> None:
    house = build()

    async def scenario(url: str) -> None:
        address = urlsplit(url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 40_000 + b"0\r\n\r\n"
        )
        status = asyncio.create_task(reader.readline())
        waits = []
        async with httpx.AsyncClient(base_url=url) as other:
            while not status.done():
                start = time.perf_counter()
                await other.get("/health")
                waits.append(time.perf_counter() - start)
        writer.close()
        assert b"400" in await status
        assert sorted(waits)[len(waits) // 2] < 0.1

    with listening(house) as url:
        run(scenario(url))
