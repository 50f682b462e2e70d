from __future__ import annotations

import pytest
import torch

from motet.kernels.norm import add_rms_norm, add_rms_norm_torch, head_rms_norm, head_rms_norm_torch
from tests.close import assert_close


@pytest.mark.parametrize(("rows", "width"), [(0, 48), (1, 577), (7, 48), (33, 130)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_rms_norm_matches_reference(rows: int, width: int, with_residual: bool) -> None:
    x, weight = torch.randn(rows, width), torch.randn(width)
    residual = torch.randn(rows, width) if with_residual else None
    expected, expected_residual = add_rms_norm_torch(x, residual, weight, 1e-5)
    y, new_residual = add_rms_norm(x, residual, weight, 1e-5)
    assert_close(y, expected)
    assert_close(new_residual, expected_residual)


def test_zero_rows_stay_finite() -> None:
    y, _ = add_rms_norm(torch.zeros(2, 16), None, torch.ones(16), 1e-6)
    assert_close(y, torch.zeros(2, 16))


@pytest.mark.parametrize(
    ("rows", "heads", "first", "count", "dim"), [(0, 3, 0, 2, 8), (5, 7, 2, 3, 20), (3, 4, 0, 4, 64)]
)
def test_head_rms_norm_changes_its_heads_only(
    rows: int, heads: int, first: int, count: int, dim: int
) -> None:
    x, weight = torch.randn(rows, heads * dim), torch.randn(dim)
    expected = x.clone()
    head_rms_norm_torch(expected, first, count, weight, 1e-6)
    before = x.clone()
    head_rms_norm(x, first, count, weight, 1e-6)
    assert_close(x, expected)
    outside = torch.ones(heads * dim, dtype=torch.bool)
    outside[first * dim : (first + count) * dim] = False
    assert torch.equal(x[:, outside], before[:, outside])
