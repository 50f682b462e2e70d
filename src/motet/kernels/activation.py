"""The gated activations between an MLP's two products.

Semantics, for h [T, 2·I] float32 (gate half g, then up half u), result [T, I]:
    silu_mul(h) = silu(g) · u
    clamped_swiglu(h, limit, alpha) = g' · sigmoid(alpha · g') · (u' + 1),  g' = min(g, limit), u' = u within ± limit
"""

from __future__ import annotations

import torch
from torch import Tensor


def silu_mul(h: Tensor) -> Tensor:
    """Torch's vectorised silu beats a scalar loop here: it has a vector exponential, Numba alone has none."""
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def clamped_swiglu(h: Tensor, limit: float, alpha: float) -> Tensor:
    """The activation of gpt-oss's experts."""
    gate, up = h.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.clamp(-limit, limit).add_(1))
