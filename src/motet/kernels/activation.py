"""The gated activation between an MLP's two products.

Semantics, for h [T, 2·I] float32 (gate half g, then up half u), result [T, I]:
    silu_mul(h) = silu(g) · u
    activate(h, activation) = the same, or with a limit g' · sigmoid(alpha · g') · (u' + 1),
    g' = min(g, limit), u' = u within ± limit (gpt-oss)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.exp import exp
from motet.kernels.jit import prange, shared

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Activation:
    """Which activation: silu(g) · u, or the clamped one. See the module's semantics."""

    limit: float | None = None
    alpha: float = 1.0


SILU = Activation()


def activate_torch(h: Tensor, activation: Activation) -> Tensor:
    """Reference in plain torch."""
    if activation.limit is None:
        return silu_mul_torch(h)
    gate, up = h.chunk(2, dim=-1)
    gate = gate.clamp(max=activation.limit)
    return (
        torch.sigmoid(gate * activation.alpha)
        .mul_(gate)
        .mul_(up.clamp(-activation.limit, activation.limit).add_(1))
    )


def activate(h: Tensor, activation: Activation) -> Tensor:
    """h [T, 2·I] to [T, I]."""
    return silu_mul(h) if activation.limit is None else activate_torch(h, activation)


def silu_mul_torch(h: Tensor) -> Tensor:
    """Reference in plain torch."""
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_mul(h: Tensor) -> Tensor:
    """h [T, 2·I] to [T, I] in one pass."""
    out = torch.empty(h.shape[0], h.shape[1] // 2)
    _silu_mul_kernel.over(len(h))(h.numpy(), out.numpy())
    return out


@shared
def _silu_mul_kernel(h: F32, out: F32, shares: int) -> None:
    rows, width = out.shape
    one = np.float32(1)
    for share in prange(shares):
        for t in range(share * rows // shares, (share + 1) * rows // shares):
            gate, up, target = h[t, :width], h[t, width:], out[t]
            for i in range(width):
                target[i] = gate[i] / (one + exp(-gate[i])) * up[i]
