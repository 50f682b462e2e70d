"""Causal attention over paged keys and values.

Semantics, for a query row at position p of a sequence with block table B:
    o[t, h] = sum_{j <= p} softmax_j(q[t, h] · k[j, h // G] / sqrt(D)) v[j, h // G],   G = Hq / Hkv
    k[j] = kv[B[j // page_tokens], layer, 0, :, j % page_tokens], v likewise with 1.
    q: [T, Hq, D] float32 inside the rows of qkv, result [T, Hq·D].

Decode rows (one per sequence) go through one kernel that reads the pages where they lie. A prefill chunk gathers its
pages once and uses torch's flash attention, which is compute-bound there and runs on all cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import kernel
from motet.kernels.kv_write import KVLayout

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass(frozen=True)
class PrefillChunk:
    """Rows [row, row + length) are the positions [start, start + length) of one sequence with block table `pages`."""

    row: int
    start: int
    length: int
    pages: Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """How the rows of a step attend: `decode_rows` [B] int32 with lengths [B] (keys to read, own included) and block
    tables [B, max pages] int32; and the prefill chunks."""

    decode_rows: Tensor
    decode_lengths: Tensor
    decode_pages: Tensor
    prefill: Sequence[PrefillChunk]


def paged_attention_torch(
    qkv: Tensor, kv: KVLayout, layer: int, batch: AttentionBatch, num_heads: int, scale: float
) -> Tensor:
    """Reference: every row by itself in plain torch."""
    out = qkv.new_zeros(qkv.shape[0], num_heads * kv.head_dim)
    rows = [
        (int(row), int(length), pages)
        for row, length, pages in zip(
            batch.decode_rows, batch.decode_lengths, batch.decode_pages, strict=True
        )
    ]
    for chunk in batch.prefill:
        rows += [(chunk.row + i, chunk.start + i + 1, chunk.pages) for i in range(chunk.length)]
    for row, length, pages in rows:
        k, v = _gather(kv, layer, pages, length)
        q = qkv[row, : num_heads * kv.head_dim].view(kv.num_kv_heads, -1, kv.head_dim)
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[row] = (weights @ v).reshape(-1)
    return out


def paged_attention(
    qkv: Tensor, kv: KVLayout, layer: int, batch: AttentionBatch, num_heads: int, scale: float
) -> Tensor:
    """qkv: [T, (Hq + 2·Hkv)·D] with q rotated and k, v already in their pages; returns [T, Hq·D]."""
    out = torch.empty(qkv.shape[0], num_heads * kv.head_dim)
    if len(batch.decode_rows):
        _decode_kernel(
            qkv.numpy(), kv.flat.numpy(), batch.decode_rows.numpy(), batch.decode_lengths.numpy(),
            batch.decode_pages.numpy(), layer, num_heads, kv.num_kv_heads, kv.head_dim, kv.page_tokens,
            kv.page_stride, scale, out.numpy(),
        )  # fmt: skip
    for chunk in batch.prefill:
        rows = slice(chunk.row, chunk.row + chunk.length)
        out[rows] = _prefill(qkv[rows], kv, layer, chunk, num_heads, scale)
    return out


def _gather(kv: KVLayout, layer: int, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [Hkv, length, D] of the first `length` positions."""
    used = pages[: -(-length // kv.page_tokens)].long()
    both = kv.pages[used, layer]
    k, v = both.permute(1, 2, 0, 3, 4).reshape(2, kv.num_kv_heads, -1, kv.head_dim)[:, :, :length]
    return k, v


def _prefill(
    qkv: Tensor, kv: KVLayout, layer: int, chunk: PrefillChunk, num_heads: int, scale: float
) -> Tensor:
    total = chunk.start + chunk.length
    q = qkv[:, : num_heads * kv.head_dim].view(chunk.length, num_heads, kv.head_dim).transpose(0, 1)
    k, v = _gather(kv, layer, chunk.pages, total)
    causal = chunk.start == 0
    mask = None if causal else torch.ones(chunk.length, total, dtype=torch.bool).tril(chunk.start)
    out = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(chunk.length, -1)


@kernel
def _scores(query: F32, flat: F32, base: int, count: int, scale: np.float32, out: F32) -> None:
    """out[j] = scale · query · key j for `count` keys that lie one after the other from `base`; four keys at a time."""
    dim = query.shape[0]
    j = 0
    while j + 4 <= count:
        at = base + j * dim
        k0, k1 = flat[at : at + dim], flat[at + dim : at + 2 * dim]
        k2, k3 = flat[at + 2 * dim : at + 3 * dim], flat[at + 3 * dim : at + 4 * dim]
        s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(dim):
            q = query[i]
            s0 += q * k0[i]
            s1 += q * k1[i]
            s2 += q * k2[i]
            s3 += q * k3[i]
        out[j], out[j + 1], out[j + 2], out[j + 3] = s0 * scale, s1 * scale, s2 * scale, s3 * scale
        j += 4
    while j < count:
        k0 = flat[base + j * dim : base + (j + 1) * dim]
        s0 = np.float32(0)
        for i in range(dim):
            s0 += query[i] * k0[i]
        out[j] = s0 * scale
        j += 1


@kernel
def _accumulate(weights: F32, flat: F32, base: int, count: int, out: F32) -> None:
    """out += weights[j] · value j for `count` values that lie one after the other from `base`; four at a time."""
    dim = out.shape[0]
    j = 0
    while j + 4 <= count:
        at = base + j * dim
        v0, v1 = flat[at : at + dim], flat[at + dim : at + 2 * dim]
        v2, v3 = flat[at + 2 * dim : at + 3 * dim], flat[at + 3 * dim : at + 4 * dim]
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        for i in range(dim):
            out[i] += w0 * v0[i] + w1 * v1[i] + w2 * v2[i] + w3 * v3[i]
        j += 4
    while j < count:
        v0 = flat[base + j * dim : base + (j + 1) * dim]
        for i in range(dim):
            out[i] += weights[j] * v0[i]
        j += 1


@kernel
def _softmax(row: F32) -> None:
    top = row[0]
    for j in range(1, row.shape[0]):
        top = max(top, row[j])
    total = np.float32(0)
    for j in range(row.shape[0]):
        row[j] = np.exp(row[j] - top)
        total += row[j]
    inverse = np.float32(1) / total
    for j in range(row.shape[0]):
        row[j] *= inverse


@kernel
def _decode_kernel(
    qkv: F32, flat: F32, rows: I32, lengths: I32, tables: I32, layer: int, num_heads: int, num_kv_heads: int,
    dim: int, page_tokens: int, page_stride: int, scale: float, out: F32,
) -> None:  # fmt: skip
    group = num_heads // num_kv_heads
    head_stride = page_tokens * dim
    layer_base = layer * 2 * num_kv_heads * head_stride
    longest = 0
    for b in range(rows.shape[0]):
        longest = max(longest, lengths[b])
    scores = np.empty((group, longest), np.float32)
    for b in range(rows.shape[0]):
        length = lengths[b]
        pages = (length + page_tokens - 1) // page_tokens
        q_row, o_row = qkv[rows[b]], out[rows[b]]
        for kv_head in range(num_kv_heads):
            k_base = layer_base + kv_head * head_stride
            v_base = k_base + num_kv_heads * head_stride
            first = kv_head * group
            for page in range(pages):
                at = tables[b, page] * page_stride + k_base
                begin = page * page_tokens
                count = min(page_tokens, length - begin)
                for g in range(group):
                    query = q_row[(first + g) * dim : (first + g + 1) * dim]
                    _scores(query, flat, at, count, np.float32(scale), scores[g, begin : begin + count])
            for g in range(group):
                _softmax(scores[g, :length])
                o_row[(first + g) * dim : (first + g + 1) * dim] = np.float32(0)
            for page in range(pages):
                at = tables[b, page] * page_stride + v_base
                begin = page * page_tokens
                count = min(page_tokens, length - begin)
                for g in range(group):
                    head = o_row[(first + g) * dim : (first + g + 1) * dim]
                    _accumulate(scores[g, begin : begin + count], flat, at, count, head)
