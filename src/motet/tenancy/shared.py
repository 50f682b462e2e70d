"""Quotas that several servers share, in Redis: the buckets of `quota`, each operation one atomic Lua script.

Times are the Redis server's, so that clocks of servers need not agree. A place of `max_concurrent` is a lease that its
server renews: the places of a server that died are free LEASE_SECONDS later, and those of one that lives come back soon
after Redis has lost them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import Any

from motet.errors import ConfigError, MotetError
from motet.tenancy.quota import Entry, Level, ask
from motet.tenancy.tenants import Tenant

logger = logging.getLogger(__name__)
LEASE_SECONDS = 60.0
REACH_SECONDS = 2.0
MAX_CONNECTIONS = 32  # who finds them all in use waits up to REACH_SECONDS
_PREFIX = "motet:quota:"

# A bucket is a hash of `left` and `at` that is gone, and so full, a minute after its last use.
_BUCKET = """
local t = redis.call('TIME')
local now = tonumber(t[1]) + tonumber(t[2]) / 1e6
local function level(key, limit)
  local had = redis.call('HMGET', key, 'left', 'at')
  if not had[1] then return limit end
  local left = math.min(limit, tonumber(had[1]) + limit * (now - tonumber(had[2])) / 60)
  return tonumber(string.format('%.9f', left))  -- as the server will read it
end
local function keep(key, left)
  redis.call('HSET', key, 'left', string.format('%.9f', left), 'at', string.format('%.6f', now))
  redis.call('EXPIRE', key, 61)
end
"""

# Those running are a sorted set: each request with the time that its lease ends.
_LEASE = """
local function lease(key, seconds, request)
  redis.call('ZADD', key, string.format('%.6f', now + seconds), request)
  redis.call('PEXPIRE', key, math.ceil(seconds * 1000))
end
"""

# KEYS: bucket of requests, set of those running. ARGV: requests per minute, places (-1: no limit), request, lease.
_ENTER = (
    _BUCKET
    + _LEASE
    + """
local limit, places = tonumber(ARGV[1]), tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local has_place = places < 0 or redis.call('ZCARD', KEYS[2]) < places
local left = -1
if limit >= 0 then left = level(KEYS[1], limit) end
if has_place and (limit < 0 or left >= 1) then
  if limit >= 0 then keep(KEYS[1], left - 1) end
  if places >= 0 then lease(KEYS[2], tonumber(ARGV[4]), ARGV[3]) end
end
return {has_place and 1 or 0, string.format('%.9f', left)}
"""
)

# KEYS: bucket of tokens. ARGV: tokens per minute, amount.
_TAKE = (
    _BUCKET
    + """
local left = level(KEYS[1], tonumber(ARGV[1]))
if left >= tonumber(ARGV[2]) then keep(KEYS[1], left - tonumber(ARGV[2])) end
return string.format('%.9f', left)
"""
)

# KEYS: bucket of tokens, set of those running. ARGV: tokens per minute (-1: no limit), amount, request.
_LEAVE = (
    _BUCKET
    + """
redis.call('ZREM', KEYS[2], ARGV[3])
local limit, amount = tonumber(ARGV[1]), tonumber(ARGV[2])
if limit >= 0 and amount > 0 then keep(KEYS[1], math.min(limit, level(KEYS[1], limit) + amount)) end
return 1
"""
)


# KEYS: set of those running. ARGV: lease, requests.
_RENEW = (
    _BUCKET
    + _LEASE
    + """
