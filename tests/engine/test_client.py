"""Both ends of the engine's socket, and the same engine on a thread: answers, departures, deaths."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from motet.adapters.store import ImageStore
from motet.config import EngineConfig
from motet.engine.client import EngineClient, EngineProcess, EngineThread
from motet.engine.loop import Engine
from motet.engine.messages import (
    HEADER,
    GetStats,
    Outbound,
    Progress,
    Ready,
    Reply,
    frame,
    typed_error,
)
from motet.errors import CapacityExceeded, ConfigError, EngineDead, ModelRefused, MotetError
from motet.registry.prepare import prepare
from motet.types import BASE, PreparedAdapter, Request, SamplingParams, SeqOutput
from tests.tiny import write_adapter, write_model

KINDS: list[type[EngineClient]] = [EngineThread, EngineProcess]
PROMPT = tuple(range(10, 45))
pytestmark = pytest.mark.xdist_group("client")  # one engine for all, on one worker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("home") / "model", "mixtral", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    targets = ["q_proj", "v_proj"]
    return write_adapter(model.parent / "adapter", model, "mixtral", seed=1, r=4, target_modules=targets)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One loop for the whole module: a client belongs to the loop that it was made in."""
    with asyncio.Runner() as runner:
        yield runner


def config(model: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(model), **{"pool_bytes": 4 << 20, "threads": 1, **options})


async def start(kind: type[EngineClient], config: EngineConfig) -> EngineClient:
    client = kind(config)  # type: ignore[arg-type]  # the subclasses take a config
    await client.started()
    return client


@pytest.fixture(scope="module", params=KINDS)
def client(request: pytest.FixtureRequest, runner: asyncio.Runner, model: Path) -> Iterator[EngineClient]:
    client = runner.run(start(request.param, config(model)))
    yield client
    stats = runner.run(client.stats())
    assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
    runner.run(client.close())
    assert not client.alive


def ask(name: str, prompt: tuple[int, ...] = PROMPT, adapter: str = BASE, **params: Any) -> Request:
    chosen = SamplingParams(**{"max_tokens": 12, "temperature": 0, "ignore_eos": True, **params})
    return Request(name, prompt, chosen, adapter)


async def outputs_of(client: EngineClient, *requests: Request) -> list[SeqOutput]:
    return [output async for output in client.stream(requests)]


def tokens_of(outputs: list[SeqOutput], name: str) -> list[int]:
    return [token for output in outputs if output.request_id == name for token in output.token_ids]


async def first_of(client: EngineClient, request: Request) -> SeqOutput:
    """Take one output and leave."""
    async with aclosing(client.stream([request])) as stream:  # type: ignore[type-var]
        async for output in stream:
            return output
    raise AssertionError("the stream was empty")


# Serving


def test_one_stream_for_several_requests(client: EngineClient, runner: asyncio.Runner) -> None:
    outputs = runner.run(outputs_of(client, ask("a", seed=1), ask("b", max_tokens=5)))
    assert {output.request_id: output.finish for output in outputs if output.finish} == {
        "a": "length",
        "b": "length",
    }
    assert len(tokens_of(outputs, "a")) == 12
    assert tokens_of(outputs, "b") == tokens_of(outputs, "a")[:5]


def test_streams_run_side_by_side(client: EngineClient, runner: asyncio.Runner) -> None:
    wanted = runner.run(outputs_of(client, ask("solo")))
    order: list[str] = []

    async def follow(name: str) -> list[int]:
        tokens: list[int] = []
        async for output in client.stream([ask(name)]):
            order.append(output.request_id)
            tokens += output.token_ids
        return tokens

    async def scenario() -> list[list[int]]:
        return list(await asyncio.gather(follow("left"), follow("right")))

    answers = runner.run(scenario())
    assert answers == [tokens_of(wanted, "solo")] * 2
    assert order.index("right") < len(order) - 1 - order[::-1].index("left"), "one after the other"


