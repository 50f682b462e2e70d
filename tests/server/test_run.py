"""The end of a server: readiness, what is in flight, what comes too late, and the exit status."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from motet.config import ServerConfig
from motet.errors import AdapterRefused, ConfigError
from motet.registry.store import Registry
from motet.server.run import serve
from motet.types import PreparedAdapter
from tests.registry.house import adapter_at

from .fakes import FakeGenerator, build, listening, run, until

COMPLETION = {"model": "base", "prompt": "x", "max_tokens": 400}


def test_work_in_flight_finishes_while_new_work_is_refused() -> None:
    house = build(FakeGenerator(["a"] * 40, delay=0.01))

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client, httpx.AsyncClient(base_url=url) as other:
            stream = asyncio.create_task(client.post("/v1/completions", json={**COMPLETION, "stream": True}))
            plain = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
            await until(lambda: house.generator.yielded > 4)
            house.app.state.lifecycle.drain()
            assert (await other.get("/ready")).status_code == 503
            assert (await other.get("/health")).status_code == 200
            refused = await other.post("/v1/completions", json=COMPLETION)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert (await stream).text.endswith("data: [DONE]\n\n")
            assert (await plain).json()["choices"][0]["text"] == "a" * 40

    with listening(house) as url:
        run(scenario(url))


def test_after_the_grace_everything_ends_with_an_error() -> None:
    house = build(FakeGenerator(["a"] * 400, delay=0.05))

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            stream = asyncio.create_task(client.post("/v1/completions", json={**COMPLETION, "stream": True}))
            plain = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
            await until(lambda: house.generator.yielded > 4)
            house.app.state.lifecycle.drain()
            text = (await stream).text
            assert '{"error":{"message":"the server shut down' in text
            assert "[DONE]" not in text
            assert (await plain).status_code == 503
        assert house.generator.running == 0

    with listening(house, grace_seconds=0.3) as url:
        run(scenario(url))


def test_a_load_that_hangs_ends_with_the_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = build()
    loading, over = threading.Event(), threading.Event()

    def prepare(_: Path) -> PreparedAdapter:
        loading.set()
        over.wait(20)
        raise AdapterRefused("too late to matter")

    monkeypatch.setattr(house.catalog, "_prepare", prepare)
    body = {"lora_name": "poet", "lora_path": str(tmp_path)}

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            load = asyncio.create_task(client.post("/v1/load_lora_adapter", json=body))
            await until(loading.is_set)
            house.app.state.lifecycle.drain()
            answer = await load
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")

    try:
        with listening(house, grace_seconds=0.3) as url:
            began = time.monotonic()
            run(scenario(url))
        assert time.monotonic() - began < 5
    finally:
        over.set()


def test_an_engine_that_dies_ends_every_stream() -> None:
    house = build(FakeGenerator(["a"] * 400, delay=0.01))

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            streams = [
                asyncio.create_task(client.post("/v1/completions", json={**COMPLETION, "stream": True}))
                for _ in range(5)
            ]
            await until(lambda: house.generator.yielded > 10)
            house.generator.alive = False
            house.generator.fail_after = 0
            for stream in streams:
                assert '"code":"engine_dead"' in (await stream).text
            assert (await client.get("/health")).status_code == 503

    with listening(house) as url:
        run(scenario(url))


def test_operators_have_a_port_of_their_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = ServerConfig(port=0, admin_port=port)
    house = build(config=config)

    async def scenario() -> None:
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve(house.app, config, on_ready=url.set_result))
        main, side = await url, f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{main}/metrics")).status_code == 404
            assert (await client.post(f"{main}/v1/completions", json=COMPLETION)).status_code == 200
            assert (await client.get(f"{side}/metrics")).status_code == 200
            assert (await client.post(f"{side}/v1/completions", json=COMPLETION)).status_code == 404
            for either in (main, side):
                assert (await client.get(f"{either}/health")).status_code == 200
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
                await serve(house.app, config)
        house.app.state.lifecycle.drain()
        await asyncio.wait_for(serving, 10)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))

    run(scenario())


PROGRAM = """
import asyncio
from motet.config import ServerConfig
from motet.server.run import serve
from tests.server.fakes import FakeGenerator, build

house = build(FakeGenerator(["a"] * 20, delay=0.02))
asyncio.run(serve(house.app, ServerConfig(port=0), on_ready=lambda url: print(url, flush=True)))
"""


def test_sigterm_under_load() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()

        async def scenario() -> None:
            async with httpx.AsyncClient(base_url=url) as client:
                stream = asyncio.create_task(
                    client.post("/v1/completions", json={**COMPLETION, "stream": True})
                )
                await asyncio.sleep(0.2)
                process.send_signal(signal.SIGTERM)
                assert (await stream).text.endswith("data: [DONE]\n\n")

        run(scenario())
        assert process.wait(5) == 0


def test_sigterm_during_a_push_that_hangs(tmp_path: Path) -> None:
    """What is new is refused, the push is answered when the grace is over, and nothing is left half done."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}", "TMPDIR": str(tmp_path)}
    push = {"name": "support", "source": str(adapter_at(tmp_path / "support", "one"))}
    with subprocess.Popen(
        [sys.executable, "-c", HANGING, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, cwd=root, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        url = process.stdout.readline().strip()

        async def scenario() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                pushing = asyncio.create_task(client.post("/admin/v1/adapters", json=push))
                assert await asyncio.to_thread(process.stdout.readline) == "examining\n"  # type: ignore[union-attr]
                process.send_signal(signal.SIGTERM)
                for path in (
                    "/admin/v1/adapters", "/admin/v1/promote", "/admin/v1/gc", "/v1/load_lora_adapter",
                    "/v1/unload_lora_adapter", "/v1/adapters/x/pin", "/v1/adapters/x/prefetch",
                ):  # fmt: skip
                    answer = await client.post(path, json={})
                    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable"), path
                assert (await client.get("/admin/v1/adapters")).status_code == 200
                answer = await pushing
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")

        began = time.monotonic()
        run(scenario())
        assert process.wait(5) == 0
        assert time.monotonic() - began < GRACE + 4
    with closing(Registry(str(tmp_path / "registry"))) as registry:
        assert registry.snapshot().versions == {}
        registry.collect("ops")
        assert registry.check() == []
        assert list(registry.artifacts.root.iterdir()) == []


GRACE = 1.5
HANGING = f"""
import sys, time
from pathlib import Path
from motet.config import ServerConfig
from motet.server import registry_routes
from motet.server.run import serve
from motet.server.workers import run
from tests.server.test_registry_routes import house_at

def examine(folder, spec):
    print("examining", flush=True)
    time.sleep(60)

registry_routes.examine = examine
house = house_at(Path(sys.argv[1]))
ready = lambda url: print(url, flush=True)
run(serve(house.app, ServerConfig(port=0), on_ready=ready, grace_seconds={GRACE}))
"""
