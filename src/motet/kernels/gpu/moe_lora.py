"""Updates of experts by many adapters: shrink, and the expand that expert products do on their way out.

Semantics, for the pair at sorted place p of expert e and adapter slot s (`route`), and for each side of a product (gate
and up read the same x, down is alone) whose site of expert 0 is `site + side`:
    shrink: z[p, side, 16·i + r] = scale_i · sum_c x[p, c] · A_i[r, c]
    expand: h[p, features of side] += sum_i z[p, side, ranks of i] @ B_i
    over the rank blocks i of (site + 3·e + side, s) (`lora.RankBlocks`); x is [T, K], read through the sorted order, or
    [P, K] in it. z: [P, sides, R] in x's dtype, R a multiple of 16 that has room for every rank. Sums are float32.

A program of shrink takes one segment and every lanes-th group of rank blocks of a side. Where gate and up share A
(adapters of fused experts), gate's program writes both sides and up's has nothing to do. Expand
takes the rank blocks of a tile's segments as one list and multiplies several at once, each by its own rows: a tile of
8 rows of 4 adapters then waits for memory about as often as one of a single adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.gpu.jit import kernel, launch_options, tl
from motet.kernels.gpu.lora import FACTOR_ALIGNMENT, RANKS, RankBlocks, check_config
from motet.kernels.gpu.route import Sorted


@dataclass(frozen=True)
class ExpertUpdate:
    """What adapters change of one expert product: table, site of expert 0's first side, workspace z."""

    table: RankBlocks
    site: int
    z: Tensor


@dataclass(frozen=True)
class ShrinkConfig:
    """How shrink is compiled: warps, with `split` each of them for columns of its own; columns per product and step;
    ranks of a product (a multiple of 16); programs for the ranks of a side; stages; when the product may start, after
    shrink's wait (`launch` 2) or never before it ends (0): it reads what is complete by then without waiting."""

    warps: int = 8
    split: bool = True
    depth: int = 64
    ranks: int = 16
    lanes: int = 2
    stages: int = 4
    launch: int = 2

    def __post_init__(self) -> None:
        check_config(self, {"ranks": RANKS, "launch": 0}, ("warps", "depth", "ranks"))
        if self.launch not in (0, 2):
            raise ConfigError(f"launch = {self.launch} must be 0 or 2")


DECODE = ShrinkConfig()
PREFILL = ShrinkConfig(warps=4, split=False, ranks=32, lanes=1, stages=3)


