"""One comparison for all tests: tolerances by dtype live here and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}


def assert_close(actual: Tensor, expected: Tensor, relative: float | None = None) -> None:
    """The largest difference is at most `relative` (default by dtype) of the largest expected magnitude."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert bool(torch.isfinite(actual).all()), "not finite"
    bound = RELATIVE[expected.dtype] if relative is None else relative
    scale = float(expected.abs().max()) or 1.0
    error = float((actual - expected).abs().max()) / scale
    assert error <= bound, f"relative error {error:.2e} exceeds {bound:.0e}"
