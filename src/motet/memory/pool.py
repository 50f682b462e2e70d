"""The one device allocation that KV cache and adapters share, cut into equal pages.

Who owns a page is decided in `memory.pages` and `adapters.residency`; this room turns a page number into bytes.
"""

from __future__ import annotations

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
"""Pages on their way to a GPU at a time."""


Mark = torch.cuda.Event | None

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

    def mark(self) -> Mark:
        """The end of what the device has been given to do so far; None where it is done when it returns."""
        if self.data.device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def fill(
        self, pages: Sequence[int], content: Sequence[NDArray[np.uint8] | Tensor], after: Mark = None
    ) -> None:
        """Write `content`, runs [n, page_bytes], into these pages. On a GPU: beside its steps, complete when this
        returns; it fetches tensors, which must be pinned, itself, and arrays by way of a pinned buffer.

        `after` is the last step that may still use what was in them.
        """
        if self.data.device.type == "cpu":
            target = self.data.numpy()
            for page, source in zip(pages, chain.from_iterable(map(np.asarray, content)), strict=True):
                target[page] = source
            return
        stream = self._stream = self._stream or torch.cuda.Stream()  # always one, for memory is kept for each
        if after is not None:
            stream.wait_event(after)
        try:
            with torch.cuda.stream(stream):
                self._copy(pages, content, stream)
        finally:  # even if it failed half-way: nothing is written to these pages later
            stream.synchronize()

    def _copy(
        self, pages: Sequence[int], content: Sequence[NDArray[np.uint8] | Tensor], stream: torch.cuda.Stream
    ) -> None:
        where = torch.tensor(pages, device=self.data.device)
        for run in content:
            places, where = where[: len(run)], where[len(run) :]
            for begin in range(0, len(run), STAGED_PAGES):
                some = run[begin : begin + STAGED_PAGES]
                self.data.index_copy_(0, places[begin : begin + len(some)], self._fetch(some, stream))

    def _fetch(self, some: NDArray[np.uint8] | Tensor, stream: torch.cuda.Stream) -> Tensor:
        """Pages on the device, in memory of `stream`'s own; the source may be written to again."""
        if isinstance(some, Tensor):
            return some.to(self.data.device, non_blocking=True)
        staged = torch.empty(some.shape, dtype=torch.uint8, pin_memory=True)
        staged.numpy()[:] = some
        fetched = staged.to(self.data.device, non_blocking=True)
        stream.synchronize()
        return fetched

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
