"""What of this server its tenants hold: places in the queue for a first token, and adapters kept in the pool.

Unlike quotas these are the server's own, never shared: its queue and its memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from motet.errors import MotetError
from motet.tenancy.quota import RateLimited
from motet.tenancy.tenants import Tenant


class Overloaded(MotetError):
    """The server's queue is full, whoever asks."""

    status = 503
    code = "overloaded"


class QueueTimeout(MotetError):
    """The request waited for its first token as long as it may."""

    status = 504
    code = "queue_timeout"


class Load:
    """Counts, in one event loop. `max_queued` bounds the requests of all tenants that wait for their first token."""

    def __init__(self, max_queued: int) -> None:
        self._max_queued = max_queued
        self._queued: Counter[str] = Counter()
        self._adapters: dict[str, Counter[str]] = {}  # tenant → digest → requests
        self._sizes: dict[str, int] = {}  # by digest

    @property
    def queued(self) -> int:
        """Requests that wait for their first token."""
        return self._queued.total()

    @contextmanager
    def hold(self, tenant: Tenant, digest: str, size_bytes: int) -> Iterator[None]:
        """Count an adapter as in use by a request. Raises RateLimited when the tenant's would be too large together."""
        held = self._adapters.get(tenant.name, Counter())
        limit = tenant.policy.adapter_bytes
        if limit is not None and digest not in held:
            together = size_bytes + sum(self._sizes[other] for other in held)
            if together > limit:
                raise RateLimited(
                    f"the adapters in use would take {together} bytes of memory; the limit is {limit}",
                    None if size_bytes > limit else 1.0,
                )
        self._adapters[tenant.name] = held
        held[digest] += 1
        self._sizes[digest] = size_bytes
        try:
            yield
        finally:
            _forget_one(held, digest)
            if not held:
                del self._adapters[tenant.name]
            if not any(digest in others for others in self._adapters.values()):
                del self._sizes[digest]

    @contextmanager
    def wait(self, tenant: Tenant) -> Iterator[None]:
        """Count a request as waiting for its first token. Raises RateLimited or Overloaded when too many do."""
        limit = tenant.policy.max_queued
        if limit is not None and self._queued[tenant.name] >= limit:
            raise RateLimited(f"{limit} requests wait for their first token, which is the limit", 1.0)
        if self.queued >= self._max_queued:
            raise Overloaded(
                f"{self._max_queued} requests wait for their first token, which is all the queue holds"
            )
        self._queued[tenant.name] += 1
        try:
            yield
        finally:
            _forget_one(self._queued, tenant.name)


def _forget_one(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
