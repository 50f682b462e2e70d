"""RMS normalisation of rows, fused with the residual addition.

Semantics (reference: `motet.kernels.norm.add_rms_norm_torch`):
    s = residual + x
    y[t, h] = s[t, h] / sqrt(mean_h(s[t, h]^2) + eps) * weight[h]
    x: [T, H] bfloat16 (a branch's output), residual: [T, H] float32, overwritten with s, weight: [H] float32;
    y: [T, H] in x's dtype. `residual` None means zeros: the first layer, whose residual is x itself.

A program takes one row, so a row's result does not depend on the batch around it. Normalisation of single heads is
fused into `kv_write`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motet.kernels.gpu.jit import kernel, launch_options, tl, triton


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns (y, s); s is `residual` itself where given."""
    rows, width = x.shape
    assert x.is_contiguous()
    assert weight.shape == (width,)
    y = torch.empty_like(x)
    total = torch.empty_like(x, dtype=torch.float32) if residual is None else residual
    assert total.shape == x.shape
    assert total.is_contiguous()
    if rows:
        block = triton.next_power_of_2(width)
        _add_rms_norm_kernel[(rows,)](
            x, total, weight, y, width, eps, HAS_RESIDUAL=residual is not None, BLOCK=block,
            num_warps=min(max(block // 512, 1), 16), **launch_options(pdl),
        )  # fmt: skip
    return y, total


@kernel()
def _add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, y, width, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64) * width + columns
    total = tl.load(x + at, inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + at, inside, other=0.0)
    tl.store(residual + at, total, inside)
    norm = tl.rsqrt(tl.sum(total * total, axis=0) / width + eps)
    tl.store(y + at, (total * norm * scale).to(y.dtype.element_ty), inside)
