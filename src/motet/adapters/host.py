"""The host tier: copies of packed images in memory, under a byte budget, the least recently used out.

On a GPU's machine the memory is pinned, so that the device fetches pages itself at the speed of its link. A device
waits while memory is pinned, and torch keeps what it once pinned, in powers of two; so all is taken at the start, in
slabs of pages, and images lie in any pages of them. On a CPU slabs are taken as they are needed, and there is rarely
need of any: the page cache holds what was read.

Belongs to the pager's thread, which writes nothing here while a device reads; others may look at `stats`.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.adapters.image import AdapterImage, ChunkTable
from motet.types import TierStats

SLAB_BYTES = 64 << 20
COPIERS = min(8, os.cpu_count() or 1)
"""Threads that copy an image: one moves some 7 GB a second, and the link to a GPU takes 50."""


@dataclass(frozen=True, slots=True)
class HostImage:
    """An image in the tier: its chunk table, and where its pages are, in image order."""

    chunks: ChunkTable
    places: tuple[int, ...]


class HostTier:
    """Images in memory by digest. A page lies at place `slab · pages of a slab + row`."""

    def __init__(self, max_bytes: int, page_bytes: int, pinned: bool, slab_bytes: int = SLAB_BYTES) -> None:
        slab_bytes = max(min(slab_bytes, max_bytes), page_bytes)
        self._rows = slab_bytes // page_bytes
        self._max_slabs = max_bytes // (self._rows * page_bytes)
        self._max_bytes = max_bytes
        self._page_bytes = page_bytes
        self._pinned = pinned
        self._slabs: list[Tensor] = []
        self._copiers = ThreadPoolExecutor(COPIERS, "motet-host-copy")
        self._free: list[int] = []  # the lowest last
        self._images: OrderedDict[str, HostImage] = OrderedDict()
        self._hits = 0
        self._evictions = 0
        while pinned and len(self._slabs) < self._max_slabs:
            self._grow()

    def __contains__(self, digest: str) -> bool:
        return digest in self._images

    def get(self, digest: str) -> HostImage | None:
        """The image, which is now the last to leave."""
        image = self._images.get(digest)
        if image is not None:
            self._images.move_to_end(digest)
            self._hits += 1
        return image

    def put(self, image: AdapterImage) -> HostImage | None:
        """Copy an image in, in place of those used least recently; None if it is larger than the tier."""
        assert image.digest not in self._images
        while len(self._free) < image.num_pages:
            if image.num_pages > self._max_slabs * self._rows:
                return None
            if len(self._slabs) < self._max_slabs:
                self._grow()
            else:
                self.drop(next(iter(self._images)))
                self._evictions += 1
        places = tuple(self._free.pop() for _ in range(image.num_pages))

        def copy(first: int) -> None:
            for place, page in zip(places[first::COPIERS], image.pages[first::COPIERS], strict=True):
                self._page(place)[:] = page

        list(self._copiers.map(copy, range(COPIERS)))
        self._images[image.digest] = HostImage(image.chunks, places)
        return self._images[image.digest]

    def drop(self, digest: str) -> None:
        """Forget an image, if it is there."""
        image = self._images.pop(digest, None)
        if image is not None:
            self._give_back(image.places)

    def runs(self, image: HostImage) -> list[Tensor]:
        """The image's pages in order, as views [n, page_bytes] of pages that lie side by side."""
        slab, row = np.divmod(np.array(image.places), self._rows)
        ends = np.flatnonzero((np.diff(slab) != 0) | (np.diff(row) != 1)) + 1
        bounds = [0, *ends.tolist(), len(image.places)]
        return [
            self._slabs[slab[begin]][row[begin] : row[begin] + end - begin] for begin, end in pairwise(bounds)
        ]

    def stats(self, loads: int, load_seconds: float) -> TierStats:
        """A snapshot."""
        return TierStats(
            resident=len(self._images),
            bytes=sum(len(image.places) for image in tuple(self._images.values())) * self._page_bytes,
            max_bytes=self._max_bytes,
            hits=self._hits,
            loads=loads,
            load_seconds=load_seconds,
            evictions=self._evictions,
        )

    def _grow(self) -> None:
        """One more slab; if the machine has no memory for it, the tier stays as large as it is."""
        try:
            slab = torch.empty(self._rows, self._page_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError:
            self._max_slabs = len(self._slabs)
            return
        self._slabs.append(slab)
        self._give_back(range((len(self._slabs) - 1) * self._rows, len(self._slabs) * self._rows))

    def _give_back(self, places: Iterable[int]) -> None:
        self._free.extend(places)
        self._free.sort(reverse=True)

    def _page(self, place: int) -> NDArray[np.uint8]:
        slab, row = divmod(place, self._rows)
        page: NDArray[np.uint8] = self._slabs[slab][row].numpy()
        return page

    def check_integrity(self) -> None:
        """Every place is free or holds one page of one image."""
        held = [place for image in self._images.values() for place in image.places]
        assert sorted([*held, *self._free]) == list(range(len(self._slabs) * self._rows))
        assert len(self._slabs) <= self._max_slabs
