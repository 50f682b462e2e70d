from __future__ import annotations

import pytest
import torch

from motet.kernels.linear import PackedWeight, linear, linear_torch
from tests.close import assert_close


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 19, 130])
@pytest.mark.parametrize(("out_features", "in_features"), [(33, 48), (577, 131), (4, 48)])
def test_linear_matches_reference(rows: int, out_features: int, in_features: int) -> None:
    weight, x = torch.randn(out_features, in_features), torch.randn(rows, in_features)
    assert_close(linear(x, PackedWeight(weight)), linear_torch(x, weight))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 64])
def test_a_row_does_not_depend_on_its_neighbours(rows: int) -> None:
    packed, x = PackedWeight(torch.randn(192, 576)), torch.randn(100, 576)
    whole = linear(x, packed)
    assert torch.equal(linear(x[5 : 5 + rows].contiguous(), packed), whole[5 : 5 + rows])


def test_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="float32"):
        PackedWeight(torch.zeros(4, 4, dtype=torch.bfloat16))