for i = 2, #ARGV do lease(KEYS[1], tonumber(ARGV[1]), ARGV[i]) end
return 1
"""
)


class QuotaUnavailable(MotetError):
    """The shared counters cannot be reached, so nobody can say whether a request is within its limits."""

    status = 503
    code = "quota_unavailable"


class RedisCounters:
    """Levels in Redis. Raises QuotaUnavailable while it cannot be reached."""

    def __init__(self, client: Any, lease_seconds: float = LEASE_SECONDS) -> None:
        """`client` is a `redis.asyncio.Redis`."""
        from redis.exceptions import RedisError

        self._failures = (RedisError, OSError)
        self._lease_seconds = lease_seconds
        self._held: defaultdict[str, set[str]] = defaultdict(set)  # by the key of a tenant's running requests
        self._renewing: asyncio.Task[None] | None = None
        self._enter = client.register_script(_ENTER)
        self._take = client.register_script(_TAKE)
        self._leave = client.register_script(_LEAVE)
        self._renew = client.register_script(_RENEW)

    async def enter(self, tenant: Tenant, request: str) -> Entry:
        policy = tenant.policy
        limit = policy.requests_per_minute
        if limit is None and policy.max_concurrent is None:
            return Entry(None, True)
        places = -1 if policy.max_concurrent is None else policy.max_concurrent
        keys = [_key(tenant, "requests"), _key(tenant, "running")]
        place, left = await self._call(self._enter, keys, [_or(limit), places, request, self._lease_seconds])
        level = None
        if limit is not None:
            level = ask(float(left), limit, 1)
            level = level if place else Level(limit, float(left), level.wait)
        entry = Entry(level, bool(place))
        if entry.admitted and places >= 0:
            self._hold(keys[1], request)
        return entry

    async def take(self, tenant: Tenant, tokens: int) -> Level | None:
        limit = tenant.policy.tokens_per_minute
        if limit is None:
            return None
        left = await self._call(self._take, [_key(tenant, "tokens")], [limit, tokens])
        return ask(float(left), limit, tokens)

    async def leave(self, tenant: Tenant, request: str, unused_tokens: int) -> None:
        policy = tenant.policy
        if policy.max_concurrent is None and (policy.tokens_per_minute is None or not unused_tokens):
            return
        keys = [_key(tenant, "tokens"), _key(tenant, "running")]
        self._let_go(keys[1], request)
        try:
            await self._call(self._leave, keys, [_or(policy.tokens_per_minute), unused_tokens, request])
        except QuotaUnavailable as error:  # the request itself is served: not its client's concern
            logger.warning("nothing was given back to tenant %s: %s", tenant.name, error)

    async def renew(self) -> None:
        """Extend the leases of all places that are held here."""
        for key, requests in list(self._held.items()):
            held = list(requests)
            try:
                await self._call(self._renew, [key], [self._lease_seconds, *held])
                left = set(held) - self._held.get(key, set())
                for request in left:  # perhaps before it was renewed
                    await self._call(self._leave, [key, key], [-1, 0, request])
            except QuotaUnavailable as error:  # a lease outlasts two such rounds
                logger.warning("the places in use were not renewed: %s", error)
                return

    def _hold(self, key: str, request: str) -> None:
        self._held[key].add(request)
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.get_running_loop().create_task(self._renew_while_held())

    def _let_go(self, key: str, request: str) -> None:
        self._held[key].discard(request)
        if not self._held[key]:
            del self._held[key]

    async def _renew_while_held(self) -> None:
        while self._held:
            await asyncio.sleep(self._lease_seconds / 3)
            await self.renew()

    async def _call(self, script: Any, keys: list[str], arguments: list[object]) -> Any:
        try:
            return await script(keys=keys, args=arguments)
        except self._failures as error:
            logger.warning("the shared quotas cannot be read: %s", error)
            raise QuotaUnavailable("the shared quotas cannot be read") from error


def connect(url: str, lease_seconds: float = LEASE_SECONDS) -> RedisCounters:
    """Counters at a `redis://` URL. Raises ConfigError if the `redis` extra is missing or the URL is none."""
    try:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise ConfigError("quotas in Redis need the extra: pip install 'motet[redis]'") from error
    try:
        once = Retry(NoBackoff(), 0)  # a script whose answer was lost may have counted already
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=REACH_SECONDS,
            socket_timeout=REACH_SECONDS,
            socket_connect_timeout=REACH_SECONDS,
            retry=once,
        )
    except ValueError as error:
        raise ConfigError(f"redis: {error}") from error
    return RedisCounters(Redis.from_pool(pool), lease_seconds)


def _key(tenant: Tenant, what: str) -> str:
    """The braces keep a tenant's keys on one node of a cluster, as a script needs."""
    return f"{_PREFIX}{{{tenant.name}}}:{what}"


def _or(limit: int | None) -> int:
    return -1 if limit is None else limit
