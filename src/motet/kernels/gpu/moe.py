"""Products of experts over sorted pairs, with biases, adapters and activation in them.

Semantics, for the pair at place p of the sorted order (`route`), of expert e and token t:
    h[p] = W_e x[p] (+ update of the pair's adapter, `moe_lora`), times the pair's weight with `weigh_input`, (+ bias_e)
    out[p] = h[p], or with an activation act(first half of h[p], second half of h[p])
    W: [E, N, K] bfloat16 or MXFP4 (`mxfp4.Mxfp4`); x: [T, K], read through the sorted order (`gather`), or [P, K];
    bias: [E, N]; out: [P, N] or [P, N/2]. Sums are float32, in an order that depends on the kernel's configuration
    only: a row's result does not depend on the batch around it.

The weights are the first operand and the pairs of a tile the columns of the second: with a few rows per expert the
weights are the large part, and tensor cores take 16 or 64 rows of the first operand but 8 columns of the second. A
program computes `features` features (gate and up of the same ones) of one tile. Decode of MXFP4 multiplies sums of 32
columns by their scales, prefill the weights (`mxfp4`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from motet.kernels.activation import Activation, activate
from motet.kernels.gpu.jit import kernel, launch_options, tl, triton
from motet.kernels.gpu.lora import FACTOR_ALIGNMENT
from motet.kernels.gpu.moe_lora import ExpertUpdate, expand
from motet.kernels.gpu.mxfp4 import (
    Mxfp4,
    join_pairs,
    order_columns,
    scale_pairs,
    scales_of_rows,
    unpack_pairs,
)
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
    """How a product is compiled: features of a program (of each half, with an activation), columns per step, warps,
    stages; ranks of updates multiplied at once; tiles that share weights in the L2 cache; whether tensor cores take
    MXFP4 as wgmma, weights scaled."""

    features: int
    depth: int
    warps: int
    stages: int
    ranks: int = 32
    group: int = 1
    wgmma: bool = False


def tile_rows(tokens: int, top_k: int, num_experts: int) -> int:
    """Rows of a tile for a batch: about twice what an expert gets when the router spreads them evenly."""
    even = tokens * top_k / num_experts
    return next((rows for limit, rows in ((4, 8), (10, 16), (24, 32), (64, 64)) if even <= limit), 128)


def product_config(weights: ExpertWeights, sides: int, rows: int) -> ProductConfig:
    """How to compile a product with `sides` sides of tiles with `rows` rows."""
    depth = weights.shape[2]
    if isinstance(weights.weight, Mxfp4):
        if rows <= 16:
            step = next(step for step in (96, 128, 64, 32) if depth % step == 0)
            return ProductConfig(64, step, warps=2, stages=3)
        step = 64 if depth % 64 == 0 else 32
        group = 1 if rows < 64 else 4
        return ProductConfig(128 // sides, step, warps=4, stages=3, ranks=16, group=group, wgmma=True)
    if rows <= 32:
        return ProductConfig(64, 64, warps=4, stages=4)
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
        out[start : start + rows] = h if activation is None else activate(h, activation)


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
    if isinstance(weight, Mxfp4):
        assert depth % config.depth == 0, f"{depth} columns are no multiple of {config.depth}"
        assert width % 32 == 0
        data, scales = weight.words, weight.scales
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
        N=width, K=depth, TOP_K=work.top_k, GATHER=gather, PACKED=isinstance(weight, Mxfp4), SIDES=sides,
        BIAS=weights.bias is not None,
        LIMIT=0.0 if how.limit is None else how.limit, CLAMP=how.limit is not None, ALPHA=how.alpha,
        UPDATE=update is not None, RANKS=config.ranks,
        ALIGNED=math.gcd(width, FACTOR_ALIGNMENT), WEIGH=weigh_input,
        ROWS=work.rows, F=config.features, DEPTH=config.depth, STAGES=stages, GROUP=config.group,
        WGMMA=config.wgmma, EXACT=x.dtype == torch.float32, num_warps=config.warps, **launch_options(pdl),
    )  # fmt: skip


@kernel(do_not_specialize=["capacity", "site", "slots"])
def _product_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    out, x, data, scales, bias, order, weight, tiles, segments, z, first, count, b, rank, pool,
    capacity, site, slots, z_columns,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr, PACKED: tl.constexpr,
    SIDES: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr, CLAMP: tl.constexpr, ALPHA: tl.constexpr,
    UPDATE: tl.constexpr, RANKS: tl.constexpr, ALIGNED: tl.constexpr,
    WEIGH: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, WGMMA: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (N + F - 1) // F
    within = tl.program_id(0) % (GROUP * BLOCKS)
    tile = tl.program_id(0) // (GROUP * BLOCKS) * GROUP + within % GROUP
    block = within // GROUP
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if (
            not UPDATE
        ):  # else the kernel in front is shrink, which starts this one when its own input is complete
            tl.extra.cuda.gdc_wait()
    rows = 0
    if tile < capacity:
        rows = tl.load(tiles + tile * 5 + 2)
    if rows == 0:
        if PDL and UPDATE:
            tl.extra.cuda.gdc_wait()
        return
    expert, start = tl.load(tiles + tile * 5).to(tl.int64), tl.load(tiles + tile * 5 + 1)
    n = tl.arange(0, ROWS)
    place = start + tl.minimum(n, rows - 1)
    pair = tl.load(order + place)
    if GATHER:
        x_row = x + (pair // TOP_K).to(tl.int64) * K
    else:
        x_row = x + place.to(tl.int64) * K

    if PACKED:
        acc = _packed_product(
            x_row, data, scales, expert, block, N, K, SIDES, ROWS, F, DEPTH, STAGES, WGMMA, EXACT
        )
        f = tl.arange(0, F)
        feature = block * F + f // 16 % (F // 32) * 32 + f // (F // 2) * 16 + f % 16
        feature = tl.max_contiguous(tl.multiple_of(feature, 16), 16)
    else:
        acc = _plain_product(x_row, data, expert, block, N, K, SIDES, ROWS, F, DEPTH, STAGES)
        feature = block * F + tl.arange(0, F)
    fits = feature < N
    up = acc
    if SIDES == 2:
        acc, up = _sides(acc, PACKED, F, ROWS)

    if UPDATE:
        begin, end = tl.load(tiles + tile * 5 + 3), tl.load(tiles + tile * 5 + 4)
        acc, up = expand(
            acc, up, z, segments, begin, end, expert.to(tl.int32), start, feature, fits, first, count, b, rank, pool,
            site, slots, z_columns, N, SIDES, ROWS, RANKS, ALIGNED, PDL,
        )  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_wait()
    if WEIGH:
        by = tl.load(weight + pair)[None, :]
        acc, up = acc * by, up * by
    if BIAS:
        at = bias + expert * (SIDES * N) + feature
        acc += tl.load(at, fits, other=0.0).to(tl.float32)[:, None]
        if SIDES == 2:
            up += tl.load(at + N, fits, other=0.0).to(tl.float32)[:, None]
    if SIDES == 2:
        acc = _activate(acc, up, LIMIT, CLAMP, ALPHA)
    to = out + (start + n).to(tl.int64)[None, :] * N + feature[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), (n < rows)[None, :] & fits[:, None])


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
def _packed_product(  # type: ignore[no-untyped-def]
    x_row, words, scales, expert, block,
    N: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, WGMMA: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """[SIDES · F, ROWS] of block `block`, rows ordered (mt, side, tile, rh, g)."""
    HALF: tl.constexpr = F // 32
    TILES: tl.constexpr = SIDES * HALF
    KIND: tl.constexpr = x_row.dtype.element_ty
    i = tl.arange(0, TILES)
    tile = tl.minimum(block * HALF + i % HALF, N // 32 - 1) + i // HALF * (N // 32)
    tile = (expert * (SIDES * N // 32) + tile) * (K // 32)
    at = words + tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    at_scale = scales + tile[:, None] * 8 + tl.arange(0, 8)[None, :]
    acc = tl.zeros((TILES * 32, ROWS), tl.float32)
    if WGMMA:
        at_x = x_row[:, None] + tl.arange(0, 32)[None, :]
        for _ in tl.range(0, K, DEPTH, num_stages=STAGES):
            for g in tl.static_range(DEPTH // 32):
                p0, p1, p2, p3 = unpack_pairs(tl.load(at + g * 128), TILES)
                s = tl.load(at_scale + g * 8)
                if EXACT:
                    w = join_pairs(p0, p1, p2, p3, TILES, True, True) * scales_of_rows(s, TILES)[:, None]
                else:
                    p0, p1, p2, p3 = scale_pairs(p0, p1, p2, p3, s, TILES)
                    w = join_pairs(p0, p1, p2, p3, TILES, True, False)
                acc = tl.dot(w, tl.trans(tl.load(at_x + g * 32)), acc, input_precision="ieee")
            at += DEPTH * 4
            at_scale += DEPTH // 4
            at_x += DEPTH
        return acc
    at_x = x_row[:, None] + tl.arange(0, 16)[None, :]
    for _ in tl.range(0, K, DEPTH, num_stages=STAGES):
        for g in tl.static_range(DEPTH // 32):
            p0, p1, p2, p3 = unpack_pairs(tl.load(at + g * 128), TILES)
            s = tl.load(at_scale + g * 8)
            v = order_columns(tl.load(at_x + g * 32), tl.load(at_x + g * 32 + 16), ROWS)
            v = (v * 18446744073709551616.0).to(KIND)  # 2^64
            w = join_pairs(p0, p1, p2, p3, TILES, False, EXACT)
            acc += tl.dot(w, v, input_precision="ieee") * scales_of_rows(s, TILES)[:, None]
        at += DEPTH * 4
        at_scale += DEPTH // 4
        at_x += DEPTH
    return acc * 5.421010862427522e-20  # 2^-64


@kernel()
def _plain_product(  # type: ignore[no-untyped-def]
    x_row, data, expert, block,
    N: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """[SIDES · F, ROWS] of block `block`, the first side's features first."""
    i = tl.arange(0, SIDES * F)
    row = tl.minimum(block * F + i % F, N - 1) + i // F * N
    k = tl.arange(0, DEPTH)
    at = data + (expert * (SIDES * N) + row)[:, None] * K + k[None, :]
    at_x = x_row[:, None] + k[None, :]
    acc = tl.zeros((SIDES * F, ROWS), tl.float32)
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        if K % DEPTH == 0:
            w, v = tl.load(at), tl.load(at_x)
        else:
            there = (step + k < K)[None, :]
            w, v = tl.load(at, there, other=0.0), tl.load(at_x, there, other=0.0)
        acc = tl.dot(w, tl.trans(v), acc, input_precision="ieee")
        at += DEPTH
        at_x += DEPTH
    return acc
