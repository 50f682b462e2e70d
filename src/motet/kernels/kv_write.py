"""Rotary embedding of q and k fused with the write of k and v into their pages.

Semantics, for row t at position p with page table entry `slot[t] = page * page_tokens + offset`:
    q[t, h] and k[t, h] are rotated: (a, b) -> (a cos - b sin, b cos + a sin) on the two halves of the head
    kv[page, layer, 0, h, offset] = rotated k[t, h];  kv[page, layer, 1, h, offset] = v[t, h]
    qkv: [T, (Hq + 2·Hkv)·D] float32, rotated q is left in place; cos, sin: [max positions, D / 2].
The rotation follows the Hugging Face layout (halves, not interleaved pairs).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import kernel

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass(frozen=True)
class KVLayout:
    """The KV cache inside the pool: pages of [layers, 2, kv heads, page tokens, head dim], k before v.

    `flat` is the whole pool as float32; a page begins every `page_stride` elements.
    """

    flat: Tensor
    num_pages: int
    page_stride: int
    num_layers: int
    num_kv_heads: int
    page_tokens: int
    head_dim: int

    @property
    def pages(self) -> Tensor:
        """A view [pages, layers, 2, kv heads, page tokens, head dim]."""
        head = self.page_tokens * self.head_dim
        kind = self.num_kv_heads * head
        return self.flat.as_strided(
            (self.num_pages, self.num_layers, 2, self.num_kv_heads, self.page_tokens, self.head_dim),
            (self.page_stride, 2 * kind, kind, head, self.head_dim, 1),
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
) -> None:
    """Reference in plain torch, in place like the kernel."""
    rows, dim, heads_kv = qkv.shape[0], kv.head_dim, kv.num_kv_heads
    heads = qkv.view(rows, num_heads + 2 * heads_kv, dim)
    c, s = cos[positions][:, None], sin[positions][:, None]
    rotated = heads[:, : num_heads + heads_kv]
    a, b = rotated[..., : dim // 2].clone(), rotated[..., dim // 2 :].clone()
    rotated[..., : dim // 2] = a * c - b * s
    rotated[..., dim // 2 :] = b * c + a * s
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
) -> None:
    """positions, slots: [T] int32."""
    _rotary_kv_write_kernel(
        qkv.numpy(), positions.numpy(), slots.numpy(), cos.numpy(), sin.numpy(), kv.flat.numpy(),
        layer, num_heads, kv.num_kv_heads, kv.page_tokens, kv.page_stride,
    )  # fmt: skip


@kernel
def _rotary_kv_write_kernel(
    qkv: F32, positions: I32, slots: I32, cos: F32, sin: F32, flat: F32,
    layer: int, num_heads: int, num_kv_heads: int, page_tokens: int, page_stride: int,
) -> None:  # fmt: skip
    half = cos.shape[1]
    dim = 2 * half
    head_stride = page_tokens * dim
    for t in range(qkv.shape[0]):
        row = qkv[t]
        c, s = cos[positions[t]], sin[positions[t]]
        for h in range(num_heads + num_kv_heads):
            head = row[h * dim : (h + 1) * dim]
            for i in range(half):
                a, b = head[i], head[half + i]
                head[i] = a * c[i] - b * s[i]
                head[half + i] = b * c[i] + a * s[i]
        page, offset = slots[t] // page_tokens, slots[t] % page_tokens
        base = page * page_stride + layer * 2 * num_kv_heads * head_stride + offset * dim
        for h in range(2 * num_kv_heads):
            target = flat[base + h * head_stride : base + h * head_stride + dim]
            source = row[(num_heads + h) * dim : (num_heads + h + 1) * dim]
            for i in range(dim):
                target[i] = source[i]


def empty_kv(num_pages: int, num_layers: int, num_kv_heads: int, page_tokens: int, head_dim: int) -> KVLayout:
    """A KV cache of its own, outside any pool: for tests and measurements."""
    stride = num_layers * 2 * num_kv_heads * page_tokens * head_dim
    flat = torch.zeros(num_pages * stride)
    return KVLayout(flat, num_pages, stride, num_layers, num_kv_heads, page_tokens, head_dim)
