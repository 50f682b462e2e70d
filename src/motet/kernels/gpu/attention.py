"""Causal attention over paged keys and values: one query per sequence (decode), and tiles of many (prefill).

Semantics (reference: `motet.kernels.attention.paged_attention_torch`), for a row at position p of a sequence:
    o[t, h] = sum_j exp(s_j) v[j, h // G] / (sum_j exp(s_j) + exp(sink[h])),   s_j = q[t, h] · k[j, h // G] · scale
    over the keys j of [first(p), p] (`KVGroup.first_key`: a window, a chunk of positions, or all); G = Hq / Hkv
    qkv: [T, (Hq + 2·Hkv)·D] bfloat16 with q rotated and k, v already in their pages; out: [T, Hq·D] in qkv's dtype,
    of which a call writes the rows it is given; sinks [Hq] float32. Scores, weights and sums are float32.

Decode and prefill rows of one step lie in the same qkv; each kind is one launch. Rows, lengths, tiles and block tables
are read before waiting for the kernel in front: no kernel of the same chain may write them.

Decode: programs (row, kv head, worker). A row's keys are cut into splits whose size follows from its length alone, so
that its result does not depend on the batch; workers take splits in turn, and the last one to finish adds the splits
up in their order. The grid depends on shapes only.
Prefill: programs (kv head, tile). A tile is up to `prefill_rows` consecutive rows of one sequence times the G heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.attention import Heads
from motet.kernels.gpu.jit import kernel, launch_options, tl, triton
from motet.kernels.kv_write import KVLayout

MAX_SPLITS = 32
MIN_SPLIT = 256
"""Keys of a split of a row with up to MAX_SPLITS · MIN_SPLIT keys; longer rows have longer splits."""
PROGRAMS = 1024
"""Decode programs aimed at, about two waves of four on each of 132 multiprocessors."""
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class DecodeConfig:
    """How decode is compiled: keys per step of the loop, warps, stages of the software pipeline."""

    keys: int = 64
    warps: int = 4
    stages: int = 3

    @staticmethod
    def of(head_dim: int) -> DecodeConfig:
        """128 keys where two stages of them fit: 2 % of a step of 64 rows, nothing at 1 and 16 (H200)."""
        return DecodeConfig(128, stages=2) if head_dim <= 64 else DecodeConfig()


@dataclass(frozen=True)
class PrefillConfig:
    """How prefill is compiled: rows times heads of a tile, keys per step of the loop, warps, stages."""

    rows: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 3


PREFILL = PrefillConfig()


@dataclass(frozen=True)
class DecodeBatch:
    """Decode rows: `rows` [B] int32 (of qkv), `lengths` [B] int32 (keys up to the row's own; 0: padding, whose output
    is zeros), block tables `pages` [B, max pages] int32."""

    rows: Tensor
    lengths: Tensor
    pages: Tensor


@dataclass(frozen=True)
class PrefillBatch:
    """Prefill rows: `tiles` [N, 4] int32 (`prefill_tiles`; length 0: nothing), `pages` [sequences, max pages] int32."""

    tiles: Tensor
    pages: Tensor


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where splits meet: `partial` [B, MAX_SPLITS, Hq, D] and `state` [B, MAX_SPLITS, Hq, 2] float32, `arrivals`
    [B, Hkv] int32, zero between launches."""

    partial: Tensor
    state: Tensor
    arrivals: Tensor

    @classmethod
    def empty(cls, max_rows: int, heads: int, kv_heads: int, dim: int, device: torch.device | str) -> Self:
        """Room for `max_rows` decode rows."""
        return cls(
            torch.empty(max_rows, MAX_SPLITS, heads, dim, device=device),
            torch.empty(max_rows, MAX_SPLITS, heads, 2, device=device),
            torch.zeros(max_rows, kv_heads, dtype=torch.int32, device=device),
        )


