"""What every request is wrapped in: an id, a log line, a bounded body, and a plain 500 for the unexpected."""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import AsyncExitStack

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motet.errors import InvalidRequest
from motet.observe.metrics import Metrics
from motet.observe.tracing import NO_TRACE, NO_TRACER, Trace, Tracer
from motet.server.failures import CLIENT_GONE, BodyTooLarge, UnsupportedMediaType, count, response_to
from motet.server.lifecycle import Lifecycle

logger = logging.getLogger(__name__)
REQUEST_ID = "X-Request-Id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/@+=-]{1,128}")

PROBES = frozenset({"/health", "/ready", "/metrics"})
"""What monitors ask every few seconds; logged only at DEBUG."""


class Envelope:
    """ASGI middleware. A client's request id is kept when it is a plain word; otherwise one is drawn."""

    def __init__(
        self, app: ASGIApp, lifecycle: Lifecycle, metrics: Metrics, tracer: Tracer = NO_TRACER
    ) -> None:
        self._app = app
        self._tracer = tracer
        self._lifecycle = lifecycle
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrival = time.perf_counter()
        asked = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["arrival"] = arrival
        state["trace"] = trace = self._trace(scope, request_id)
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                if (visit := state.get("visit")) is not None:
                    headers.update(visit.headers())
            await send(message)

        try:
            with self._lifecycle.request():
                async with AsyncExitStack() as state["held"]:
                    await self._app(scope, receive, stamped)
        except ClientDisconnect:
            status = CLIENT_GONE
        except Exception as failure:
            logger.exception("unexpected failure", extra={"request_id": request_id})
            count(self._metrics, scope, "internal_error")
            if status:  # too late for a status: the connection must not look complete
                raise
            await response_to(failure)(scope, receive, stamped)
        finally:
            fields = {"request_id": request_id, "model": state.get("model", "-"), "status": status}
            if (principal := state.get("principal")) is not None and principal.key:
                fields |= {"tenant": principal.tenant.name, "key": principal.key}
            took = (time.perf_counter() - arrival) * 1e3
            trace.end(status)
            level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
            logger.log(level, "%s %s %.1f ms", scope["method"], scope["path"][:200], took, extra=fields)

    def _trace(self, scope: Scope, request_id: str) -> Trace:
        if scope["path"] in PROBES:
            return NO_TRACE
        path = scope["path"][:200]
        trace = self._tracer.request(f"{scope['method']} {path}", Headers(scope=scope))
        trace.set({"http.request.method": scope["method"], "url.path": path, "motet.request_id": request_id})
        return trace


async def read_body(request: Request, limit: int) -> bytes:
    """The JSON body of `request`. Raises BodyTooLarge as soon as it is known to be over `limit` bytes."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("the request body must have Content-Type: application/json")
    too_large = BodyTooLarge(f"the request body is larger than {limit} bytes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal():
        raise InvalidRequest("Content-Length must be a number")
    if int(declared[:20]) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)
