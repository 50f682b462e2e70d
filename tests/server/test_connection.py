"""Clients that are too slow with what they send: answered 408 and hung up on, others notice nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send

import motet.server.connection
import motet.server.run
from motet.config import ServerConfig
from motet.errors import ConfigError
from motet.server.connection import with_patience
from motet.server.failures import RequestTimeout
from motet.server.sagemaker import SageMaker
from motet.tenancy.access import Guard

from .fakes import House, build, listening, run, until

BODY = json.dumps({"model": "base", "prompt": "x"}).encode()
QUICK = ServerConfig(head_seconds=0.4, body_seconds=0.4, body_rate=200)


def head(path: str = "/v1/completions", length: int = len(BODY)) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


@dataclass
class Client:
    """A connection, and what has come over it once it is closed."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def drip(self, data: bytes, seconds: float = 0.03) -> None:
        """Send byte by byte until all is sent or the other side is gone."""
        for i in range(len(data)):
            if self.reader.at_eof():
                return
            self.writer.write(data[i : i + 1])
            await asyncio.sleep(seconds)

    async def answered(self, data: bytes, seconds: float = 0.03) -> bytes:
        """What was answered before the connection was closed, while `data` dripped."""
        dripping = asyncio.create_task(self.drip(data, seconds))
        try:
            return await asyncio.wait_for(self.reader.read(), 5)
        finally:
            dripping.cancel()


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Client]:
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


def against(house: House, scenario: Callable[[Client], object]) -> None:
    """Run `scenario`; afterwards the server is as it was."""

    async def whole(url: str) -> None:
        async with client_of(url) as client:
            await scenario(client)  # type: ignore[misc]
        await until(lambda: house.app.state.lifecycle.in_flight == 0)
        async with httpx.AsyncClient(base_url=url) as other:
            answer = await other.post(
                "/v1/completions", content=BODY, headers={"content-type": "application/json"}
            )
            assert answer.status_code == 200

    with listening(house) as url:
        run(whole(url))


def error_in(answer: bytes) -> dict[str, str]:
    top, _, body = answer.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"connection: close" in top.lower()
    error: dict[str, str] = json.loads(body)["error"]
    return error


def test_half_a_head_is_408() -> None:
    async def scenario(client: Client) -> None:
        began = time.monotonic()
        error = error_in(await client.answered(head()))
        assert error["code"] == "request_timeout"
        assert "head did not come within 0.4 s" in error["message"]
        assert 0.3 < time.monotonic() - began < 2, "a byte now and then buys no time"

    against(build(config=QUICK), scenario)


def test_the_second_head_of_a_connection_is_bounded_too() -> None:
    async def scenario(client: Client) -> None:
        client.writer.write(head() + BODY)
        assert b"200 OK" in await client.reader.readuntil(b"\r\n\r\n")
        answer = await client.answered(head())
        error_in(answer[answer.index(b"HTTP/1.1") :])

    against(build(config=QUICK), scenario)


def test_a_connection_on_which_nothing_comes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motet.server.run, "KEEP_ALIVE_SECONDS", 0.3)

    async def scenario(client: Client) -> None:
        assert await client.answered(b"") == b"", "without a word: it was only idle"

    against(build(), scenario)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/load_lora_adapter", "/invocations", "/adapters"])
def test_a_dripping_body_is_408(path: str) -> None:
    house = build(config=QUICK)
    house.app.add_middleware(SageMaker, base="base", max_body_bytes=1 << 20, guard=Guard())

    async def scenario(client: Client) -> None:
        client.writer.write(head(path, 1000))
        began = time.monotonic()
        assert error_in(await client.answered(b" " * 1000))["code"] == "request_timeout"
        assert 0.3 < time.monotonic() - began < 2

    against(house, scenario)
    assert not house.generator.calls[1:]


def test_a_slow_body_that_goes_on_is_waited_for() -> None:
    async def scenario(client: Client) -> None:
        body = BODY[:-1] + b" " * 400 + b"}"
        client.writer.write(head(length=len(body)))
        began = time.monotonic()
        for i in range(0, len(body), 20):
            client.writer.write(body[i : i + 20])
            await asyncio.sleep(0.04)
        assert b"200 OK" in await client.reader.readuntil(b"\r\n\r\n")
        assert time.monotonic() - began > 2 * QUICK.body_seconds

    against(build(config=QUICK), scenario)


def test_a_body_that_was_answered_before_it_came_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(motet.server.connection, "_LINGER_SECONDS", 0.3)

    async def scenario(client: Client) -> None:
        client.writer.write(head(length=1 << 40))
        assert b" 413 " in await client.reader.readuntil(b"\r\n\r\n")
        began = time.monotonic()
        with suppress(ConnectionError):
            await client.answered(b" " * 1000)
        assert time.monotonic() - began < 2

    against(build(), scenario)


def test_a_server_that_is_slow_itself_blames_nobody() -> None:
    """Only the time that it waits for the client counts, and after the body none."""
    parts: list[Message] = [
        {"type": "http.request", "body": b"x", "more_body": True},
        {"type": "http.request", "body": b"y", "more_body": False},
    ]
    got: list[str] = []

    async def app(_: Scope, receive: Receive, __: Send) -> None:
        for _part in range(3):
            await asyncio.sleep(0.2)
            got.append((await receive())["type"])

    async def receive() -> Message:
        if not parts:
            await asyncio.sleep(0.3)
            return {"type": "http.disconnect"}
        return parts.pop(0)

    async def send(_: Message) -> None: ...

    config = ServerConfig(body_seconds=0.1)
    run(with_patience(app, config)({"type": "http"}, receive, send))  # type: ignore[arg-type]
    assert got == ["http.request", "http.request", "http.disconnect"]

    async def never() -> Message:
        await asyncio.sleep(10)
        raise AssertionError

    with pytest.raises(RequestTimeout, match="0 bytes of the request's body came in"):
        run(with_patience(app, config)({"type": "http"}, never, send))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["head_seconds", "body_seconds", "body_rate"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be positive, got 0"):
        msgspec.structs.replace(QUICK, **{name: 0})
