"""The one device allocation that KV cache and adapters share, cut into equal pages.

Who owns a page is decided in `memory.pages` and `adapters.residency`; this room turns a page number into bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.kv_write import KVLayout
from motet.types import ModelSpec, Site

PAGE_ALIGNMENT = 64
MIN_RANK_ROWS = 16


def page_bytes(spec: ModelSpec, page_tokens: int) -> int:
    """Bytes of a page: the KV of `page_tokens` tokens in one KV group, or more if an adapter's row needs it.

    A page also holds at least MIN_RANK_ROWS rows of the widest factor inside the layers, so that tiny models can page
    adapters too, and one row of a factor as wide as the vocabulary.
    """
    layers = len(spec.kv_groups[0].layers)
    kv = layers * spec.kv_planes * spec.num_kv_heads * spec.head_dim * page_tokens * 4
    inside = [site for site in spec.sites if site.module not in ("embed", "head")]
    rows = max(_widest(inside) * MIN_RANK_ROWS, _widest(spec.sites))
    size = max(kv, rows * 4)
    return -(-size // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def _widest(sites: Sequence[Site]) -> int:
    return max((max(site.in_features, site.out_features) for site in sites), default=0)


class Pool:
    """`num_pages` pages of `page_bytes` bytes each. `data` is [num_pages, page_bytes] uint8."""

    def __init__(self, spec: ModelSpec, pool_bytes: int, page_tokens: int) -> None:
        self.spec = spec
        self.page_tokens = page_tokens
        self.page_bytes = page_bytes(spec, page_tokens)
        self.num_pages = pool_bytes // self.page_bytes
        if self.num_pages < 2:
            raise ConfigError(
                f"pool_bytes {pool_bytes} holds {self.num_pages} pages of {self.page_bytes} bytes; "
                f"give at least {2 * self.page_bytes}"
            )
        # Written once, so that memory which is not there fails now and not in the middle of a request.
        self.data = torch.empty(self.num_pages, self.page_bytes, dtype=torch.uint8).fill_(0)

    @property
    def flat(self) -> Tensor:
        """The pool as one run of bytes [num_pages * page_bytes]."""
        return self.data.view(-1)

    @property
    def kv(self) -> KVLayout:
        """The pool seen as KV pages of one group's layers."""
        spec = self.spec
        return KVLayout(
            flat=self.flat.view(torch.float32),
            num_pages=self.num_pages,
            page_stride=self.page_bytes // 4,
            num_layers=len(spec.kv_groups[0].layers),
            num_kv_heads=spec.num_kv_heads,
            page_tokens=self.page_tokens,
            head_dim=spec.head_dim,
            planes=spec.kv_planes,
        )
