from __future__ import annotations

import pytest
import torch
from torch import Tensor

from motet.kernels.bfloat16 import Bfloat16Weight
from motet.kernels.linear import PackedWeight, Weight, linear, linear_torch
from tests.close import assert_close

SHAPES = [(33, 48), (577, 131), (4, 48)]


def kept(weight: Tensor, dtype: torch.dtype) -> Weight:
    return Bfloat16Weight(weight.bfloat16()) if dtype == torch.bfloat16 else PackedWeight(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 19, 250])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_linear_matches_reference(dtype: torch.dtype, rows: int, out_features: int, in_features: int) -> None:
    weight, x = torch.randn(out_features, in_features), torch.randn(rows, in_features)
    found = kept(weight, dtype)
    assert (found.out_features, found.in_features) == (out_features, in_features)
    assert_close(linear(x, found), linear_torch(x, weight.to(dtype).float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 64])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, rows: int) -> None:
    weight, x = kept(torch.randn(192, 576), dtype), torch.randn(300, 576)
    whole = linear(x, weight)
    assert torch.equal(linear(x[5 : 5 + rows].contiguous(), weight), whole[5 : 5 + rows])


def test_inputs_may_lie_apart() -> None:
    weight, x = torch.randn(40, 24).bfloat16(), torch.randn(9, 50)
    assert_close(linear(x[:, 7:31], Bfloat16Weight(weight)), linear_torch(x[:, 7:31], weight.float()))


def test_two_bytes_a_weight() -> None:
    assert Bfloat16Weight(torch.zeros(96, 17, dtype=torch.bfloat16)).nbytes == 2 * 96 * 17


def test_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="float32"):
        PackedWeight(torch.zeros(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bfloat16"):
        Bfloat16Weight(torch.zeros(4, 4))
