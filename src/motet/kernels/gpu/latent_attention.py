"""Multi-head latent attention (DeepSeek V2, V3) over a paged cache of latents, with absorbed projections.

Semantics (references: `motet.kernels.latent_attention`), for a query row at position p of a sequence:
    o[t, h] = sum_j softmax_j(query[t, h] · c[j] · scale) c[j, :rank]     over the positions j of [0, p]
    c[j]: `rank` numbers of latent, then the rotated key, in one plane of one KV head of the pool
    query: [T, Hq, rank + rope] and o: [T, Hq, rank] bfloat16. Scores, weights and sums are float32.
    latent_write makes both sides of it, for row t of a down-projection z [T, ≥ column + rank + rope]:
    c = (rms_norm(z[t, column : column + rank]) · norm, rotated z[t, column + rank : column + rank + rope])
    query[t, h, rank:] = rotated q[t, h, nope:],  q: [T, Hq, nope + rope] in the first columns of its rows.
    positions, slots: [T] int32, rows with a negative slot (padding) are left alone; cos, sin: [max positions, rope / 2]
    and norm [rank] float32.

All heads of a row share one cached row per token, so heads are the rows of both products, and a key's latent, read
once, is also its value. Decode has up to 64 heads in a program: (row, block of heads, worker), splits and their order
as in `attention`. Its rows, lengths, tiles and block tables too are read before waiting for the kernel in front.
Prefill: programs (block of heads, tile); a tile is some rows of one sequence times their heads, 64 in all. More would
not fit: 64 sums of 512 numbers are half of all registers, queries and two steps of keys 216 of 227 KiB shared memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motet.kernels.gpu.attention import (
    LOG2E,
    MAX_SPLITS,
    MIN_SPLIT,
    PROGRAMS,
    DecodeBatch,
    DecodeConfig,
    DecodeWorkspace,
    PrefillBatch,
    PrefillConfig,
    combine_splits,
    nothing_seen,
)
from motet.kernels.gpu.jit import kernel, launch_options, tl, triton
from motet.kernels.kv_write import KVLayout
from motet.kernels.latent_attention import LatentHeads

HEADS = 16
"""Heads that a program of `latent_write` rotates."""
FEW_HEADS, MANY_HEADS = 16, 64
"""Heads of a decode program: what fits a warp's product, or, if there are more, a group of four warps'."""
DECODE = {
    FEW_HEADS: DecodeConfig(keys=32, warps=4, stages=5),
    MANY_HEADS: DecodeConfig(keys=64, warps=8, stages=3),
}
"""Both leave room for two steps of keys in shared memory: that takes 5 stages, or 3 where the products are wgmma's."""
PREFILL = PrefillConfig(rows=64, keys=64, warps=8, stages=3)


