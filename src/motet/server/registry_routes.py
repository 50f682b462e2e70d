"""The registry over HTTP, for operators: what `motet adapters` does, under /admin/v1, described by its own OpenAPI.

One table makes the routes and the description, so that neither can say what the other does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as version_of
from typing import Any, ParamSpec, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from motet.config import ServerConfig, cache_dir
from motet.engine.protocol import AdapterHost
from motet.errors import InvalidRequest
from motet.registry.examine import examine
from motet.registry.follow import RegistryCatalog, Release
from motet.registry.records import (
    PROD,
    Alias,
    Canary,
    Event,
    Label,
    Limits,
    Snapshot,
    Version,
    version_number,
)
from motet.registry.sources import is_remote, opened
from motet.server.admin import confined
from motet.server.envelope import read_body
from motet.server.failures import ErrorBody
from motet.server.lifecycle import Lifecycle
from motet.server.openai import Strict, parse
from motet.tenancy.access import Principal

P = ParamSpec("P")
T = TypeVar("T")
PREFIX = "/admin/v1"
_MAX_EVENTS = 1000
_MAX_COMMAS = 10_000


class Nothing(Strict, frozen=True):
    """No field."""


class PushRequest(Strict, frozen=True):
    """`source` is a folder on the server's disk, or a URL that the policy lets it fetch. `expires` is unix time."""

    name: str
    source: str
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    license: str = ""
    org: str = ""
    expires: float | None = None


class RefRequest(Strict, frozen=True):
    """`ref` is support@7, support@prod, or support for support@prod."""

    ref: str


class PromoteRequest(RefRequest, frozen=True):
    """`to` is the alias to move."""

    to: str = PROD


class CanaryRequest(RefRequest, frozen=True):
    """`ref` is the candidate, support@8; `of` the alias that it takes a share `weight` of."""

    of: str = PROD
    weight: float = 0.1
    shadow: bool = False
    limits: Limits = Limits()


class Removed(msgspec.Struct, frozen=True):
    """The folders of files that no version needed."""

    removed: list[str]


class Problems(msgspec.Struct, frozen=True):
    """What is unsound; nothing if the registry is sound."""

    problems: list[str]


class Releases(msgspec.Struct, frozen=True):
    """Releases by alias."""

    releases: dict[str, Release]


class Events(msgspec.Struct, frozen=True):
    """The audit log, newest first."""

    events: list[Event]


@dataclass(frozen=True)
class Operation:
    """One method of one path: what it takes, what it answers, and what it says of itself."""

    method: str
    path: str
    takes: type[Strict] | None
    answers: Any
    run: Callable[[Request, Any], Coroutine[object, object, object]]

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").strip().partition("\n")[0]


def registry_routes(host: AdapterHost, config: ServerConfig, lifecycle: Lifecycle) -> list[Route]:
    """The routes of a server that follows a registry; none for another."""
    if not isinstance(host, RegistryCatalog):
        return []
    operations = RegistryAdmin(host, config).operations()
    document = msgspec.json.encode(openapi(operations))

    async def describe(_: Request) -> Response:
        return Response(document, media_type="application/json")

    routes = [
        Route(
            PREFIX + operation.path,
            partial(_answer, operation, config, lifecycle),
            methods=[operation.method],
        )
        for operation in operations
    ]
    return [*routes, Route(f"{PREFIX}/openapi.json", describe, methods=["GET"])]


