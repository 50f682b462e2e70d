"""A product of few rows with the updates of their adapters in it, for projections that all rows take.

Semantics, for a row t of adapter slot s (no update: -1) and the members m of a group of sites side by side in W:
    y[t, columns of m] = x[t] @ W[columns of m].T + bias + sum over the rank blocks i of (site + m, s) of
    scale[i] · (sum_k z[k, t, ranks of i]) @ B_i
    x: [T, K], W: [N, K], bias: [N], y: [T, N] in x's dtype, T at most ROOM; z: what `lora.lora_shrink` left, and
    everything that belongs to adapters as `lora` has it. Sums are float32; z, summed and scaled, is in x's dtype.

The weights are the first operand and the rows the columns of the second, as in `moe`: tensor cores then take 64 rows of
weights and 16, 32 or 64 of x. A program computes `features` features of all rows from one of `splits` parts of K. It
multiplies the rank blocks whose number in their site is its part's, modulo `splits`, so that all programs share the
factors; the last of a block's programs to finish adds the parts up in their order. y is written once and read never.

With a `write` the members are q, k and v, and that last program rotates them and puts k and v into their pages, as
`kv_write.rotary_kv_write` would: y is given q only. A block then is of both halves of heads (`paired_columns`), so that
the two elements of a pair are in one program however long a head is.

A row's bits depend on nothing but the row, its adapter and the configuration: not on the rows beside it, not on how
many there are, not on whether the step has adapters. Which splits and steps a sum has therefore follows from N and K
alone, and the products of rank blocks that a row does not own add zeros. (cuBLAS chooses by the number of rows.)

Weights, factors, tiles, positions, slots and tables are read before waiting for the kernel in front: no kernel of the
same chain may write them. With an update that kernel is `lora_shrink`, which starts this one when x is complete.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.gpu.jit import kernel, launch_options, tl, triton
from motet.kernels.gpu.kv_write import KVWrite, paired_columns, rotary_places, write_heads
from motet.kernels.gpu.lora import FACTOR_ALIGNMENT, RANKS, TILES, LoraTiles, RankBlocks, check_config

ROOM = 64
"""Rows that the kernel takes."""
MOST_ROWS = 32
"""Rows up to which a step multiplies with this kernel; with more, cuBLAS and `lora_add` do.

gpt-oss-20b's q k v and o with adapters on an H200, in microseconds: 15.1 and 12.5 against 17.4 and 16.9 at one row,
22.4 and 15.7 against 21.5 and 20.1 at 16, 26.0 and 19.6 against 23.0 and 21.2 at 32, 32.6 and 26.1 against 27.0 and
21.4 at 64.
"""
MOST_BLOCKS = 1024
"""Blocks of features that may have their sums split."""
PROGRAMS = 264
"""Programs aimed at: two on each of 132 multiprocessors."""
LEAST_STEPS = 4
"""Steps of the loop that a part of K has at least."""
SHARED_BYTES = 112 << 10
"""Shared memory of the pipeline's stages, so that two programs fit on a multiprocessor."""
LEAST_ROWS = 16
"""Rows of a program at least: with 8 Triton takes `mma`, from 16 on `wgmma`, which need not round alike."""
LINE = 64
"""Elements of a cache line."""
UPDATE_TILE = 2048
"""Elements of z that a program multiplies at once, at most: registers."""


@dataclass(frozen=True)
class DenseUpdate:
    """What adapters change of a product: table, first site and widths of its members, tiles (those without rows last),
    and z [slices, T or more, columns] from `lora_shrink`."""

    table: RankBlocks
    site: int
    widths: tuple[int, ...]
    tiles: LoraTiles
    z: Tensor


@dataclass(frozen=True)
class DenseConfig:
    """How the product is compiled: `features` of a program, `depth` columns of K per step of the loop, warps, stages of
    the pipeline at most, `splits` of K; `ranks` of updates multiplied at once; columns of each row of weights that are
    ordered from memory while the kernel in front ends (`prefetch`); whether masks go where sizes divide (`even`)."""

    features: int = 64
    depth: int = 64
    warps: int = 4
    stages: int = 8
    splits: int = 1
    ranks: int = 128
    prefetch: int = 0
    even: bool = True

    def __post_init__(self) -> None:
        least = {"features": 64, "depth": 16, "warps": 4, "ranks": RANKS, "prefetch": 0}
        check_config(self, least, ("features", "depth", "warps", "ranks", "prefetch"))
        if self.warps * 16 > self.features:
            raise ConfigError(f"warps = {self.warps}: every four need 64 of features = {self.features}")
        if 0 < self.prefetch < LINE:
            raise ConfigError(f"prefetch = {self.prefetch} must be 0 or at least {LINE}, a cache line")


