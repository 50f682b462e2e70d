"""Threads that do their work like any executor's, and that no end waits for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from motet.server.workers import MOST, Workers, at_work, run

from .fakes import until


def test_work_is_done_by_as_many_threads_as_there_may_be() -> None:
    workers = Workers(3)
    gate = threading.Barrier(3, timeout=5)
    threads: set[int] = set()

    def work(number: int) -> int:
        threads.add(threading.get_ident())
        gate.wait()
        return number * 2

    futures = [workers.submit(work, i) for i in range(9)]
    assert [future.result(5) for future in futures] == [i * 2 for i in range(9)]
    assert len(threads) == 3
    for i in range(3):
        assert workers.submit(pow, 2, i).result(5) == 2**i
    workers.shutdown()
    with pytest.raises(RuntimeError, match="ended"):
        workers.submit(pow, 2, 3)


def test_a_thread_outlives_what_it_raises_and_skips_what_was_cancelled() -> None:
    workers = Workers(1)
    began, opened = threading.Event(), threading.Event()
    done: list[str] = []

    def wait() -> bool:
        began.set()
        return opened.wait(5)

    first = workers.submit(wait)
    second = workers.submit(done.append, "second")
    failing = workers.submit(int, "x")
    assert began.wait(5)
    assert at_work() == 1
    assert second.cancel()
    opened.set()
    assert first.result(5)
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result(5)
    assert workers.submit(len, "abc").result(5) == 3
    assert done == []
    workers.shutdown()


def test_nothing_is_busy_in_the_end() -> None:
    async def scenario() -> None:
        assert await asyncio.gather(*(asyncio.to_thread(pow, 2, i) for i in range(50))) == [
            2**i for i in range(50)
        ]
        await until(lambda: not at_work())

    run(scenario())


STUCK = """
import asyncio, tempfile, threading, time
from motet.server.workers import run

async def work():
    folder = tempfile.TemporaryDirectory()
    print(folder.name, flush=True)
    for _ in range(40):
        asyncio.ensure_future(asyncio.to_thread(time.sleep, 60))
    await asyncio.sleep(0.2)

run(work())
"""


def test_a_process_ends_beside_threads_that_hang() -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, f"leaving {MOST} threads in the middle of their work\n")
    assert time.monotonic() - began < 10
    assert not Path(done.stdout.strip()).exists(), "its temporary folder is gone"
