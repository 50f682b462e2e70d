"""SageMaker's requests as it sends them, replayed against the application inside its layer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from motet.config import ServerConfig
from motet.server.sagemaker import SageMaker
from motet.tenancy.access import Guard
from motet.tenancy.keys import new_key
from motet.tenancy.store import Contents
from tests.live import live_server
from tests.tiny import write_adapter, write_model

from .fakes import FakeGenerator, House, adapter_at, build

ADAPTER = {"X-Amzn-SageMaker-Adapter-Identifier": "poet"}


class Container:
    """The application as SageMaker sees it."""

    def __init__(self, house: House, guard: Guard | None = None) -> None:
        self.house = house
        self.app = SageMaker(house.app, house.catalog.base, house.config.max_body_bytes, guard or Guard())

    def ask(self, method: str, path: str, **request: object) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://container:8080") as client:
                return await client.request(method, path, **request)  # type: ignore[arg-type]

        return asyncio.run(call())

    def invoke(self, body: object, **headers: str) -> httpx.Response:
        headers = {"content-type": "application/json", "accept": "application/json", **headers}
        return self.ask("POST", "/invocations", content=json.dumps(body), headers=headers)


@pytest.fixture
def container() -> Container:
    return Container(build())


def test_no_body_is_read_without_a_key_or_of_another_type() -> None:
    record, token = new_key("acme", "inference")
    contents = Contents({record.id: record}, {})
    container = Container(build(), Guard(lambda: contents))
    kept = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal kept
        while True:
            kept += 1
            yield b"x" * 1000

    for path in ("/invocations", "/adapters"):
        answer = container.ask("POST", path, content=endless())
        assert answer.status_code == 401
        headers = {"authorization": f"Bearer {token}", "content-type": "text/plain"}
        assert container.ask("POST", path, content=endless(), headers=headers).status_code == 415
    assert kept == 0


def test_a_million_fields_are_not_looked_into(container: Container) -> None:
    body = {f"a{i}": 1 for i in range(200_000)}
    answer = container.invoke(body)
    assert answer.status_code == 400
    assert "elements" in answer.json()["error"]["message"]


def test_ping_is_green_once_the_engine_is_warm(container: Container) -> None:
    assert container.ask("GET", "/ping").status_code == 200
    container.house.generator.ready = False
    assert container.ask("GET", "/ping").status_code == 503


def test_the_life_of_an_adapter(container: Container, tmp_path: Path) -> None:
    src = adapter_at(tmp_path / "poet", "verse")
    register = {"name": "poet", "src": src, "preload": True, "pin": False}
    for _ in range(2):
        assert container.ask("POST", "/adapters", json=register).status_code == 200, "again is fine"
    assert container.ask("GET", "/adapters").json() == {"adapters": [{"name": "poet", "src": src}]}
    answer = container.invoke({"prompt": "abc"}, **ADAPTER)
    assert (answer.status_code, answer.json()["model"]) == (200, "poet")
    assert container.house.generator.calls[-1][2] == container.house.catalog.records()[0].digest
    other = {"name": "poet", "src": adapter_at(tmp_path / "prose", "prose")}
    assert container.ask("POST", "/adapters", json=other).status_code == 409
    assert container.ask("DELETE", "/adapters/poet").status_code == 200
    assert container.ask("DELETE", "/adapters/poet").status_code == 404
    assert container.invoke({"prompt": "abc"}, **ADAPTER).status_code == 404
    assert container.ask("GET", "/adapters").json() == {"adapters": []}


def test_a_name_that_must_be_quoted(container: Container, tmp_path: Path) -> None:
    src = adapter_at(tmp_path / "a", "A")
    assert container.ask("POST", "/adapters", json={"name": "org/a@1", "src": src}).status_code == 200
    assert container.ask("DELETE", "/adapters/org%2Fa%401").status_code == 200


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "chat.completion"),
        ({"prompt": "hi"}, "text_completion"),
        ({"model": "base", "prompt": "hi", "max_tokens": 3}, "text_completion"),
    ],
)
def test_invocations_go_where_the_body_says(container: Container, body: object, kind: str) -> None:
    answer = container.invoke(body)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["object"], answer.json()["model"]) == (kind, "base")


def test_the_header_comes_before_the_body(container: Container, tmp_path: Path) -> None:
    asyncio.run(container.house.catalog.load("poet", adapter_at(tmp_path / "poet", "verse")))
    assert container.invoke({"model": "base", "prompt": "x"}, **ADAPTER).json()["model"] == "poet"


def test_a_stream(container: Container) -> None:
    answer = container.invoke({"messages": [{"role": "user", "content": "hi"}], "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[1, 2]", 400),
        (b'{"prompt": ', 400),
        (b'{"prompt": "x", "prompt_": 1}', 400),
        (b'{"inputs": "x"}', 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": "' + b"x" * 3000 + b'"}', 413),
    ],
)
def test_bodies_that_are_none(body: bytes, status: int) -> None:
    container = Container(build(config=ServerConfig(max_body_bytes=2000)))
    answer = container.ask("POST", "/invocations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == (413 if len(body) > 2000 else status)
    assert "error" in answer.json()
    assert not container.house.generator.calls


def test_a_body_in_pieces_and_without_a_type(container: Container) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"pro', b'mpt": "x"', b"}"):
            yield piece

    answer = container.ask("POST", "/invocations", content=pieces())
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "a"}, 400, "src"),
        ({"name": "a", "src": "/nowhere"}, 422, None),
        ({"name": "../a", "src": "/nowhere"}, 400, "lora_name"),
        ({"name": "a", "src": "/nowhere", "pin": True}, 400, "pin"),
        ({"name": "a", "src": "/nowhere", "more": 1}, 400, "more"),
    ],
)
def test_adapters_that_are_none(container: Container, body: object, status: int, param: str | None) -> None:
    answer = container.ask("POST", "/adapters", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_adapters_come_from_where_sagemaker_puts_them(tmp_path: Path) -> None:
    root = tmp_path / "opt-ml"
    container = Container(build(config=ServerConfig(adapter_roots=(str(root),))))
    inside, outside = adapter_at(root / "a", "A"), adapter_at(tmp_path / "b", "B")
    assert container.ask("POST", "/adapters", json={"name": "a", "src": inside}).status_code == 200
    assert container.ask("POST", "/adapters", json={"name": "b", "src": outside}).status_code == 400


@pytest.mark.xdist_group("live")
def test_a_container(tmp_path: Path) -> None:
    """The command that a container runs, and a life of an adapter in it."""
    model = write_model(tmp_path / "model", "llama")
    adapter = write_adapter(tmp_path / "poet", model, "llama", 1, r=4, target_modules=["q_proj"])
    settings = tmp_path / "motet.toml"
    settings.write_text(f"[server]\nadapter_roots = ['{tmp_path}']")
    options = ("--sagemaker", "--host=127.0.0.1", "--pool=8MiB", f"--config={settings}")
    with live_server(model, {}, tmp_path / "cache", *options) as server:
        assert server.get("/ping").status_code == 200
        assert server.post("/adapters", {"name": "poet", "src": str(adapter)}).status_code == 200
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
        texts = [
            httpx.post(f"{server.url}/invocations", json=body, headers=headers, timeout=60).json()
            for headers in ({}, ADAPTER)
        ]
        assert [text["model"] for text in texts] == ["model", "poet"]
        assert texts[0]["choices"] != texts[1]["choices"]
        assert httpx.delete(f"{server.url}/adapters/poet").status_code == 200


def test_everything_else_is_as_before() -> None:
    container = Container(build(FakeGenerator(["x"])))
    assert container.ask("GET", "/v1/models").status_code == 200
    assert container.ask("GET", "/metrics").status_code == 200
    assert container.ask("GET", "/adapters/x").status_code == 404
