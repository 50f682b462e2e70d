"""Rotary embedding of q and k fused with the write of k and v into their pages.

Semantics, for row t at position p with page table entry `slot[t] = page * page_tokens + offset`:
    q[t, h] and k[t, h] are rotated: (a, b) -> (a cos - b sin, b cos + a sin) on the two halves of the head
    kv[page, layer, 0, h, offset] = rotated k[t, h];  kv[page, layer, 1, h, offset] = v[t, h]
    qkv: [T, (Hq + 2·Hkv)·D] float32, rotated q is left in place; cos, sin: [max positions, D / 2].
With `interleaved`, a and b are the even and the odd elements of a head instead of its halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import inline, prange, shared

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass(frozen=True)
class KVLayout:
    """The KV cache inside the pool: pages of [layers, planes, kv heads, page tokens, head dim], k before v.

    `flat` is the whole pool as float32; a page begins every `page_stride` elements. `num_layers` are those of one
    KV group: a layer's index in its group picks its part of a page.
    """

    flat: Tensor
    num_pages: int
    page_stride: int
    num_layers: int
    num_kv_heads: int
    page_tokens: int
    head_dim: int
    planes: int = 2

    @property
    def pages(self) -> Tensor:
        """A view [pages, layers, planes, kv heads, page tokens, head dim]."""
        head = self.page_tokens * self.head_dim
        plane = self.num_kv_heads * head
        return self.flat.as_strided(
            (
                self.num_pages,
                self.num_layers,
                self.planes,
                self.num_kv_heads,
                self.page_tokens,
                self.head_dim,
            ),
            (self.page_stride, self.planes * plane, plane, head, self.head_dim, 1),
        )


def rotary_kv_write_torch(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: KVLayout,
    layer: int,
    num_heads: int,
    interleaved: bool = False,
) -> None:
    """Reference in plain torch, in place like the kernel."""
    rows, dim, heads_kv = qkv.shape[0], kv.head_dim, kv.num_kv_heads
    heads = qkv.view(rows, num_heads + 2 * heads_kv, dim)
    c, s = cos[positions][:, None], sin[positions][:, None]
    rotated = heads[:, : num_heads + heads_kv]
    halves = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    a, b = (half.clone() for half in halves)
    halves[0].copy_(a * c - b * s)
    halves[1].copy_(b * c + a * s)
    page, offset = slots // kv.page_tokens, slots % kv.page_tokens
    kv.pages[page, layer, 0, :, offset] = heads[:, num_heads : num_heads + heads_kv]
    kv.pages[page, layer, 1, :, offset] = heads[:, num_heads + heads_kv :]


def rotary_kv_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: KVLayout,
    layer: int,
    num_heads: int,
    interleaved: bool = False,
) -> None:
    """positions, slots: [T] int32; `layer` is the index in the layer's KV group."""
    _rotary_kv_write_kernel.over(len(qkv))(
        qkv.numpy(), positions.numpy(), slots.numpy(), cos.numpy(), sin.numpy(), kv.flat.numpy(),
        layer, num_heads, kv.num_kv_heads, kv.page_tokens, kv.page_stride, interleaved,
    )  # fmt: skip


@inline
def rotate_head(head, c, s, interleaved):  # type: ignore[no-untyped-def]  # Numba values
    """Rotate one head in place by the angles whose cosines and sines are c and s [D / 2]."""
    half = c.shape[0]
    if interleaved:
        for i in range(half):
            a, b = head[2 * i], head[2 * i + 1]
            head[2 * i] = a * c[i] - b * s[i]
            head[2 * i + 1] = b * c[i] + a * s[i]
    else:
        for i in range(half):
            a, b = head[i], head[half + i]
            head[i] = a * c[i] - b * s[i]
            head[half + i] = b * c[i] + a * s[i]


@shared
def _rotary_kv_write_kernel(
    qkv: F32, positions: I32, slots: I32, cos: F32, sin: F32, flat: F32, layer: int, num_heads: int,
    num_kv_heads: int, page_tokens: int, page_stride: int, interleaved: bool, shares: int,
) -> None:  # fmt: skip
    rows, dim = qkv.shape[0], 2 * cos.shape[1]
    head_stride = page_tokens * dim
    for share in prange(shares):
        for t in range(share * rows // shares, (share + 1) * rows // shares):
            row = qkv[t]
            c, s = cos[positions[t]], sin[positions[t]]
            for h in range(num_heads + num_kv_heads):
                rotate_head(row[h * dim : (h + 1) * dim], c, s, interleaved)
            page, offset = slots[t] // page_tokens, slots[t] % page_tokens
            base = page * page_stride + layer * 2 * num_kv_heads * head_stride + offset * dim
            for h in range(2 * num_kv_heads):
                target = flat[base + h * head_stride : base + h * head_stride + dim]
                source = row[(num_heads + h) * dim : (num_heads + h + 1) * dim]
                for i in range(dim):
                    target[i] = source[i]


def empty_kv(
    num_pages: int, num_layers: int, num_kv_heads: int, page_tokens: int, head_dim: int, planes: int = 2
) -> KVLayout:
    """A KV cache of its own, outside any pool: for tests and measurements."""
    stride = num_layers * planes * num_kv_heads * page_tokens * head_dim
    flat = torch.zeros(num_pages * stride)
    return KVLayout(flat, num_pages, stride, num_layers, num_kv_heads, page_tokens, head_dim, planes)
