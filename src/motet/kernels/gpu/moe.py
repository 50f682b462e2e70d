"""Products of experts over sorted pairs, with biases, adapters and activation in them.

Semantics, for the pair at place p of the sorted order (`route`), of expert e and token t:
    h[p] = W_e x[p] (+ update of the pair's adapter, `moe_lora`), times the pair's weight with `weigh_input`, (+ bias_e)
    out[p] = h[p], or with an activation act(first half of h[p], second half of h[p])
    W: [E, N, K] bfloat16 or MXFP4 (`mxfp4.Mxfp4`); x: [T, K], read through the sorted order (`gather`), or [P, K];
    bias: [E, N]; out: [P, N] or [P, N/2]. Sums are float32, in an order that depends on the kernel's configuration
    only (`ProductConfig`): a row's result does not depend on the batch around it, nor on the size of a decode step.

The weights are the first operand and the pairs of a tile the columns of the second: with a few rows per expert the
weights are the large part, and tensor cores take 16 or 64 rows of the first operand but 8 columns of the second. A
program computes `features` features (gate and up of the same ones) of one tile. Decode of MXFP4 multiplies sums of 32
columns by their scales, prefill the weights (`mxfp4`).

In decode each warp of a program has columns of its own (`split`): it reads every weight and every column of x once, and
a step of one row, which waits for memory, has as many warps more that wait. Sums split over programs instead would need
counters and another round through memory. At the end of a program comes a chain of loads (segments, table, factors),
so what it leads to is ordered into the caches at the beginning, after the first weights.

Programs of a kernel that was launched programmatically wait on the multiprocessors while the kernel in front runs. With
every launch at the start of a kernel, whole layers can wait there: a layer of gpt-oss then took 62 us for one row
without adapters and 180 for 16 rows with adapters, instead of 45 and 170 with plain launches. So kernels launch the
next one after their own wait, products of many programs after their main loop (`launch`). Shrink must: the product
after it reads lists and x without waiting, and its weights while shrink runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.activation import Activation, activate_torch
from motet.kernels.gpu.jit import kernel, launch_options, tl, triton
from motet.kernels.gpu.lora import FACTOR_ALIGNMENT, RANKS, check_config
from motet.kernels.gpu.moe_lora import ExpertUpdate, expand, fetch, fetch_factors, most_blocks
from motet.kernels.gpu.mxfp4 import Mxfp4, add_parts, first_group, scales_then_sums, sums_then_scales
from motet.kernels.gpu.route import Sorted


@dataclass(frozen=True)
class ExpertWeights:
    """One linear map of all experts: `weight` [E, N, K], `bias` [E, N] or None."""

    weight: Tensor | Mxfp4
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, N, K."""
        if isinstance(self.weight, Mxfp4):
            experts, tiles, groups, _ = self.weight.words.shape
            return experts, tiles * 32, groups * 32
        experts, features, depth = self.weight.shape
        return experts, features, depth

    def of(self, expert: int) -> Tensor:
        """The plain weight [N, K] of one expert."""
        if isinstance(self.weight, Mxfp4):
            return Mxfp4(self.weight.words[expert], self.weight.scales[expert]).dequantise()
        return self.weight[expert]


@dataclass(frozen=True)
class ProductConfig:
    """How a product is compiled.

    `features` of a program (of each half, with an activation), `depth` columns of K per step of each part, warps and
    stages; `ranks` of updates multiplied at once; `group` of tiles that share weights in the L2 cache; `wgmma`: MXFP4
    for many rows, weights scaled; `split` parts of a sum (a power of two, at least the warps if not 1) take turns of
    `depth` columns and are added up at the end. A sum's order follows from split and depth, and from nothing else as
    long as Triton takes `mma` for it: split or few warps.

    `ahead`: the first weights, biases and factors are ordered into the L2 cache before anything waits for them.
    `launch`: the next kernel may start never before this one ends (0), with it (1), after its wait (2) or after its
    main loop (3). `registers` of a thread at most; 0: what the compiler likes.
    """

    features: int
    depth: int
    warps: int
    stages: int
    ranks: int = 64
    group: int = 1
    wgmma: bool = False
    split: int = 1
    ahead: bool = False
    launch: int = 2
    registers: int = 0

    def __post_init__(self) -> None:
        least = {"ranks": RANKS, "launch": 0, "registers": 0}
        check_config(self, least, ("features", "warps", "ranks", "split"))
        if self.split > 1 and (self.wgmma or self.split < self.warps):
            raise ConfigError(
                f"split = {self.split} must be 1 with wgmma and else at least warps = {self.warps}"
            )
        if self.launch > 3:
            raise ConfigError(f"launch = {self.launch} must be at most 3")


FEW_TILES = 32
"""Up to so many tiles a product has too few programs for more than one to follow another on a multiprocessor."""


