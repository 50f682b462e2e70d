"""From the first request to the last: who is in flight, who has left, and when to stop waiting for the rest.

A request in flight ends when its work is done, when its client has gone, or when the server's grace is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

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
        self._ends: set[asyncio.Future[None]] = set()  # one per attended work

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
        end = asyncio.get_running_loop().create_future()
        if self._over:
            end.set_result(None)
        self._ends.add(end)
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((task, gone, end), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            raise Unavailable("the server shut down before the request was done")
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
            self._ends.discard(end)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
