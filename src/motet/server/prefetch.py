"""Where adapters are, and an operator's say in it: load one before it is asked for, or never evict it.

A pin is of what the name stands for now: it ends with those weights, when they are replaced or unloaded.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from motet.engine.protocol import AdapterHost, Generator
from motet.errors import InvalidRequest
from motet.server.lifecycle import Lifecycle
from motet.types import AdapterRecord, EngineStats


class AdapterState(msgspec.Struct, frozen=True):
    """`state` is absent, loading, remaking, ready or draining; `loads` are the copies into the pool so far."""

    name: str
    digest: str
    state: str
    pinned: bool
    loads: int
    size_bytes: int


class AdapterStates(msgspec.Struct, frozen=True):
    data: list[AdapterState]


def residency_routes(generator: Generator, host: AdapterHost, lifecycle: Lifecycle) -> list[Route]:
    """The routes under /v1/adapters."""

    async def states(_: Request) -> Response:
        stats = await generator.stats()
        return _json(AdapterStates([_state(record, stats) for record in host.records()]))

    async def prefetch(request: Request) -> Response:
        """Begin to load, if there is room that nobody wants; the answer tells the state, it does not wait."""
        lifecycle.admit()
        record = _adapter(request, host)
        await generator.prefetch(record.digest)
        return _json(_state(record, await generator.stats()))

    async def pin(request: Request) -> Response:
        return await set_pinned(request, True)

    async def unpin(request: Request) -> Response:
        return await set_pinned(request, False)

    async def set_pinned(request: Request, pinned: bool) -> Response:
        lifecycle.admit()
        record = _adapter(request, host)
        await generator.pin_adapter(record.digest, pinned)
        return _json(_state(record, await generator.stats()))

    return [
        Route("/v1/adapters", states, methods=["GET"]),
        Route("/v1/adapters/{model:path}/prefetch", prefetch, methods=["POST"]),
        Route("/v1/adapters/{model:path}/pin", pin, methods=["POST"]),
        Route("/v1/adapters/{model:path}/unpin", unpin, methods=["POST"]),
    ]


def _adapter(request: Request, host: AdapterHost) -> AdapterRecord:
    """The adapter that the path names. Raises ModelNotFound; InvalidRequest for the base."""
    name: str = request.path_params["model"]
    record = host.resolve(name)
    if record is None:
        raise InvalidRequest(f"{name!r} is the base model, which is always there", "model")
    return record


def _state(record: AdapterRecord, stats: EngineStats) -> AdapterState:
    return AdapterState(
        name=record.name,
        digest=record.digest,
        state=stats.residency.get(record.digest, "absent"),
        pinned=record.digest in stats.pinned,
        loads=stats.loads_by_adapter.get(record.digest, 0),
        size_bytes=record.size_bytes,
    )


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
