from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from motet.kernels.linear import linear, linear_torch
from motet.kernels.moe import Experts, moe, moe_torch
from motet.kernels.mxfp4 import TILE_ROWS, Mxfp4Weight, mxfp4_dequantise, mxfp4_dequantise_torch
from motet.kernels.route import RoutingRule
from tests.close import assert_close


def random_weight(outputs: int, inputs: int, low: int = 118, high: int = 124) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    return codes, torch.randint(low, high, (outputs, inputs // 32), dtype=torch.uint8)


def test_every_code_and_scale() -> None:
    codes = torch.arange(16, dtype=torch.uint8).expand(255, 16).contiguous()  # low half c, high half 0
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    out = torch.empty(255, 32)
    mxfp4_dequantise(codes, scales, out)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([magnitudes, -magnitudes])
    expected = (values.double() * 2.0 ** (scales.double() - 127)).float()  # the largest overflow to infinity
    assert torch.equal(out[:, ::2], expected)
    assert torch.equal(out[:, 1::2], torch.zeros(255, 16))
    assert torch.equal(mxfp4_dequantise_torch(codes, scales), out)
    mxfp4_dequantise(codes[:1], torch.tensor([[255]], dtype=torch.uint8), out[:1])
    assert bool(out[0].isnan().all())


@pytest.mark.parametrize(("outputs", "inputs"), [(0, 64), (1, 32), (33, 160), (TILE_ROWS + 7, 96)])
def test_dequantises_like_transformers(outputs: int, inputs: int) -> None:
    codes, scales = random_weight(outputs, inputs)
    blocks = codes.view(1, outputs, inputs // 32, 16)
    theirs = convert_moe_packed_tensors(blocks, scales[None], dtype=torch.float32)[0].T
    ours = torch.empty(outputs, inputs)
    mxfp4_dequantise(codes, scales, ours)
    assert torch.equal(ours, theirs)
    assert torch.equal(mxfp4_dequantise_torch(codes, scales), theirs)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 19, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(33, 64), (TILE_ROWS + 77, 160), (4, 32)])
def test_product_matches_reference(rows: int, outputs: int, inputs: int) -> None:
    codes, scales = random_weight(outputs, inputs)
    x, weight = torch.randn(rows, inputs), Mxfp4Weight(codes, scales)
    assert (weight.out_features, weight.in_features) == (outputs, inputs)
    assert_close(linear(x, weight), linear_torch(x, mxfp4_dequantise_torch(codes, scales)))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(192, 576), (TILE_ROWS + 65, 96)])
def test_a_row_does_not_depend_on_its_neighbours(rows: int, outputs: int, inputs: int) -> None:
    weight, x = Mxfp4Weight(*random_weight(outputs, inputs)), torch.randn(300, inputs)
    whole = linear(x, weight)
    assert torch.equal(linear(x[5 : 5 + rows].contiguous(), weight), whole[5 : 5 + rows])


def test_experts_in_four_bits() -> None:
    hidden, wide, count = 64, 96, 3
    gate_up = [Mxfp4Weight(*random_weight(2 * wide, hidden)) for _ in range(count)]
    down = [Mxfp4Weight(*random_weight(hidden, wide)) for _ in range(count)]
    experts = Experts(gate_up, down, torch.randn(count, 2 * wide), torch.randn(count, hidden))
    plain = [[mxfp4_dequantise_torch(w.codes, w.scales) for w in weights] for weights in (gate_up, down)]
    x, logits, rule = torch.randn(21, hidden), torch.randn(21, count), RoutingRule(2, normalise=True)
    assert_close(moe(x, logits, rule, experts), moe_torch(x, logits, rule, plain[0], plain[1], experts))


def test_four_bits_and_a_quarter() -> None:
    weight = Mxfp4Weight(*random_weight(37, 96))
    assert weight.nbytes * 8 == 4.25 * 37 * 96


@pytest.mark.parametrize(
    ("codes", "scales", "dtype", "message"),
    [
        ((4, 32), (4, 2), torch.int8, "uint8"),
        ((4, 32), (5, 2), torch.uint8, "do not fit"),
        ((4, 33), (4, 2), torch.uint8, "do not fit"),
        ((4, 2, 16), (4, 2), torch.uint8, "do not fit"),
    ],
)
def test_refuses_what_does_not_fit(
    codes: tuple[int, ...], scales: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Mxfp4Weight(torch.zeros(codes, dtype=dtype), torch.zeros(scales, dtype=torch.uint8))