def shrunk(pairs: int, sides: int, ranks: int, x: Tensor) -> Tensor:
    """A workspace z for `pairs` pairs of x and adapters of at most `ranks` ranks, each chunk counted up to 16."""
    return torch.empty(pairs, sides, -(-ranks // 16) * 16, dtype=x.dtype, device=x.device)


def shrink_torch(x: Tensor, work: Sorted, update: ExpertUpdate, *, gather: bool) -> None:
    """Reference: segment by segment, rank block by rank block."""
    table, z = update.table, update.z
    for expert, slot, start, rows in work.segments[: int(work.counts[1])].tolist():
        places = torch.arange(start, start + rows, device=x.device)
        source = work.order[places].long() // work.top_k if gather else places
        for side in range(z.shape[1]):
            where = update.site + 3 * expert + side, slot
            first = int(table.first[where])
            for j in range(int(table.count[where])):
                rank, at = int(table.rank[first + j]), int(table.a[first + j])
                a = table.pool[at : at + rank * x.shape[1]].view(rank, -1)
                z[start : start + rows, side, 16 * j : 16 * j + 16] = 0
                part = (x[source].float() @ a.float().T) * table.scale[first + j]
                z[start : start + rows, side, 16 * j : 16 * j + rank] = part.to(z.dtype)


def shrink(
    x: Tensor,
    work: Sorted,
    update: ExpertUpdate,
    *,
    gather: bool,
    config: ShrinkConfig = DECODE,
    pdl: bool = False,
) -> None:
    """Fill update.z; with `gather` x is [T, K] and row t belongs to all pairs of token t, else [P, K] sorted."""
    z, table, depth = update.z, update.table, x.shape[1]
    assert x.is_contiguous()
    assert z.is_contiguous()
    assert z.dtype == x.dtype
    assert len(z) >= len(work.order)
    if len(work.segments):
        lanes = min(config.lanes, -(-z.shape[2] // config.ranks))
        _shrink_kernel[(len(work.segments), z.shape[1] * lanes)](
            z, x, work.order, work.counts, work.segments, table.first, table.count, table.a, table.rank, table.scale,
            table.pool, update.site, table.first.stride(0), z.shape[2], SIDES=z.shape[1], LANES=lanes, K=depth,
            TOP_K=work.top_k if gather else 0, ROWS=work.rows, SPLIT=config.warps if config.split else 1,
            RANKS=config.ranks, DEPTH=config.depth, ALIGNED=math.gcd(depth, FACTOR_ALIGNMENT), STAGES=config.stages,
            LAUNCH=config.launch if pdl else 0, num_warps=config.warps, **launch_options(pdl),
        )  # fmt: skip


@kernel(do_not_specialize=["site", "slots"])
def _shrink_kernel(  # type: ignore[no-untyped-def]
    z, x, order, counts, segments, first, count, a, rank, scale, pool, site, slots, z_columns,
    SIDES: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
    LAUNCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    segment, side, lane = tl.program_id(0), tl.program_id(1) // LANES, tl.program_id(1) % LANES
    if PDL:  # in this order: who comes next may then read what route wrote without waiting for this kernel
        tl.extra.cuda.gdc_wait()
        if LAUNCH == 2:
            tl.extra.cuda.gdc_launch_dependents()
    used = tl.load(counts + 1)  # what one row waits for is the chain of loads, so none waits for this one
    expert, slot = tl.load(segments + segment * 4), tl.load(segments + segment * 4 + 1)
    start, rows = tl.load(segments + segment * 4 + 2), tl.load(segments + segment * 4 + 3)
    if segment >= used:
        return
    at = (site + 3 * expert) * slots + slot
    run, blocks = tl.load(first + at + side * slots), tl.load(count + at + side * slots)
    other_run, others = run, blocks
    if SIDES == 2:
        other_run, others = tl.load(first + at + (1 - side) * slots), tl.load(count + at + (1 - side) * slots)

    n, r = tl.arange(0, ROWS), tl.arange(0, RANKS)
    inside = n < rows
    row = start + n
    if TOP_K > 0:
        row = tl.load(order + row, inside, other=0) // TOP_K
    at_x = x + row.to(tl.int64) * K
    at_z = z + ((start + n).to(tl.int64) * SIDES + side)[None, :] * z_columns
    for begin in tl.range(lane * (RANKS // 16), blocks, LANES * (RANKS // 16), num_stages=1):
        block = begin + r // 16
        mine = block < blocks
        offset = tl.load(a + run + block, mine, other=0)
        shared = mine & (side < 0)
        if SIDES == 2:
            shared = mine & (tl.load(a + other_run + block, block < others, other=-1) == offset)
            if side == 1:
                mine = mine & (shared == 0)
        by = tl.load(scale + run + block, mine, other=0.0)[:, None]
        by_other = by
        if SIDES == 2:
            by_other = tl.load(scale + other_run + block, shared, other=0.0)[:, None]
        if tl.max(mine.to(tl.int32), 0) > 0:
            there = mine & (r % 16 < tl.load(rank + run + block, mine, other=0))
            at_a = pool + tl.multiple_of(offset + r % 16 * K, ALIGNED)
            if SPLIT == 1:
                total = _products(at_a, at_x, there, inside, K, RANKS, ROWS, DEPTH, STAGES)
            else:
                total = _split_products(at_a, at_x, there, inside, K, RANKS, ROWS, SPLIT, DEPTH, STAGES)
            to = at_z + (16 * begin + r)[:, None]
            tl.store(to, (total * by).to(z.dtype.element_ty), mine[:, None] & inside[None, :])
            if SIDES == 2:  # only side 0 has something to share
                total = (total * by_other).to(z.dtype.element_ty)
                tl.store(to + z_columns, total, shared[:, None] & (inside & (side == 0))[None, :])


@kernel()
def _products(  # type: ignore[no-untyped-def]
    at_a, at_x, there, inside,
    K: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[RANKS, ROWS] of rows at_a [RANKS] and at_x [ROWS], by all warps together."""
    column = tl.arange(0, DEPTH)[None, :]
    acc = tl.zeros((RANKS, ROWS), tl.float32)
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        fits = column < K - step
        w = tl.load(at_a[:, None] + step + column, there[:, None] & fits, other=0.0)
        v = tl.load(at_x[:, None] + step + column, inside[:, None] & fits, other=0.0)
        acc = tl.dot(w.to(v.dtype), tl.trans(v), acc, input_precision="ieee")
    return acc


@kernel()
def _split_products(  # type: ignore[no-untyped-def]
    at_a, at_x, there, inside,
    K: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The same with one product for each of SPLIT warps, of its columns, added up at the end."""
    column = tl.arange(0, SPLIT)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    acc = tl.zeros((SPLIT, RANKS, ROWS), tl.float32)
    for step in tl.range(0, K, SPLIT * DEPTH, num_stages=STAGES):
        fits = column < K - step
        w = tl.load(at_a[None, :, None] + step + column, there[None, :, None] & fits, other=0.0)
        v = tl.load(at_x[None, :, None] + step + column, inside[None, :, None] & fits, other=0.0)
        acc = tl.dot(w.to(v.dtype), tl.permute(v, (0, 2, 1)), acc, input_precision="ieee")
    return tl.sum(acc, 0)


@kernel()
def most_blocks(segments, begin, end, count, slots, SIDES: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rank blocks of the longest of segments [begin, end) of a tile; `count` is at the site's slot 0."""
    every = begin + tl.arange(0, ROWS)
    count += tl.load(segments + every * 4 + 1, every < end, other=0)
    blocks = tl.max(tl.load(count, every < end, other=0), 0)
    if SIDES == 2:
        blocks = tl.maximum(blocks, tl.max(tl.load(count + slots, every < end, other=0), 0))
    return blocks


@kernel()
def _find(  # type: ignore[no-untyped-def]
    item, segments, begin, end, blocks, at, slots, first, count, b, rank,
    WIDTH: tl.constexpr, SIDES: tl.constexpr, RANKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Of RANKS ranks of segments [begin, end): their segment and rank block, and for each side whether that block
    exists, whether the rank does and where in the pool its row of B begins. `at` is the site's slot 0 in the table.

    Every segment is given `blocks` rank blocks: item i is block i % blocks of segment i // blocks.
    """
    c = tl.arange(0, RANKS)
    i = item + c // 16
    there = i < (end - begin) * blocks
    segment, block = segments + (begin + i // blocks) * 4, i % blocks
    at += tl.load(segment + 1, there, other=0)
    side = _factor(at, block, there, c % 16, first, count, b, rank, WIDTH, ALIGNED)
    side_up = side
    if SIDES == 2:
        side_up = _factor(at + slots, block, there, c % 16, first, count, b, rank, WIDTH, ALIGNED)
    return segment, block, side, side_up


@kernel()
def _factor(at, block, there, r, first, count, b, rank, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    there = there & (block < tl.load(count + at, there, other=0))
    block += tl.load(first + at, there, other=0)
    full = there & (r < tl.load(rank + block, there, other=0))
    return there, full, tl.multiple_of(tl.load(b + block, there, other=0) + r * WIDTH, ALIGNED)


@kernel()
def fetch_factors(  # type: ignore[no-untyped-def]
    segments, begin, end, blocks, feature, at, slots, first, count, b, rank, pool,
    WIDTH: tl.constexpr, SIDES: tl.constexpr, RANKS: tl.constexpr, ALIGNED: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Order what `expand` will read first, columns [feature, feature + F), into the caches."""
    _, _, side, side_up = _find(
        0, segments, begin, end, blocks, at, slots, first, count, b, rank, WIDTH, SIDES, RANKS, ALIGNED
    )
    column = feature + tl.arange(0, F // 16)[None, :] * 16
    fetch(pool + side[2][:, None] + column, side[1][:, None] & (column < WIDTH))
    if SIDES == 2:
        fetch(pool + side_up[2][:, None] + column, side_up[1][:, None] & (column < WIDTH))


@kernel()
def fetch(at, there):  # type: ignore[no-untyped-def]
    """Order 32 bytes at each pointer into the L2 cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [at.to(tl.int64), there.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@kernel()
def expand(  # type: ignore[no-untyped-def]
    acc, up, z, segments, begin, end, blocks, tile_start, feature, fits, at, slots, first, count, b, rank, pool,
    z_columns,
    WIDTH: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """acc [F, ROWS] (and up, the second side's) plus the updates of segments [begin, end) of one tile.

    `feature` [F] are the columns of B that these are, `fits` which of them exist; RANKS ranks are multiplied at once.
    With PDL this waits for shrink.
    """
    n, r = tl.arange(0, ROWS), tl.arange(0, RANKS) % 16
    at_z = z + ((tile_start + n).to(tl.int64) * (SIDES * z_columns))[None, :]
    for item in tl.range(0, (end - begin) * blocks, RANKS // 16, num_stages=1):
        segment, block, side, side_up = _find(
            item, segments, begin, end, blocks, at, slots, first, count, b, rank, WIDTH, SIDES, RANKS, ALIGNED
        )
        w = tl.load(pool + side[2][:, None] + feature[None, :], side[1][:, None] & fits[None, :], other=0.0)
        if SIDES == 2:
            w_up = tl.load(
                pool + side_up[2][:, None] + feature[None, :], side_up[1][:, None] & fits[None, :], other=0.0
            )
        low = tl.load(segment + 2, side[0] | side_up[0], other=0) - tile_start
        high = low + tl.load(segment + 3, side[0] | side_up[0], other=0)
        owns = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        if PDL:
            tl.extra.cuda.gdc_wait()
        at_v = at_z + tl.max_contiguous(tl.multiple_of(16 * block + r, 16), 16)[:, None]
        v = tl.load(at_v, owns & side[0][:, None], other=0.0)
        acc = tl.dot(tl.trans(w).to(v.dtype), v, acc, input_precision="ieee")
        if SIDES == 2:
            v_up = tl.load(at_v + z_columns, owns & side_up[0][:, None], other=0.0)
            up = tl.dot(tl.trans(w_up).to(v.dtype), v_up, up, input_precision="ieee")
    return acc, up