def decode_attention(
    qkv: Tensor,
    kv: KVLayout,
    layer: int,
    batch: DecodeBatch,
    heads: Heads,
    workspace: DecodeWorkspace,
    out: Tensor,
    *,
    config: DecodeConfig | None = None,
    min_split: int = MIN_SPLIT,
    pdl: bool = False,
) -> None:
    """Writes the decode rows of out [T, Hq·D]; `layer` is the index in the layer's KV group."""
    count = len(batch.rows)
    _check(qkv, kv, heads, out)
    assert workspace.arrivals.shape[0] >= count
    assert workspace.partial.shape[1:] == (MAX_SPLITS, heads.num, kv.head_dim)
    if not count:
        return
    config = config or DecodeConfig.of(kv.head_dim)
    workers = min(max(triton.next_power_of_2(PROGRAMS // (count * kv.num_kv_heads)), 1), MAX_SPLITS)
    _decode_kernel[(count, kv.num_kv_heads, workers)](
        qkv, kv.flat, batch.rows, batch.lengths, batch.pages, _sinks(heads, qkv), workspace.partial,
        workspace.state, workspace.arrivals, out, layer, batch.pages.stride(0), kv.page_stride, heads.scale * LOG2E,
        SINKS=heads.sinks is not None, **_shape(kv, heads), MAX_SPLITS=MAX_SPLITS, MIN_SPLIT=min_split,
        BLOCK_H=max(triton.next_power_of_2(heads.num // kv.num_kv_heads), 16), BLOCK_N=config.keys,
        BLOCK_D=max(triton.next_power_of_2(kv.head_dim), 16), num_warps=config.warps, num_stages=config.stages,
        **launch_options(pdl),
    )  # fmt: skip


def prefill_attention(
    qkv: Tensor,
    kv: KVLayout,
    layer: int,
    batch: PrefillBatch,
    heads: Heads,
    out: Tensor,
    *,
    config: PrefillConfig = PREFILL,
    pdl: bool = False,
) -> None:
    """Writes the rows of the batch's tiles in out [T, Hq·D]; `layer` is the index in the layer's KV group."""
    _check(qkv, kv, heads, out)
    if not len(batch.tiles):
        return
    _prefill_kernel[(kv.num_kv_heads, len(batch.tiles))](
        qkv, kv.flat, batch.tiles, batch.pages, _sinks(heads, qkv), out, layer, batch.pages.stride(0),
        kv.page_stride, heads.scale * LOG2E, SINKS=heads.sinks is not None, **_shape(kv, heads),
        BLOCK_M=config.rows, BLOCK_N=config.keys, BLOCK_D=max(triton.next_power_of_2(kv.head_dim), 16),
        num_warps=config.warps, num_stages=config.stages, **launch_options(pdl),
    )  # fmt: skip


def prefill_rows(num_heads: int, num_kv_heads: int, config: PrefillConfig = PREFILL) -> int:
    """Rows of a prefill tile."""
    return config.rows // (num_heads // num_kv_heads)


def prefill_tiles(chunks: Iterable[tuple[int, int, int, int]], rows: int) -> NDArray[np.int32]:
    """Cut chunks (first row, first position, length, block table) into tiles of `rows` rows: [N, 4] of the same.

    Tiles with the most keys come first: they take longest, and what starts last should end soon.
    """
    tiles = [
        (row + at, position + at, min(rows, length - at), table)
        for row, position, length, table in chunks
        for at in range(0, length, rows)
    ]
    tiles.sort(key=lambda tile: -tile[1])
    return np.array(tiles, np.int32).reshape(-1, 4)


def _check(qkv: Tensor, kv: KVLayout, heads: Heads, out: Tensor) -> None:
    assert qkv.shape[1] == (heads.num + 2 * kv.num_kv_heads) * kv.head_dim
    assert out.shape == (qkv.shape[0], heads.num * kv.head_dim)
    assert qkv.is_contiguous()
    assert out.is_contiguous()
    assert kv.planes == 2


def _sinks(heads: Heads, qkv: Tensor) -> Tensor:
    return qkv if heads.sinks is None else heads.sinks


def _shape(kv: KVLayout, heads: Heads) -> dict[str, int]:
    return {
        "NUM_HEADS": heads.num,
        "NUM_KV_HEADS": kv.num_kv_heads,
        "DIM": kv.head_dim,
        "PAGE_TOKENS": kv.page_tokens,
        "WINDOW": heads.reach.window,
        "CHUNK": heads.reach.chunk,
    }


@kernel()
def _first_key(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    first = position * 0
    if WINDOW:
        first = tl.maximum(first, position - WINDOW + 1)
    if CHUNK:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@kernel()
def _look(  # type: ignore[no-untyped-def]
    q, acc, top, total, key, end, first, last, flat, table, place, page_stride, scale,
    DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, PLANE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: rows q [M, D] look at the keys `key` [N] below `end`.

    MASKED: each row sees only those in [first, last]. `top` [M] is the largest score so far times log2(e), -1e30 before
    any, so that differences stay numbers; `total` [M] and acc [M, D] are sums of 2^(score - top).
    """
    d = tl.arange(0, q.shape[1])
    inside = (d < DIM)[None, :]
    if MASKED:
        inside = inside & (key < end)[:, None]
        page = tl.load(table + key // PAGE_TOKENS, key < end, other=0)
    else:
        page = tl.load(table + key // PAGE_TOKENS)
    at = flat + place + page.to(tl.int64) * page_stride + key % PAGE_TOKENS * DIM
    k = tl.load(at[:, None] + d[None, :], inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where((key[None, :] >= first) & (key[None, :] <= last), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    weights = tl.math.exp2(scores * scale - new_top[:, None])
    fade = tl.math.exp2(top - new_top)
    total = total * fade + tl.sum(weights, axis=1)
    v = tl.load(at[:, None] + PLANE + d[None, :], inside, other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@kernel()
def nothing_seen(ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc, top and total before any key; see `_look`."""
    return (
        tl.zeros([ROWS, COLUMNS], tl.float32),
        tl.full([ROWS], -1e30, tl.float32),
        tl.zeros([ROWS], tl.float32),
    )


@kernel()
def combine_splits(  # type: ignore[no-untyped-def]
    partial, state, slot, splits, used, inside, d, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc, top and total of all splits, added up in their order, four of them on their way at a time."""
    acc, top, total = nothing_seen(BLOCK_H, BLOCK_D)
    for four in range(0, splits, 4):
        for i in tl.static_range(4):
            there = used & (four + i < splits)
            of = slot + (four + i) * NUM_HEADS
            top_i = tl.load(state + of * 2, there, other=-1e30, cache_modifier=".cg")
            total_i = tl.load(state + of * 2 + 1, there, other=0.0, cache_modifier=".cg")
            at = partial + of[:, None] * DIM + d[None, :]
            acc_i = tl.load(at, inside & there[:, None], other=0.0, cache_modifier=".cg")
            new_top = tl.maximum(top, top_i)
            fade, fade_i = tl.math.exp2(top - new_top), tl.math.exp2(top_i - new_top)
            acc = acc * fade[:, None] + acc_i * fade_i[:, None]
            total = total * fade + total_i * fade_i
            top = new_top
    return acc, top, total


@kernel(do_not_specialize=["layer", "pages_stride"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    qkv, flat, rows, lengths, pages, sinks, partial, state, arrivals, out, layer, pages_stride, page_stride, scale,
    SINKS: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PLANE: tl.constexpr = NUM_KV_HEADS * PAGE_TOKENS * DIM
    b, kv_head, worker = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    workers = tl.num_programs(2)
    length, row = tl.load(lengths + b), tl.load(rows + b).to(tl.int64)
    begin = _first_key(length - 1, WINDOW, CHUNK)
    reach = tl.maximum(length - begin, 0)
    size = tl.maximum(tl.cdiv(tl.cdiv(reach, MAX_SPLITS), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    splits = tl.cdiv(reach, size)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if worker >= tl.maximum(splits, 1):
        return

    g, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + g
    inside = (g < GROUP)[:, None] & (d < DIM)[None, :]
    q_row = qkv + row * ((NUM_HEADS + 2 * NUM_KV_HEADS) * DIM)
    q = tl.load(q_row + head[:, None] * DIM + d[None, :], inside, other=0.0)
    table = pages + b.to(tl.int64) * pages_stride
    place = layer.to(tl.int64) * (2 * PLANE) + kv_head * (PAGE_TOKENS * DIM)
    acc, top, total = nothing_seen(BLOCK_H, BLOCK_D)
    slot = (b.to(tl.int64) * MAX_SPLITS) * NUM_HEADS + head  # where this head's first split goes
    for split in range(worker, splits, workers):
        acc, top, total = nothing_seen(BLOCK_H, BLOCK_D)
        end = tl.minimum(begin + (split + 1) * size, length)
        for start in range(begin + split * size, end, BLOCK_N):
            acc, top, total = _look(
                q, acc, top, total, start + tl.arange(0, BLOCK_N), end, begin, end - 1, flat, table, place,
                page_stride, scale, DIM, PAGE_TOKENS, PLANE, True,
            )  # fmt: skip
        if splits > 1:
            to = slot + split * NUM_HEADS
            tl.store(partial + to[:, None] * DIM + d[None, :], acc, inside)
            tl.store(state + to * 2, top, g < GROUP)
            tl.store(state + to * 2 + 1, total, g < GROUP)

    if splits > 1:
        tl.debug_barrier()  # all warps' stores come before the arrival
        arrived = tl.atomic_add(arrivals + b * NUM_KV_HEADS + kv_head, 1, sem="acq_rel", scope="gpu")
        if arrived < tl.minimum(splits, workers) - 1:
            return
        tl.store(arrivals + b * NUM_KV_HEADS + kv_head, 0)
        acc, top, total = combine_splits(
            partial, state, slot, splits, g < GROUP, inside, d, NUM_HEADS, DIM, BLOCK_H, BLOCK_D
        )
    if SINKS:
        sink = tl.load(sinks + head, g < GROUP, other=0.0) * 1.4426950408889634
        new_top = tl.maximum(top, sink)
        fade = tl.math.exp2(top - new_top)
        acc = acc * fade[:, None]
        total = total * fade + tl.math.exp2(sink - new_top)
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = out + row * (NUM_HEADS * DIM) + head[:, None] * DIM + d[None, :]
    tl.store(to, result.to(out.dtype.element_ty), inside)


@kernel(do_not_specialize=["layer", "pages_stride"])
def _prefill_kernel(  # type: ignore[no-untyped-def]
    qkv, flat, tiles, pages, sinks, out, layer, pages_stride, page_stride, scale,
    SINKS: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PLANE: tl.constexpr = NUM_KV_HEADS * PAGE_TOKENS * DIM
    kv_head, tile = tl.program_id(0), tiles + tl.program_id(1) * 4
    row, position, length = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    table = pages + tl.load(tile + 3).to(tl.int64) * pages_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if length <= 0:
        return

    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query, head = m // GROUP, kv_head * GROUP + m % GROUP
    inside = (query < length)[:, None] & (d < DIM)[None, :]
    at = (row + query) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * DIM) + head * DIM
    q = tl.load(qkv + at[:, None] + d[None, :], inside, other=0.0)
    place = layer.to(tl.int64) * (2 * PLANE) + kv_head * (PAGE_TOKENS * DIM)
    last = (position + query)[:, None]
    first = _first_key(last, WINDOW, CHUNK)
    acc, top, total = nothing_seen(BLOCK_M, BLOCK_D)
    if SINKS:
        top = tl.load(sinks + head) * 1.4426950408889634
        total += 1.0

    begin, end = _first_key(position, WINDOW, CHUNK), position + length
    edge = begin  # every row sees all keys before it, and those from it on need a mask
    if WINDOW == 0 and CHUNK == 0:
        edge = (position + 1) // BLOCK_N * BLOCK_N
        for start in range(0, edge, BLOCK_N):
            acc, top, total = _look(
                q, acc, top, total, start + tl.arange(0, BLOCK_N), end, first, last, flat, table, place, page_stride,
                scale, DIM, PAGE_TOKENS, PLANE, False,
            )  # fmt: skip
    for start in range(edge, end, BLOCK_N):
        acc, top, total = _look(
            q, acc, top, total, start + tl.arange(0, BLOCK_N), end, first, last, flat, table, place, page_stride,
            scale, DIM, PAGE_TOKENS, PLANE, True,
        )  # fmt: skip
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = (row + query) * (NUM_HEADS * DIM) + head * DIM
    tl.store(out + to[:, None] + d[None, :], result.to(out.dtype.element_ty), inside)