class RegistryAdmin:
    """The operations. What changes the registry is served by this server when it answers, by others a moment later."""

    def __init__(self, host: RegistryCatalog, config: ServerConfig) -> None:
        self._host = host
        self._registry = host.registry
        self._config = config

    def operations(self) -> list[Operation]:
        return [
            Operation("GET", "/adapters", None, Snapshot, self.list_adapters),
            Operation("POST", "/adapters", PushRequest, Version, self.push),
            Operation("GET", "/adapters/{ref:path}", None, Version, self.show),
            Operation("POST", "/promote", PromoteRequest, Alias, self.promote),
            Operation("POST", "/rollback", RefRequest, Alias, self.rollback),
            Operation("POST", "/canary", CanaryRequest, Alias, self.canary),
            Operation("GET", "/releases", None, Releases, self.releases),
            Operation("POST", "/drop_alias", RefRequest, Nothing, self.drop_alias),
            Operation("POST", "/retire", RefRequest, Version, self.retire),
            Operation("POST", "/gc", Nothing, Removed, self.gc),
            Operation("GET", "/check", None, Problems, self.check),
            Operation("GET", "/audit", None, Events, self.audit),
        ]

    async def list_adapters(self, _: Request, __: None) -> Snapshot:
        """All versions and aliases."""
        return await asyncio.to_thread(self._registry.snapshot)

    async def push(self, request: Request, asked: PushRequest) -> Version:
        """Put an adapter into the registry as a new version."""
        source, who = asked.source, _who(request)
        if not is_remote(source) and (_principal(request).key or self._config.adapter_roots):
            source = await asyncio.to_thread(confined, source, self._config.adapter_roots)
        label = Label(source, who, asked.metrics, asked.license, asked.org, asked.expires)
        return await asyncio.to_thread(self._push, asked.name, label)

    def _push(self, name: str, label: Label) -> Version:
        with opened(label.source, self._host.fetch, cache_dir() / "sources") as folder:
            return self._registry.push(name, folder, partial(examine, spec=self._host.spec), label)

    async def show(self, request: Request, _: None) -> Version:
        """One version."""
        return await asyncio.to_thread(self._registry.version, request.path_params["ref"])

    async def promote(self, request: Request, asked: PromoteRequest) -> Alias:
        """Point an alias at a version."""
        return await self._changed(self._registry.promote, asked.ref, _who(request), asked.to)

    async def rollback(self, request: Request, asked: RefRequest) -> Alias:
        """End an alias' canary, or point the alias at the version before."""
        return await self._changed(self._registry.rollback, asked.ref, _who(request))

    async def canary(self, request: Request, asked: CanaryRequest) -> Alias:
        """Give a candidate a share of an alias."""
        name, number = version_number(asked.ref)
        canary = Canary(number, asked.weight, asked.shadow, asked.limits)
        return await self._changed(self._registry.canary, f"{name}@{asked.of}", canary, _who(request))

    async def releases(self, _: Request, __: None) -> Releases:
        """Every alias, with what this server has seen of its versions since its canary began."""
        return Releases(self._host.releases())

    async def drop_alias(self, request: Request, asked: RefRequest) -> Nothing:
        """Forget an alias and where it has pointed."""
        await self._changed(self._registry.drop_alias, asked.ref, _who(request))
        return Nothing()

    async def retire(self, request: Request, asked: RefRequest) -> Version:
        """Take a version out of use."""
        return await self._changed(self._registry.retire, asked.ref, _who(request))

    async def gc(self, request: Request, _: Nothing) -> Removed:
        """Remove the files that no version in use needs."""
        return Removed(await asyncio.to_thread(self._registry.collect, _who(request)))

    async def check(self, _: Request, __: None) -> Problems:
        """Read the whole registry and say what is unsound."""
        return Problems(await asyncio.to_thread(self._registry.check))

    async def audit(self, request: Request, _: None) -> Events:
        """Who did what; `subject` in the query is an adapter, version or alias, `last` how many."""
        last = request.query_params.get("last", "100")
        if not (last.isascii() and last.isdigit() and 0 < int(last[:9]) <= _MAX_EVENTS):
            raise InvalidRequest(f"last must be between 1 and {_MAX_EVENTS}", "last")
        subject = request.query_params.get("subject")
        return Events(await asyncio.to_thread(self._registry.history, subject, int(last)))

    async def _changed(self, change: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        answer = await asyncio.to_thread(change, *arguments, **named)
        await self._host.sync()
        return answer


def openapi(operations: list[Operation]) -> dict[str, Any]:
    """The description of the operations, OpenAPI 3.1."""
    used: dict[Any, None] = {ErrorBody: None}
    for operation in operations:
        used |= dict.fromkeys(filter(None, (operation.takes, operation.answers)))
    shapes, components = msgspec.json.schema_components(used, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(used, shapes, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described: dict[str, Any] = {
            "summary": operation.summary,
            "operationId": operation.run.__name__,
            "responses": {
                "200": {"description": "Done", "content": _json_of(schemas[operation.answers])},
                "default": {"description": "Refused", "content": _json_of(schemas[ErrorBody])},
            },
        }
        if operation.takes is not None:
            described["requestBody"] = {"required": True, "content": _json_of(schemas[operation.takes])}
        if parameters := _parameters(operation):
            described["parameters"] = parameters
        paths.setdefault(PREFIX + operation.path.replace(":path", ""), {})[operation.method.lower()] = (
            described
        )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Motet registry", "version": version_of("motet")},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    if "{ref" in operation.path:
        return [{"name": "ref", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.path == "/audit":
        whole = {"type": "integer", "minimum": 1, "maximum": _MAX_EVENTS, "default": 100}
        return [
            {"name": "subject", "in": "query", "schema": {"type": "string"}},
            {"name": "last", "in": "query", "schema": whole},
        ]
    return []


def _json_of(schema: object) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


async def _answer(
    operation: Operation, config: ServerConfig, lifecycle: Lifecycle, request: Request
) -> Response:
    if operation.method == "POST":
        lifecycle.admit()
    asked = None
    if operation.takes is not None:
        asked = parse(await read_body(request, config.max_body_bytes), operation.takes, _MAX_COMMAS)
    answer = await lifecycle.finish(operation.run(request, asked))
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _principal(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


def _who(request: Request) -> str:
    """For the audit log: the public id of the key, or that there are no keys."""
    principal = _principal(request)
    return f"key {principal.key}" if principal.key else "operator"
