"""Multi-head latent attention (DeepSeek V2) over a paged cache of latents, with absorbed projections.

Semantics, for a query row at position p of a sequence with block table B:
    o[t, h] = sum_j softmax_j(query[t, h] · c[j] · scale) c[j, :rank]     over the positions j of [0, p]
    c[j] = kv[B[j // page_tokens], layer, 0, 0, j % page_tokens]: `rank` numbers of latent, then the rotated key
    query: [T, Hq, rank + rope] float32, result [T, Hq, rank].

    latent_write makes both sides of it, for row t of a down-projection z [T, ≥ column + rank + rope]:
    c = (rms_norm(z[t, column : column + rank]) · norm, rotated z[t, column + rank : column + rank + rope])
    query[t, h, rank:] = rotated q[t, h, nope:],  q: [T, Hq, nope + rope] in the first columns of its rows.

Keys and values of a head are linear in the latent: k[h] = W_k[h] c, v[h] = W_v[h] c. So the caller puts W_k[h]ᵀ q[t, h]
into query[t, h, :rank] and applies W_v[h] to o[t, h] (`per_head`), and all heads share one cached row per token.

Decode rows read the pages where they lie, four heads at a time per page: 0.15 ms for 16 heads, rank 512, rope 64 and
300 tokens on one core, where gathering the pages and two torch products take 0.20. A prefill chunk gathers its pages
once and takes ROWS rows at a time through two products: 44 ms for 512 rows, torch's flash attention takes 70.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.attention import NO_SINK, AttentionBatch, PrefillChunk, gather
from motet.kernels.exp import softmax_row
from motet.kernels.jit import kernel
from motet.kernels.kv_write import KVLayout, rotate_head

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

ROWS = 64
MAX_SCORES = 1 << 22
"""Scores held at once in prefill: 16 MiB. Beyond 4,096 tokens with 16 heads fewer rows are taken at a time."""


@dataclass(frozen=True)
class LatentHeads:
    """Head count; sizes of a head's unrotated and rotated query, of the latent and of a value; the scale of scores."""

    num: int
    nope: int
    rope: int
    rank: int
    value: int
    scale: float


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, Hq, K] times each head's own weight [Hq, K, N], giving a view [T, Hq, N].

    A lone row is computed twice: from two rows up a row's bits do not depend on how many there are.
    """
    rows = x.expand(2, -1, -1) if len(x) == 1 else x
    return torch.bmm(rows.transpose(0, 1), weight).transpose(0, 1)[: len(x)]


def latent_write_torch(
    q: Tensor, z: Tensor, column: int, query: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    norm: Tensor, eps: float, kv: KVLayout, layer: int, heads: LatentHeads, interleaved: bool,
) -> None:  # fmt: skip
    """Reference in plain torch."""
    c, s = cos[positions], sin[positions]
    size = heads.nope + heads.rope
    q_rope = q[:, : heads.num * size].unflatten(1, (heads.num, size))[..., heads.nope :]
    query[..., heads.rank :] = _rotated(q_rope, c[:, None], s[:, None], interleaved)
    latent, key = z[:, column : column + kv.head_dim].split([heads.rank, heads.rope], dim=1)
    latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + eps) * norm
    page, offset = slots // kv.page_tokens, slots % kv.page_tokens
    kv.pages[page, layer, 0, 0, offset] = torch.cat([latent, _rotated(key, c, s, interleaved)], dim=1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    x = x.clone()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    before = a.clone()
    a.copy_(before * cos - b * sin)
    b.copy_(b * cos + before * sin)
    return x


def latent_write(
    q: Tensor, z: Tensor, column: int, query: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    norm: Tensor, eps: float, kv: KVLayout, layer: int, heads: LatentHeads, interleaved: bool,
) -> None:  # fmt: skip
    """Write each row's latent and rotated key into its page, and its rotated queries into `query`.

    positions, slots: [T] int32; cos, sin: [max positions, rope / 2]; `layer` is the index in the layer's KV group.
    """
    _latent_write_kernel(
        q.numpy(), z.numpy(), column, query.numpy(), positions.numpy(), slots.numpy(), cos.numpy(), sin.numpy(),
        norm.numpy(), eps, kv.flat.numpy(), layer, heads.nope, kv.page_tokens, kv.page_stride, interleaved,
    )  # fmt: skip


def latent_attention_torch(
    query: Tensor, kv: KVLayout, layer: int, batch: AttentionBatch, heads: LatentHeads
) -> Tensor:
    """Reference: every row by itself in plain torch."""
    out = query.new_zeros(*query.shape[:2], heads.rank)
    decode = zip(batch.decode_rows, batch.decode_lengths, batch.decode_pages, strict=True)
    rows = [(int(row), int(length), pages) for row, length, pages in decode]
    for chunk in batch.prefill:
        rows += [(chunk.row + i, chunk.start + i + 1, chunk.pages) for i in range(chunk.length)]
    for row, length, pages in rows:
        cached = gather(kv, layer, pages, 0, length)[0, 0]
        out[row] = torch.softmax(query[row] @ cached.T * heads.scale, dim=-1) @ cached[:, : heads.rank]
    return out


def latent_attention(
    query: Tensor, kv: KVLayout, layer: int, batch: AttentionBatch, heads: LatentHeads
) -> Tensor:
    """query [T, Hq, rank + rope] to [T, Hq, rank]; `layer` is the index in the layer's KV group."""
    out = torch.empty(*query.shape[:2], heads.rank)
    if len(batch.decode_rows):
        _decode_kernel(
            query.numpy(), kv.flat.numpy(), batch.decode_rows.numpy(), batch.decode_lengths.numpy(),
            batch.decode_pages.numpy(), layer, kv.page_tokens, kv.page_stride, heads.scale, out.numpy(),
        )  # fmt: skip
    for chunk in batch.prefill:
        rows = slice(chunk.row, chunk.row + chunk.length)
        _prefill(query[rows], kv, layer, chunk, heads, out[rows])
    return out


