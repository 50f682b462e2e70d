"""Who may ask for what: every request is authenticated, and held to the rule of the route that will answer it.

The rule is that of the route that matched, so odd spellings of a path meet the rule of whatever they reach. A route
without a rule is the operator's alone, and what no route answers still takes a key.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from motet.config import ServerConfig
from motet.errors import ConfigError, MotetError
from motet.observe.metrics import Metrics
from motet.server.failures import Forbidden, count, response_to
from motet.tenancy.access import Guard, Principal
from motet.tenancy.keys import Role
from motet.tenancy.load import Load
from motet.tenancy.quota import Counters, LocalCounters
from motet.tenancy.store import Store

logger = logging.getLogger(__name__)
ADMIN_PORT = "motet.admin_port"
"""In a scope: the request came in by the port of administration."""


@dataclass(frozen=True)
class Rule:
    """Which keys a route takes, and whether it belongs on the port of administration, if there is one."""

    roles: frozenset[Role]
    for_operators: bool = False


PUBLIC = Rule(frozenset())
INFERENCE = Rule(frozenset({"inference", "admin"}))
METRICS = Rule(frozenset({"metrics", "admin"}), for_operators=True)
ADMIN = Rule(frozenset({"admin"}), for_operators=True)
SEEN = Rule(frozenset({"inference", "admin"}), for_operators=True)
"""For operators, but a tenant is first told that what it must not see is not there."""

RULES: dict[str, Rule] = {
    "GET /health": PUBLIC,
    "GET /ready": PUBLIC,
    "GET /version": PUBLIC,
    "GET /openapi.json": PUBLIC,
    "GET /metrics": METRICS,
    "POST /v1/chat/completions": INFERENCE,
    "POST /v1/completions": INFERENCE,
    "GET /v1/models": INFERENCE,
    "GET /v1/models/{model:path}": INFERENCE,
    "POST /v1/load_lora_adapter": ADMIN,
    "POST /v1/unload_lora_adapter": SEEN,
    "GET /v1/adapters": ADMIN,
    "POST /v1/adapters/{model:path}/prefetch": ADMIN,
    "POST /v1/adapters/{model:path}/pin": ADMIN,
    "POST /v1/adapters/{model:path}/unpin": ADMIN,
}
"""By method and path as routes are declared; HEAD goes with GET."""


class NotHere(MotetError):
    """The route belongs on the other port."""

    status = 404
    code = "not_found"


@dataclass(frozen=True)
class Tenancy:
    """What the server knows of its tenants: who they are, what they used, what they hold."""

    guard: Guard
    counters: Counters
    load: Load


def tenancy_of(config: ServerConfig) -> Tenancy:
    """Open the database and the counters that `config` names. Raises ConfigError or StoreUnavailable."""
    read = Store(config.database).read if config.database else None
    counters: Counters = LocalCounters()
    if config.redis:
        from motet.tenancy.shared import connect

        counters = connect(config.redis)
    return Tenancy(Guard(read, config.tenants), counters, Load(config.max_queued))


def check_exposure(config: ServerConfig, guard: Guard) -> None:
    """Say it when everybody is served; raise ConfigError when that would be the whole network unasked."""
    if not guard.is_open:
        return
    if not (config.allow_open or _is_loopback(config.host)):
        raise ConfigError(
            f"there are no API keys, so everybody who reaches {config.host} would be the operator. Make keys with "
            "`motet keys create`, listen on 127.0.0.1, or say --allow-open"
        )
    where = "this machine" if _is_loopback(config.host) else "the network"
    logger.warning("no API keys: everybody on %s may use and administer this server", where)


def _is_loopback(host: str) -> bool:
    """Whether every address of `host` is this machine's own."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host or "0.0.0.0", None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


class Gate:
    """ASGI middleware: lets a request in, with its principal as `state.principal`, or answers 401, 403 or 404."""

    def __init__(self, app: ASGIApp, guard: Guard, config: ServerConfig, metrics: Metrics) -> None:
        self._app = app
        self._guard = guard
        self._two_ports = config.admin_port is not None
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                await self._check(scope)
            except MotetError as failure:
                count(self._metrics, scope, failure.code)
                await response_to(failure)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _check(self, scope: Scope) -> None:
        rule = rule_of(scope)
        if rule == PUBLIC:
            return
        principal: Principal = await self._guard.principal(token_of(scope))
        scope["state"]["principal"] = principal
        if rule is None:
            return
        if self._two_ports and rule.for_operators != scope.get(ADMIN_PORT, False):
            raise NotHere(f"{scope['path'][:200]} is not served on this port")
        if principal.role not in rule.roles:
            raise Forbidden(f"a key of role {principal.role!r} may not do this")


def rule_of(scope: Scope) -> Rule | None:
    """The rule of the route that will answer; None where none will."""
    routes: list[BaseRoute] = scope["app"].routes
    for route in routes:
        if route.matches(scope)[0] == Match.FULL:
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            return RULES.get(f"{method} {route.path}", ADMIN) if isinstance(route, Route) else ADMIN
    return None


def token_of(scope: Scope) -> str | None:
    """The key that a request comes with."""
    scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def for_operators(app: ASGIApp) -> ASGIApp:
    """`app` as it is on the port of administration."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, ADMIN_PORT: True}, receive, send)

    return marked