def latent_write(
    q: Tensor, z: Tensor, column: int, query: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    norm: Tensor, eps: float, kv: KVLayout, layer: int, heads: LatentHeads, interleaved: bool, *, pdl: bool = False,
) -> None:  # fmt: skip
    """Writes each row's latent and rotated key into its page, and its rotated queries into `query`.

    `layer` is the index in the layer's KV group; see the module's semantics.
    """
    rows = len(q)
    assert q.stride(1) == z.stride(1) == 1
    assert q.shape[1] >= heads.num * (heads.nope + heads.rope)
    assert z.shape[1] >= column + kv.head_dim
    assert query.shape == (rows, heads.num, heads.rank + heads.rope)
    assert query.is_contiguous()
    assert cos.shape[1] * 2 == heads.rope
    assert norm.shape == (heads.rank,)
    assert query.dtype == q.dtype == kv.flat.dtype
    _check(kv, heads)
    if not rows:
        return
    _latent_write_kernel[(rows, -(-(heads.num + 1) // HEADS))](
        q, z[:, column:], query, positions, slots, cos, sin, norm, kv.flat, layer, q.stride(0), z.stride(0),
        kv.page_stride, eps, NUM_HEADS=heads.num, NOPE=heads.nope, ROPE=heads.rope, RANK=heads.rank,
        PAGE_TOKENS=kv.page_tokens, INTERLEAVED=interleaved, HEADS=HEADS,
        HALF=triton.next_power_of_2(heads.rope // 2), BLOCK_R=triton.next_power_of_2(heads.rank), num_warps=4,
        **launch_options(pdl),
    )  # fmt: skip


def decode_workspace(max_rows: int, num_heads: int, dim: int, device: torch.device | str) -> DecodeWorkspace:
    """Room for `max_rows` decode rows of latents up to `dim` long."""
    return DecodeWorkspace.empty(max_rows, num_heads, -(-num_heads // _block(num_heads)), dim, device)


def prefill_rows(num_heads: int, config: PrefillConfig = PREFILL) -> int:
    """Rows of a prefill tile."""
    return max(config.rows // num_heads, 1)


def latent_decode(
    query: Tensor,
    kv: KVLayout,
    layer: int,
    batch: DecodeBatch,
    heads: LatentHeads,
    workspace: DecodeWorkspace,
    out: Tensor,
    *,
    config: DecodeConfig | None = None,
    min_split: int = MIN_SPLIT,
    pdl: bool = False,
) -> None:
    """Writes the decode rows of out [T, Hq, rank]; `layer` is the index in the layer's KV group."""
    count, block_h = len(batch.rows), _block(heads.num)
    config = config or DECODE[block_h]
    blocks = -(-heads.num // block_h)
    _check(kv, heads, query, out)
    assert workspace.arrivals.shape[0] >= count
    assert workspace.arrivals.shape[1] == blocks
    assert workspace.partial.shape[1:3] == (MAX_SPLITS, heads.num)
    assert workspace.partial.shape[3] >= heads.rank
    if not count:
        return
    workers = min(max(triton.next_power_of_2(PROGRAMS // (count * blocks)), 1), MAX_SPLITS)
    shape = _shape(kv, heads)
    _decode_kernel[(count, blocks, workers)](
        query, kv.flat, batch.rows, batch.lengths, batch.pages, workspace.partial, workspace.state,
        workspace.arrivals, out, layer, batch.pages.stride(0), kv.page_stride, heads.scale * LOG2E, **shape,
        MAX_SPLITS=MAX_SPLITS, MIN_SPLIT=min_split, BLOCK_H=block_h, BLOCK_N=config.keys,
        COLUMNS=min(shape["BLOCK_R"], 1024 * config.warps // block_h), num_warps=config.warps,
        num_stages=config.stages, **launch_options(pdl),
    )  # fmt: skip


def latent_prefill(
    query: Tensor,
    kv: KVLayout,
    layer: int,
    batch: PrefillBatch,
    heads: LatentHeads,
    out: Tensor,
    *,
    config: PrefillConfig = PREFILL,
    pdl: bool = False,
) -> None:
    """Writes the rows of the batch's tiles in out [T, Hq, rank]; `layer` is the index in the layer's KV group."""
    _check(kv, heads, query, out)
    if not len(batch.tiles):
        return
    _prefill_kernel[(-(-heads.num // config.rows), len(batch.tiles))](
        query, kv.flat, batch.tiles, batch.pages, out, layer, batch.pages.stride(0), kv.page_stride,
        heads.scale * LOG2E, **_shape(kv, heads), BLOCK_M=config.rows, BLOCK_N=config.keys, num_warps=config.warps,
        num_stages=config.stages, **launch_options(pdl),
    )  # fmt: skip


def _block(num_heads: int) -> int:
    """Heads of a decode program."""
    return FEW_HEADS if num_heads <= FEW_HEADS else MANY_HEADS


def _check(kv: KVLayout, heads: LatentHeads, query: Tensor | None = None, out: Tensor | None = None) -> None:
    assert (kv.planes, kv.num_kv_heads, kv.head_dim) == (1, 1, heads.rank + heads.rope)
    if query is not None and out is not None:
        assert query.shape[1:] == (heads.num, kv.head_dim)
        assert out.shape == (len(query), heads.num, heads.rank)
        assert query.is_contiguous()
        assert out.is_contiguous()


def _shape(kv: KVLayout, heads: LatentHeads) -> dict[str, int]:
    return {
        "NUM_HEADS": heads.num,
        "RANK": heads.rank,
        "ROPE": heads.rope,
        "PAGE_TOKENS": kv.page_tokens,
        "BLOCK_R": max(triton.next_power_of_2(heads.rank), 16),
        "BLOCK_P": max(triton.next_power_of_2(heads.rope), 16),
    }


@kernel(do_not_specialize=["layer"])
def _latent_write_kernel(  # type: ignore[no-untyped-def]
    q, z, query, positions, slots, cos, sin, norm, flat, layer, q_stride, z_stride, page_stride, eps,
    NUM_HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.maximum(tl.load(positions + row), 0).to(tl.int64)
    pair, r = tl.arange(0, HALF)[None, :], tl.arange(0, BLOCK_R)
    c = tl.load(cos + position * (ROPE // 2) + pair, pair < ROPE // 2, other=0.0)
    s = tl.load(sin + position * (ROPE // 2) + pair, pair < ROPE // 2, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if slot < 0:
        return

    place = (slot // PAGE_TOKENS).to(tl.int64) * page_stride + (slot % PAGE_TOKENS) * (RANK + ROPE)
    cached = flat + place + layer.to(tl.int64) * (PAGE_TOKENS * (RANK + ROPE))
    latent = z + row * z_stride
    if tl.program_id(1) == 0:
        x = tl.load(latent + r, r < RANK, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / RANK + eps)
        x = x * scale * tl.load(norm + r, r < RANK, other=0.0)
        tl.store(cached + r, x.to(flat.dtype.element_ty), r < RANK)

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    is_key = head == NUM_HEADS  # comes behind the queries
    source = tl.where(is_key, latent + RANK, q + row * q_stride + head * (NOPE + ROPE) + NOPE)
    target = tl.where(is_key, cached + RANK, query + (row * NUM_HEADS + head) * (RANK + ROPE) + RANK)
    if INTERLEAVED:
        element = tl.arange(0, 2 * HALF)[None, :]
        whole = (head <= NUM_HEADS) & (element < ROPE)
        both = tl.load(source + element, whole, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [HEADS, HALF, 2]))
        both = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [HEADS, 2 * HALF])
        tl.store(target + element, both.to(flat.dtype.element_ty), whole)
    else:
        inside = (head <= NUM_HEADS) & (pair < ROPE // 2)
        a = tl.load(source + pair, inside, other=0.0).to(tl.float32)
        b = tl.load(source + ROPE // 2 + pair, inside, other=0.0).to(tl.float32)
        tl.store(target + pair, (a * c - b * s).to(flat.dtype.element_ty), inside)
        tl.store(target + ROPE // 2 + pair, (b * c + a * s).to(flat.dtype.element_ty), inside)


@kernel()
def _look(  # type: ignore[no-untyped-def]
    q, q_rope, acc, top, total, key, end, last, flat, table, place, page_stride, scale, RANK: tl.constexpr,
    ROPE: tl.constexpr, PAGE_TOKENS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: rows q [M, rank] and q_rope [M, rope] look at the keys `key` [N] below `end`,
    each up to its `last`. acc [M, rank], top and total [M] as in `attention`."""
    r, p = tl.arange(0, q.shape[1]), tl.arange(0, q_rope.shape[1])
    there = (key < end)[:, None]
    page = tl.load(table + key // PAGE_TOKENS, key < end, other=0)
    at = flat + place + page.to(tl.int64) * page_stride + key % PAGE_TOKENS * (RANK + ROPE)
    latent = tl.load(at[:, None] + r[None, :], there & (r < RANK)[None, :], other=0.0)
    rotated = tl.load(at[:, None] + RANK + p[None, :], there & (p < ROPE)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(latent), input_precision="ieee")
    scores = tl.dot(q_rope, tl.trans(rotated), scores, input_precision="ieee")
    scores = tl.where(key[None, :] <= last, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    weights = tl.math.exp2(scores * scale - new_top[:, None])
    fade = tl.math.exp2(top - new_top)
    total = total * fade + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(latent.dtype), latent, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@kernel(do_not_specialize=["layer", "pages_stride"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    query, flat, rows, lengths, pages, partial, state, arrivals, out, layer, pages_stride, page_stride, scale,
    NUM_HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b, block, worker = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    workers = tl.num_programs(2)
    length, row = tl.load(lengths + b), tl.load(rows + b).to(tl.int64)
    size = tl.maximum(tl.cdiv(tl.cdiv(length, MAX_SPLITS), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    splits = tl.cdiv(length, size)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if worker >= tl.maximum(splits, 1):
        return

    head = block * BLOCK_H + tl.arange(0, BLOCK_H)
    r, p, used = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P), head < NUM_HEADS
    if NUM_HEADS % BLOCK_H == 0:  # a condition for each store costs 370 bytes of spills
        used = tl.full([BLOCK_H], 1, tl.int1)
    inside = used[:, None] & (r < RANK)[None, :]
    at = query + row * (NUM_HEADS * (RANK + ROPE)) + head[:, None] * (RANK + ROPE)
    q = tl.load(at + r[None, :], inside, other=0.0)
    q_rope = tl.load(at + RANK + p[None, :], used[:, None] & (p < ROPE)[None, :], other=0.0)
    table = pages + b.to(tl.int64) * pages_stride
    place = layer.to(tl.int64) * (PAGE_TOKENS * (RANK + ROPE))
    partial += b.to(tl.int64) * (MAX_SPLITS * NUM_HEADS * RANK)
    state += b.to(tl.int64) * (MAX_SPLITS * NUM_HEADS * 2)
    acc, top, total = nothing_seen(BLOCK_H, BLOCK_R)
    for split in range(worker, splits, workers):
        acc, top, total = nothing_seen(BLOCK_H, BLOCK_R)
        end = tl.minimum((split + 1) * size, length)
        for start in range(split * size, end, BLOCK_N):
            acc, top, total = _look(
                q, q_rope, acc, top, total, start + tl.arange(0, BLOCK_N), end, end - 1, flat, table, place,
                page_stride, scale, RANK, ROPE, PAGE_TOKENS,
            )  # fmt: skip
        if splits > 1:
            of = split * NUM_HEADS + head
            tl.store(partial + of[:, None] * RANK + r[None, :], acc, inside)
            tl.store(state + of * 2, top, used)
            tl.store(state + of * 2 + 1, total, used)

    to = out + row * (NUM_HEADS * RANK) + head[:, None] * RANK
    if splits <= 1:
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(to + r[None, :], result.to(out.dtype.element_ty), inside)
        return
    arrival = arrivals + b * tl.num_programs(1) + block
    tl.debug_barrier()  # all warps' stores come before the arrival
    if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") < tl.minimum(splits, workers) - 1:
        return
    tl.store(arrival, 0)
    for left in range(0, BLOCK_R, COLUMNS):  # all at once they would not fit the registers
        d = left + tl.arange(0, COLUMNS)
        within = used[:, None] & (d < RANK)[None, :]
        part, _, whole = combine_splits(
            partial, state, head, splits, used, within, d, NUM_HEADS, RANK, BLOCK_H, COLUMNS
        )
        result = part / tl.where(whole > 0, whole, 1.0)[:, None]
        tl.store(to + d[None, :], result.to(out.dtype.element_ty), within)


@kernel(do_not_specialize=["layer", "pages_stride"])
def _prefill_kernel(  # type: ignore[no-untyped-def]
    query, flat, tiles, pages, out, layer, pages_stride, page_stride, scale,
    NUM_HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = NUM_HEADS if NUM_HEADS < BLOCK_M else BLOCK_M
    tile = tiles + tl.program_id(1) * 4
    row, position, length = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    table = pages + tl.load(tile + 3).to(tl.int64) * pages_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if length <= 0:
        return

    m, r, p = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    of, head = m // GROUP, tl.program_id(0) * GROUP + m % GROUP
    used = (of < length) & (head < NUM_HEADS)
    inside = used[:, None] & (r < RANK)[None, :]
    at = query + row * (NUM_HEADS * (RANK + ROPE)) + (of * NUM_HEADS + head)[:, None] * (RANK + ROPE)
    q = tl.load(at + r[None, :], inside, other=0.0)
    q_rope = tl.load(at + RANK + p[None, :], used[:, None] & (p < ROPE)[None, :], other=0.0)
    place = layer.to(tl.int64) * (PAGE_TOKENS * (RANK + ROPE))
    acc, top, total = nothing_seen(BLOCK_M, BLOCK_R)
    for start in range(0, position + length, BLOCK_N):
        acc, top, total = _look(
            q, q_rope, acc, top, total, start + tl.arange(0, BLOCK_N), position + length, (position + of)[:, None],
            flat, table, place, page_stride, scale, RANK, ROPE, PAGE_TOKENS,
        )  # fmt: skip
    to = out + row * (NUM_HEADS * RANK) + (of * NUM_HEADS + head)[:, None] * RANK
    tl.store(to + r[None, :], (acc / total[:, None]).to(out.dtype.element_ty), inside)