def tile_rows(tokens: int, top_k: int, num_experts: int) -> int:
    """Rows of a tile for a batch: about twice what an expert gets when the router spreads them evenly."""
    even = tokens * top_k / num_experts
    return next((rows for limit, rows in ((4, 8), (10, 16), (24, 32), (64, 64)) if even <= limit), 128)


def product_config(weights: ExpertWeights, sides: int, rows: int, tiles: int = 1024) -> ProductConfig:
    """How to compile a product with `sides` sides of at most `tiles` tiles with `rows` rows.

    Tiles of up to 16 rows, those of decode steps, get the same `split` and `depth` however many there are.
    """
    depth = weights.shape[2]
    if isinstance(weights.weight, Mxfp4):
        if rows <= 16:
            few = tiles <= FEW_TILES
            step = next(step for step in (96, 128, 64, 32) if depth % step == 0)
            return ProductConfig(  # ahead costs gate and up, which have twice the factors to find, 1.7 % of a step
                32 if few or sides == 2 else 64, step, 2, 3, split=2, ahead=sides == 1, launch=2 if few else 3
            )
        step = 64 if depth % 64 == 0 else 32
        group = 1 if rows < 64 else 4
        return ProductConfig(128 // sides, step, 4, 3, ranks=16, group=group, wgmma=True)
    if rows <= 32:
        return ProductConfig(64, 64, warps=4, stages=4, ranks=32)
    return ProductConfig(256 // sides, 64, warps=8, stages=4, ranks=16, group=4)


def product_torch(
    x: Tensor, weights: ExpertWeights, work: Sorted, out: Tensor, *, gather: bool,
    activation: Activation | None = None, update: ExpertUpdate | None = None, weigh_input: bool = False,
) -> None:  # fmt: skip
    """Reference in float64, tile by tile; `update.z` is what shrink left."""
    for expert, start, rows, first, end in work.tiles[: int(work.counts[0])].tolist():
        places = torch.arange(start, start + rows, device=x.device)
        pairs = work.order[places].long()
        h = x[pairs // work.top_k if gather else places].double() @ weights.of(expert).double().T
        for segment in range(first, end) if update is not None else ():
            _, slot, begin, count = work.segments[segment].tolist()
            _expand_torch(h[begin - start : begin - start + count], update, expert, slot, begin)
        if weigh_input:
            h *= work.weight.view(-1)[pairs, None]
        if weights.bias is not None:
            h += weights.bias[expert]
        out[start : start + rows] = h if activation is None else activate_torch(h, activation)


def _expand_torch(h: Tensor, update: ExpertUpdate | None, expert: int, slot: int, begin: int) -> None:
    assert update is not None
    table, z = update.table, update.z.double()
    width = h.shape[1] // z.shape[1]
    for side in range(z.shape[1]):
        where = update.site + 3 * expert + side, slot
        first = int(table.first[where])
        for j in range(int(table.count[where])):
            rank, at = int(table.rank[first + j]), int(table.b[first + j])
            b = table.pool[at : at + rank * width].view(rank, width).double()
            h[:, side * width : (side + 1) * width] += (
                z[begin : begin + len(h), side, 16 * j : 16 * j + rank] @ b
            )


def product(
    x: Tensor, weights: ExpertWeights, work: Sorted, out: Tensor, config: ProductConfig, *, gather: bool,
    activation: Activation | None = None, update: ExpertUpdate | None = None, weigh_input: bool = False,
    pdl: bool = False,
) -> None:  # fmt: skip
    """Fill out; see the module's semantics. Shrink must have filled `update.z`."""
    _, total, depth = weights.shape
    sides = 1 if activation is None else 2
    width = total // sides
    weight = weights.weight
    assert x.is_contiguous()
    assert x.shape[1] == depth
    assert out.is_contiguous()
    assert out.shape == (len(work.order), width)
    assert weights.bias is None or weights.bias.is_contiguous()
    assert update is None or update.z.shape[1] == sides
    word_step = scale_step = 0
    if isinstance(weight, Mxfp4):
        assert depth % config.depth == 0, f"{depth} columns are no multiple of {config.depth}"
        assert width % 32 == 0
        data, scales, (word_step, scale_step) = weight.words, weight.scales, weight.steps()
    else:
        data = scales = weight
        assert data.is_contiguous()
    if not len(work.tiles):
        return
    if not len(work.segments):  # then shrink, for which a product with updates waits late, was not launched
        update = None
    table = (work.counts,) * 5 if update is None else (
        update.table.first, update.table.count, update.table.b, update.table.rank, update.table.pool)  # fmt: skip
    z = out if update is None else update.z
    how = activation or Activation()
    stages = config.stages if x.element_size() == 2 else 1  # float32, as tests have it, takes twice the room
    tiles = triton.cdiv(len(work.tiles), config.group) * config.group
    _product_kernel[(tiles * triton.cdiv(width, config.features),)](
        out, x, data, scales, data if weights.bias is None else weights.bias, work.order, work.weight, work.tiles,
        work.segments, z, *table, len(work.tiles), 0 if update is None else update.site, table[0].stride(0),
        z.shape[-1],
        N=width, K=depth, TOP_K=work.top_k, GATHER=gather, PACKED=isinstance(weight, Mxfp4), WORDS=word_step,
        SCALES=scale_step, SIDES=sides, BIAS=weights.bias is not None,
        LIMIT=0.0 if how.limit is None else how.limit, CLAMP=how.limit is not None, ALPHA=how.alpha,
        UPDATE=update is not None, RANKS=config.ranks, AHEAD=config.ahead and not triton.knobs.runtime.interpret,
        ALIGNED=math.gcd(width, FACTOR_ALIGNMENT), WEIGH=weigh_input,
        ROWS=work.rows, F=config.features, DEPTH=config.depth, STAGES=stages, GROUP=config.group,
        WGMMA=config.wgmma, SPLIT=config.split, EXACT=x.dtype == torch.float32, LAUNCH=config.launch if pdl else 0,
        num_warps=config.warps, maxnreg=config.registers or None, **launch_options(pdl),
    )  # fmt: skip


@kernel(do_not_specialize=["capacity", "site", "slots"])
def _product_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    out, x, data, scales, bias, order, weight, tiles, segments, z, first, count, b, rank, pool,
    capacity, site, slots, z_columns,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr, PACKED: tl.constexpr,
    WORDS: tl.constexpr, SCALES: tl.constexpr,
    SIDES: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr, CLAMP: tl.constexpr, ALPHA: tl.constexpr,
    UPDATE: tl.constexpr, RANKS: tl.constexpr, AHEAD: tl.constexpr, ALIGNED: tl.constexpr,
    WEIGH: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, WGMMA: tl.constexpr, SPLIT: tl.constexpr,
    EXACT: tl.constexpr, LAUNCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (N + F - 1) // F
    within = tl.program_id(0) % (GROUP * BLOCKS)
    tile = tl.program_id(0) // (GROUP * BLOCKS) * GROUP + within % GROUP
    block = within // GROUP
    if PDL and LAUNCH == 1:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL and not UPDATE:  # else shrink is in front, which starts this one when its own input is complete
        tl.extra.cuda.gdc_wait()
        if LAUNCH == 2:
            tl.extra.cuda.gdc_launch_dependents()
    listed = tiles + tl.minimum(tile, capacity - 1) * 5
    expert, start, rows = tl.load(listed).to(tl.int64), tl.load(listed + 1), tl.load(listed + 2)
    begin, end = tl.load(listed + 3), tl.load(listed + 4)
    if (rows == 0) | (tile >= capacity):
        if PDL and UPDATE:
            tl.extra.cuda.gdc_wait()
        return
    n = tl.arange(0, ROWS)
    place = start + tl.minimum(n, rows - 1)
    pair = tl.load(order + place)
    if GATHER:
        x_row = x + (pair // TOP_K).to(tl.int64) * K
    else:
        x_row = x + place.to(tl.int64) * K
    f = tl.arange(0, F)
    feature = block * F + f
    if PACKED:
        feature = block * F + f // 16 % (F // 32) * 32 + f // (F // 2) * 16 + f % 16
        feature = tl.max_contiguous(tl.multiple_of(feature, 16), 16)
    fits = feature < N
    at_bias = bias + expert * (SIDES * N) + feature
    site_slots = (site + 3 * expert.to(tl.int32)) * slots
    blocks = 0
    if AHEAD:
        if PACKED:  # weights first: to find the factors takes a chain of loads
            columns: tl.constexpr = min(SPLIT * DEPTH * max(STAGES - 1, 1), K)
            _fetch_weights(data, scales, expert, block, N, K, SIDES, F, columns, WORDS, SCALES)
        for side in tl.static_range(SIDES if BIAS else 0):
            fetch(at_bias + side * N, fits & (f % 8 == 0))
    if UPDATE:
        blocks = most_blocks(segments, begin, end, count + site_slots, slots, SIDES, ROWS)
        if AHEAD:
            fetch_factors(
                segments, begin, end, blocks, block * F, site_slots, slots, first, count, b, rank, pool,
                N, SIDES, RANKS, ALIGNED, F,
            )  # fmt: skip

    if PACKED and WGMMA:
        acc = scales_then_sums(
            x_row, data, scales, expert, block, N, K, SIDES, ROWS, F, DEPTH, STAGES, EXACT, WORDS, SCALES
        )  # fmt: skip
    elif PACKED:
        acc = sums_then_scales(
            x_row, data, scales, expert, block, N, K, SIDES, ROWS, F, DEPTH, STAGES, SPLIT, EXACT, WORDS, SCALES
        )  # fmt: skip
    else:
        acc = _plain_product(x_row, data, expert, block, N, K, SIDES, ROWS, F, DEPTH, STAGES, SPLIT)
    up = acc
    if SIDES == 2:
        acc, up = _sides(acc, PACKED, F, ROWS)
    if PDL and LAUNCH == 3:
        tl.extra.cuda.gdc_launch_dependents()

    if UPDATE:
        acc, up = expand(
            acc, up, z, segments, begin, end, blocks, start, feature, fits, site_slots, slots, first, count, b, rank,
            pool, z_columns, N, SIDES, ROWS, RANKS, ALIGNED, PDL,
        )  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_wait()
            if LAUNCH == 2:
                tl.extra.cuda.gdc_launch_dependents()
    if WEIGH:
        by = tl.load(weight + pair)[None, :]
        acc, up = acc * by, up * by
    if BIAS:
        acc += tl.load(at_bias, fits, other=0.0).to(tl.float32)[:, None]
        if SIDES == 2:
            up += tl.load(at_bias + N, fits, other=0.0).to(tl.float32)[:, None]
    if SIDES == 2:
        acc = _activate(acc, up, LIMIT, CLAMP, ALPHA)
    to = out + (start + n).to(tl.int64)[None, :] * N + feature[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), (n < rows)[None, :] & fits[:, None])


@kernel()
def _fetch_weights(  # type: ignore[no-untyped-def]
    words, scales, expert, block, N: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr, F: tl.constexpr,
    COLUMNS: tl.constexpr, WORDS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Order the first COLUMNS columns of packed weights into the L2 cache, 64 bytes at a time."""
    group = first_group(tl.arange(0, SIDES * F // 32), expert, block, N, K, SIDES, F // 32)[:, None]
    i = tl.arange(0, triton.next_power_of_2(COLUMNS // 4))[None, :] * 16
    fetch(words + group * WORDS + i, (group >= 0) & (i < COLUMNS // 32 * WORDS))
    if SCALES == 8:  # else they lie among the words
        j = tl.arange(0, triton.next_power_of_2(max(COLUMNS // 64, 1)))[None, :] * 16
        fetch(scales + group * SCALES + j, (group >= 0) & (j < COLUMNS // 32 * SCALES))


@kernel()
def _sides(acc, PACKED: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gate's and the up's half of [2 · F, ROWS]."""
    if PACKED:  # rows are ordered (mt, side, tile, rh, g)
        acc = tl.permute(tl.reshape(acc, (2, 2, F // 2, ROWS)), (0, 2, 3, 1))
    else:
        acc = tl.permute(tl.reshape(acc, (2, F, ROWS)), (1, 2, 0))
    gate, up = tl.split(acc)
    return tl.reshape(gate, (F, ROWS)), tl.reshape(up, (F, ROWS))


@kernel()
def _activate(gate, up, LIMIT: tl.constexpr, CLAMP: tl.constexpr, ALPHA: tl.constexpr):  # type: ignore[no-untyped-def]
    if CLAMP:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * up


@kernel()
def _plain_product(  # type: ignore[no-untyped-def]
    x_row, data, expert, block,
    N: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """[SIDES · F, ROWS] of block `block`, the first side's features first; parts as in `mxfp4.sums_then_scales`."""
    i = tl.arange(0, SIDES * F)
    row = tl.minimum(block * F + i % F, N - 1) + i // F * N
    k = tl.arange(0, DEPTH)
    at = data + (expert * (SIDES * N) + row)[:, None] * K + k[None, :]
    at_x = x_row[:, None] + k[None, :]
    column = k[None, :]
    acc = tl.zeros((SIDES * F, ROWS), tl.float32)
    if SPLIT > 1:
        part = tl.arange(0, SPLIT)[:, None, None] * DEPTH
        at, at_x, column = at[None, :, :] + part, at_x[None, :, :] + part, column[None, :, :] + part
        acc = tl.zeros((SPLIT, SIDES * F, ROWS), tl.float32)
    for step in tl.range(0, K, SPLIT * DEPTH, num_stages=STAGES):
        if K % (SPLIT * DEPTH) == 0:
            w, v = tl.load(at), tl.load(at_x)
        else:
            there = column < K - step
            w, v = tl.load(at, there, other=0.0), tl.load(at_x, there, other=0.0)
        if SPLIT > 1:
            acc = tl.dot(w, tl.permute(v, (0, 2, 1)), acc, input_precision="ieee")
        else:
            acc = tl.dot(w, tl.trans(v), acc, input_precision="ieee")
        at += SPLIT * DEPTH
        at_x += SPLIT * DEPTH
    return add_parts(acc, SPLIT, SIDES * F, ROWS)
