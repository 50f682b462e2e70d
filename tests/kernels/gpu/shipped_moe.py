"""What the kernels of mixtures of experts launch at the shapes they were made for, for `hopper`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from motet.kernels.activation import Activation
from motet.kernels.gpu.combine import COMBINE, CombineConfig, Normed, combine
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
from motet.kernels.gpu.norm_route import MOST_ROWS, norm_route, norm_scores, takes
from motet.kernels.gpu.route import ROUTE, RouteConfig, Sorted, route
from motet.kernels.route import RoutingRule

F32, I32 = torch.float32, torch.int32


@dataclass(frozen=True)
class Shape:
    """A layer of experts; packed weights have their scales in a tensor of their own or among the words (`joined`)."""

    hidden: int
    width: int
    num_experts: int
    top_k: int
    activation: Activation
    packed: bool
    joined: bool = False


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
    words, scales = meta(*tiles, 128, dtype=I32), meta(*tiles, 8, dtype=I32)
    if shape.joined:
        both = meta(*tiles, 136, dtype=I32)
        words, scales = both[..., :128], both[..., 128:]
    return ExpertWeights(Mxfp4(words, scales), meta(shape.num_experts, features))


@dataclass(frozen=True)
class LayerPlan:
    """How a layer is computed: tile rows and the configurations of its launches."""

    rows: int
    up: ProductConfig
    down: ProductConfig
    shrink: ShrinkConfig
    route: RouteConfig = ROUTE
    combine: CombineConfig = COMBINE


def default_plan(shape: Shape, tokens: int, rows: int | None = None) -> LayerPlan:
    """What a step's layers choose by themselves."""
    rows = rows or tile_rows(tokens, shape.top_k, shape.num_experts)
    tiles = len(Sorted.empty(tokens, shape.top_k, shape.num_experts, rows, 0, "meta").tiles)
    up = product_config(weights(shape, 2 * shape.width, shape.hidden), 2, rows, tiles)
    down = product_config(weights(shape, shape.hidden, shape.width), 1, rows, tiles)
    return LayerPlan(rows, up, down, DECODE if rows <= 16 else PREFILL)


def layer(shape: Shape, tokens: int, plan: LayerPlan, *, lora: bool, pdl: bool = True) -> None:
    """One layer's launches, as a step makes them."""
    work = Sorted.empty(tokens, shape.top_k, shape.num_experts, plan.rows, 8 if lora else 0, "meta")
    if tokens > MOST_ROWS:  # fewer are routed with their norm, below
        slots, real = meta(tokens, dtype=I32) if lora else None, meta(1, dtype=I32)
        logits, rule = meta(tokens, shape.num_experts), RoutingRule(shape.top_k, True)
        route(logits, rule, slots, work, real, config=plan.route, pdl=pdl)
    pairs, x = tokens * shape.top_k, meta(tokens, shape.hidden)
    updates: list[ExpertUpdate | None] = [None, None]
    if lora:
        updates = [ExpertUpdate(table(), side, shrunk(pairs, 2 - side // 2, 64, x)) for side in (0, 2)]
    activations, out = meta(pairs, shape.width), meta(pairs, shape.hidden, dtype=F32)
    gate_up, down = weights(shape, 2 * shape.width, shape.hidden), weights(shape, shape.hidden, shape.width)
    if updates[0] is not None:
        shrink(x, work, updates[0], gather=True, config=plan.shrink, pdl=pdl)
    product(
        x,
        gate_up,
        work,
        activations,
        plan.up,
        gather=True,
        activation=shape.activation,
        update=updates[0],
        pdl=pdl,
    )
    if updates[1] is not None:
        shrink(activations, work, updates[1], gather=False, config=plan.shrink, pdl=pdl)
    product(activations, down, work, out, plan.down, gather=False, update=updates[1], pdl=pdl)
    normed = Normed(meta(shape.hidden, dtype=F32), 1e-5, meta(tokens, shape.hidden))
    for norm in (None, normed):
        residual = meta(tokens, shape.hidden, dtype=F32)
        combine(out, work, residual, norm=norm, config=plan.combine, pdl=pdl)


def routes() -> None:
    """Rules of every kind, for tokens of which each takes another way through the kernels."""
    top2 = RoutingRule(
        8, True, "sigmoid", groups=8, top_groups=4, group_score="top2", bias=meta(256, dtype=F32)
    )
    groups = RoutingRule(3, groups=3, top_groups=2, scale=2.5)
    sigmoid = RoutingRule(1, scoring="sigmoid", on_input=True)
    for rule, experts in ((groups, 12), (top2, 256), (sigmoid, 5)):
        for tokens in (47, 700):
            work = Sorted.empty(tokens, rule.top_k, experts, 8, 8, "meta")
            logits, slots = meta(tokens, experts, dtype=F32), meta(tokens, dtype=I32)
            route(logits, rule, slots, work, meta(1, dtype=I32), pdl=True)


def norm_routes() -> None:
    """Steps of every size, with adapters and of the base; rules of every kind; the widest rows."""
    top2 = RoutingRule(
        8, True, "sigmoid", groups=8, top_groups=4, group_score="top2", bias=meta(256, dtype=F32)
    )
    groups, sigmoid = RoutingRule(6, groups=8, top_groups=3), RoutingRule(1, scoring="sigmoid", on_input=True)
    for width, experts, rule in (
        (2880, 32, RoutingRule(4, True)), (2048, 128, RoutingRule(8, True)), (4096, 8, RoutingRule(2, True)),
        (2048, 64, RoutingRule(6)), (5120, 160, groups), (7168, 256, top2), (5120, 16, sigmoid),
    ):  # fmt: skip
        router, norm = meta(experts, width), meta(width, dtype=F32)
        sizes = (1, 16, 64) if experts in (32, 128) else (64,)
        for rows in (min(rows, (1 << 24) // router.numel()) for rows in sizes):
            assert takes(rows, rule, router)
            x, residual = meta(rows, width), meta(rows, width, dtype=F32)
            work = Sorted.empty(rows, rule.top_k, experts, 8, 8, "meta")
            norm_route(
                x, residual, norm, 1e-5, router, meta(experts), rule, meta(rows, dtype=I32), work, meta(1, dtype=I32),
                meta(1024, dtype=I32), pdl=True,
            )  # fmt: skip
        norm_scores(x, residual, norm, 1e-5, router, None, pdl=True)


def launches() -> None:
    """Default configurations: decode, and prefill of packed and plain experts; every rule of routing."""
    cases = [(GPT_OSS, (1, 16, 64, 1600)), (replace(GPT_OSS, packed=False), (1600,)), (QWEN3, (16, 1600))]
    for shape, tokens in (*cases, (MIXTRAL, (16,)), (DEEPSEEK, (16,))):
        for one in tokens:
            for lora in (False, True):
                layer(shape, one, default_plan(shape, one), lora=lora)
    routes()
    norm_routes()