def test_leaving_a_stream_ends_its_request(client: EngineClient, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        output = await first_of(client, ask("leaves", max_tokens=2000))
        assert output.finish is None
        assert (await client.stats()).running == 0

    runner.run(scenario())


def test_an_aborted_request_ends_its_stream(client: EngineClient, runner: asyncio.Runner) -> None:
    async def scenario() -> list[str | None]:
        ends: list[str | None] = []
        async for output in client.stream([ask("stays"), ask("goes", max_tokens=2000)]):
            if output.request_id == "goes" and not ends:
                client.abort({"goes", "nobody"})
            if output.finish is not None:
                ends.append(f"{output.request_id} {output.finish}")
        return ends

    assert sorted(str(end) for end in runner.run(scenario())) == ["goes abort", "stays length"]


def test_a_request_that_cannot_be_served_ends_with_its_error(
    client: EngineClient, runner: asyncio.Runner
) -> None:
    (output,) = runner.run(outputs_of(client, ask("long", max_tokens=5000)))
    assert (output.finish, output.code) == ("error", "invalid_request")
    (output,) = runner.run(outputs_of(client, ask("stranger", adapter="0" * 64)))
    assert output.finish == "error"
    assert "000000" in (output.error or "")


def test_statistics(client: EngineClient, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        before = await client.stats()
        assert before.total_pages > before.adapter_pages
        assert before.page_bytes > 0 < before.weight_bytes
        async with aclosing(client.stream([ask("works", max_tokens=2000)])) as stream:  # type: ignore[type-var]
            async for _ in stream:
                break
            during = await client.stats()
        assert (during.running, during.running_by_adapter) == (1, {BASE: 1})
        assert during.kv_pages > 0
        assert during.steps > before.steps

    runner.run(scenario())


def test_an_adapter_is_registered_used_and_forgotten(
    client: EngineClient, runner: asyncio.Runner, adapter: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        ready = await client.started()
        found: PreparedAdapter = prepare(adapter, ready.spec, ready.page_bytes, ImageStore(tmp_path))
        await client.register_adapter(found.digest, found.image, found.num_pages)
        await client.register_adapter(found.digest, found.image, found.num_pages)
        assert (await client.stats()).residency == {found.digest: "absent"}
        tuned = tokens_of(await outputs_of(client, ask("tuned", adapter=found.digest)), "tuned")
        assert tuned != tokens_of(await outputs_of(client, ask("plain")), "plain")
        stats = await client.stats()
        assert stats.residency == {found.digest: "ready"}
        assert (stats.adapter_pages, stats.loads) == (found.num_pages, 1)
        await client.forget_adapter(found.digest)
        await client.forget_adapter("f" * 64)
        stats = await client.stats()
        assert (stats.residency, stats.adapter_pages) == ({}, 0)
        (refused,) = await outputs_of(client, ask("late", adapter=found.digest))
        assert refused.finish == "error"

    runner.run(scenario())


# Starting


def test_progress_goes_from_nothing_to_ready(model: Path) -> None:
    seen: list[tuple[str, float]] = []

    async def scenario() -> None:
        client = EngineThread(config(model), lambda stage, fraction: seen.append((stage, fraction)))
        assert not client.ready
        await client.started()
        assert client.ready
        await client.close()
        assert not client.ready

    asyncio.run(scenario())
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.5
    assert seen[-1] == ("ready", 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_an_engine_from_starting_is_told_as_it_is(kind: type[EngineClient], model: Path) -> None:
    async def scenario() -> None:
        client = kind(config(model, pool_bytes=100))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="pool_bytes 100 holds 0 pages"):
            await asyncio.wait_for(client.started(), 60)
        assert not client.alive
        assert not client.ready
        with pytest.raises(EngineDead):
            await client.stats()
        with pytest.raises(EngineDead):
            await outputs_of(client, ask("x"))
        await client.close()

    asyncio.run(scenario())


def test_a_model_that_is_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        client = EngineThread(config(tmp_path))
        with pytest.raises(ModelRefused, match=r"no config\.json"):
            await client.started()
        await client.close()

    asyncio.run(scenario())


def test_errors_keep_their_class_on_the_wire() -> None:
    error = typed_error("too small", CapacityExceeded.code)
    assert (type(error), str(error)) == (CapacityExceeded, "too small")
    assert type(typed_error("?", "from the future")) is type(typed_error("?", None)) is MotetError


# Dying


def test_a_failure_in_the_loop_ends_every_stream(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = 0
    step = Engine.step

    def failing(engine: Engine) -> list[SeqOutput]:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise RuntimeError("a kernel fell over")
        return step(engine)

    monkeypatch.setattr(Engine, "step", failing)

    async def scenario() -> list[list[SeqOutput]]:
        client = await start(EngineThread, config(model))
        streams = [outputs_of(client, ask(name, max_tokens=2000)) for name in "abc"]
        answers = list(await asyncio.wait_for(asyncio.gather(*streams), 30))
        assert not client.alive
        with pytest.raises(EngineDead, match="the engine stopped"):
            await client.stats()
        await client.close()
        return answers

    with caplog.at_level(logging.ERROR):
        answers = asyncio.run(scenario())
    for outputs in answers:
        assert [output.finish for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert (outputs[-1].finish, outputs[-1].code) == ("error", "engine_dead")
    assert "a kernel fell over" in caplog.text


def test_closing_ends_what_is_open(model: Path) -> None:
    async def scenario() -> SeqOutput:
        client = await start(EngineThread, config(model))
        stream = client.stream([ask("open", max_tokens=2000)])
        await anext(stream)
        await client.close()
        return [output async for output in stream][-1]

    last = asyncio.run(scenario())
    assert (last.finish, last.code) == ("error", "engine_dead")


def test_a_killed_process_ends_streams_and_calls(model: Path) -> None:
    async def scenario() -> None:
        client = EngineProcess(config(model))
        early = client.stats()  # asked before it listens
        assert (await early).running == 0
        streams = [asyncio.create_task(outputs_of(client, ask(name, max_tokens=2000))) for name in "ab"]
        await first_of(client, ask("c", max_tokens=2000))
        os.kill(client.pid, signal.SIGSTOP)
        call = asyncio.create_task(client.stats())
        await asyncio.sleep(0)
        os.kill(client.pid, signal.SIGKILL)
        for outputs in await asyncio.wait_for(asyncio.gather(*streams), 10):
            assert (outputs[-1].finish, outputs[-1].code) == ("error", "engine_dead")
        with pytest.raises(EngineDead):
            await call
        assert not client.alive
        client.abort({"a"})
        await client.close()

    asyncio.run(scenario())


def test_an_engine_leaves_with_its_server_and_not_before(model: Path) -> None:
    """Signals to the whole service are the server's to answer; the socket's end is the engine's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "motet.engine.process"]
        arguments = [msgspec.json.encode(config(model)).decode(), str(theirs.fileno())]
        process = subprocess.Popen([*command, *arguments], pass_fds=[theirs.fileno()])
        theirs.close()
        ours.settimeout(60)
        while not isinstance(message := receive(ours), Ready):
            assert isinstance(message, Progress)
        for number in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
        ours.sendall(frame(GetStats(7)))
        reply = receive(ours)
        assert isinstance(reply, Reply)
        assert (reply.call, reply.error) == (7, None)
    assert process.wait(30) == 0


def receive(stream: socket.socket) -> Outbound:
    (length,) = HEADER.unpack(stream.recv(HEADER.size, socket.MSG_WAITALL))
    message: Outbound = msgspec.msgpack.decode(stream.recv(length, socket.MSG_WAITALL), type=Outbound)
    return message
