"""From the first request to the last: who is in flight, who has left, and when to stop waiting for the rest.

A request in flight ends when its work is done, when its client has gone, or when the server's grace is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from motet.server.failures import Unavailable

T = TypeVar("T")


class Lifecycle:
    """Counts work in flight and ends it on time."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self._over = False
        self._ends: set[asyncio.Future[None]] = set()  # one for each that waits
        self._left: set[asyncio.Future[Any]] = set()  # the loop itself keeps only weak references

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as in flight, from its first byte to its last."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def drain(self) -> None:
        """Accept no new work; readiness turns red. Safe to call in a signal handler."""
        self.draining = True

    def cut(self) -> None:
        """End what is still in flight with an error. Call it in the event loop."""
        self._over = True
        for end in self._ends:
            if not end.done():
                end.set_result(None)

    def admit(self) -> None:
        """Raise Unavailable once the server drains."""
        if self.draining:
            raise Unavailable("the server is shutting down")

    async def attend(self, receive: Receive, work: Coroutine[object, object, T]) -> T:
        """The result of `work`, which is cancelled when the client goes or the server's grace is over.

        `receive` must have given the whole request body already. Raises ClientDisconnect or Unavailable.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await self._first(task, gone)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            raise Unavailable("the server shut down before the request was done")
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def finish(self, work: Coroutine[object, object, T]) -> T:
        """The result of `work`, which goes on when the client goes, and is left to itself when the grace is over: for
        what a thread does, and no cancelling undoes. Raises Unavailable then."""
        task = asyncio.ensure_future(work)
        self._left.add(task)
        task.add_done_callback(self._forget)
        await self._first(task)
        if task.done():
            return task.result()
        raise Unavailable("the server shut down before the operation was over; see whether it was done")

    async def _first(self, *tasks: asyncio.Future[T] | asyncio.Future[None]) -> None:
        """Wait until one of `tasks` is done, or the server's grace is over."""
        end = asyncio.get_running_loop().create_future()
        if self._over:
            end.set_result(None)
        self._ends.add(end)
        try:
            await asyncio.wait((*tasks, end), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ends.discard(end)

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._left.discard(task)
        if not task.cancelled():
            task.exception()  # perhaps nobody is there any more to be told


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
