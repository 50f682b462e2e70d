"""The registry over HTTP: a release from push to rollback, seen by requests at once, and its OpenAPI."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from starlette.routing import Route

from motet.config import ServerConfig
from motet.observe.metrics import Metrics
from motet.registry.follow import RegistryCatalog
from motet.registry.records import Alias, Event, Snapshot, Version
from motet.registry.store import Registry
from motet.server import registry_routes
from motet.server.app import create_app
from motet.server.gate import Tenancy
from motet.tenancy.access import Guard
from motet.tenancy.keys import new_key
from motet.tenancy.load import Load
from motet.tenancy.quota import LocalCounters
from motet.tenancy.store import Contents
from motet.types import PreparedAdapter
from tests.registry.house import adapter_at
from tests.registry.test_follow import examine, prepare

from .fakes import SPEC, FakeEngine, FakeGenerator, build


@dataclass
class House:
    app: FastAPI
    catalog: RegistryCatalog
    home: Path

    def ask(self, method: str, path: str, body: object = None, token: str = "") -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"} if token else {}

        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://motet") as client:
                return await client.request(method, path, json=body, headers=headers)

        return asyncio.run(call())

    def post(self, path: str, **body: object) -> Any:
        answer = self.ask("POST", f"/admin/v1{path}", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def push(self, text: str, name: str = "support", **body: object) -> Any:
        source = str(adapter_at(self.home / text, text))
        return self.post("/adapters", name=name, source=source, **body)

    def complete(self, model: str, **body: object) -> httpx.Response:
        return self.ask("POST", "/v1/completions", {"model": model, "prompt": "x", **body})


def house_at(home: Path, config: ServerConfig | None = None, guard: Guard | None = None) -> House:
    def bind(folder: Path) -> PreparedAdapter:
        return prepare(folder)

    registry = Registry(str(home / "registry"))
    catalog = RegistryCatalog(registry, home / "copies", SPEC, "base", "/base", bind, FakeEngine())
    config = config or ServerConfig()
    tenancy = Tenancy(guard or Guard(), LocalCounters(), Load(config.max_queued))
    return House(create_app(FakeGenerator(), catalog, config, Metrics("base"), tenancy), catalog, home)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(registry_routes, "examine", lambda folder, spec: examine(folder))  # noqa: ARG005
    return house_at(tmp_path)


def test_a_release_over_http(house: House) -> None:
    first = msgspec.convert(house.push("one", metrics={"f1": 0.5}, org="acme", license="mit"), Version)
    assert (first.ref, first.label.who, first.label.metrics) == ("support@1", "operator", {"f1": 0.5})
    assert house.complete("support").status_code == 404
    assert msgspec.convert(house.post("/promote", ref="support@1"), Alias).stable == 1
    answer = house.complete("support")
    assert (answer.status_code, answer.json()["model"]) == (200, "support@1")
    assert answer.headers["x-motet-adapter-digest"] == first.facts.digest
    assert house.complete(first.fine_tune("base")).json()["model"] == "support@1"
    house.push("two")
    assert house.complete("support@2").json()["model"] == "support@2", "on demand"
    canary = house.post("/canary", ref="support@2", weight=0.5)
    assert canary["canary"]["weight"] == 0.5
    answered = [house.complete("support@prod", user=f"user-{i}").json()["model"] for i in range(40)]
    assert 8 < answered.count("support@2") < 32
    assert [house.complete("support@prod", user=f"user-{i}").json()["model"] for i in range(40)] == answered
    house.post("/promote", ref="support@2")
    assert house.complete("support").json()["model"] == "support@2"
    house.post("/rollback", ref="support")
    assert house.complete("support").json()["model"] == "support@1"
    house.post("/promote", ref="support@2", to="best")
    assert house.ask("GET", "/admin/v1/adapters/support@best").json()["number"] == 2
    house.post("/drop_alias", ref="support@best")
    assert house.complete("support@best").status_code == 404
    assert house.post("/retire", ref="support@2")["retired"]
    assert house.complete("support@2").status_code == 404
    assert len(house.post("/gc")["removed"]) == 1
    assert house.ask("GET", "/admin/v1/check").json() == {"problems": []}
    listed = msgspec.convert(house.ask("GET", "/admin/v1/adapters").json(), Snapshot)
    assert listed == house.catalog.registry.snapshot()
    events = house.ask("GET", "/admin/v1/audit?subject=support@prod&last=2").json()["events"]
    assert [msgspec.convert(event, Event).action for event in events] == ["rollback", "promote"]
    models = [model["id"] for model in house.ask("GET", "/v1/models").json()["data"]]
    assert models == ["base", "support", "support@1", "support@prod"]
    assert "support@1" in house.ask("GET", "/metrics").text


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/promote", {"ref": "support@9"}, 404, "not_registered"),
        ("POST", "/promote", {"ref": "../x@1"}, 400, "invalid_request"),
        ("POST", "/promote", {"ref": "support@1", "too": "x"}, 400, "invalid_request"),
        ("POST", "/promote", {"ref": "support@1", "to": "7"}, 400, "invalid_request"),
        ("POST", "/canary", {"ref": "support@1", "weight": 2}, 400, "invalid_request"),
        ("POST", "/canary", {"ref": "support@1"}, 404, "not_registered"),
        ("POST", "/rollback", {"ref": "support@1"}, 400, "invalid_request"),
        ("POST", "/adapters", {"name": "support", "source": "/nowhere"}, 422, "adapter_refused"),
        ("POST", "/adapters", {"name": "support"}, 400, "invalid_request"),
        ("POST", "/adapters", {"name": "support", "source": "https://models.test/a"}, 400, "source_refused"),
        ("POST", "/adapters", {"name": "support", "source": "http://127.0.0.1/a"}, 400, "source_refused"),
        ("GET", "/adapters/support@8", None, 404, "not_registered"),
        ("GET", "/adapters/..%2fsecret", None, 400, "invalid_request"),
        ("GET", "/audit?last=0", None, 400, "invalid_request"),
        ("GET", "/audit?last=1e3", None, 400, "invalid_request"),
        ("DELETE", "/adapters", None, 405, "method_not_allowed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    house: House, method: str, path: str, body: object, status: int, code: str
) -> None:
    house.push("one")
    answer = house.ask(method, f"/admin/v1{path}", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert house.catalog.registry.check() == []


def test_the_description_is_of_the_routes_that_there_are(house: House) -> None:
    document = house.ask("GET", "/admin/v1/openapi.json").json()
    routes = {
        (method, re.sub(":path}", "}", route.path))
        for route in house.app.routes
        if isinstance(route, Route) and route.path.startswith("/admin/v1/")
        for method in route.methods or ()
        if method != "HEAD"
    }
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert routes == described | {("GET", "/admin/v1/openapi.json")}
    for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all(operation["summary"] for operation in operations)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    push = document["components"]["schemas"]["PushRequest"]
    assert push["required"] == ["name", "source"]


def test_only_operators_may(tmp_path: Path) -> None:
    (admin, admin_token), (tenant, tenant_token) = new_key("ops", "admin"), new_key("acme", "inference")
    keys = {key.id: key for key in (admin, tenant)}
    house = house_at(tmp_path, guard=Guard(lambda: Contents(keys, {})))
    for route in house.app.routes:
        if not isinstance(route, Route) or not route.path.startswith("/admin/"):
            continue
        for method in sorted(route.methods or ()):
            path = route.path.replace("{ref:path}", "support@1")
            assert house.ask(method, path, {}).status_code == 401, path
            assert house.ask(method, path, {}, tenant_token).status_code == 403, path
            assert house.ask(method, path, {}, admin_token).status_code in (200, 400, 404), path
    body = {"name": "x", "source": "/etc"}
    refused = house.ask("POST", "/admin/v1/adapters", body, admin_token)
    assert "no adapter_roots are configured" in refused.text
    collected = house.ask("POST", "/admin/v1/gc", {}, admin_token)
    assert collected.status_code == 200


def test_a_server_without_a_registry_has_no_such_routes() -> None:
    assert build().get("/admin/v1/adapters").status_code == 404
