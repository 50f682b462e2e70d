"""Low-rank updates of many adapters in one batch, for projections that all rows take: shrink, then expand in place.

Semantics, for a row t of adapter slot s and the members m of a group of sites that read the same x (q k v; gate up):
    y[t, columns of m] += sum over the rank blocks i of (site + m, s) of scale[i] · (x[t] @ A_i.T) @ B_i
    x: [T, K], y: [T, sum(widths)] bfloat16; A_i: [rank[i], K] and B_i: [rank[i], widths[m]] row-major in the pool.
    shrink: z[k, t, 16·j + r] = x[t, slice k] · A_i[r, slice k] for the j-th rank block i of the group, members in order
    expand: y[t, columns of m] += scale · (sum_k z[k, t]) @ B, with z rounded to bfloat16 and the sum in float32

A rank block is a run of at most 16 ranks of a chunk of an adapter. Where rank blocks lie, how many a (site, slot) has
and which rows take which slot is data; the grids depend on shapes only. Programs without work end at once, rows of
the base model are in no tile, any rank works (programs loop over rank blocks), and slices of K are added in a fixed
order. Where gate and up share A, both read the same addresses at the same time: the second read hits the L2 cache.

Programs are numbered so that those of `group` tiles that take the same ranks or columns follow each other, then those
of the next ranks or columns, then the next tiles: a factor is fetched into the L2 cache once per group. Masks of K and
of columns go where sizes divide.

The factors, tiles and the table are read before waiting for the kernel in front: no kernel of the same chain may write
them. Shrink lets its successor start when x is complete, so that `dense` may multiply by x while shrink runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.gpu.jit import kernel, launch_options, tl, triton

RANKS = 16
"""Most ranks of a rank block: the depth of one tensor-core product."""
TILES = ("tile_slot", "tile_start", "tile_rows")
"""Arguments that are not specialised on where they begin: they are rows of a matrix as wide as a step has tiles."""
FACTOR_ALIGNMENT = 32
"""Factors begin at multiples of so many elements (64 bytes) of the pool."""


@dataclass(frozen=True)
class RankBlocks:
    """The pointer table on the device.

    first, count: [sites, slots] int32, the run of rank blocks of a site and slot. a, b: [blocks] int64, where A and B
    begin in `pool` [elements] bfloat16; rank [blocks] int32 in 1..16; scale [blocks] float32.
    """

    first: Tensor
    count: Tensor
    a: Tensor
    b: Tensor
    rank: Tensor
    scale: Tensor
    pool: Tensor


@dataclass(frozen=True)
class LoraTiles:
    """Tile i is the rows [start[i], start[i] + rows[i]), all of adapter slot[i]; [N] int32 each, rows 0: unused."""

    slot: Tensor
    start: Tensor
    rows: Tensor


def check_config(config: object, least: Mapping[str, int], powers: Collection[str]) -> None:
    """ConfigError that names a field of a dataclass of numbers below its `least` (if not given, 1), or one of `powers`
    that is no power of two."""
    for name, value in vars(config).items():
        if isinstance(value, bool):
            continue
        if value < least.get(name, 1):
            raise ConfigError(f"{name} = {value} must be at least {least.get(name, 1)}")
        if name in powers and value & (value - 1):
            raise ConfigError(f"{name} = {value} must be a power of two")


@dataclass(frozen=True)
class LoraConfig:
    """How the pair of kernels is compiled.

    `rows` of a tile. Shrink: `slice` of K per program, `depth` of it per step of the loop, `ranks` per program,
    `groups` of programs over the ranks, each taking its share. Expand: `columns` of y, `expand_ranks` per step. Both:
    tiles of a `group` (0: all), whether masks go where sizes divide (`even`).
    """

    rows: int
    slice: int
    depth: int
    ranks: int
    groups: int
    shrink_warps: int
    columns: int
    expand_ranks: int
    expand_warps: int
    stages: int = 3
    group: int = 0
    even: bool = True

    def __post_init__(self) -> None:
        tiles = ("rows", "depth", "ranks", "columns", "expand_ranks")
        least = dict.fromkeys(tiles, RANKS) | {"group": 0}
        check_config(self, least, (*tiles, "shrink_warps", "expand_warps"))
        if self.slice % self.depth:
            raise ConfigError(f"slice = {self.slice} must be a multiple of depth = {self.depth}")

    def slices(self, depth: int) -> int:
        """How many partial sums shrink leaves of a dot product `depth` long."""
        return -(-depth // self.slice)


DECODE = LoraConfig(
    rows=16, slice=512, depth=512, ranks=16, groups=8, shrink_warps=4, columns=128, expand_ranks=32, expand_warps=4
)  # fmt: skip
PREFILL = LoraConfig(
    rows=64, slice=2048, depth=64, ranks=32, groups=4, shrink_warps=4, columns=128, expand_ranks=32, expand_warps=4
)  # fmt: skip


def row_tiles(slots: NDArray[np.integer], rows: int) -> NDArray[np.int32]:
    """[3, N]: slot, start and rows of the tiles of at most `rows` rows; `slots` [T] is -1 for rows of the base."""
    edges = np.flatnonzero(np.diff(slots, prepend=-2, append=-2))
    tiles = [
        (slots[run], start, min(rows, end - start))
        for run, end in pairwise(edges)
        if slots[run] >= 0
        for start in range(run, end, rows)
    ]
    return np.array(tiles, np.int32).reshape(-1, 3).T.copy()


def shrunk(rows: int, depth: int, columns: int, config: LoraConfig, device: torch.device | str) -> Tensor:
    """A workspace z for `rows` rows whose groups have at most `columns` / 16 rank blocks in one slot."""
    return torch.empty(config.slices(depth), rows, columns, device=device)


def lora_add_torch(
    y: Tensor, x: Tensor, table: RankBlocks, site: int, widths: Sequence[int], tiles: LoraTiles
) -> None:
    """Reference: tile by tile and rank block by rank block."""
    column = 0
    for member, width in enumerate(widths):
        for slot, start, rows in torch.stack([tiles.slot, tiles.start, tiles.rows], 1).tolist():
            first = int(table.first[site + member, slot])
            for i in range(first, first + int(table.count[site + member, slot])):
                rank, at, bt = int(table.rank[i]), int(table.a[i]), int(table.b[i])
                a = table.pool[at : at + rank * x.shape[1]].view(rank, -1).to(x.dtype)
                b = table.pool[bt : bt + rank * width].view(rank, -1).to(x.dtype)
                y[start : start + rows, column : column + width] += (
                    x[start : start + rows] @ a.T @ b * table.scale[i]
                )
        column += width


def lora_add(
    y: Tensor,
    x: Tensor,
    table: RankBlocks,
    site: int,
    widths: Sequence[int],
    tiles: LoraTiles,
    z: Tensor,
    config: LoraConfig,
    *,
    pdl: bool = False,
) -> None:
    """Shrink and expand; see the module's semantics."""
    lora_shrink(x, table, site, len(widths), tiles, z, config, pdl=pdl)
    lora_expand(y, table, site, widths, tiles, z, config, pdl=pdl)


