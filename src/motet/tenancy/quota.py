"""How much a tenant may use: requests and tokens per minute, and requests at once.

Per-minute limits are token buckets: a bucket holds one minute's worth, fills steadily, and gives what is asked for or
nothing. A request takes one of `requests_per_minute` and a place of `max_concurrent` as it arrives; once its prompt is
known it takes prompt + max_tokens of `tokens_per_minute`, and gives back what it did not use as it ends. A request that
is refused or fails has still counted as a request, and costs no tokens.

The arithmetic is `refill`; `Counters` keep the levels: `LocalCounters` in this process, `RedisCounters` for several
servers. Each of their methods is atomic, so that exactly as many requests are admitted as the limits say.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from motet.errors import MotetError
from motet.tenancy.tenants import Tenant
from motet.types import Struct

MINUTE = 60.0


class RateLimited(MotetError):
    """A tenant is over a limit of its own; `retry_after` is the seconds until trying again may help, None: never."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Level(Struct, frozen=True):
    """A bucket after somebody asked: what is left of `limit`. `wait` is 0 if they got it, else the seconds until they
    could."""

    limit: int
    left: float
    wait: float = 0.0

    @property
    def full_in(self) -> float:
        """Seconds until the bucket is full."""
        return (self.limit - self.left) * MINUTE / self.limit


class Entry(Struct, frozen=True):
    """The answer to an arrival: the bucket of requests, if there is one, and whether `max_concurrent` had a place."""

    requests: Level | None
    has_place: bool

    @property
    def admitted(self) -> bool:
        return self.has_place and (self.requests is None or not self.requests.wait)


class Counters(Protocol):
    """Where the levels are kept; each method is atomic."""

    async def enter(self, tenant: Tenant, request: str) -> Entry:
        """Take one request and one place; both or, if the entry is not admitted, neither."""
        ...

    async def take(self, tenant: Tenant, tokens: int) -> Level | None:
        """Take tokens, all or none; None if the tenant has no limit of them."""
        ...

    async def leave(self, tenant: Tenant, request: str, unused_tokens: int) -> None:
        """Give the place back, and the tokens that were taken and not used."""
        ...


def refill(left: float, limit: int, seconds: float) -> float:
    """What a bucket that had `left` holds `seconds` later."""
    return min(float(limit), left + limit * seconds / MINUTE)


def ask(left: float, limit: int, amount: int) -> Level:
    """The bucket after `amount` was asked of it."""
    if amount <= left:
        return Level(limit, left - amount)
    return Level(limit, left, (amount - left) * MINUTE / limit)


@dataclass
class _State:
    """One tenant's levels. None is a bucket that nobody has asked yet: it is full."""

    requests: float | None = None
    tokens: float | None = None
    at: float = 0.0
    running: set[str] = field(default_factory=set)


class LocalCounters:
    """Levels in this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: dict[str, _State] = {}

    async def enter(self, tenant: Tenant, request: str) -> Entry:
        state, policy = self._refilled(tenant), tenant.policy
        level = None
        if policy.requests_per_minute is not None:
            assert state.requests is not None
            level = ask(state.requests, policy.requests_per_minute, 1)
        entry = Entry(level, policy.max_concurrent is None or len(state.running) < policy.max_concurrent)
        if entry.admitted:
            state.running.add(request)
            state.requests = level.left if level else None
        return entry

    async def take(self, tenant: Tenant, tokens: int) -> Level | None:
        limit = tenant.policy.tokens_per_minute
        if limit is None:
            return None
        state = self._refilled(tenant)
        assert state.tokens is not None
        level = ask(state.tokens, limit, tokens)
        state.tokens = level.left
        return level

    async def leave(self, tenant: Tenant, request: str, unused_tokens: int) -> None:
        state, limit = self._refilled(tenant), tenant.policy.tokens_per_minute
        state.running.discard(request)
        if limit is not None and state.tokens is not None:
            state.tokens = min(float(limit), state.tokens + unused_tokens)

    def _refilled(self, tenant: Tenant) -> _State:
        state, now, policy = self._tenants.setdefault(tenant.name, _State()), self._clock(), tenant.policy
        seconds, state.at = now - state.at, now
        state.requests = _level(state.requests, policy.requests_per_minute, seconds)
        state.tokens = _level(state.tokens, policy.tokens_per_minute, seconds)
        return state


def _level(left: float | None, limit: int | None, seconds: float) -> float | None:
    if limit is None:
        return None
    return float(limit) if left is None else refill(left, limit, seconds)


class Visit:
    """One request's stay, an asynchronous context manager: entering takes a request and a place, or raises
    RateLimited; leaving gives the place back and what was reserved beyond `used_tokens`.
    """

    def __init__(self, counters: Counters, tenant: Tenant) -> None:
        self.used_tokens = 0
        self._counters = counters
        self._tenant = tenant
        self._id = uuid.uuid4().hex
        self._reserved = 0
        self._levels: dict[str, Level | None] = {}

    async def __aenter__(self) -> Visit:
        try:
            entry = await self._counters.enter(self._tenant, self._id)
        except BaseException:  # perhaps only the answer was lost, and the place is taken
            await self._counters.leave(self._tenant, self._id, 0)
            raise
        self._levels["requests"] = entry.requests
        if not entry.has_place:
            limit = self._tenant.policy.max_concurrent
            raise RateLimited(f"{limit} requests are in flight, which is the limit", 1.0)
        if entry.requests is not None and entry.requests.wait:
            raise RateLimited(f"the limit is {entry.requests.limit} requests per minute", entry.requests.wait)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._counters.leave(self._tenant, self._id, max(0, self._reserved - self.used_tokens))

    async def reserve(self, tokens: int) -> None:
        """Take `tokens`, or raise RateLimited."""
        level = self._levels["tokens"] = await self._counters.take(self._tenant, tokens)
        if level is None or not level.wait:
            self._reserved = tokens
            return
        wanted = f"the request needs {tokens} tokens (prompt + max_tokens)"
        if tokens > level.limit:
            raise RateLimited(
                f"{wanted}, more than the limit of {level.limit} per minute; set a smaller max_tokens", None
            )
        raise RateLimited(f"{wanted}; {int(level.left)} of {level.limit} per minute are left", level.wait)

    def headers(self) -> dict[str, str]:
        """What is left, under OpenAI's names."""
        headers: dict[str, str] = {}
        for what, level in self._levels.items():
            if level is not None:
                headers[f"x-ratelimit-limit-{what}"] = str(level.limit)
                headers[f"x-ratelimit-remaining-{what}"] = str(int(level.left))
                headers[f"x-ratelimit-reset-{what}"] = f"{level.full_in:.3f}s"
        return headers
