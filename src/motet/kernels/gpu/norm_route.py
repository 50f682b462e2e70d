"""Between attention and the experts of few rows in one launch: norm, router scores, sorted work.

Semantics (references: `motet.kernels.norm.add_rms_norm_torch`, a product, `route.route_torch`):
    s = residual + x
    y[t, h] = s[t, h] / sqrt(mean_h(s[t, h]^2) + eps) * weight[h]
    scores[t, e] = sum_h y[t, h] · router[e, h] + bias[e], of y as it is rounded, added up in float32
    and what `route` makes of the scores as they are rounded
    x: [T, H] bfloat16, residual: [T, H] float32, weight: [H] float32, router: [E, H], bias: [E] or None; y [T, H] and
    scores [T, E] in x's dtype and s [T, H] float32 are new tensors: while one program writes a row of s, others may
    still read that row of the residual.

A program computes the scores of `experts` experts, so that no multiprocessor reads the whole router, for every n-th
row, whose norm it takes by itself: that is cheaper than waiting for another's. Its part of the router is on its way
while the kernel in front ends. The programs count how many have stored their scores; the last one sorts all rows
(`route.route_kernel`).

A row's bits depend on the row and the configuration, which follows from E and H: not on the rows beside it, nor on how
many there are, nor on whether rows are sorted here or have their scores updated by adapters first (`norm_scores`).

Norm weights, router and its bias are read before waiting for the kernel in front: no kernel of the same chain may write
them. The next kernel may start at any time. Whatever follows waits before it reads what this one wrote, but for the
expert product with updates; and in front of that comes shrink, which starts it after its own wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from motet.kernels.gpu.jit import begin, kernel, launch_options, tl, triton
from motet.kernels.gpu.lora import check_config
from motet.kernels.gpu.route import PAIR_BITS, Sorted, one_program, route_kernel, rule_arguments
from motet.kernels.route import RoutingRule

MOST_ROWS = 64
"""Rows up to which scores are computed row by row."""
MOST_PRODUCTS = 1 << 24
"""T · E · H up to which they are: with more, tensor cores and fewer reads of the router are worth launches."""
TILE = 16384
"""Elements of the router that a program holds in registers."""
LEAST_SORTED = 4
"""Rows that are sorted at least: of a single row Triton gives every thread all scores."""


@dataclass(frozen=True)
class NormRouteConfig:
    """How the kernel is compiled: `experts` of a program, warps, and when the next kernel may start (`launch`, see
    `moe.ProductConfig`; 3: when all scores are stored). There are at most so many `programs`, as a multiprocessor has
    registers for one; where there are more rows each takes several."""

    experts: int
    warps: int = 8
    programs: int = 132
    launch: int = 2

    def __post_init__(self) -> None:
        check_config(self, {"launch": 0}, ("experts", "warps"))


def norm_route_config(num_experts: int, width: int) -> NormRouteConfig:
    """How to compile it for a router [E, H], whatever T."""
    block = triton.next_power_of_2(width)
    most = triton.next_power_of_2(num_experts)
    return NormRouteConfig(min(max(TILE // block, 1), most), 8 if block <= 4096 and most <= 64 else 16)


def takes(rows: int, rule: RoutingRule, router: Tensor) -> bool:
    """Whether so many rows are few enough for `norm_route` and `norm_scores`."""
    few = 0 < rows <= MOST_ROWS and rows * router.numel() <= MOST_PRODUCTS
    return few and one_program(max(rows, LEAST_SORTED), rule, len(router))


def norm_scores(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, router: Tensor, bias: Tensor | None,
    *, config: NormRouteConfig | None = None, pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (y, s, scores) and sorts nothing."""
    config = config or norm_route_config(*router.shape)
    out = _outputs(x, residual, weight, router, bias)
    grid, how = _launch(x, router, bias, config, pdl)
    _norm_scores_kernel[grid](
        x, residual, weight, eps, router, router if bias is None else bias, *out, len(x), E=len(router), **how
    )
    return out


