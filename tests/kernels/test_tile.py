from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from motet.kernels.tile import (
    LANES,
    ROWS,
    SIZES,
    WIDTH,
    multiply,
    multiply_slim,
    multiply_two,
    spread,
    transpose,
)
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


@pytest.mark.parametrize(
    ("rows", "cols", "depth", "more"), [(ROWS + 3, WIDTH, 9, 5), (7, 3, 4, 0), (5, WIDTH, 0, 6)]
)
def test_two_sources_have_the_bits_of_one_after_the_other(
    rows: int, cols: int, depth: int, more: int
) -> None:
    x, z, panel = torch.randn(rows, depth), torch.randn(rows, more + 2), torch.randn(depth + more, WIDTH)
    one, two = torch.full((rows, cols), 3.0), torch.full((rows, cols), 4.0)
    flat_x, flat_z, flat = x.numpy().reshape(-1), z.numpy().reshape(-1), panel.numpy().reshape(-1)
    first, second = one.numpy().reshape(-1), two.numpy().reshape(-1)
    multiply(first, 0, cols, cols, flat_x, 0, depth, rows, flat, 0, depth, False)
    multiply(first, 0, cols, cols, flat_z, 1, more + 2, rows, flat, depth * WIDTH, more, True)
    multiply_two(second, 0, cols, cols, flat_x, 0, depth, rows, flat, 0, depth, flat_z, 1, more + 2, more)
    assert_close(one, x @ panel[:depth, :cols] + z[:, 1 : 1 + more] @ panel[depth:, :cols])
    assert torch.equal(one, two)


@pytest.mark.parametrize(("rows", "depth"), [(4 * ROWS + sum(SIZES), 17), (1, 40), (0, 3), (2, 0)])
def test_slim_panels_match_the_product(rows: int, depth: int) -> None:
    x, panel = torch.randn(rows, depth), torch.randn(depth, LANES)
    y = torch.full((rows, LANES + 3), 3.0)
    multiply_slim(
        y.numpy().reshape(-1), 2, LANES + 3, x.numpy().reshape(-1), 0, depth, rows, panel.numpy().reshape(-1), 0, depth
    )  # fmt: skip
    assert_close(y[:, 2 : 2 + LANES], x @ panel)
    assert bool((y[:, :2] == 3).all() and (y[:, 2 + LANES :] == 3).all()), "written outside the block"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [LANES, WIDTH])
@pytest.mark.parametrize(("count", "depth", "column"), [(1, 7, 0), (2 * LANES + 9, 5, 3), (4, 11, LANES - 2)])
def test_rows_become_columns_of_panels(
    dtype: torch.dtype, width: int, count: int, depth: int, column: int
) -> None:
    matrix = torch.randn(count, depth).to(dtype)
    flat = torch.cat([torch.randn(6).to(dtype), matrix.reshape(-1)])
    source = flat.numpy() if dtype == torch.float32 else flat.view(torch.uint16).numpy()
    panels = np.full((4, depth, width), 7, np.float32)
    transpose(panels.reshape(-1), width, column, source, 6, count, depth)
    side_by_side = torch.from_numpy(panels).transpose(0, 1).reshape(depth, -1)
    assert torch.equal(side_by_side[:, column : column + count], matrix.float().T)
    assert bool((side_by_side[:, :column] == 7).all())
    assert bool((side_by_side[:, column + count :] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, WIDTH - 3, WIDTH])
def test_rows_become_a_panel(dtype: torch.dtype, width: int) -> None:
    matrix = torch.randn(5, WIDTH + 6).to(dtype)
    source = matrix.numpy() if dtype == torch.float32 else matrix.view(torch.uint16).numpy()
    panel = np.full((7, WIDTH), 7, np.float32)
    spread(panel.reshape(-1), WIDTH, source.reshape(-1), 4, WIDTH + 6, 5, width)
    found = torch.from_numpy(panel)
    assert torch.equal(found[1:6, :width], matrix.float()[:, 4 : 4 + width])
    assert bool((found[1:6, width:] == 7).all() and (found[[0, 6]] == 7).all())
