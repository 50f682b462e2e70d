"""Low-rank updates of a latent attention's key and value projection, which is never applied as such.

Semantics: with the rank blocks i of the projection's site for the slot of row t (`lora`), A_i [rank[i], R] and B_i
[rank[i], Hq · (nope + value)], of which B_k,i[h] are the first `nope` columns of head h's and B_v,i[h] the others:
    query[t, h, :R] += sum_i scale[i] · (q[t, h, :nope] @ B_k,i[h].T) @ A_i
    v[t, h]         += sum_i scale[i] · (o[t, h] @ A_i.T) @ B_v,i[h]
    q: [T, ≥ Hq · (nope + rope)], query: [T, Hq, R + rope], o: [T, Hq, R], v: [T, Hq, value] bfloat16; R is the latent's
    size. What stands in parentheses is scaled and rounded to bfloat16, sums are float32.
    (`motet.kernels.latent_lora` says why.)

Both are one kernel, of programs (tile, head, block of columns): a head's shrink is so short that every program does it
by itself, without a workspace and a second launch. Tiles of rows as in `lora`; rows of the base model are in none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from motet.kernels.gpu.jit import kernel, launch_options, tl, triton
from motet.kernels.gpu.lora import FACTOR_ALIGNMENT, LoraConfig, LoraTiles, RankBlocks
from motet.kernels.latent_attention import LatentHeads

DEPTH = 128
"""Of a step of the shrink's dot products."""


def lora_key_query_torch(
    query: Tensor, q: Tensor, heads: LatentHeads, table: RankBlocks, site: int, tiles: LoraTiles
) -> None:
    """Reference: tile by tile and rank block by rank block."""
    per = q[:, : heads.num * (heads.nope + heads.rope)].unflatten(1, (heads.num, -1))[..., : heads.nope]
    for rows, a, b, scale in _blocks_torch(heads, table, site, tiles):
        z = torch.einsum("thn,rhn->thr", per[rows], b[..., : heads.nope].to(q.dtype))
        query[rows, :, : heads.rank] += z @ a.to(q.dtype) * scale


def lora_value_torch(
    v: Tensor, o: Tensor, heads: LatentHeads, table: RankBlocks, site: int, tiles: LoraTiles
) -> None:
    """Reference, likewise."""
    for rows, a, b, scale in _blocks_torch(heads, table, site, tiles):
        v[rows] += (
            torch.einsum("thr,rhv->thv", o[rows] @ a.to(o.dtype).T, b[..., heads.nope :].to(o.dtype)) * scale
        )


def _blocks_torch(
    heads: LatentHeads, table: RankBlocks, site: int, tiles: LoraTiles
) -> Iterator[tuple[slice, Tensor, Tensor, float]]:
    """Each tile's rows with A [r, R], B [r, Hq, nope + value] and scale of each rank block."""
    each = heads.nope + heads.value
    for slot, start, rows in torch.stack([tiles.slot, tiles.start, tiles.rows], 1).tolist():
        first = int(table.first[site, slot])
        for i in range(first, first + int(table.count[site, slot])):
            rank, at, bt = int(table.rank[i]), int(table.a[i]), int(table.b[i])
            a = table.pool[at : at + rank * heads.rank].view(rank, -1)
            b = table.pool[bt : bt + rank * heads.num * each].view(rank, heads.num, each)
            yield slice(start, start + rows), a, b, float(table.scale[i])


def lora_key_query(
    query: Tensor,
    q: Tensor,
    heads: LatentHeads,
    table: RankBlocks,
    site: int,
    tiles: LoraTiles,
    config: LoraConfig,
    *,
    pdl: bool = False,
) -> None:
    """Adds the adapters' share of the keys to query in place."""
    assert query.is_contiguous()
    assert query.shape[1:] == (heads.num, heads.rank + heads.rope)
    assert q.stride(1) == 1
    assert q.shape[1] >= heads.num * (heads.nope + heads.rope)
    each = heads.nope + heads.value
    _launch(
        query, q, table.b, table.a, table, site, tiles, config, pdl, NUM_HEADS=heads.num,
        X_HEAD=heads.nope + heads.rope, Y_HEAD=query.stride(1), K=heads.nope, N=heads.rank,
        DOWN_ROW=heads.num * each, DOWN_HEAD=each, UP_ROW=heads.rank, UP_HEAD=0, UP_SKIP=0,
    )  # fmt: skip


