"""Every way a request can fail, as a status and OpenAI's error body, so that clients never see our internals.

The body is {"error": {"message", "type", "param", "code"}}. A MotetError is told in full, anything else is a
bare 500.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from motet.errors import MotetError
from motet.observe.metrics import UNKNOWN, Metrics
from motet.tenancy.access import Principal

logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's number for "client closed request": for the log, nobody receives it
_RETRY_AFTER_SECONDS = {503: 1.0, 504: 1.0, 507: 60.0}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Unavailable(MotetError):
    """Not now: the engine is warming up, or the server is shutting down."""

    status = 503
    code = "unavailable"


class RequestTimeout(MotetError):
    """The client was too slow with its request."""

    status = 408
    code = "request_timeout"


class BodyTooLarge(MotetError):
    """The request body is over `max_body_bytes`."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaType(MotetError):
    """The body is not declared as JSON; a browser can send other types across sites without asking."""

    status = 415
    code = "unsupported_media_type"


class Forbidden(MotetError):
    """This server does not allow it."""

    status = 403
    code = "forbidden"


class GenerationFailed(MotetError):
    """The engine ended a request that it had accepted with an error."""

    code = "generation_failed"


class Error(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: Error


def status_of(failure: BaseException) -> int:
    """The HTTP status for `failure`."""
    return failure.status if isinstance(failure, MotetError) else 500


def body_of(failure: BaseException) -> ErrorBody:
    """OpenAI's error body for `failure`; only a MotetError may speak for itself."""
    if isinstance(failure, MotetError):
        param = getattr(failure, "param", None)
        return ErrorBody(Error(str(failure), _type_of(failure.status), param, failure.code))
    return ErrorBody(Error("internal server error", _type_of(500), None, "internal_error"))


def response_to(failure: BaseException) -> Response:
    """The whole HTTP answer for `failure`."""
    return _response(status_of(failure), body_of(failure), headers_of(failure))


def headers_of(failure: BaseException) -> dict[str, str]:
    """When to come back, with what, and on which connection."""
    status = status_of(failure)
    headers = dict(_HEADERS.get(status, {}))
    seconds: float | None = getattr(failure, "retry_after", _RETRY_AFTER_SECONDS.get(status))
    if seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    return headers


def count(metrics: Metrics, scope: Scope, code: str) -> None:
    """Count a failure for the model and the tenant of the request, as far as they are known."""
    state = scope["state"]
    principal: Principal | None = state.get("principal")
    metrics.error(state.get("model", UNKNOWN), code, principal.tenant.name if principal else "")


Handler = Callable[[Request, Any], Coroutine[Any, Any, Response]]


def handlers(metrics: Metrics) -> dict[int | type[Exception], Handler]:
    """What Starlette calls for exceptions that leave an endpoint before its response has started."""

    async def on_motet_error(request: Request, failure: MotetError) -> Response:
        count(metrics, request.scope, failure.code)
        if failure.status >= 500 and not isinstance(failure, Unavailable):
            logger.warning("%s: %s", failure.code, failure)
        return response_to(failure)

    async def on_http_error(request: Request, failure: HTTPException) -> Response:
        status = failure.status_code
        code = HTTPStatus(status).phrase.lower().replace(" ", "_")
        count(metrics, request.scope, code)
        message = f"{request.method} {request.url.path[:200]}: {HTTPStatus(status).phrase}"
        return _response(status, ErrorBody(Error(message, _type_of(status), None, code)), failure.headers)

    async def on_client_gone(request: Request, _: ClientDisconnect) -> Response:
        count(metrics, request.scope, "client_gone")
        return Response(status_code=CLIENT_GONE)

    return {MotetError: on_motet_error, HTTPException: on_http_error, ClientDisconnect: on_client_gone}


def _response(status: int, body: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def _type_of(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
