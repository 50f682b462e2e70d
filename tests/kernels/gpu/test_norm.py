from __future__ import annotations

import pytest
import torch

from motet.kernels.gpu.norm import add_rms_norm
from motet.kernels.norm import add_rms_norm_torch
from tests.close import assert_close
from tests.kernels.gpu.conftest import TOLERANCE


@pytest.mark.parametrize(("rows", "width"), [(0, 48), (1, 577), (7, 48), (5, 2880)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_matches_reference(
    rows: int, width: int, with_residual: bool, dtype: torch.dtype, device: str
) -> None:
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device)
    residual = torch.randn(rows, width, device=device) if with_residual else None
    expected, expected_residual = add_rms_norm_torch(x.float(), residual, weight, 1e-5)
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    assert y.dtype == dtype
    assert residual is None or total is residual
    assert_close(y.float(), expected, TOLERANCE[dtype])
    assert_close(total, expected_residual)


def test_zero_rows_stay_finite(device: str) -> None:
    x, weight = torch.zeros(2, 16, device=device), torch.ones(16, device=device)
    y, _ = add_rms_norm(x, None, weight, 1e-6)
    assert_close(y, x)
