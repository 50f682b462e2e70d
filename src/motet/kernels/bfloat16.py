"""Weights kept as the bfloat16 numbers that most checkpoints have, half the bytes of float32.

Semantics: `kernels.linear`'s, with the weight's values as they are; products and sums are float32.
    panels: [ceil(N / WIDTH), K, LANES] uint32, pairs as `kernels.tile` reads them; missing columns are zeros.

Decoding streams every weight through once a step, so its time follows their bytes. A bfloat16 is the upper half of a
float32, so nothing is lost and nothing is looked up.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import prange, shared
from motet.kernels.tile import LANES, ROWS, WIDTH, multiply

F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]

GROUP = 1 << 18
"""Weights (as pairs) that meet all rows before the next come: they stay in the second cache."""
MANY = 48
"""Rows for each thread from which threads share rows."""


class Bfloat16Weight:
    """A weight [N, K] kept in bfloat16; a `Weight` of `kernels.linear`."""

    def __init__(self, weight: Tensor) -> None:
        if weight.dim() != 2 or weight.dtype != torch.bfloat16:
            raise ValueError(f"the weight must be bfloat16 [N, K], got {weight.dtype} {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.panels = _pairs(weight)
        self.nbytes = self.panels.nbytes

    def times(self, x: Tensor) -> Tensor:
        """x [T, K] to [T, N]."""
        y = torch.empty(len(x), self.out_features)
        _times_kernel(x.contiguous().numpy(), self.panels, y.numpy())
        return y


def _pairs(weight: Tensor) -> U32:
    """The weight in panels of WIDTH rows, transposed, its columns c and c + LANES side by side."""
    outputs, inputs = weight.shape
    panels = -(-outputs // WIDTH)
    padded = torch.nn.functional.pad(weight.view(torch.int16), (0, 0, 0, panels * WIDTH - outputs))
    pairs = padded.view(panels, 2, LANES, inputs).permute(0, 3, 2, 1).contiguous()
    found: U32 = pairs.view(torch.int32).squeeze(-1).numpy().view(np.uint32)
    return found


@shared
def _times_kernel(x: F32, panels: U32, y: F32, shares: int) -> None:
    """Shares are rows, if there are many, so that a core finds again what it wrote; else columns."""
    rows, depth = x.shape
    outputs, count, size = y.shape[1], panels.shape[0], depth * LANES
    flat_x, flat_w, flat_y = x.reshape(-1), panels.reshape(-1), y.reshape(-1)
    together = max(1, GROUP // size)
    many = rows >= MANY * shares
    for share in prange(shares):
        first, last = (0, count) if many else (share * count // shares, (share + 1) * count // shares)
        start, end = (share * rows // shares, (share + 1) * rows // shares) if many else (0, rows)
        for group in range(first, last, together):
            for row in range(start, end, ROWS):
                for panel in range(group, min(group + together, last)):
                    column = panel * WIDTH
                    multiply(
                        flat_y, row * outputs + column, outputs, min(WIDTH, outputs - column), flat_x, row * depth,
                        depth, min(ROWS, end - row), flat_w, panel * size, depth, False,
                    )  # fmt: skip
