"""Copies adapters into the pool, beside the step loop: from the host tier, or from their packed images on disk.

A copy fills pages that nothing else owns, so it needs no lock against the running step; numpy copies them with the
GIL released. On a GPU it begins when the steps launched before it have ended, which may still read what was there.
Finished loads are collected by the loop between two steps.

On a GPU a load is finished when all its copies have been enqueued, layer by layer: a prefill may begin then, and waits
in each layer for what it needs. The next load begins when they are over. So a step waits for the copies of one load at
most, however many have been asked for, and what copies read, in the host tier, is written to only after them.

A load that fails has changed nothing but the pages that it was given. One that finds its image gone from the disk, or
damaged there, says so: the image can be made again, and the adapter loaded then.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from motet.adapters.host import HostImage, HostTier
from motet.adapters.image import AdapterImage, ChunkTable, pages_by_layer
from motet.adapters.store import Identity, identity, reading
from motet.errors import MotetError
from motet.memory.pool import Copies, Mark, Pool
from motet.types import Load, TierStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFile:
    """Where an adapter's image lies, the directory it can be made again from, and the file that was `checked`."""

    path: Path
    source: str
    checked: Identity | None

    @staticmethod
    def just_checked(path: Path, source: str) -> ImageFile:
        """The file that is there now; whoever calls has just read or written all of it."""
        return ImageFile(path, source, identity(path))


@dataclass(frozen=True)
class LoadResult:
    """What is reported of a load: the chunks that lie in `load.pages`, or why it failed.

    Those of layer l are there when `copies[l]` is over; without copies all of them are. With `is_missing` there is no
    image, or not the right one; nothing was written.
    """

    load: Load
    chunks: ChunkTable | None
    copies: Copies = ()
    error: str | None = None
    is_missing: bool = False


@dataclass(frozen=True)
class _Job:
    load: Load
    file: ImageFile
    launched: Mark


class Pager:
    """One thread that serves loads in the order they were planned."""

    def __init__(self, pool: Pool, host: HostTier | None, on_finished: Callable[[], None]) -> None:
        """`on_finished` is called from the pager's thread. `load_seconds` is what all loads took together, each until
        its last page was in the pool."""
        self._pool = pool
        self._host = host
        self._on_finished = on_finished
        self._layer_of = np.array([site.layer for site in pool.spec.sites])
        self._under_way = 0
        self.load_seconds = 0.0
        self._disk_hits = 0
        self._host_loads = 0
        self._host_seconds = 0.0
        self._todo: queue.SimpleQueue[_Job | str | None] = queue.SimpleQueue()  # a digest is one to forget
        self._done: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="motet-pager", daemon=True)
        self._thread.start()

    def start(self, load: Load, file: ImageFile) -> None:
        """Queue a copy; returns at once."""
        self._under_way += 1
        self._todo.put(_Job(load, file, self._pool.mark()))

    def forget(self, digest: str) -> None:
        """Give up the host's copy of an adapter that is not served any more."""
        self._todo.put(digest)

    def finished(self) -> list[LoadResult]:
        """Loads reported since the last call."""
        results = []
        while not self._done.empty():
            results.append(self._done.get())
        self._under_way -= len(results)
        return results

    @property
    def busy(self) -> bool:
        """Whether a load has begun and `finished` has not told its end."""
        return self._under_way > 0

    def stats(self) -> dict[str, TierStats]:
        """The tiers below the pool, by name; of the disk only what was read."""
        tiers = {"disk": TierStats(hits=self._disk_hits)}
        if self._host is not None:
            tiers["host"] = self._host.stats(self._host_loads, self._host_seconds)
        return tiers

    def close(self) -> None:
        """End the thread after the loads that are queued and their copies."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._todo.get()) is not None:
            if isinstance(job, str):
                if self._host is not None:
                    self._host.drop(job)
                continue
            began = time.monotonic()
            try:
                result = self._copy(job)
            except (MotetError, OSError, ValueError) as failure:
                result = LoadResult(job.load, None, error=str(failure), is_missing=True)
            except Exception as failure:  # no memory on the device, or a bug: its requests end
                logger.exception("an adapter could not be loaded")
                result = LoadResult(job.load, None, error=f"{type(failure).__name__}: {failure}")
            self._done.put(result)
            self._on_finished()
            try:
                for last in result.copies[-1:]:
                    last.synchronize()
            except Exception:  # a fault of the device: the loads that are queued are to report it too
                logger.exception("the copies of an adapter failed")
            if result.error is None:
                self.load_seconds += time.monotonic() - began

    def _copy(self, job: _Job) -> LoadResult:
        held = self._host.get(job.load.digest) if self._host is not None else None
        if held is None:
            with reading(job.file.path, job.file.checked) as image:
                self._check(image, job)
                self._disk_hits += 1
                held = self._to_host(image)
                if held is None:
                    return self._fill(job, image.chunks, [image.pages])
        assert self._host is not None
        return self._fill(job, held.chunks, self._host.runs(held))

    def _fill(
        self, job: _Job, chunks: ChunkTable, content: Sequence[NDArray[np.uint8] | Tensor]
    ) -> LoadResult:
        parts = pages_by_layer(chunks, self._layer_of, self._pool.spec.num_layers)
        return LoadResult(job.load, chunks, self._pool.fill(job.load.pages, content, job.launched, parts))

    def _to_host(self, image: AdapterImage) -> HostImage | None:
        """Copy an image to the host tier, if there is one and it fits."""
        if self._host is None:
            return None
        began = time.monotonic()
        held = self._host.put(image)
        if held is not None:
            self._host_loads += 1
            self._host_seconds += time.monotonic() - began
        return held

    def _check(self, image: AdapterImage, job: _Job) -> None:
        path = job.file.path
        if image.digest != job.load.digest:
            raise ValueError(f"{path} holds {image.digest}")
        if image.num_pages != len(job.load.pages) or image.page_bytes != self._pool.page_bytes:
            raise ValueError(f"{path} was packed for another page size or has changed")