def norm_route(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, router: Tensor, bias: Tensor | None,
    rule: RoutingRule, slots: Tensor | None, work: Sorted, tokens: Tensor | None, arrived: Tensor,
    *, config: NormRouteConfig | None = None, pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (y, s, scores) and fills `work` as `route.route` does; `arrived` is from `dense.arrivals`."""
    rows, num_experts = len(x), len(router)
    assert takes(rows, rule, router)
    assert work.inverse.shape == (rows, rule.top_k)
    config = config or norm_route_config(*router.shape)
    out = _outputs(x, residual, weight, router, bias)
    grid, how = _launch(x, router, bias, config, pdl)
    given, rules = rule_arguments(rule, slots, tokens, num_experts, work)
    _norm_route_kernel[grid](
        x, residual, weight, eps, router, router if bias is None else bias, *out, arrived, *given, work.weight,
        work.order, work.inverse, work.counts, work.tiles, work.segments, rows, len(work.tiles),
        TP=max(triton.next_power_of_2(rows), LEAST_SORTED), ROWS=work.rows, PAIR_BITS=PAIR_BITS, **rules, **how,
    )  # fmt: skip
    return out


def _outputs(
    x: Tensor, residual: Tensor, weight: Tensor, router: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, s and scores."""
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert residual.shape == x.shape
    assert router.is_contiguous()
    assert router.shape[1:] == weight.shape == x.shape[1:]
    assert bias is None or bias.shape == router.shape[:1]
    return torch.empty_like(x), torch.empty_like(residual), x.new_empty(len(x), len(router))


def _launch(
    x: Tensor, router: Tensor, bias: Tensor | None, config: NormRouteConfig, pdl: bool
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and how `_norm_scores_kernel` is compiled."""
    rows, (num_experts, width) = len(x), router.shape
    parts = triton.cdiv(num_experts, config.experts)
    each = triton.cdiv(rows, max(config.programs // parts, 1))
    return (triton.cdiv(rows, each), parts), {
        "WIDTH": width, "BLOCK": triton.next_power_of_2(width), "EXPERTS": config.experts,
        "ROUTER_BIAS": bias is not None, "LAUNCH": config.launch if pdl else 0, "num_warps": config.warps,
        **launch_options(pdl),
    }  # fmt: skip


@kernel(do_not_specialize=["rows"])
def _norm_scores_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, eps, router, router_bias, y, total, scores, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr, ROUTER_BIAS: tl.constexpr,
    LAUNCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    column, expert = tl.arange(0, BLOCK), part * EXPERTS + tl.arange(0, EXPERTS)
    inside, fits = column < WIDTH, expert < E
    w = tl.load(
        router + expert[:, None] * WIDTH + column[None, :], fits[:, None] & inside[None, :], other=0.0
    )
    scale = tl.load(weight + column, inside, other=0.0)
    shift = tl.zeros((EXPERTS,), tl.float32)
    if ROUTER_BIAS:
        shift = tl.load(router_bias + expert, fits, other=0.0).to(tl.float32)
    begin(LAUNCH, PDL)
    step = tl.num_programs(0)
    at = tl.program_id(0) * WIDTH + column
    branch, before = tl.load(x + at, inside, other=0.0), tl.load(residual + at, inside, other=0.0)
    for row in range(tl.program_id(0), rows, step):
        s = branch.to(tl.float32) + before
        at, coming = row * WIDTH + column, inside & (row + step < rows)
        branch = tl.load(x + at + step * WIDTH, coming, other=0.0)
        before = tl.load(residual + at + step * WIDTH, coming, other=0.0)
        norm = tl.rsqrt(tl.sum(s * s, 0) / WIDTH + eps)
        v = (s * norm * scale).to(y.dtype.element_ty)
        score = tl.sum(w.to(tl.float32) * v.to(tl.float32)[None, :], 1) + shift
        tl.store(scores + row * E + expert, score.to(scores.dtype.element_ty), fits)
        if part == 0:
            tl.store(y + at, v, inside)
            tl.store(total + at, s, inside)


@kernel(do_not_specialize=["rows", "capacity"])
def _norm_route_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, eps, router, router_bias, y, total, scores, arrived,
    bias, slots, tokens, by, order, inverse, counts, tiles, segments, rows, capacity,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, ROUTER_BIAS: tl.constexpr,
    BIAS: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SLOT_BITS: tl.constexpr, GP: tl.constexpr, TP: tl.constexpr,
    PAIR_BITS: tl.constexpr, ROWS: tl.constexpr, LAUNCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _norm_scores_kernel(
        x, residual, weight, eps, router, router_bias, y, total, scores, rows, WIDTH, BLOCK, E, EXPERTS, ROUTER_BIAS,
        LAUNCH, PDL,
    )  # fmt: skip
    if PDL and LAUNCH == 3:
        tl.extra.cuda.gdc_launch_dependents()
    tl.debug_barrier()  # all warps' stores come before the arrival
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") < tl.num_programs(0) * tl.num_programs(1) - 1:
        return
    tl.store(arrived, 0)
    route_kernel(
        scores, bias, slots, tokens, by, order, inverse, counts, tiles, segments, rows, E, capacity,
        BIAS, SLOTS, PADDED, SIGMOID, NORMALISE, SCALE, GROUPS, TOP_GROUPS, TOP2, E, EP, K, KP, SLOT_BITS, GP, TP,
        PAIR_BITS, ROWS, 0, False,
    )  # fmt: skip
