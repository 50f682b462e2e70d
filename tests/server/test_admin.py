"""The model list, loading and unloading over HTTP, and the small routes."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from pathlib import Path

import pytest

from motet.config import ServerConfig

from .fakes import FakeGenerator, House, adapter_at, build, run, until


def test_the_model_list(house: House, poet: str) -> None:
    base, adapter = house.get("/v1/models").json()["data"]
    assert {k: v for k, v in base.items() if k != "created"} == {
        "id": "base", "object": "model", "owned_by": "motet", "root": "/models/fake", "parent": None,
        "digest": "sha256:ba5eba5eba5eba5eba5e", "max_model_len": 500,
    }  # fmt: skip
    assert adapter["parent"] == "base"
    assert adapter["root"].endswith("/poet")
    assert (adapter["id"], adapter["digest"], adapter["rank"], adapter["size_bytes"]) == (
        "poet",
        poet,
        8,
        4096,
    )
    assert house.get("/v1/models/poet").json() == adapter
    assert house.get("/v1/models/base").json() == base
    assert house.get("/v1/models/nobody").status_code == 404


def test_names_with_slashes(house: House, tmp_path: Path) -> None:
    path = adapter_at(tmp_path / "a", "A")
    assert house.post("/v1/load_lora_adapter", {"lora_name": "org/a@1", "lora_path": path}).status_code == 200
    assert house.get("/v1/models/org/a@1").json()["id"] == "org/a@1"
    assert house.get("/v1/models/org%2Fa%401").json()["id"] == "org/a@1"


@pytest.mark.parametrize("flag", ["replace", "load_inplace"])
def test_replacing(house: House, poet: str, tmp_path: Path, flag: str) -> None:
    body = {"lora_name": "poet", "lora_path": adapter_at(tmp_path / "prose", "prose")}
    response = house.post("/v1/load_lora_adapter", body)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "adapter_conflict")
    assert poet in response.text
    response = house.post("/v1/load_lora_adapter", {**body, flag: True})
    assert response.status_code == 200
    assert response.json()["digest"] != poet
    assert house.engine.known == {response.json()["digest"]}


def test_unloading(house: House, poet: str) -> None:
    assert house.chat(model="poet").status_code == 200
    assert house.post("/v1/unload_lora_adapter", {"lora_name": "poet"}).json()["digest"] == poet
    assert house.chat(model="poet").status_code == 404
    assert house.post("/v1/unload_lora_adapter", {"lora_name": "poet"}).status_code == 404
    assert not house.engine.known


def test_bad_admin_requests(house: House) -> None:
    for body, status in (
        ({"lora_name": "../x", "lora_path": "/x"}, 400),
        ({"lora_name": "base", "lora_path": "/x"}, 400),
        ({"lora_name": "a", "lora_path": "/nowhere/at/all"}, 422),
        ({"lora_name": "a"}, 400),
        ({"lora_name": "a", "lora_path": "/x", "extra": 1}, 400),
    ):
        assert house.post("/v1/load_lora_adapter", body).status_code == status
    assert house.post("/v1/unload_lora_adapter", {"lora_name": "base"}).status_code == 400


def test_switched_off(tmp_path: Path) -> None:
    house = build(config=ServerConfig(allow_runtime_adapters=False))
    body = {"lora_name": "a", "lora_path": adapter_at(tmp_path / "a", "A")}
    assert house.post("/v1/load_lora_adapter", body).status_code == 403
    assert house.post("/v1/unload_lora_adapter", {"lora_name": "a"}).status_code == 403


@pytest.mark.parametrize("how", ["replace", "unload"])
def test_a_stream_ends_on_the_digest_it_began_with(tmp_path: Path, how: str) -> None:
    house = build(FakeGenerator(["a"] * 30, delay=0.005))

    async def scenario() -> None:
        old = await house.catalog.load("poet", adapter_at(tmp_path / "old", "old"))
        body = {"model": "poet", "prompt": "x", "stream": True, "max_tokens": 30}
        async with house.client() as client:
            stream = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: house.generator.yielded > 2)
            if how == "replace":
                await house.catalog.load("poet", adapter_at(tmp_path / "new", "new"), replace=True)
            else:
                await house.catalog.unload("poet")
            response = await stream
        assert response.headers["x-motet-adapter-digest"] == old.digest
        assert response.text.endswith("data: [DONE]\n\n")
        assert response.text.count('"text":"a"') == 30

    run(scenario())


def test_small_routes(house: House) -> None:
    assert house.get("/health").json() == {"status": "ok"}
    assert house.get("/ready").json() == {"status": "ready"}
    assert house.get("/version").json() == {"version": version("motet")}


def test_request_ids(house: House) -> None:
    assert house.get("/health", **{"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
    for bad in ("", "x" * 129, "a b", "a;b"):
        drawn = house.get("/health", **{"x-request-id": bad}).headers["x-request-id"]
        assert drawn != bad
        assert len(drawn) == 32
    assert house.get("/nowhere", **{"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    assert house.post("/v1/completions", {}, **{"x-request-id": "abc"}).headers["x-request-id"] == "abc"
