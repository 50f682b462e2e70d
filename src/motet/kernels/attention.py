"""Causal attention over paged keys and values, with sliding windows, chunked attention and sinks.

Semantics, for a query row at position p of a sequence with block table B:
    o[t, h] = sum_j exp(s_j) v[j, h // G] / (sum_j exp(s_j) + exp(sink[h])),   s_j = q[t, h] · k[j, h // G] · scale
    over the keys j of [first(p), p]; G = Hq / Hkv, and without sinks the last term is missing
    first(p) = 0, or p - window + 1 with a window, or the begin of p's chunk of positions with a chunk length
    k[j] = kv[B[j // page_tokens], layer, 0, :, j % page_tokens], v likewise with 1.
    q: [T, Hq, D] float32 inside the rows of qkv, result [T, Hq·D]; sinks: [Hq].

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
from motet.types import FULL, KVGroup

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass(frozen=True)
class Heads:
    """How queries look at keys: their number, the scale of scores, how far back they see, and their sinks [Hq]."""

    num: int
    scale: float
    reach: KVGroup = FULL
    sinks: Tensor | None = None


@dataclass(frozen=True)
class PrefillChunk:
    """Rows [row, row + length) are the positions [start, start + length) of one sequence with block table `pages`."""

    row: int
    start: int
    length: int
    pages: Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """How the rows of a step attend in one KV group: `decode_rows` [B] int32 with lengths [B] (positions up to the
    row's own) and block tables [B, max pages] int32; and the prefill chunks."""

    decode_rows: Tensor
    decode_lengths: Tensor
    decode_pages: Tensor
    prefill: Sequence[PrefillChunk]


def paged_attention_torch(
    qkv: Tensor, kv: KVLayout, layer: int, batch: AttentionBatch, heads: Heads
) -> Tensor:
    """Reference: every row by itself in plain torch."""
    out = qkv.new_zeros(qkv.shape[0], heads.num * kv.head_dim)
    rows = [
        (int(row), int(length), pages)
        for row, length, pages in zip(
            batch.decode_rows, batch.decode_lengths, batch.decode_pages, strict=True
        )
    ]
    for chunk in batch.prefill:
        rows += [(chunk.row + i, chunk.start + i + 1, chunk.pages) for i in range(chunk.length)]
    for row, length, pages in rows:
        k, v = gather(kv, layer, pages, heads.reach.first_key(length - 1), length)
        q = qkv[row, : heads.num * kv.head_dim].view(kv.num_kv_heads, -1, kv.head_dim)
        scores = q @ k.transpose(1, 2) * heads.scale
        if heads.sinks is not None:
            scores = torch.cat([scores, heads.sinks.view(kv.num_kv_heads, -1, 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]]
        out[row] = (weights @ v).reshape(-1)
    return out


def paged_attention(qkv: Tensor, kv: KVLayout, layer: int, batch: AttentionBatch, heads: Heads) -> Tensor:
    """qkv: [T, (Hq + 2·Hkv)·D] with q rotated and k, v already in their pages; returns [T, Hq·D].

    `layer` is the index in the layer's KV group.
    """
    out = torch.empty(qkv.shape[0], heads.num * kv.head_dim)
    if len(batch.decode_rows):
        sinks = NO_SINKS if heads.sinks is None else heads.sinks.numpy()
        _decode_kernel(
            qkv.numpy(), kv.flat.numpy(), batch.decode_rows.numpy(), batch.decode_lengths.numpy(),
            batch.decode_pages.numpy(), layer, heads.num, kv.num_kv_heads, kv.head_dim, kv.page_tokens,
            kv.page_stride, heads.scale, heads.reach.window, heads.reach.chunk, sinks, out.numpy(),
        )  # fmt: skip
    for chunk in batch.prefill:
        rows = slice(chunk.row, chunk.row + chunk.length)
        out[rows] = _prefill(qkv[rows], kv, layer, chunk, heads)
    return out


NO_SINKS = np.zeros(0, np.float32)
NO_SINK = np.float32(-np.inf)


def gather(kv: KVLayout, layer: int, pages: Tensor, first: int, end: int) -> Tensor:
    """Planes [planes, Hkv, end - first, D] of the positions [first, end)."""
    block = first // kv.page_tokens
    used = pages[block : -(-end // kv.page_tokens)].long()
    planes = kv.pages[used, layer].permute(1, 2, 0, 3, 4).reshape(kv.planes, kv.num_kv_heads, -1, kv.head_dim)
    begin = block * kv.page_tokens
    return planes[:, :, first - begin : end - begin]


def visible(chunk: PrefillChunk, first: int, heads: Heads) -> Tensor:
    """What to add to each row's scores of keys [first, end): 0, or -inf where it must not look.

    [length, end - first] float32.
    """
    position = torch.arange(chunk.start, chunk.start + chunk.length)[:, None]
    key = torch.arange(first, chunk.start + chunk.length)[None]
    mask = key <= position
    if heads.reach.window:
        mask &= key > position - heads.reach.window
    if heads.reach.chunk:
        mask &= key // heads.reach.chunk == position // heads.reach.chunk
    return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))


def _prefill(qkv: Tensor, kv: KVLayout, layer: int, chunk: PrefillChunk, heads: Heads) -> Tensor:
    end = chunk.start + chunk.length
    first = heads.reach.first_key(chunk.start)
    q = qkv[:, : heads.num * kv.head_dim].view(chunk.length, heads.num, kv.head_dim).transpose(0, 1)
    k, v = gather(kv, layer, chunk.pages, first, end)
    causal = chunk.start == 0 and not heads.reach.window and not heads.reach.chunk
    mask = None if causal else visible(chunk, first, heads)
    group = heads.num // kv.num_kv_heads
    out, lse = _flash(
        q[None], k.repeat_interleave(group, 0)[None], v.repeat_interleave(group, 0)[None],
        0.0, causal, attn_mask=mask, scale=heads.scale,
    )  # fmt: skip
    if heads.sinks is not None:
        out = out * torch.sigmoid(lse - heads.sinks[:, None])[..., None]
    rows: Tensor = out[0].transpose(0, 1).reshape(chunk.length, -1)
    return rows


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


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
def softmax_row(row: F32, sink: np.float32) -> None:
    """In place; `sink` is one more score, whose share is dropped (-inf: none)."""
    top = sink
    for j in range(row.shape[0]):
        top = max(top, row[j])
    total = np.exp(sink - top)
    for j in range(row.shape[0]):
        row[j] = np.exp(row[j] - top)
        total += row[j]
    inverse = np.float32(1) / total
    for j in range(row.shape[0]):
        row[j] *= inverse


@kernel
def _decode_kernel(
    qkv: F32, flat: F32, rows: I32, lengths: I32, tables: I32, layer: int, num_heads: int, num_kv_heads: int,
    dim: int, page_tokens: int, page_stride: int, scale: float, window: int, chunk: int, sinks: F32, out: F32,
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
        first_key = max(0, length - window) if window > 0 else 0
        if chunk > 0:
            first_key = max(first_key, (length - 1) // chunk * chunk)
        first_page = first_key // page_tokens
        pages = (length + page_tokens - 1) // page_tokens
        q_row, o_row = qkv[rows[b]], out[rows[b]]
        for kv_head in range(num_kv_heads):
            k_base = layer_base + kv_head * head_stride
            v_base = k_base + num_kv_heads * head_stride
            first = kv_head * group
            for page in range(first_page, pages):
                skip = max(0, first_key - page * page_tokens)
                at = tables[b, page] * page_stride + k_base + skip * dim
                begin = page * page_tokens + skip
                count = min(page_tokens - skip, length - begin)
                for g in range(group):
                    query = q_row[(first + g) * dim : (first + g + 1) * dim]
                    _scores(query, flat, at, count, np.float32(scale), scores[g, begin : begin + count])
            for g in range(group):
                sink = sinks[first + g] if sinks.shape[0] > 0 else NO_SINK
                softmax_row(scores[g, first_key:length], sink)
                o_row[(first + g) * dim : (first + g + 1) * dim] = np.float32(0)
            for page in range(first_page, pages):
                skip = max(0, first_key - page * page_tokens)
                at = tables[b, page] * page_stride + v_base + skip * dim
                begin = page * page_tokens + skip
                count = min(page_tokens - skip, length - begin)
                for g in range(group):
                    head = o_row[(first + g) * dim : (first + g + 1) * dim]
                    _accumulate(scores[g, begin : begin + count], flat, at, count, head)