def lora_value(
    v: Tensor,
    o: Tensor,
    heads: LatentHeads,
    table: RankBlocks,
    site: int,
    tiles: LoraTiles,
    config: LoraConfig,
    *,
    pdl: bool = False,
) -> None:
    """Adds the adapters' share of the values to v in place."""
    assert v.is_contiguous()
    assert v.shape[1:] == (heads.num, heads.value)
    assert o.is_contiguous()
    assert o.shape[1:] == (heads.num, heads.rank)
    each = heads.nope + heads.value
    _launch(
        v, o, table.a, table.b, table, site, tiles, config, pdl, NUM_HEADS=heads.num, X_HEAD=heads.rank,
        Y_HEAD=heads.value, K=heads.rank, N=heads.value, DOWN_ROW=heads.rank, DOWN_HEAD=0, UP_ROW=heads.num * each,
        UP_HEAD=each, UP_SKIP=heads.nope,
    )  # fmt: skip


def _launch(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, table: RankBlocks, site: int, tiles: LoraTiles,
    config: LoraConfig, pdl: bool, *, NUM_HEADS: int, **shape: int,
) -> None:  # fmt: skip
    """`down` and `up` are where in the pool the first and the second factor of each rank block begin."""
    if not len(tiles.slot):
        return
    block_n = min(max(triton.next_power_of_2(shape["N"]), 16), config.columns)
    _lora_heads_kernel[(len(tiles.slot), NUM_HEADS, -(-shape["N"] // block_n))](
        y, x, tiles.slot, tiles.start, tiles.rows, table.first, table.count, down, up, table.rank, table.scale,
        table.pool, site, table.first.stride(0), x.stride(0), y.stride(0), **shape,
        DOWN_ALIGNED=math.gcd(shape["DOWN_ROW"], FACTOR_ALIGNMENT),
        UP_ALIGNED=math.gcd(shape["UP_ROW"], FACTOR_ALIGNMENT),
        BLOCK_M=config.rows, BLOCK_R=config.expand_ranks,
        BLOCK_K=min(max(triton.next_power_of_2(shape["K"]), 16), DEPTH), BLOCK_N=block_n,
        num_warps=config.expand_warps, **launch_options(pdl),
    )  # fmt: skip


@kernel(do_not_specialize=["site", "slots"])
def _lora_heads_kernel(  # type: ignore[no-untyped-def]
    y, x, tile_slot, tile_start, tile_rows, first, count, down, up, rank, scale, pool, site, slots, x_stride,
    y_stride,
    X_HEAD: tl.constexpr, Y_HEAD: tl.constexpr, K: tl.constexpr, N: tl.constexpr, DOWN_ROW: tl.constexpr,
    DOWN_HEAD: tl.constexpr, UP_ROW: tl.constexpr, UP_HEAD: tl.constexpr, UP_SKIP: tl.constexpr,
    DOWN_ALIGNED: tl.constexpr, UP_ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rows, slot, start = tl.load(tile_rows + tile), tl.load(tile_slot + tile), tl.load(tile_start + tile)
    blocks, run = 0, 0
    if rows > 0:
        blocks = tl.load(count + site * slots + slot)
        run = tl.load(first + site * slots + slot)
    if blocks == 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return

    m, c, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = (start + m).to(tl.int64)[:, None]
    x_row = x + t * x_stride + head * X_HEAD
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Not pipelined: that would move the reads of x in front of the wait.
    for begin in tl.range(0, blocks, BLOCK_R // 16, num_stages=1):
        block, there = run + begin + c // 16, begin + c // 16 < blocks
        ranked = (c % 16 < tl.load(rank + block, there, other=0))[:, None]
        by = tl.load(scale + block, there, other=0.0)
        of = tl.multiple_of(tl.load(up + block, there, other=0) + c % 16 * UP_ROW, UP_ALIGNED)
        of += head * UP_HEAD + UP_SKIP
        w_up = tl.load(pool + of[:, None] + n[None, :], ranked & (n < N)[None, :], other=0.0)
        of = tl.multiple_of(tl.load(down + block, there, other=0) + c % 16 * DOWN_ROW, DOWN_ALIGNED)
        of += head * DOWN_HEAD
        z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for step in tl.static_range(0, K, BLOCK_K):
            deep = (step + k < K)[None, :]
            w = tl.load(pool + of[:, None] + step + k[None, :], ranked & deep, other=0.0)
            if PDL and step == 0:  # with the first factors on their way
                tl.extra.cuda.gdc_wait()
            v = tl.load(x_row + step + k[None, :], (m < rows)[:, None] & deep, other=0.0)
            z = tl.dot(v, tl.trans(w).to(v.dtype), z, input_precision="ieee")
        shrunk = (z * by[None, :]).to(y.dtype.element_ty)
        acc = tl.dot(shrunk, w_up.to(shrunk.dtype), acc, input_precision="ieee")
    to = y + t * y_stride + head * Y_HEAD + n[None, :]
    inside = (m < rows)[:, None] & (n < N)[None, :]
    acc += tl.load(to, inside, other=0.0).to(tl.float32)
    tl.store(to, acc.to(y.dtype.element_ty), inside)
