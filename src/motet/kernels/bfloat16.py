"""Weights kept as the bfloat16 numbers that most checkpoints have, half the bytes of float32.

Semantics: `kernels.linear`'s, with the weight's values as they are; products and sums are float32.
    panels: [ceil(N / WIDTH), K, LANES] uint32, pairs as `kernels.tile` reads them; missing columns are zeros.

Decoding streams every weight through once a step, so its time follows their bytes. A bfloat16 is the upper half of a
float32, so nothing is lost and nothing is looked up. With many rows, pairs cost two operations beside 24 products:
some panels are unpacked, meet all rows and make room for the next. SmolLM2-135M's products at 1,024 rows take 0.65 s
so, 0.69 s with pairs (two cores).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import kernel, prange, shared
from motet.kernels.lora import NO_BLOCKS, LoraTable, factors, shrink
from motet.kernels.tile import LANES, ROWS, WIDTH, multiply, multiply_two, unpack

F32 = NDArray[np.float32]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

GROUP = 1 << 18
"""Weights (as pairs) that meet all rows before the next come: they stay in the second cache."""
UNPACKED = 3 << 16
"""The same of weights that are unpacked."""
MANY = 48
"""Rows for each thread from which threads share rows, and weights are unpacked."""


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
        if self.unpacks(x):
            _many_kernel(x.contiguous().numpy(), self.panels, y.numpy(), *NO_BLOCKS)
        else:
            _few_kernel(x.contiguous().numpy(), self.panels, y.numpy())
        return y

    def unpacks(self, x: Tensor) -> bool:
        """Whether weights are unpacked for the rows of x, because there are many."""
        return len(x) >= MANY * torch.get_num_threads()

    def adapted(self, x: Tensor, table: LoraTable, site: int, widths: Sequence[int], blocks: I64) -> Tensor:
        """As `times` of many rows, and `kernels.lora`'s updates of the blocks; the bits are those of one by one."""
        y, where = torch.empty(len(x), self.out_features), (blocks, site, np.array(widths, np.int64))
        _many_kernel(x.contiguous().numpy(), self.panels, y.numpy(), *where, *table.arrays)
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
def _few_kernel(x: F32, panels: U32, y: F32, shares: int) -> None:
    """Shares are columns."""
    rows, depth = x.shape
    outputs, count, size = y.shape[1], panels.shape[0], depth * LANES
    flat_x, flat_w, flat_y = x.reshape(-1), panels.reshape(-1), y.reshape(-1)
    together = max(1, GROUP // size)
    for share in prange(shares):
        last = (share + 1) * count // shares
        for group in range(share * count // shares, last, together):
            for row in range(0, rows, ROWS):
                for panel in range(group, min(group + together, last)):
                    column = panel * WIDTH
                    multiply(
                        flat_y, row * outputs + column, outputs, min(WIDTH, outputs - column), flat_x, row * depth,
                        depth, min(ROWS, rows - row), flat_w, panel * size, depth, False,
                    )  # fmt: skip


@shared
def _many_kernel(
    x: F32, panels: U32, y: F32, blocks: I64, site: int, widths: I64,
    first: I32, count: I32, a: I64, b: I64, rank: I32, dtype: I32, scale: F32, pool16: U16, pool32: F32, shares: int,
) -> None:  # fmt: skip
    """Shares are rows, so that a core finds again what it wrote. An adapter's B lies below the weights: [W; B]."""
    rows, depth = x.shape
    outputs, pairs = y.shape[1], depth * LANES
    flat_x, flat_w, flat_y = x.reshape(-1), panels.reshape(-1), y.reshape(-1)
    for share in prange(shares):
        table = first, count, a, b, rank, dtype, scale, pool16, pool32
        start, end = share * rows // shares, (share + 1) * rows // shares
        z, columns = shrink(x, start, end, blocks, site, widths.shape[0], table)
        size = (depth + columns) * WIDTH
        together = max(1, UNPACKED // size)
        unpacked, of_z = np.empty(together * size, np.float32), np.zeros((together, 2), np.int64)
        for group in range(0, panels.shape[0], together):
            number, row = min(together, panels.shape[0] - group), start
            for i in range(number):
                unpack(unpacked, i * size, flat_w, (group + i) * pairs, LANES, depth)
            while row < end:
                past, block = _run(blocks, row, end)
                for i in range(number):
                    of_z[i, 1] = 0
                    if block >= 0:
                        of_z[i] = factors(
                            unpacked, i * size + depth * WIDTH, (group + i) * WIDTH, blocks[block, 2],
                            site + blocks[block, 3], widths, table,
                        )  # fmt: skip
                while row < past:
                    few = min(ROWS, past - row)
                    for i in range(number):
                        column, z_at = (group + i) * WIDTH, (row - start) * columns + of_z[i, 0]
                        multiply_two(
                            flat_y, row * outputs + column, outputs, min(WIDTH, outputs - column), flat_x, row * depth,
                            depth, few, unpacked, i * size, depth, z, z_at, columns, of_z[i, 1],
                        )  # fmt: skip
                    row += few


@kernel
def _run(blocks: I64, row: int, end: int) -> tuple[int, int]:
    """Of the rows from `row` on, as many as are of the same block, or of none: where they end, and the block or -1."""
    for i in range(blocks.shape[0]):
        if blocks[i, 0] <= row < blocks[i, 1]:
            return min(end, blocks[i, 1]), i
        if blocks[i, 0] > row:
            end = min(end, blocks[i, 0])
    return end, -1


def warm_up() -> None:
    """Compile what only many rows reach."""
    Bfloat16Weight(torch.zeros(1, 1, dtype=torch.bfloat16)).times(
        torch.zeros(MANY * torch.get_num_threads(), 1)
    )