@cache
def dense_config(features: int, depth: int) -> DenseConfig:
    """How to compile a product [T, depth] → [T, features], whatever T: few features have their sums split."""
    step = 128 if depth % 128 == 0 else 64
    blocks, steps = -(-features // 64), -(-depth // step)
    splits = max(min(PROGRAMS // blocks, steps // LEAST_STEPS), 1)
    return DenseConfig(depth=step, stages=512 // step, splits=-(-steps // -(-steps // splits)))


def arrivals(device: torch.device | str) -> Tensor:
    """Counters for split sums, zero between launches; launches that may overlap need their own."""
    return torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=device)


def dense_product_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, update: DenseUpdate | None = None
) -> None:
    """Reference in float64, tile by tile and rank block by rank block; `update.z` is what shrink left."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias
    if update is not None:
        table, tiles = update.table, update.tiles
        for slot, start, rows in torch.stack([tiles.slot, tiles.start, tiles.rows], 1).tolist():
            column = at = 0
            for member, width in enumerate(update.widths):
                first = int(table.first[update.site + member, slot])
                for i in range(first, first + (int(table.count[update.site + member, slot]) if rows else 0)):
                    rank, begin = int(table.rank[i]), int(table.b[i])
                    b = table.pool[begin : begin + rank * width].view(rank, width).double()
                    z = update.z[:, start : start + rows, at : at + rank].double().sum(0) * table.scale[i]
                    y[start : start + rows, column : column + width] += z @ b
                    at += RANKS
                column += width
    out.copy_(y)


def dense_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    arrived: Tensor,
    config: DenseConfig,
    *,
    update: DenseUpdate | None = None,
    write: KVWrite | None = None,
    pdl: bool = False,
) -> None:
    """Fill out; see the module's semantics. `arrived` is from `arrivals`; x's rows may lie apart. A `write` must be
    fusible."""
    count, depth = x.shape
    features = len(weight)
    if update is not None and not len(update.tiles.slot):  # nor was shrink launched, whose end this waits for
        update = None
    widths = (features,) if update is None else update.widths
    if write is not None:
        assert write.fusible
        assert update is None or widths == write.widths
        widths = write.widths
    blocks = sum(triton.cdiv(width, config.features) for width in widths)
    assert 0 < count <= ROOM
    assert weight.shape[1] == depth
    assert sum(widths) == features
    assert out.shape == (count, features)
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert out.is_contiguous()
    dim = 0 if write is None else write.kv.head_dim
    rows = max(triton.next_power_of_2(count), LEAST_ROWS)
    steps = triton.cdiv(depth, config.depth)
    each = triton.cdiv(steps, config.splits)
    splits = triton.cdiv(steps, each)
    assert splits == 1 or blocks <= len(arrived)
    partial = x.new_empty(splits, blocks, config.features, rows, dtype=torch.float32) if splits > 1 else out
    stage = (config.features + rows) * config.depth * x.element_size()
    _dense_kernel[(blocks, splits)](
        out, x, weight, weight if bias is None else bias, partial, arrived, *_update_arguments(update, arrived, count),
        *_write_arguments(write, arrived, count), count, x.stride(0), MEMBERS=len(widths), WIDTHS=tuple(widths),
        N=features, K=depth, BIAS=bias is not None, UPDATE=update is not None, DIM=dim,
        RUN=math.gcd(dim // 2, config.features // 2), PAGE_TOKENS=0 if write is None else write.kv.page_tokens,
        ALIGNED=math.gcd(*widths, FACTOR_ALIGNMENT), ROWS=rows, F=config.features,
        DEPTH=config.depth, PART=each * config.depth, SPLITS=splits,
        RANKS=max(min(config.ranks, UPDATE_TILE // rows), RANKS),
        EVEN_N=config.even and all(width % config.features == 0 for width in widths),
        EVEN_K=config.even and depth % config.depth == 0, PREFETCH=config.prefetch, LINE=LINE,
        STAGES=max(min(config.stages, SHARED_BYTES // stage), 1), num_warps=config.warps, **launch_options(pdl),
    )  # fmt: skip


def _update_arguments(update: DenseUpdate | None, nothing: Tensor, rows: int) -> tuple[Tensor | int, ...]:
    """What the kernel takes of an update, or stand-ins."""
    if update is None:
        return (nothing,) * 10 + (0,) * 6
    table, tiles, z = update.table, update.tiles, update.z
    assert z.is_contiguous()
    assert z.shape[1] >= rows
    assert len(tiles.slot) <= rows
    return (
        z, tiles.slot, tiles.start, tiles.rows, table.first, table.count, table.b, table.rank, table.scale, table.pool,
        update.site, table.first.stride(0), len(tiles.slot), *z.shape,
    )  # fmt: skip


def _write_arguments(write: KVWrite | None, nothing: Tensor, rows: int) -> tuple[Tensor | int, ...]:
    """Likewise of a write."""
    if write is None:
        return (nothing,) * 5 + (0,) * 2
    how, kv = write.how, write.kv
    assert len(write.positions) == len(write.slots) == rows
    assert how.cos.shape[1] * 2 == kv.head_dim
    assert kv.planes == 2
    return write.positions, write.slots, how.cos, how.sin, kv.flat, write.layer, kv.page_stride


@kernel(do_not_specialize=[*TILES, "rows", "site", "slots", "tiles", "slices", "z_rows", "layer"])
def _dense_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    y, x, weight, bias, partial, arrived, z, tile_slot, tile_start, tile_rows, first, count, b, rank, scale, pool,
    site, slots, tiles, slices, z_rows, z_columns, positions, kv_slots, cos, sin, flat, layer, page_stride, rows,
    x_stride,
    MEMBERS: tl.constexpr, WIDTHS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    UPDATE: tl.constexpr, DIM: tl.constexpr, RUN: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, DEPTH: tl.constexpr,
    PART: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PREFETCH: tl.constexpr, LINE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    # Whose features these are: columns from `left` on of the member's `width`, which begin at feature `origin`.
    member, width, origin, left, passed, gone = 0, WIDTHS[0], 0, block * F, 0, 0
    for m in tl.static_range(1, MEMBERS):
        passed += (WIDTHS[m - 1] + F - 1) // F
        gone += WIDTHS[m - 1]
        member = tl.where(block >= passed, m, member)
        width = tl.where(block >= passed, WIDTHS[m], width)
        left = tl.where(block >= passed, (block - passed) * F, left)
        origin = tl.where(block >= passed, gone, origin)
    n, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    if DIM > 0:
        column = paired_columns(left, F, DIM, RUN)
        feature = tl.multiple_of(origin, ALIGNED) + column
    else:
        column = left + tl.arange(0, F)
        feature = tl.multiple_of(origin + left, ALIGNED) + tl.arange(0, F)
    begin = split * PART
    if EVEN_N:
        w_row = weight + feature.to(tl.int64)[:, None] * K + begin
    else:
        w_row = weight + tl.minimum(feature, origin + width - 1).to(tl.int64)[:, None] * K + begin
    x_row = x + tl.minimum(n, rows - 1).to(tl.int64)[:, None] * x_stride + begin
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            _prefetch(w_row + tl.minimum(tl.arange(0, PREFETCH // LINE) * LINE, K - 1 - begin)[None, :])
    if DIM > 0:
        slot = tl.load(kv_slots + n, n < rows, other=-1)
        angle = rotary_places(left, tl.load(positions + n, n < rows, other=0), F, DIM)
        if not UPDATE:  # while the kernel in front ends
            c, s = tl.load(cos + angle), tl.load(sin + angle)
    if PDL and not UPDATE:
        tl.extra.cuda.gdc_wait()

    if UPDATE:  # the first factors are on their way while the loop runs
        items, per = _items(split, tile_slot, tile_rows, count, site, slots, member, tiles, ROWS, SPLITS)
        w, by, before, low, high = _factors(
            0, items, per, split, tile_slot, tile_start, tile_rows, first, count, b, rank, scale, pool, site, slots,
            member, width, column, MEMBERS, SPLITS, RANKS, ALIGNED, EVEN_N,
        )  # fmt: skip

    acc = tl.zeros((F, ROWS), tl.float32)
    w_at, x_at = w_row + k[None, :], x_row + k[None, :]
    for step in tl.range(begin, tl.minimum(begin + PART, K), DEPTH, num_stages=STAGES):
        if EVEN_K:
            a, v = tl.load(w_at), tl.load(x_at)
        else:
            there = (step + k < K)[None, :]
            a, v = tl.load(w_at, there, other=0.0), tl.load(x_at, there, other=0.0)
        acc = tl.dot(a, tl.trans(v), acc, input_precision="ieee")
        w_at += DEPTH
        x_at += DEPTH

    if UPDATE:
        if DIM > 0:
            c, s = tl.load(cos + angle), tl.load(sin + angle)
        if PDL:
            tl.extra.cuda.gdc_wait()
        for item in tl.range(0, items, RANKS // 16, num_stages=1):
            v = _shrunk(z, n, by, before, low, high, slices, z_rows, z_columns, ROWS, RANKS)
            w = tl.reshape(w, (RANKS, F)).to(x.dtype.element_ty)
            acc = tl.dot(tl.trans(w), v.to(x.dtype.element_ty), acc, input_precision="ieee")
            w, by, before, low, high = _factors(
                item + RANKS // 16, items, per, split, tile_slot, tile_start, tile_rows, first, count, b, rank, scale,
                pool, site, slots, member, width, column, MEMBERS, SPLITS, RANKS, ALIGNED, EVEN_N,
            )  # fmt: skip

    if SPLITS > 1:
        SIZE: tl.constexpr = F * ROWS
        mine = partial + block * SIZE + tl.arange(0, F)[:, None] * ROWS + n[None, :]
        apart = tl.num_programs(0) * SIZE
        tl.store(mine + split * apart, acc)
        tl.debug_barrier()  # all warps' stores come before the arrival
        if tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        tl.store(arrived + block, 0)
        acc = tl.zeros((F, ROWS), tl.float32)
        for i in tl.static_range(SPLITS):
            acc += tl.load(mine + i * apart, cache_modifier=".cg")
    fits = column < width
    if BIAS:
        acc += tl.load(bias + feature, fits, other=0.0).to(tl.float32)[:, None]
    if DIM > 0:
        write_heads(
            acc, c, s, y, flat, member, left, width, n, rows, slot, layer, page_stride, N, DIM, PAGE_TOKENS,
            WIDTHS[1] // DIM,
        )  # fmt: skip
    else:
        to = y + n.to(tl.int64)[None, :] * N + feature[:, None]
        tl.store(to, acc.to(y.dtype.element_ty), (n < rows)[None, :] & fits[:, None])


@kernel()
def _items(  # type: ignore[no-untyped-def]
    split, tile_slot, tile_rows, count, site, slots, member, tiles, ROWS: tl.constexpr, SPLITS: tl.constexpr
):
    """How many (tile, rank block) there are for this part of K, and how many of each tile.

    Every tile is given the rank blocks of the one that has most; a tile has a row, so there are at most ROWS.
    """
    e = tl.arange(0, ROWS)
    used = tl.load(tile_rows + e, e < tiles, other=0) > 0
    slot = tl.load(tile_slot + e, used, other=0)
    blocks = tl.max(tl.load(count + (site + member) * slots + slot, used, other=0), 0)
    per = tl.maximum(blocks - split + SPLITS - 1, 0) // SPLITS
    return tl.sum(used.to(tl.int32), 0) * per, tl.maximum(per, 1)


@kernel()
def _factors(  # type: ignore[no-untyped-def]
    item, items, per, split, tile_slot, tile_start, tile_rows, first, count, b, rank, scale, pool, site, slots,
    member, width, column,
    MEMBERS: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, ALIGNED: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Of RANKS / 16 items from `item` on: B [items, 16, F], zeros where there is no such rank; each one's scale, rank
    block of z, first row and row after the last. Items that do not exist have no rows."""
    i = item + tl.arange(0, RANKS // 16)
    tile, block, there = i // per, split + i % per * SPLITS, i < items
    slot = tl.load(tile_slot + tile, there, other=0)
    at = (site + member) * slots + slot
    there = there & (block < tl.load(count + at, there, other=0))
    index = tl.load(first + at, there, other=0) + block
    r = tl.arange(0, 16)
    inside = (r[None, :] < tl.load(rank + index, there, other=0)[:, None])[:, :, None]
    if not EVEN_N:
        inside = inside & (column < width)[None, None, :]
    factor = tl.multiple_of(
        tl.load(b + index, there, other=0)[:, None] + r[None, :] * width, (ALIGNED, ALIGNED)
    )
    w = tl.load(pool + factor[:, :, None] + column[None, None, :], inside, other=0.0)
    before = block
    for m in tl.static_range(MEMBERS - 1):  # shrink has a slot's rank blocks one member after the other
        before += tl.load(count + (site + m) * slots + slot, there & (m < member), other=0)
    low = tl.load(tile_start + tile, there, other=0)
    high = low + tl.load(tile_rows + tile, there, other=0)
    return w, tl.load(scale + index, there, other=0.0), before, low, high


@kernel()
def _shrunk(  # type: ignore[no-untyped-def]
    z, n, by, before, low, high, slices, z_rows, z_columns, ROWS: tl.constexpr, RANKS: tl.constexpr
):
    """z [RANKS, ROWS] of the rank blocks `before` of rows [low, high): slices summed in their order, and scaled."""
    owns = ((n[None, :] >= low[:, None]) & (n[None, :] < high[:, None]))[:, None, :]
    at = z + (before[:, None] * 16 + tl.arange(0, 16)[None, :])[:, :, None] + (n * z_columns)[None, None, :]
    total = tl.zeros((RANKS // 16, 16, ROWS), tl.float32)
    for four in range(0, slices, 4):  # on their way together
        for i in tl.static_range(4):
            part = at + (four + i) * z_rows * z_columns
            total += tl.load(part, owns & (four + i < slices), other=0.0)
    return tl.reshape(total * by[:, None, None], (RANKS, ROWS))


@kernel()
def _prefetch(at):  # type: ignore[no-untyped-def]
    """Order the cache lines at these addresses from memory; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )
