"""Causal attention over paged keys and values, with sliding windows, chunked attention and sinks.

Semantics, for a query row at position p of a sequence with block table B:
    o[t, h] = sum_j exp(s_j) v[j, h // G] / (sum_j exp(s_j) + exp(sink[h])),   s_j = q[t, h] · k[j, h // G] · scale
    over the keys j of [first(p), p]; G = Hq / Hkv, and without sinks the last term is missing
    first(p) = 0, or p - window + 1 with a window, or the begin of p's chunk of positions with a chunk length
    k[j] = kv[B[j // page_tokens], layer, 0, :, j % page_tokens], v likewise with 1.
    q: [T, Hq, D] float32 inside the rows of qkv, result [T, Hq·D]; sinks: [Hq].

Decode rows (one per sequence) go through one kernel that reads the pages where they lie. The rows of a prefill chunk
meet their keys through `kernels.tile`: keys are transposed once for a block of rows, and scores, softmax and values
follow for some rows at a time, only as far as the last of them sees. Threads share sequences, blocks and KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.exp import softmax_row
from motet.kernels.jit import inline, kernel, prange, shared
from motet.kernels.kv_write import KVLayout
from motet.kernels.tile import ROWS, WIDTH, multiply, transpose
from motet.types import FULL, KVGroup

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

BLOCK = 128
"""Rows of a prefill chunk for which keys are transposed once."""
TOGETHER = 2 * ROWS
"""Rows whose scores are held at once."""


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

    @cached_property
    def blocks(self) -> tuple[I64, I32]:
        """The prefill chunks cut up, [n, 4] of (row, start, length, chunk), and their block tables [chunks, most]."""
        blocks = [
            (chunk.row + at, chunk.start + at, min(BLOCK, chunk.length - at), i)
            for i, chunk in enumerate(self.prefill)
            for at in range(0, chunk.length, BLOCK)
        ]
        longest = max((len(chunk.pages) for chunk in self.prefill), default=0)
        tables = np.zeros((len(self.prefill), longest), np.int32)
        for table, chunk in zip(tables, self.prefill, strict=True):
            table[: len(chunk.pages)] = chunk.pages.numpy()
        return np.array(blocks, np.int64).reshape(-1, 4), tables


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
    sinks = NO_SINKS if heads.sinks is None else heads.sinks.numpy()
    how = (
        layer, heads.num, kv.num_kv_heads, kv.head_dim, kv.page_tokens, kv.page_stride, heads.scale,
        heads.reach.window, heads.reach.chunk, sinks, out.numpy(),
    )  # fmt: skip
    if len(batch.decode_rows):
        rows, lengths, pages = batch.decode_rows, batch.decode_lengths, batch.decode_pages
        _decode_kernel(qkv.numpy(), kv.flat.numpy(), rows.numpy(), lengths.numpy(), pages.numpy(), *how)
    if batch.prefill:
        _prefill_kernel(qkv.numpy(), kv.flat.numpy(), *batch.blocks, *how)
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


@inline
def _first_key(position, window, chunk):  # type: ignore[no-untyped-def]  # Numba values
    """The first key that a row sees."""
    first = max(0, position - window + 1) if window > 0 else 0
    return max(first, position // chunk * chunk) if chunk > 0 else first


@shared
def _decode_kernel(
    qkv: F32, flat: F32, rows: I32, lengths: I32, tables: I32, layer: int, num_heads: int, num_kv_heads: int,
    dim: int, page_tokens: int, page_stride: int, scale: float, window: int, chunk: int, sinks: F32, out: F32,
    shares: int,
) -> None:  # fmt: skip
    group = num_heads // num_kv_heads
    head_stride = page_tokens * dim
    layer_base = layer * 2 * num_kv_heads * head_stride
    for share in prange(shares):
        scores = np.empty((group, tables.shape[1] * page_tokens), np.float32)
        for item in range(share, rows.shape[0] * num_kv_heads, shares):
            b, kv_head = item // num_kv_heads, item % num_kv_heads
            length = lengths[b]
            first_key = _first_key(length - 1, window, chunk)
            first_page = first_key // page_tokens
            pages = (length + page_tokens - 1) // page_tokens
            q_row, o_row = qkv[rows[b]], out[rows[b]]
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


@kernel
def _attend(
    qkv: F32, flat: F32, row: int, start: int, length: int, table: I32, k_base: int, v_base: int, head: int, last: int,
    dim: int, page_tokens: int, page_stride: int, scale: float, window: int, chunk: int, sinks: F32, out: F32,
) -> None:  # fmt: skip
    """Heads [head, last) of one KV head for the rows of a block."""
    stride, out_stride = qkv.shape[1], out.shape[1]
    queries, target = qkv.reshape(-1), out.reshape(-1)
    first, end = _first_key(start, window, chunk), start + length
    count = end - first
    padded, across = (count + WIDTH - 1) // WIDTH * WIDTH, (dim + WIDTH - 1) // WIDTH * WIDTH
    keys, values = np.empty(padded * dim, np.float32), np.zeros(count * across, np.float32)
    keys[max(0, padded - WIDTH) * dim :] = np.float32(0)
    scores, beginning = np.empty(TOGETHER * padded, np.float32), start - start
    key = first
    while key < end:
        offset = key % page_tokens
        few = min(page_tokens - offset, end - key)
        at = table[key // page_tokens] * page_stride + offset * dim
        transpose(keys, WIDTH, key - first, flat, k_base + at, few, dim)
        for column in range(0, dim, WIDTH):
            for j in range(few):
                to, source = column * count + (key - first + j) * WIDTH, v_base + at + j * dim + column
                for i in range(min(WIDTH, dim - column)):
                    values[to + i] = flat[source + i]
        key += few
    for h in range(head, last):
        sink = sinks[h] if sinks.shape[0] > 0 else NO_SINK
        for r in range(0, length, TOGETHER):
            rows = min(TOGETHER, length - r)
            seen = start + r + rows - first
            for column in range(0, seen, WIDTH):
                multiply(
                    scores, column, padded, min(WIDTH, padded - column), queries, (row + r) * stride + h * dim, stride,
                    rows, keys, column * dim, dim, False,
                )  # fmt: skip
            for i in range(rows):
                position = start + r + i
                begin, past = _first_key(position, window, chunk) - first, position + 1 - first
                line = scores[i * padded : i * padded + (seen + WIDTH - 1) // WIDTH * WIDTH]
                for j in range(line.shape[0]):
                    line[j] = line[j] * np.float32(scale) if begin <= j < past else NO_SINK
                softmax_row(line, sink)
            for column in range(0, dim, WIDTH):
                multiply(
                    target, (row + r) * out_stride + h * dim + column, out_stride, min(WIDTH, dim - column),
                    scores, beginning, padded, rows, values, column * count, seen, False,
                )  # fmt: skip


@shared
def _prefill_kernel(
    qkv: F32, flat: F32, blocks: I64, tables: I32, layer: int, num_heads: int, num_kv_heads: int,
    dim: int, page_tokens: int, page_stride: int, scale: float, window: int, chunk: int, sinks: F32, out: F32,
    shares: int,
) -> None:  # fmt: skip
    group = num_heads // num_kv_heads
    head_stride = page_tokens * dim
    for share in prange(shares):
        for item in range(share, blocks.shape[0] * num_kv_heads, shares):
            row, start, length, number = blocks[item // num_kv_heads]
            kv_head = item % num_kv_heads
            k_base = (layer * 2 * num_kv_heads + kv_head) * head_stride
            _attend(
                qkv, flat, row, start, length, tables[number], k_base, k_base + num_kv_heads * head_stride,
                kv_head * group, (kv_head + 1) * group, dim, page_tokens, page_stride, scale, window, chunk, sinks, out,
            )  # fmt: skip
