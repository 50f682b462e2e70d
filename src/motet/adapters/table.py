"""The pointer table: from (site, adapter slot) to the factors' place in the pool.

An adapter gets a slot when its pages are filled and loses it when it is evicted. Slots are reused and their number
grows with demand; nothing here has a fixed maximum. Every change builds a new immutable LoraTable, so a step that
has begun never sees the next one's addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from motet.adapters.image import ChunkTable
from motet.kernels.lora import BFLOAT16, LoraTable


@dataclass(frozen=True)
class _Placed:
    """An adapter's chunks with their pool offsets, in elements of the chunk's dtype, ordered by site."""

    site: NDArray[np.int64]
    a: NDArray[np.int64]
    b: NDArray[np.int64]
    rank: NDArray[np.int32]
    dtype: NDArray[np.int32]
    scale: NDArray[np.float32]


class AdapterTable:
    """Slots of the adapters that are resident in one memory of pages."""

    max_slots = None  # it grows

    def __init__(self, num_sites: int, memory: Tensor, page_bytes: int) -> None:
        """`memory` holds the pages one after the other, uint8."""
        self._num_sites = num_sites
        self._memory = memory
        self._page_bytes = page_bytes
        self._slots: dict[str, int] = {}
        self._placed: dict[int, _Placed] = {}
        self.current = self._build()

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, digest: str) -> int:
        """The slot of a resident adapter; -1 for the base (the empty digest)."""
        return self._slots[digest] if digest else -1

    def add(self, digest: str, chunks: ChunkTable, pages: tuple[int, ...]) -> int:
        """Give the adapter whose chunks now lie in `pages` a slot."""
        assert digest not in self._slots, f"adapter {digest} is resident already"
        slot = next(i for i in range(len(self._slots) + 1) if i not in self._placed)
        self._slots[digest] = slot
        self._placed[slot] = self._place(chunks, np.asarray(pages, np.int64))
        self.current = self._build()
        return slot

    def remove(self, digest: str) -> None:
        """Forget a resident adapter's addresses; its pages may be reused from now on."""
        del self._placed[self._slots.pop(digest)]
        self.current = self._build()

    def _place(self, chunks: ChunkTable, pages: NDArray[np.int64]) -> _Placed:
        width = np.where(chunks.dtype == BFLOAT16, 2, 4)
        size = self._page_bytes
        return _Placed(
            site=chunks.site.astype(np.int64),
            a=(pages[chunks.a_page] * size + chunks.a_offset) // width,
            b=(pages[chunks.b_page] * size + chunks.b_offset) // width,
            rank=chunks.rank.astype(np.int32),
            dtype=chunks.dtype.astype(np.int32),
            scale=chunks.scaling.astype(np.float32),
        )

    def _build(self) -> LoraTable:
        slots = max(self._placed, default=-1) + 1
        first = np.zeros((self._num_sites, slots), np.int32)
        count = np.zeros((self._num_sites, slots), np.int32)
        base = 0
        for slot, placed in sorted(self._placed.items()):
            count[:, slot] = np.bincount(placed.site, minlength=self._num_sites)
            first[:, slot] = base + np.cumsum(count[:, slot]) - count[:, slot]
            base += len(placed.site)
        parts = [placed for _, placed in sorted(self._placed.items())]
        return LoraTable(
            first=first,
            count=count,
            a=np.concatenate([p.a for p in parts]) if parts else np.zeros(0, np.int64),
            b=np.concatenate([p.b for p in parts]) if parts else np.zeros(0, np.int64),
            rank=np.concatenate([p.rank for p in parts]) if parts else np.zeros(0, np.int32),
            dtype=np.concatenate([p.dtype for p in parts]) if parts else np.zeros(0, np.int32),
            scale=np.concatenate([p.scale for p in parts]) if parts else np.zeros(0, np.float32),
            pool=self._memory,
        )
