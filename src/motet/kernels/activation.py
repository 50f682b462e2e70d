"""The gated activation of SwiGLU.

Semantics:
    silu_mul(h)[t, i] = silu(h[t, i]) * h[t, I + i]
    h: [T, 2·I] float32 (gate half, then up half), result [T, I].
"""

from __future__ import annotations

import torch
from torch import Tensor


def silu_mul(h: Tensor) -> Tensor:
    """Torch's vectorised silu beats a scalar loop here: it has a vector exponential, Numba alone has none."""
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
