"""Tenants take turns for a thread, so that nobody waits for all that somebody else has to do.

A tenant has at most one job in the thread, and when it is over all other tenants that wait come before its next one:
with k tenants waiting, one waits for at most k jobs. Who is not waited for any more when its turn comes is left out.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """Hands out an executor of one thread. All methods belong to one event loop."""

    def __init__(self, thread: Executor) -> None:
        self._thread = thread
        self._running: str | None = None  # whose job is in the thread
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = (
            OrderedDict()
        )  # who is next comes first

    @property
    def waiting(self) -> int:
        """Jobs that are not in the thread yet."""
        return sum(map(len, self._waiting.values()))

    async def run(self, tenant: str, job: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """What `job` returns or raises. Cancelled while it waits, it is never begun."""
        await self._turn(tenant)
        try:
            future = asyncio.wrap_future(self._thread.submit(job, *args, **named))
        except BaseException:
            self._next()
            raise
        future.add_done_callback(self._over)
        return await asyncio.shield(
            future
        )  # the thread is taken until it is done, whether or not it is waited for

    async def _turn(self, tenant: str) -> None:
        if self._running is None:
            self._running = tenant
            return
        mine = asyncio.get_running_loop().create_future()
        queue = self._waiting.setdefault(tenant, deque())
        queue.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():  # its turn came just now
                self._next()
            elif mine in queue:
                queue.remove(mine)
                if not queue:
                    del self._waiting[tenant]
            raise

    def _over(self, future: asyncio.Future[T]) -> None:
        if not future.cancelled():
            future.exception()  # perhaps nobody waits for it any more
        self._next()

    def _next(self) -> None:
        """Give the thread to the tenant whose turn it is."""
        assert self._running is not None
        if self._running in self._waiting:
            self._waiting.move_to_end(self._running)
        self._running = None
        while self._waiting and self._running is None:
            tenant, queue = next(iter(self._waiting.items()))
            first = queue.popleft()
            if not queue:
                del self._waiting[tenant]
            if not first.done():  # not cancelled in this very moment
                first.set_result(None)
                self._running = tenant