def _prefill(
    query: Tensor, kv: KVLayout, layer: int, chunk: PrefillChunk, heads: LatentHeads, out: Tensor
) -> None:
    """Some rows at a time, against the keys up to the last of them; only the youngest of those can be hidden."""
    cached = gather(kv, layer, chunk.pages, 0, chunk.start + chunk.length)[0, 0]
    step = min(ROWS, max(1, MAX_SCORES // (heads.num * len(cached))))
    hidden = torch.ones(step, step, dtype=torch.bool).triu_(1)[:, None]
    for first in range(0, chunk.length, step):
        rows = min(step, chunk.length - first)
        seen = chunk.start + first
        scores = query[first : first + rows].view(rows * heads.num, -1) @ cached[: seen + rows].T
        scores = scores.mul_(heads.scale).view(rows, heads.num, -1)
        scores[..., seen:].masked_fill_(hidden[:rows, :, :rows], float("-inf"))
        weights = torch.softmax(scores, dim=-1).view(rows * heads.num, -1)
        out[first : first + rows] = (weights @ cached[: seen + rows, : heads.rank]).view(rows, heads.num, -1)


@kernel
def _latent_write_kernel(
    q: F32, z: F32, column: int, query: F32, positions: I32, slots: I32, cos: F32, sin: F32, norm: F32, eps: float,
    flat: F32, layer: int, nope: int, page_tokens: int, page_stride: int, interleaved: bool,
) -> None:  # fmt: skip
    rank, rope = norm.shape[0], 2 * cos.shape[1]
    dim = rank + rope
    for t in range(z.shape[0]):
        c, s = cos[positions[t]], sin[positions[t]]
        for h in range(query.shape[1]):
            begin = h * (nope + rope) + nope
            source, head = q[t, begin : begin + rope], query[t, h, rank:]
            for i in range(rope):
                head[i] = source[i]
            rotate_head(head, c, s, interleaved)
        page, offset = slots[t] // page_tokens, slots[t] % page_tokens
        base = page * page_stride + (layer * page_tokens + offset) * dim
        row, cached = z[t, column : column + dim], flat[base : base + dim]
        total = np.float32(0)
        for i in range(rank):
            total += row[i] * row[i]
        scale = np.float32(1.0 / np.sqrt(total / rank + eps))
        for i in range(rank):
            cached[i] = row[i] * scale * norm[i]
        for i in range(rank, dim):
            cached[i] = row[i]
        rotate_head(cached[rank:], c, s, interleaved)


@kernel
def _scores_of_four(query: F32, flat: F32, base: int, count: int, scale: np.float32, out: F32) -> None:
    """out[h, j] = scale · query[h] · row j for four heads and `count` rows from `base`; two rows at a time."""
    dim = query.shape[1]
    q0, q1, q2, q3 = query[0], query[1], query[2], query[3]
    for j in range(0, count - 1, 2):
        at = base + j * dim
        k0, k1 = flat[at : at + dim], flat[at + dim : at + 2 * dim]
        a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        b0, b1, b2, b3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(dim):
            x, y = k0[i], k1[i]
            a0 += q0[i] * x
            a1 += q1[i] * x
            a2 += q2[i] * x
            a3 += q3[i] * x
            b0 += q0[i] * y
            b1 += q1[i] * y
            b2 += q2[i] * y
            b3 += q3[i] * y
        out[0, j], out[1, j], out[2, j], out[3, j] = a0 * scale, a1 * scale, a2 * scale, a3 * scale
        out[0, j + 1], out[1, j + 1] = b0 * scale, b1 * scale
        out[2, j + 1], out[3, j + 1] = b2 * scale, b3 * scale
    if count % 2:
        for h in range(4):
            _scores_of_one(query[h], flat, base + (count - 1) * dim, 1, scale, out[h, count - 1 :])


@kernel
def _scores_of_one(query: F32, flat: F32, base: int, count: int, scale: np.float32, out: F32) -> None:
    dim = query.shape[0]
    for j in range(count):
        row = flat[base + j * dim : base + (j + 1) * dim]
        total = np.float32(0)
        for i in range(dim):
            total += query[i] * row[i]
        out[j] = total * scale


@kernel
def _add_to_four(weights: F32, flat: F32, base: int, count: int, stride: int, out: F32) -> None:
    """out[h] += weights[h, j] · the begin of row j for four heads and `count` rows from `base`; four at a time."""
    rank = out.shape[1]
    o0, o1, o2, o3 = out[0], out[1], out[2], out[3]
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    whole = count - count % 4
    for j in range(0, whole, 4):
        at = base + j * stride
        c0, c1 = flat[at : at + rank], flat[at + stride : at + stride + rank]
        c2 = flat[at + 2 * stride : at + 2 * stride + rank]
        c3 = flat[at + 3 * stride : at + 3 * stride + rank]
        w00, w01, w02, w03 = w0[j], w0[j + 1], w0[j + 2], w0[j + 3]
        w10, w11, w12, w13 = w1[j], w1[j + 1], w1[j + 2], w1[j + 3]
        w20, w21, w22, w23 = w2[j], w2[j + 1], w2[j + 2], w2[j + 3]
        w30, w31, w32, w33 = w3[j], w3[j + 1], w3[j + 2], w3[j + 3]
        for i in range(rank):
            a, b, c, d = c0[i], c1[i], c2[i], c3[i]
            o0[i] += w00 * a + w01 * b + w02 * c + w03 * d
            o1[i] += w10 * a + w11 * b + w12 * c + w13 * d
            o2[i] += w20 * a + w21 * b + w22 * c + w23 * d
            o3[i] += w30 * a + w31 * b + w32 * c + w33 * d
    for h in range(4):
        _add_to_one(weights[h, whole:], flat, base + whole * stride, count - whole, stride, out[h])


@kernel
def _add_to_one(weights: F32, flat: F32, base: int, count: int, stride: int, out: F32) -> None:
    rank = out.shape[0]
    for j in range(count):
        row = flat[base + j * stride : base + j * stride + rank]
        for i in range(rank):
            out[i] += weights[j] * row[i]


@kernel
def _decode_kernel(
    query: F32, flat: F32, rows: I32, lengths: I32, tables: I32, layer: int, page_tokens: int, page_stride: int,
    scale: float, out: F32,
) -> None:  # fmt: skip
    heads, dim = query.shape[1], query.shape[2]
    by_four = heads - heads % 4
    longest = 0
    for b in range(rows.shape[0]):
        longest = max(longest, lengths[b])
    scores = np.empty((heads, longest), np.float32)
    factor = np.float32(scale)
    for b in range(rows.shape[0]):
        length = lengths[b]
        q, o = query[rows[b]], out[rows[b]]
        o[:] = np.float32(0)
        for first in range(0, length, page_tokens):
            base = tables[b, first // page_tokens] * page_stride + layer * page_tokens * dim
            count = min(page_tokens, length - first)
            for h in range(0, by_four, 4):
                _scores_of_four(q[h : h + 4], flat, base, count, factor, scores[h : h + 4, first:])
            for h in range(by_four, heads):
                _scores_of_one(q[h], flat, base, count, factor, scores[h, first:])
        for h in range(heads):
            softmax_row(scores[h, :length], NO_SINK)
        for first in range(0, length, page_tokens):
            base = tables[b, first // page_tokens] * page_stride + layer * page_tokens * dim
            count = min(page_tokens, length - first)
            for h in range(0, by_four, 4):
                _add_to_four(scores[h : h + 4, first:], flat, base, count, dim, o[h : h + 4])
            for h in range(by_four, heads):
                _add_to_one(scores[h, first:], flat, base, count, dim, o[h])
