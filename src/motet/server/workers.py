"""Threads for work that blocks, which no end waits for.

Python waits for every thread of an executor before it exits. A push that fetches from a slow host, or a disk that
hangs, would so keep a server that was told to stop for many minutes. What these threads write is whole or not there,
whenever they are cut off (`registry.artifacts`, `adapters.store`), so a server leaves without them.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)
Jobs = queue.SimpleQueue[Callable[[], None] | None]
_LAST_SECONDS = 0.3  # for threads that are about to be done
MOST = 32  # Python's own bound; they mostly wait for disks, databases and other hosts


class Workers(ThreadPoolExecutor):
    """At most `most` daemon threads, begun as work comes. A ThreadPoolExecutor in name: event loops take no other."""

    def __init__(self, most: int = MOST) -> None:
        super().__init__(max_workers=1)  # none of whose threads is ever started
        self._most = most
        self._jobs: Jobs = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0  # jobs that are not over
        self._started = 0  # threads
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    result = fn(*args, **kwargs)
                except BaseException as failure:  # noqa: BLE001 - it is raised where the result is awaited
                    future.set_exception(failure)
                else:
                    future.set_result(result)
            with self._lock:
                self._open -= 1

        with self._lock:
            if self._closed:
                raise RuntimeError("the server has ended")
            self._open += 1
            if self._started < min(self._open, self._most):
                self._started += 1
                _Worker(self._jobs).start()
        self._jobs.put(job)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Take no more work, and wait for none."""
        with self._lock:
            self._closed = True
        for _ in range(self._started):
            self._jobs.put(None)


class _Worker(threading.Thread):
    """Does jobs until there is None."""

    def __init__(self, jobs: Jobs) -> None:
        super().__init__(name="motet-worker", daemon=True)
        self._jobs = jobs
        self.at_work = False

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.at_work = True
            job()
            self.at_work = False


def at_work() -> int:
    """How many threads of all Workers are in the middle of a job."""
    return sum(isinstance(thread, _Worker) and thread.at_work for thread in threading.enumerate())


def run(work: Coroutine[Any, Any, None]) -> None:
    """As asyncio.run, of a whole process: it ends when `work` has, whatever its threads do."""

    async def whole() -> None:
        asyncio.get_running_loop().set_default_executor(Workers())
        await work

    asyncio.run(whole())
    deadline = time.monotonic() + _LAST_SECONDS
    while at_work() and time.monotonic() < deadline:
        time.sleep(0.01)
    if busy := at_work():
        logger.warning("leaving %d threads in the middle of their work", busy)
        # Python would end them where they next take its lock, which compiled code in between may answer with abort().
        atexit._run_exitfuncs()  # temporary folders go
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
