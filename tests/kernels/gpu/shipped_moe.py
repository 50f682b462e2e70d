"""What the kernels of mixtures of experts launch at the shapes they were made for, for `hopper`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from motet.kernels.activation import Activation
from motet.kernels.gpu.combine import Normed, combine
from motet.kernels.gpu.lora import RankBlocks
from motet.kernels.gpu.moe import (
    ExpertWeights,
    ProductConfig,
    product,
    product_config,
    tile_rows,
)
from motet.kernels.gpu.moe_lora import DECODE, PREFILL, ExpertUpdate, ShrinkConfig, shrink, shrunk
from motet.kernels.gpu.mxfp4 import Mxfp4
from motet.kernels.gpu.route import Sorted, route
from motet.kernels.route import RoutingRule

F32, I32 = torch.float32, torch.int32


@dataclass(frozen=True)
class Shape:
    """A layer of experts."""

    hidden: int
    width: int
    num_experts: int
    top_k: int
    activation: Activation
    packed: bool


GPT_OSS = Shape(2880, 2880, 32, 4, Activation(7.0, 1.702), True)
QWEN3 = Shape(2048, 768, 128, 8, Activation(), False)
MIXTRAL = Shape(4096, 14336, 8, 2, Activation(), False)
DEEPSEEK = Shape(2048, 1408, 64, 6, Activation(), False)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def table() -> RankBlocks:
    many = meta(1000, dtype=torch.int64)
    return RankBlocks(
        meta(300, 16, dtype=I32), meta(300, 16, dtype=I32), many, many, meta(1000, dtype=I32), meta(1000, dtype=F32),
        meta(1 << 30),
    )  # fmt: skip


def weights(shape: Shape, features: int, depth: int) -> ExpertWeights:
    if not shape.packed:
        return ExpertWeights(meta(shape.num_experts, features, depth))
    tiles = shape.num_experts, features // 32, depth // 32
    packed = Mxfp4(meta(*tiles, 128, dtype=I32), meta(*tiles, 8, dtype=I32))
    return ExpertWeights(packed, meta(shape.num_experts, features))


def layer(
    shape: Shape,
    tokens: int,
    rows: int,
    up: ProductConfig,
    down: ProductConfig,
    how: ShrinkConfig,
    *,
    lora: bool,
) -> None:
    """One layer's launches, as a step makes them."""
    work = Sorted.empty(tokens, shape.top_k, shape.num_experts, rows, 8 if lora else 0, "meta")
    rule, slots = RoutingRule(shape.top_k, True), meta(tokens, dtype=I32)
    route(
        meta(tokens, shape.num_experts, dtype=F32),
        rule,
        slots if lora else None,
        work,
        meta(1, dtype=I32),
        pdl=True,
    )
    pairs, x = tokens * shape.top_k, meta(tokens, shape.hidden)
    updates: list[ExpertUpdate | None] = [None, None]
    if lora:
        updates = [ExpertUpdate(table(), side, shrunk(pairs, 2 - side // 2, 64, x)) for side in (0, 2)]
    activations, out = meta(pairs, shape.width), meta(pairs, shape.hidden, dtype=F32)
    if updates[0] is not None:
        shrink(x, work, updates[0], gather=True, config=how, pdl=True)
    product(
        x, weights(shape, 2 * shape.width, shape.hidden), work, activations, up, gather=True,
        activation=shape.activation, update=updates[0], pdl=True,
    )  # fmt: skip
    if updates[1] is not None:
        shrink(activations, work, updates[1], gather=False, config=how, pdl=True)
    product(
        activations,
        weights(shape, shape.hidden, shape.width),
        work,
        out,
        down,
        gather=False,
        update=updates[1],
        pdl=True,
    )
    normed = Normed(meta(shape.hidden, dtype=F32), 1e-5, meta(tokens, shape.hidden))
    for norm in (None, normed):
        combine(out, work, meta(tokens, shape.hidden, dtype=F32), norm=norm, pdl=True)


def launches() -> None:
    """Default configurations: decode, and prefill of packed and plain experts."""
    cases = [(GPT_OSS, (1, 16, 64, 1600)), (replace(GPT_OSS, packed=False), (1600,)), (QWEN3, (16, 1600))]
    for shape, tokens in (*cases, (MIXTRAL, (16,)), (DEEPSEEK, (16,))):
        for one in tokens:
            rows = tile_rows(one, shape.top_k, shape.num_experts)
            up = product_config(weights(shape, 2 * shape.width, shape.hidden), 2, rows)
            down = product_config(weights(shape, shape.hidden, shape.width), 1, rows)
            for lora in (False, True):
                layer(shape, one, rows, up, down, DECODE if rows <= 16 else PREFILL, lora=lora)
