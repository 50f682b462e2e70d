"""The gated activation between an MLP's two products.

Semantics, for h [T, 2·I] float32 (gate half g, then up half u), result [T, I]:
    silu_mul(h) = silu(g) · u
    activate(h, activation) = the same, or with a limit g' · sigmoid(alpha · g') · (u' + 1),
    g' = min(g, limit), u' = u within ± limit (gpt-oss)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """Which activation: silu(g) · u, or the clamped one. See the module's semantics."""

    limit: float | None = None
    alpha: float = 1.0


SILU = Activation()


def activate(h: Tensor, activation: Activation) -> Tensor:
    """h [T, 2·I] to [T, I]."""
    if activation.limit is None:
        return silu_mul(h)
    gate, up = h.chunk(2, dim=-1)
    gate = gate.clamp(max=activation.limit)
    return (
        torch.sigmoid(gate * activation.alpha)
        .mul_(gate)
        .mul_(up.clamp(-activation.limit, activation.limit).add_(1))
    )


def silu_mul(h: Tensor) -> Tensor:
    """Torch's vectorised silu beats a scalar loop here: it has a vector exponential, Numba alone has none."""
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
