"""Copies adapters from their packed images into the pool, beside the step loop.

A copy fills pages that nothing else owns, so it needs no lock against the running step; numpy copies them with the
GIL released. On a GPU it begins when the steps launched before it have ended, which may still read what was there.
Finished loads are collected by the loop between two steps.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from motet.adapters.image import ChunkTable, open_image
from motet.errors import MotetError
from motet.memory.pool import Mark, Pool
from motet.types import Load


@dataclass(frozen=True)
class LoadResult:
    """A finished load: the chunks that now lie in `load.pages`, or why it failed. `seconds` is its duration."""

    load: Load
    chunks: ChunkTable | None
    error: str | None
    seconds: float


class Pager:
    """One thread that serves loads in the order they were planned."""

    def __init__(self, pool: Pool, on_finished: Callable[[], None]) -> None:
        """`on_finished` is called from the pager's thread after each load."""
        self._pool = pool
        self._on_finished = on_finished
        self._under_way = 0
        self._todo: queue.SimpleQueue[tuple[Load, Path, Mark] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="motet-pager", daemon=True)
        self._thread.start()

    def start(self, load: Load, image: Path) -> None:
        """Queue a copy; returns at once."""
        self._under_way += 1
        self._todo.put((load, image, self._pool.mark()))

    def finished(self) -> list[LoadResult]:
        """Loads that ended since the last call."""
        results = []
        while not self._done.empty():
            results.append(self._done.get())
        self._under_way -= len(results)
        return results

    @property
    def busy(self) -> bool:
        """Whether a load has begun and `finished` has not told its end."""
        return self._under_way > 0

    def close(self) -> None:
        """End the thread after the load in progress."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._todo.get()) is not None:
            load, path, launched = job
            began = time.monotonic()
            chunks, error = None, None
            try:
                chunks = self._copy(load, path, launched)
            except (MotetError, OSError, ValueError) as failure:
                error = f"adapter {load.digest[:12]} could not be loaded: {failure}"
            self._done.put(LoadResult(load, chunks, error, time.monotonic() - began))
            self._on_finished()

    def _copy(self, load: Load, path: Path, launched: Mark) -> ChunkTable:
        image = open_image(path)
        if image.digest != load.digest:
            raise ValueError(f"{path} holds {image.digest}")
        if image.num_pages != len(load.pages) or image.page_bytes != self._pool.page_bytes:
            raise ValueError(f"{path} was packed for another page size or has changed")
        self._pool.fill(load.pages, image.pages, launched)
        return image.chunks
