from __future__ import annotations

import pytest
import torch

from motet.kernels.gpu.mxfp4 import Mxfp4
from motet.kernels.mxfp4 import mxfp4_dequantise_torch


def test_packing_loses_nothing(device: str) -> None:
    codes = torch.randint(0, 256, (3, 64, 5, 16), dtype=torch.uint8, device=device)
    scales = torch.randint(0, 129, (3, 64, 5), dtype=torch.uint8, device=device)
    packed = Mxfp4.pack(codes, scales)
    assert packed.words.shape == (3, 2, 5, 128)
    assert packed.scales.shape == (3, 2, 5, 8)
    unpacked, again = packed.unpack()
    assert torch.equal(unpacked, codes.flatten(2))
    assert torch.equal(again, scales)
    expected = mxfp4_dequantise_torch(codes[2].flatten(1).cpu(), scales[2].cpu())
    assert torch.equal(packed.dequantise()[2].cpu(), expected)


def test_one_matrix_and_no_experts(device: str) -> None:
    codes = torch.randint(0, 256, (32, 16), dtype=torch.uint8, device=device)
    scales = torch.full((32, 1), 120, dtype=torch.uint8, device=device)
    assert torch.equal(Mxfp4.pack(codes, scales).unpack()[0], codes)


@pytest.mark.parametrize(
    ("rows", "scale", "message"), [(48, 120, "multiple of 32"), (32, 129, "at most"), (32, 255, "at most")]
)
def test_refuses_what_does_not_fit(rows: int, scale: int, message: str) -> None:
    codes = torch.zeros(rows, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        Mxfp4.pack(codes, torch.full((rows, 1), scale, dtype=torch.uint8))


def test_refuses_parts_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Mxfp4.pack(torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(32, 1, dtype=torch.uint8))
