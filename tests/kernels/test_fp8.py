from __future__ import annotations

import pytest
import torch

from motet.kernels.fp8 import dequantise, dequantise_torch, scale_shape
from tests.close import assert_close


@pytest.mark.parametrize("shape", [(128, 256), (7, 5), (130, 257), (3, 20, 31), (1, 1)])
@pytest.mark.parametrize("block", [(128, 128), (6, 4), (1, 32), (200, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_dequantise_matches_reference(
    shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype
) -> None:
    q = torch.randn(shape).mul_(100).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(shape, block)).add_(0.01).to(dtype)
    expected = dequantise_torch(q, scale, block)
    assert_close(dequantise(q, scale, block), expected)
    last = tuple(size - 1 for size in shape)
    part = scale[(*last[:-2], last[-2] // block[0], last[-1] // block[1])]
    assert float(expected[last]) == float(q[last].float() * part.float())


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) do not fit a weight \(5, 4\) in blocks \(4, 4\)"):
        dequantise(torch.zeros(5, 4, dtype=torch.float8_e4m3fn), torch.ones(2, 2), (4, 4))
