"""The contract of a SageMaker container, as a layer around the application: its routes become the server's own.

    GET    /ping               GET  /ready
    POST   /invocations        POST /v1/chat/completions or /v1/completions, by what the body has
    POST   /adapters           POST /v1/load_lora_adapter
    GET    /adapters           GET  /v1/models
    DELETE /adapters/{name}    POST /v1/unload_lora_adapter

So limits, errors and metrics are those of any request. A body is read here only for a key that is known, and only one
that says it is JSON, or says nothing. The header X-Amzn-SageMaker-Adapter-Identifier names the
adapter; a request without it, and without a `model`, goes to the base.
"""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import unquote

import msgspec
from msgspec import Raw
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motet.errors import MotetError
from motet.server.failures import UnsupportedMediaType, response_to
from motet.server.gate import token_of
from motet.server.openai import Strict, parse
from motet.tenancy.access import Guard

ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
_MAX_FIELDS = 100
_MAX_COMMAS = 1 << 17  # of a body that is looked into: 20 ms
_Body = dict[str, Raw]


class RegisterRequest(Strict, frozen=True):
    """`preload` needs nothing: an adapter is bound when it is registered. None can be pinned."""

    name: str
    src: str
    preload: bool = True
    pin: Literal[False] = False


class SageMaker:
    """ASGI middleware, outside of all others."""

    def __init__(self, app: ASGIApp, base: str, max_body_bytes: int, guard: Guard) -> None:
        self._app = app
        self._base = base
        self._max_body = max_body_bytes
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        except MotetError as failure:
            await response_to(failure)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["method"], scope["path"]:
            case "GET", "/ping":
                await self._app(_moved(scope, "GET", "/ready"), receive, send)
            case "POST", "/invocations":
                await self._invoke(scope, receive, send)
            case "GET", "/adapters":
                await self._app(_moved(scope, "GET", "/v1/models"), receive, _listing(send))
            case "POST", "/adapters":
                taken = await self._take(scope, receive)
                asked = parse(taken.body, RegisterRequest, _MAX_FIELDS)
                body = {"lora_name": asked.name, "lora_path": asked.src}
                await self._send_on(scope, "/v1/load_lora_adapter", body, receive, send)
            case "DELETE", path if path.startswith("/adapters/"):
                body = {"lora_name": unquote(path.removeprefix("/adapters/"))}
                await self._send_on(scope, "/v1/unload_lora_adapter", body, receive, send)
            case _:
                await self._app(scope, receive, send)

    async def _invoke(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = await self._take(scope, receive)
        path, body = "/v1/completions", taken.body
        if (fields := _fields(taken)) is not None:
            path = "/v1/chat/completions" if "messages" in fields else path
            adapter = Headers(scope=scope).get(ADAPTER_HEADER)
            if adapter or "model" not in fields:
                fields["model"] = Raw(msgspec.json.encode(adapter or self._base))
            body = msgspec.json.encode(fields)
        # What is too large or no object goes on as it came, and is refused like anywhere else.
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": not taken.whole}]
        await self._app(
            _moved(scope, "POST", path, body if taken.whole else None), _replay(messages, receive), send
        )

    async def _take(self, scope: Scope, receive: Receive) -> _Taken:
        await self._guard.principal(token_of(scope))
        kind = Headers(scope=scope).get("content-type", "application/json")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMediaType("the request body must have Content-Type: application/json")
        return await _take(receive, self._max_body)

    async def _send_on(self, scope: Scope, path: str, value: object, receive: Receive, send: Send) -> None:
        body = msgspec.json.encode(value)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        await self._app(_moved(scope, "POST", path, body), _replay(messages, receive), send)


class _Taken(msgspec.Struct):
    """The first bytes of a body; `whole` if there are no more."""

    body: bytes
    whole: bool


async def _take(receive: Receive, limit: int) -> _Taken:
    parts, size, more = [], 0, True
    while more and size <= limit:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
    return _Taken(b"".join(parts), not more)


def _fields(taken: _Taken) -> _Body | None:
    if not taken.whole or taken.body.count(b",") > _MAX_COMMAS:
        return None
    try:
        return msgspec.json.decode(taken.body, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """`messages`, and then what `receive` has."""

    async def next_message() -> Message:
        return messages.pop(0) if messages else await receive()

    return next_message


def _moved(scope: Scope, method: str, path: str, body: bytes | None = None) -> Scope:
    """The scope of another route; with `body`, its headers say so."""
    moved = {
        **scope,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "headers": list(scope["headers"]),
    }
    if body is not None:
        headers = MutableHeaders(scope=moved)
        headers["content-length"] = str(len(body))
        headers["content-type"] = "application/json"
        if "transfer-encoding" in headers:
            del headers["transfer-encoding"]
    return moved


def _listing(send: Send) -> Send:
    """The adapters of a list of models: {"adapters": [{"name", "src"}]}; any other answer as it is."""
    start: list[Message] = []
    parts: list[bytes] = []

    async def translate(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.append(message)
            return
        parts.append(message.get("body", b""))
        if message.get("more_body"):
            return
        body = b"".join(parts)
        if start[0]["status"] == 200:
            models: list[dict[str, Any]] = msgspec.json.decode(body)["data"]
            adapters = [{"name": m["id"], "src": m["root"]} for m in models if m["parent"] is not None]
            body = msgspec.json.encode({"adapters": adapters})
            MutableHeaders(scope=start[0])["content-length"] = str(len(body))
        await send(start[0])
        await send({"type": "http.response.body", "body": body})

    return translate
