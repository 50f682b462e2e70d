from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from motet.kernels.tile import LANES, ROWS, SIZES, WIDTH, multiply, spread, transpose
from tests.close import assert_close


def pairs(weight: Tensor) -> np.ndarray:
    """weight [depth, WIDTH] bfloat16 as the kernel reads it."""
    bits = weight.view(torch.uint16).view(-1, 2, LANES).transpose(1, 2).contiguous()
    return bits.numpy().view(np.uint32).reshape(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "cols", "depth"),
    [(1, WIDTH, 5), (sum(SIZES), WIDTH - 3, 17), (3 * ROWS + 2, WIDTH, 33), (2, 1, 3), (0, 4, 4), (3, 2, 0)],
)
def test_a_block_matches_the_product(dtype: torch.dtype, rows: int, cols: int, depth: int) -> None:
    weight, x = torch.randn(depth, WIDTH).to(dtype), torch.randn(rows + 1, depth + 3)
    panel = weight.numpy().reshape(-1) if dtype == torch.float32 else pairs(weight)
    expected = x[1:, 2 : 2 + depth] @ weight.float()[:, :cols]
    stride = cols + 5
    y = torch.full((rows + 2, stride), 3.0)
    before = y.clone()
    for add in (False, True):
        multiply(
            y.numpy().reshape(-1), stride + 4, stride, cols, x.numpy().reshape(-1), depth + 3 + 2, depth + 3, rows,
            panel, 0, depth, add,
        )  # fmt: skip
    inside = y[1 : 1 + rows, 4 : 4 + cols]
    assert_close(inside, 2 * expected)
    inside.fill_(3.0)
    assert torch.equal(y, before), "written outside the block"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "depth", "column"), [(1, 7, 0), (WIDTH + 9, 5, 3), (4, 11, WIDTH - 2)])
def test_rows_and_columns_become_panels(dtype: torch.dtype, count: int, depth: int, column: int) -> None:
    matrix = torch.randn(count, depth).to(dtype)
    flat = torch.cat([torch.randn(6).to(dtype), matrix.reshape(-1)])
    source = flat.numpy() if dtype == torch.float32 else flat.view(torch.uint16).numpy()
    panels = np.full((3, depth, WIDTH), 7, np.float32)
    transpose(panels.reshape(-1), column, source, 6, count, depth)
    side_by_side = torch.from_numpy(panels).transpose(0, 1).reshape(depth, -1)
    assert torch.equal(side_by_side[:, column : column + count], matrix.float().T)
    assert bool((side_by_side[:, :column] == 7).all())
    assert bool((side_by_side[:, column + count :] == 7).all())
    panels = np.full((-(-depth // WIDTH), count, WIDTH), 7, np.float32)
    spread(panels.reshape(-1), source, 6, depth, count, depth)
    side_by_side = torch.from_numpy(panels).transpose(0, 1).reshape(count, -1)
    assert torch.equal(side_by_side[:, :depth], matrix.float())
    assert bool((side_by_side[:, depth:] == 7).all())