def lora_shrink(
    x: Tensor,
    table: RankBlocks,
    site: int,
    members: int,
    tiles: LoraTiles,
    z: Tensor,
    config: LoraConfig,
    *,
    pdl: bool = False,
) -> None:
    """Writes z [slices, T or more, columns] (`shrunk`) of sites `site` … `site + members - 1`."""
    depth = x.shape[1]
    assert x.is_contiguous()
    assert z.is_contiguous()
    assert z.shape[0] == config.slices(depth)
    assert z.shape[1] >= len(x)
    if len(tiles.slot):
        groups = min(config.groups, -(-z.shape[2] // config.ranks))
        together = config.group or len(tiles.slot)
        _shrink_kernel[(triton.cdiv(len(tiles.slot), together) * together * groups, z.shape[0])](
            x, z, tiles.slot, tiles.start, tiles.rows, table.first, table.count, table.a, table.rank, table.pool,
            len(tiles.slot), together, groups, site, table.first.stride(0), z.shape[1], z.shape[2], MEMBERS=members,
            DEPTH=depth, ALIGNED=math.gcd(depth, FACTOR_ALIGNMENT), SLICE=config.slice, BLOCK_M=config.rows,
            BLOCK_R=config.ranks, BLOCK_K=config.depth, EVEN=config.even and depth % config.depth == 0,
            STAGES=config.stages, num_warps=config.shrink_warps, **launch_options(pdl),
        )  # fmt: skip


def lora_expand(
    y: Tensor,
    table: RankBlocks,
    site: int,
    widths: Sequence[int],
    tiles: LoraTiles,
    z: Tensor,
    config: LoraConfig,
    *,
    pdl: bool = False,
) -> None:
    """Adds to y [T, sum(widths)] what `lora_shrink` left in z, in place."""
    assert y.is_contiguous()
    assert y.shape[1] == sum(widths)
    if len(tiles.slot):
        blocks = sum(-(-width // config.columns) for width in widths)
        together = config.group or len(tiles.slot)
        _expand_kernel[(triton.cdiv(len(tiles.slot), together) * together * blocks,)](
            y, z, tiles.slot, tiles.start, tiles.rows, table.first, table.count, table.b, table.rank, table.scale,
            table.pool, len(tiles.slot), together, site, table.first.stride(0), z.shape[1], z.shape[2],
            MEMBERS=len(widths), WIDTHS=tuple(widths), TOTAL=sum(widths), BLOCKS=blocks,
            ALIGNED=math.gcd(*widths, FACTOR_ALIGNMENT), SLICES=z.shape[0],
            SLICES_PADDED=triton.next_power_of_2(z.shape[0]), BLOCK_M=config.rows, BLOCK_R=config.expand_ranks,
            BLOCK_N=config.columns, EVEN=config.even and all(width % config.columns == 0 for width in widths),
            num_warps=config.expand_warps, **launch_options(pdl),
        )  # fmt: skip


@kernel()
def _place(program, across, together, tiles, tile_rows):  # type: ignore[no-untyped-def]
    """A program's tile, its rows, and which of the `across` programs of the tile it is."""
    within = program % (together * across)
    tile = program // (together * across) * together + within % together
    return tile, tl.load(tile_rows + tile, tile < tiles, other=0), within // together


@kernel(do_not_specialize=[*TILES, "tiles", "together", "groups", "site", "slots", "z_rows"])
def _shrink_kernel(  # type: ignore[no-untyped-def]
    x, z, tile_slot, tile_start, tile_rows, first, count, a, rank, pool, tiles, together, groups, site, slots, z_rows,
    z_columns,
    MEMBERS: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr, SLICE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, rows, group = _place(tl.program_id(0), groups, together, tiles, tile_rows)
    split = tl.program_id(1)
    slot, start = tl.load(tile_slot + tile, rows > 0, other=0), tl.load(tile_start + tile, rows > 0, other=0)
    blocks = 0
    if rows > 0:
        for member in tl.static_range(MEMBERS):
            blocks += tl.load(count + (site + member) * slots + slot)
    m, c, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    x_row = x + (start + m).to(tl.int64)[:, None] * DEPTH
    z_row = z + (split.to(tl.int64) * z_rows + start + m)[:, None] * z_columns
    if PDL and BLOCK_K < SLICE:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Not pipelined: that would move the reads of x in front of the wait.
    for begin in tl.range(group * (BLOCK_R // 16), blocks, groups * (BLOCK_R // 16), num_stages=1):
        block = begin + c // 16
        index, before = block * 0, 0
        for member in tl.static_range(MEMBERS):
            at = (site + member) * slots + slot
            index = tl.where(block >= before, tl.load(first + at) + block - before, index)
            before += tl.load(count + at)
        there = block < blocks
        factor = tl.load(a + index, there, other=0) + (c % 16) * DEPTH
        factor = tl.multiple_of(factor, ALIGNED)
        there &= c % 16 < tl.load(rank + index, there, other=0)
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        if BLOCK_K >= SLICE:  # the factor is on its way while the kernel in front ends
            column = split * SLICE + k
            mine, wanted = there[:, None], (m < rows)[:, None]
            if not EVEN:
                mine, wanted = mine & (column < DEPTH)[None, :], wanted & (column < DEPTH)[None, :]
            w = tl.load(pool + factor[:, None] + column[None, :], mine, other=0.0)
            if PDL:
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            v = tl.load(x_row + column[None, :], wanted, other=0.0)
            acc = tl.dot(v, tl.trans(w).to(v.dtype), acc, input_precision="ieee")
        else:
            for step in tl.range(
                split * SLICE, tl.minimum(split * SLICE + SLICE, DEPTH), BLOCK_K, num_stages=STAGES
            ):
                column = step + k
                mine, wanted = there[:, None], (m < rows)[:, None]
                if not EVEN:
                    mine, wanted = mine & (column < DEPTH)[None, :], wanted & (column < DEPTH)[None, :]
                w = tl.load(pool + factor[:, None] + column[None, :], mine, other=0.0)
                v = tl.load(x_row + column[None, :], wanted, other=0.0)
                acc = tl.dot(v, tl.trans(w).to(v.dtype), acc, input_precision="ieee")
        tl.store(z_row + (begin * 16 + c)[None, :], acc, (m < rows)[:, None] & (block < blocks)[None, :])
    if PDL:  # programs without work too, the wait first
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@kernel(do_not_specialize=[*TILES, "tiles", "together", "site", "slots", "z_rows"])
def _expand_kernel(  # type: ignore[no-untyped-def]
    y, z, tile_slot, tile_start, tile_rows, first, count, b, rank, scale, pool, tiles, together, site, slots, z_rows,
    z_columns,
    MEMBERS: tl.constexpr, WIDTHS: tl.constexpr, TOTAL: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
    SLICES: tl.constexpr, SLICES_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, rows, n_block = _place(tl.program_id(0), BLOCKS, together, tiles, tile_rows)
    slot, start = tl.load(tile_slot + tile, rows > 0, other=0), tl.load(tile_start + tile, rows > 0, other=0)
    # Whose columns these are: `width` of them from column `origin` of y, `skipped` rank blocks before them in z.
    width, origin, where, skipped, passed, blocks, counted = 0, 0, 0, 0, 0, 0, 0
    left = 0
    for member in tl.static_range(MEMBERS):
        at = (site + member) * slots + slot
        here = 0
        if rows > 0:
            here = tl.load(count + at)
        if (n_block >= passed) & (n_block < passed + (WIDTHS[member] + BLOCK_N - 1) // BLOCK_N):
            width, where, skipped, blocks = WIDTHS[member], at, counted, here
            left = (n_block - passed) * BLOCK_N
            origin = 0
            for other in tl.static_range(MEMBERS):
                if other < member:
                    origin += WIDTHS[other]
        passed += (WIDTHS[member] + BLOCK_N - 1) // BLOCK_N
        counted += here
    if blocks == 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return

    m, c, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), left + tl.arange(0, BLOCK_N)
    run = tl.load(first + where) + c // 16
    w = _expand_factor(pool, b, rank, run, blocks - c // 16, c % 16, width, n, ALIGNED, EVEN)
    if PDL:  # with the first factors on their way
        tl.extra.cuda.gdc_wait()
    to = y + (start + m).to(tl.int64)[:, None] * TOTAL + tl.multiple_of(origin + left, ALIGNED)
    to += tl.arange(0, BLOCK_N)[None, :]
    inside = (m < rows)[:, None]
    if not EVEN:
        inside = inside & (n < width)[None, :]
    acc = tl.load(to, inside, other=0.0).to(tl.float32)
    part = tl.arange(0, SLICES_PADDED)[:, None, None]
    z_row = z + (part.to(tl.int64) * z_rows + (start + m)[None, :, None]) * z_columns
    z_row += (skipped * 16 + c)[None, None, :]
    z_inside = (part < SLICES) & (m < rows)[None, :, None]
    for begin in tl.range(0, blocks, BLOCK_R // 16, num_stages=1):
        there = begin + c // 16 < blocks
        parts = tl.load(z_row + begin * 16, z_inside & there[None, None, :], other=0.0)
        by = tl.load(scale + run + begin, there, other=0.0)
        v = (tl.sum(parts, axis=0) * by[None, :]).to(y.dtype.element_ty)
        acc = tl.dot(v, w.to(v.dtype), acc, input_precision="ieee")
        ahead = begin + BLOCK_R // 16
        w = _expand_factor(
            pool, b, rank, run + ahead, blocks - ahead - c // 16, c % 16, width, n, ALIGNED, EVEN
        )
    tl.store(to, acc.to(y.dtype.element_ty), inside)


@kernel()
def _expand_factor(  # type: ignore[no-untyped-def]
    pool, b, rank, block, remaining, r, width, n, ALIGNED: tl.constexpr, EVEN: tl.constexpr
):
    """Columns n of the ranks r [R] of rank blocks `block` [R], zeros where no block is `remaining`."""
    there = remaining > 0
    at = tl.multiple_of(tl.load(b + block, there, other=0) + r * width, ALIGNED)
    there &= r < tl.load(rank + block, there, other=0)
    inside = there[:, None]
    if not EVEN:
        inside = inside & (n < width)[None, :]
    return tl.load(pool + at[:, None] + n[None, :], inside, other=0.0)
