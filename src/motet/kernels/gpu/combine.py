"""The weighted sum of what a token's experts gave, added to the residual, and the norm after it.

Semantics, for token t with k experts (`route`):
    residual[t] += sum_j weight[t, j] · y[inverse[t, j]] (+ shared[t]), in the order of j; padding tokens get nothing
    normed[t] = residual[t] / sqrt(mean(residual[t]^2) + eps) · norm, where asked for
    y: [P, H] in sorted order, shared: [T, H] of a shared expert; residual [T, H] and norm [H] float32, normed [T, H].

A program takes a row, or without the norm some columns of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motet.kernels.gpu.jit import begin, kernel, launch_options, tl, triton
from motet.kernels.gpu.route import Sorted


@dataclass(frozen=True)
class Normed:
    """The norm after combine: weight [H] float32, epsilon, and where the normalised rows [T, H] go."""

    weight: Tensor
    eps: float
    out: Tensor


@dataclass(frozen=True)
class CombineConfig:
    """How combine is compiled: columns of a program where there is no norm, columns of a warp, and when the next
    kernel may start (`launch`, see `moe.ProductConfig`: 0, 1 or 2)."""

    columns: int = 512
    per_warp: int = 256
    launch: int = 2


COMBINE = CombineConfig()


def combine_torch(
    y: Tensor, work: Sorted, residual: Tensor, *, shared: Tensor | None = None, weighed: bool = False,
    norm: Normed | None = None,
) -> None:  # fmt: skip
    """Reference in plain torch."""
    there = work.inverse >= 0
    rows = y[work.inverse.clamp(min=0).long()].float() * there[..., None]
    weight = there.float() if weighed else work.weight
    residual += (rows * weight[..., None]).sum(1)
    if shared is not None:
        residual += shared.float()
    if norm is not None:
        scale = torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + norm.eps)
        norm.out.copy_(residual * scale * norm.weight)


def combine(
    y: Tensor, work: Sorted, residual: Tensor, *, shared: Tensor | None = None, weighed: bool = False,
    norm: Normed | None = None, config: CombineConfig = COMBINE, pdl: bool = False,
) -> None:  # fmt: skip
    """y [P, H] sorted, added to residual [T, H] in place; `weighed` says that weights are in y already."""
    tokens, hidden = residual.shape
    assert y.is_contiguous()
    assert residual.is_contiguous()
    assert residual.dtype == torch.float32
    assert shared is None or shared.is_contiguous()
    if not tokens:
        return
    block = triton.next_power_of_2(hidden) if norm is not None else config.columns
    parts, eps = ((residual, residual), 0.0) if norm is None else ((norm.weight, norm.out), norm.eps)
    _combine_kernel[(tokens, triton.cdiv(hidden, block))](
        y, work.inverse, work.weight, residual, y if shared is None else shared, *parts, eps,
        H=hidden, TOP_K=work.top_k, SHARED=shared is not None, WEIGHED=weighed, NORM=norm is not None, BLOCK=block,
        LAUNCH=config.launch if pdl else 0, num_warps=min(max(block // config.per_warp, 1), 16), **launch_options(pdl),
    )  # fmt: skip


@kernel()
def _combine_kernel(  # type: ignore[no-untyped-def]
    y, inverse, weight, residual, shared, norm, normed, eps, H: tl.constexpr, TOP_K: tl.constexpr,
    SHARED: tl.constexpr, WEIGHED: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
    LAUNCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    if NORM:
        by_column = tl.load(norm + column, inside, other=0.0)
    begin(LAUNCH, PDL)
    total = tl.load(residual + token * H + column, inside, other=0.0)
    update = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        place = tl.load(inverse + token * TOP_K + j)
        by = 1.0
        if not WEIGHED:
            by = tl.load(weight + token * TOP_K + j)
        row = tl.load(y + place.to(tl.int64) * H + column, inside & (place >= 0), other=0.0)
        update += row.to(tl.float32) * by
    if SHARED:
        update += tl.load(shared + token * H + column, inside, other=0.0).to(tl.float32)
    total += update
    tl.store(residual + token * H + column, total, inside)
    if NORM:
        scale = tl.rsqrt(tl.sum(total * total, 0) / H + eps) * by_column
        tl.store(normed + token * H + column, (total * scale).to(normed.dtype.element_ty), inside)
