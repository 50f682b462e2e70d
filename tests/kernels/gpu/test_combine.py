from __future__ import annotations

import pytest
import torch

from motet.kernels.gpu.combine import Normed, combine, combine_torch
from motet.kernels.gpu.route import Sorted, route_torch
from motet.kernels.route import RoutingRule
from tests.close import assert_close
from tests.kernels.gpu.conftest import TOLERANCE


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_combine(with_norm: bool, shared: bool, dtype: torch.dtype, device: str) -> None:
    work, hidden = Sorted.empty(9, 2, 6, 8, 0, device), 577
    route_torch(torch.randn(9, 6, device=device), RoutingRule(2), None, work, torch.tensor([7]))
    y = torch.randn(18, hidden, device=device).to(dtype)
    more = torch.randn(9, hidden, device=device).to(dtype) if shared else None
    residual = torch.randn(9, hidden, device=device)
    mine, reference = residual.clone(), residual.clone()
    norms = [
        Normed(torch.linspace(0.5, 2, hidden, device=device), 1e-5, torch.zeros_like(y[:9]))
        if with_norm
        else None
        for _ in range(2)
    ]
    combine(y, work, mine, shared=more, weighed=shared, norm=norms[0])
    combine_torch(y, work, reference, shared=more, weighed=shared, norm=norms[1])
    assert_close(mine, reference)
    if norms[0] is not None and norms[1] is not None:
        assert_close(norms[0].out.float(), norms[1].out.float(), TOLERANCE[dtype])
