"""The one device allocation that KV cache and adapters share, cut into equal pages.

Who owns a page is decided in `memory.pages` and `adapters.residency`; this room turns a page number into bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.kv_write import KVLayout
from motet.types import ModelSpec, Site

PAGE_ALIGNMENT = 64
MIN_RANK_ROWS = 16
STAGED_PAGES = 64
"""Pages that a GPU is given at a time."""
SLABS = 2
"""Pinned buffers of so many pages, for what is not pinned: one is filled while the other is fetched."""

Mark = torch.cuda.Event | None
Copies = tuple[torch.cuda.Event, ...]
"""When the parts of a load are in the pool, in their order; nothing if all of it was there at once, as on a CPU."""

KV_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""What keys and values are kept in, by device."""


def page_bytes(spec: ModelSpec, page_tokens: int, kv_dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a page: the KV of `page_tokens` tokens in one KV group, or more if an adapter's row needs it.

    A page also holds at least MIN_RANK_ROWS rows of the widest factor inside the layers, so that tiny models can page
    adapters too, and one row of a factor as wide as the vocabulary.
    """
    layers = len(spec.kv_groups[0].layers)
    kv = layers * spec.kv_planes * spec.num_kv_heads * spec.head_dim * page_tokens * kv_dtype.itemsize
    inside = [site for site in spec.sites if site.module not in ("embed", "head")]
    rows = max(_widest(inside) * MIN_RANK_ROWS, _widest(spec.sites))
    size = max(kv, rows * 4)
    return -(-size // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def _widest(sites: Sequence[Site]) -> int:
    return max((max(site.in_features, site.out_features) for site in sites), default=0)


class Pool:
    """`num_pages` pages of `page_bytes` bytes each. `data` is [num_pages, page_bytes] uint8."""

    def __init__(
        self,
        spec: ModelSpec,
        pool_bytes: int,
        page_tokens: int,
        kv_dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.spec = spec
        self.kv_dtype = kv_dtype
        self.page_tokens = page_tokens
        self.page_bytes = page_bytes(spec, page_tokens, kv_dtype)
        self.num_pages = pool_bytes // self.page_bytes
        if self.num_pages < 2:
            raise ConfigError(
                f"pool_bytes {pool_bytes} holds {self.num_pages} pages of {self.page_bytes} bytes; "
                f"give at least {2 * self.page_bytes}"
            )
        # Written once, so that memory which is not there fails now and not in the middle of a request.
        self.data = torch.empty(self.num_pages, self.page_bytes, dtype=torch.uint8, device=device).fill_(0)
        self._stream: torch.cuda.Stream | None = None  # of `fill`, which one thread calls
        self._slabs: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # the one fetched longest ago first

    def mark(self) -> Mark:
        """The end of what the device has been given to do so far; None where it is done when it returns."""
        if self.data.device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def fill(
        self,
        pages: Sequence[int],
        content: Sequence[NDArray[np.uint8] | Tensor],
        after: Mark = None,
        parts: Sequence[int] = (),
    ) -> Copies:
        """Write `content`, runs [n, page_bytes], into these pages, in their order. On a GPU beside its steps: copies
        have been enqueued when this returns. It fetches tensors itself, which must be pinned and stay as they are
        until the last copy is over, and arrays by way of pinned buffers.

        `after` is the last step that may still use what was in the pages. Part i is there with the first `parts[i]`
        pages; without `parts` there is one, of all pages. If this fails, nothing is written to the pages any more.
        """
        if self.data.device.type == "cpu":
            target = self.data.numpy()
            for page, source in zip(pages, chain.from_iterable(map(np.asarray, content)), strict=True):
                target[page] = source
            return ()
        # Always one, for memory is kept for each; ahead of steps, for one of them may wait for what it brings.
        stream = self._stream = self._stream or torch.cuda.Stream(priority=-1)
        if after is not None:
            stream.wait_event(after)
        try:
            with torch.cuda.stream(stream):
                return self._copy(pages, content, parts or (len(pages),), stream)
        except BaseException:
            stream.synchronize()
            raise

    def _copy(
        self,
        pages: Sequence[int],
        content: Sequence[NDArray[np.uint8] | Tensor],
        parts: Sequence[int],
        stream: torch.cuda.Stream,
    ) -> Copies:
        where = torch.tensor(pages).pin_memory().to(self.data.device, non_blocking=True)
        words = self.data.view(torch.int64)
        begin, copies = 0, list[torch.cuda.Event]()
        for run in content:
            for some in (run[i : i + STAGED_PAGES] for i in range(0, len(run), STAGED_PAGES)):
                end = begin + len(some)
                words.index_copy_(0, where[begin:end], self._fetch(some, stream).view(torch.int64))
                begin = end
                if new := bisect_right(parts, end) - len(copies):
                    there = torch.cuda.Event()
                    there.record(stream)
                    copies += [there] * new
        return tuple(copies)

    def _fetch(self, some: NDArray[np.uint8] | Tensor, stream: torch.cuda.Stream) -> Tensor:
        """Pages on the device, in memory of `stream`'s own."""
        if isinstance(some, Tensor):
            return some.to(self.data.device, non_blocking=True)
        while len(self._slabs) < SLABS:
            slab = torch.empty(STAGED_PAGES, self.page_bytes, dtype=torch.uint8, pin_memory=True)
            self._slabs.append((slab, torch.cuda.Event()))
        slab, fetched = self._slabs.popleft()
        fetched.synchronize()
        slab.numpy()[: len(some)] = some
        pages = slab[: len(some)].to(self.data.device, non_blocking=True)
        fetched.record(stream)
        self._slabs.append((slab, fetched))
        return pages

    @property
    def flat(self) -> Tensor:
        """The pool as one run of bytes [num_pages * page_bytes]."""
        return self.data.view(-1)

    @property
    def kv(self) -> KVLayout:
        """The pool seen as KV pages of one group's layers."""
        spec, kind = self.spec, self.kv_dtype
        return KVLayout(
            flat=self.flat.view(kind),
            num_pages=self.num_pages,
            page_stride=self.page_bytes // kind.itemsize,
            num_layers=len(spec.kv_groups[0].layers),
            num_kv_heads=spec.num_kv_heads,
            page_tokens=self.page_tokens,
            head_dim=spec.head_dim,
            planes=spec.kv_planes,
        )
