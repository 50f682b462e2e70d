"""The pointer table of a GPU: rank blocks in device memory of fixed capacity, changed in place between steps.

Captured graphs hold the table's addresses, so a change must not move it. What a slot's columns say is written before
any step that uses the slot, on the stream of the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.adapters.image import DTYPES, ChunkTable
from motet.errors import MotetError
from motet.kernels.gpu.lora import RANKS, RankBlocks

MAX_SLOTS = 1024
"""Adapters resident at a time; 20 MB of table for gpt-oss-20b."""
MAX_BLOCKS = 1 << 21
"""Rank blocks of all of them: 400 adapters of rank 32 on every map of gpt-oss-20b; 59 MB."""

MAX_SITE_BLOCKS = 512 // RANKS
"""Rank blocks of an adapter at one site, for which steps have room: rank 512. Fewer ranks if rows are so wide that
a page holds only runs of less than RANKS of them."""


@dataclass(frozen=True)
class _Blocks:
    """An adapter's rank blocks, ordered by site: offsets in elements of the pool."""

    site: NDArray[np.int64]
    a: NDArray[np.int64]
    b: NDArray[np.int64]
    rank: NDArray[np.int32]
    scale: NDArray[np.float32]


class GpuTable:
    """Slots of the adapters that are resident in one memory of pages, `max_slots` at a time."""

    max_slots = MAX_SLOTS

    def __init__(
        self, num_sites: int, memory: Tensor, page_bytes: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """`memory` holds the pages one after the other, uint8; all factors in them are of `dtype`."""
        device = memory.device
        self._dtype = dtype
        self._num_sites = num_sites
        self._page_bytes = page_bytes
        self._slots: dict[str, int] = {}
        self._runs: dict[int, tuple[int, int]] = {}  # by slot: where its rank blocks are
        self._ranks: dict[int, int] = {}  # by slot: its rank blocks at a site, the most of any
        self.adapted: dict[int, frozenset[int]] = {}  # by slot: its sites

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.current = RankBlocks(
            first=ints(num_sites, MAX_SLOTS),
            count=ints(num_sites, MAX_SLOTS),
            a=torch.zeros(MAX_BLOCKS, dtype=torch.int64, device=device),
            b=torch.zeros(MAX_BLOCKS, dtype=torch.int64, device=device),
            rank=ints(MAX_BLOCKS),
            scale=torch.zeros(MAX_BLOCKS, device=device),
            pool=memory.view(dtype),
        )

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def rank_blocks(self) -> int:
        """The most rank blocks that any resident adapter has at a site."""
        return max(self._ranks.values(), default=0)

    def slot(self, digest: str) -> int:
        """The slot of a resident adapter; -1 for the base (the empty digest)."""
        return self._slots[digest] if digest else -1

    def add(self, digest: str, chunks: ChunkTable, pages: tuple[int, ...]) -> int:
        """Give the adapter whose chunks now lie in `pages` a slot. MotetError if the table or a step has no room."""
        assert digest not in self._slots, f"adapter {digest} is resident already"
        slot = next(i for i in range(len(self._slots) + 1) if i not in self._runs)
        blocks = _blocks(chunks, np.asarray(pages, np.int64), self._page_bytes, self._dtype)
        if slot >= MAX_SLOTS:
            raise MotetError(f"{MAX_SLOTS} adapters are resident, more have no place in the table")
        count = np.bincount(blocks.site, minlength=self._num_sites).astype(np.int32)
        if count.max() > MAX_SITE_BLOCKS:
            raise MotetError(
                f"the adapter has {count.max()} rank blocks at site {count.argmax()}, a step has room for "
                f"{MAX_SITE_BLOCKS}: its rank is too high for rows so wide"
            )
        begin = self._find(len(blocks.site))
        run = slice(begin, begin + len(blocks.site))
        table = self.current
        for target, values in ((table.a, blocks.a), (table.b, blocks.b), (table.rank, blocks.rank)):
            target[run] = _sent(values, target.device)
        table.scale[run] = _sent(blocks.scale, table.scale.device)
        first = (begin + np.cumsum(count) - count).astype(np.int32)
        table.first[:, slot] = _sent(first, table.first.device)
        table.count[:, slot] = _sent(count, table.count.device)
        self._slots[digest] = slot
        self._runs[slot] = run.start, run.stop
        self._ranks[slot] = int(count.max())
        self.adapted[slot] = frozenset(np.unique(blocks.site).tolist())
        return slot

    def remove(self, digest: str) -> None:
        """Forget a resident adapter's addresses; its pages may be reused from now on."""
        slot = self._slots.pop(digest)
        self.current.count[:, slot] = 0
        for by_slot in (self._runs, self._ranks, self.adapted):
            by_slot.pop(slot)

    def _find(self, size: int) -> int:
        """Where so many rank blocks fit."""
        begin = 0
        for start, end in sorted(self._runs.values()):
            if start - begin >= size:
                return begin
            begin = end
        if begin + size > MAX_BLOCKS:
            raise MotetError(f"the table of {MAX_BLOCKS} rank blocks has no room for {size} more")
        return begin


def _sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on its way to a GPU: from memory that is not pinned the host would wait for the step under way."""
    found = torch.from_numpy(values)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _blocks(chunks: ChunkTable, pages: NDArray[np.int64], page_bytes: int, dtype: torch.dtype) -> _Blocks:
    """Chunks cut into rank blocks."""
    if any(DTYPES[code] != dtype for code in np.unique(chunks.dtype).tolist()):
        raise MotetError(f"the adapter was not packed in {dtype}; pack it again")
    pieces = -(-chunks.rank // RANKS)
    of = np.repeat(np.arange(len(chunks)), pieces)
    piece = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    a = (pages[chunks.a_page] * page_bytes + chunks.a_offset) // dtype.itemsize
    b = (pages[chunks.b_page] * page_bytes + chunks.b_offset) // dtype.itemsize
    return _Blocks(
        site=chunks.site[of].astype(np.int64),
        a=a[of] + piece * RANKS * chunks.in_features[of],
        b=b[of] + piece * RANKS * chunks.out_features[of],
        rank=np.minimum(chunks.rank[of] - piece * RANKS, RANKS).astype(np.int32),
        scale=chunks.scaling[of].astype(np.float32),
    )
