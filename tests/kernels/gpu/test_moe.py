from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.activation import Activation
from motet.kernels.gpu.moe import (
    ExpertWeights,
    ProductConfig,
    product,
    product_config,
    product_torch,
    tile_rows,
)
from motet.kernels.gpu.moe_lora import ExpertUpdate, shrink_torch, shrunk
from motet.kernels.gpu.mxfp4 import Mxfp4
from motet.kernels.gpu.route import Sorted, route_torch
from motet.kernels.route import RoutingRule
from tests.close import assert_close
from tests.kernels.gpu.conftest import ON_DEVICE, TOLERANCE
from tests.kernels.gpu.expert_table import expert_table

EXPERTS, RANKS = 6, (5, 16, 40, 33)


def lists(tokens: int, rows: int, device: str) -> Sorted:
    out = Sorted.empty(tokens, 2, EXPERTS, rows, len(RANKS), device)
    slots = torch.randint(-1, len(RANKS), (tokens,), dtype=torch.int32)
    real = torch.tensor([max(tokens - 2, 1)])
    route_torch(torch.randn(tokens, EXPERTS, device=device), RoutingRule(2), slots, out, real)
    return out


def packed(features: int, depth: int, device: str) -> Mxfp4:
    codes = torch.randint(0, 256, (EXPERTS, features, depth // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(115, 124, (EXPERTS, features, depth // 32), dtype=torch.uint8, device=device)
    return Mxfp4.pack(codes, scales)


def check(
    x: Tensor, weights: ExpertWeights, work: Sorted, config: ProductConfig, activation: Activation | None,
    table_shape: tuple[int, int] | None, weigh: bool,
) -> None:  # fmt: skip
    """One product against the reference in float64, rows that no pair owns untouched."""
    sides = 1 if activation is None else 2
    width = weights.shape[1] // sides
    update = None
    if table_shape is not None:
        table = expert_table(EXPERTS, *table_shape, RANKS, x.dtype, str(x.device))
        z = shrunk(len(work.order), sides, max(RANKS), x)
        update = ExpertUpdate(table, 2 if sides == 2 else 4, z)
        shrink_torch(x, work, update, gather=sides == 2)
    out = torch.full((len(work.order), width), -77, dtype=x.dtype, device=x.device)
    expected = torch.full_like(out, -77, dtype=torch.float64)
    how = {"gather": sides == 2, "activation": activation, "update": update, "weigh_input": weigh}
    product_torch(x, weights, work, expected, **how)  # type: ignore[arg-type]
    product(x, weights, work, out, config, **how)  # type: ignore[arg-type]
    assert_close(out.double(), expected, TOLERANCE[x.dtype])


PLAIN = [
    (ProductConfig(32, 32, 4, 3), 8),
    (ProductConfig(16, 16, 2, 3, group=2), 16),
    (ProductConfig(64, 32, 4, 3, group=3), 64),
    (ProductConfig(32, 16, 2, 3, ranks=16, split=2), 8),
    (ProductConfig(16, 16, 4, 3, split=8), 16),
]


@pytest.mark.parametrize(("config", "rows"), PLAIN)
@pytest.mark.parametrize("activation", [None, Activation(), Activation(1.5, 1.7)])
@pytest.mark.parametrize("with_lora", [False, True])
def test_plain_weights(
    config: ProductConfig,
    rows: int,
    activation: Activation | None,
    with_lora: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    hidden, width, tokens = 80, 37, 11
    shape = (EXPERTS, 2 * width, hidden) if activation else (EXPERTS, hidden, width)
    weight = (torch.randn(shape, device=device) / shape[2] ** 0.5).to(dtype)
    bias = torch.randn(shape[:2], device=device)
    x = torch.randn(tokens if activation else 2 * tokens, shape[2], device=device).to(dtype)
    table = (hidden, width) if with_lora else None
    weigh = with_lora and rows == 16
    check(x, ExpertWeights(weight, bias), lists(tokens, rows, device), config, activation, table, weigh)


PACKED = [
    (ProductConfig(32, 32, 1, 3), 8),
    (ProductConfig(64, 96, 2, 3), 16),
    (ProductConfig(64, 96, 4, 3, group=2, wgmma=True), 64),
    (ProductConfig(32, 96, 2, 3, split=2), 8),
    (ProductConfig(64, 32, 4, 3, ranks=32, split=4), 16),
    (ProductConfig(64, 32, 2, 3, group=2, split=8), 8),
]
PACKED_DTYPE = torch.bfloat16 if ON_DEVICE else torch.float32


@pytest.mark.parametrize(("config", "rows"), PACKED)
@pytest.mark.parametrize("activation", [None, Activation(1.5, 1.7)])
@pytest.mark.parametrize("with_lora", [False, True])
def test_packed_weights(
    config: ProductConfig, rows: int, activation: Activation | None, with_lora: bool, device: str
) -> None:
    hidden, width, tokens = 192, 96, 9
    features, depth = (2 * width, hidden) if activation else (hidden, width)
    weights = ExpertWeights(packed(features, depth, device), torch.randn(EXPERTS, features, device=device))
    x = torch.randn(tokens if activation else 2 * tokens, depth, device=device).to(PACKED_DTYPE)
    table = (hidden, width) if with_lora else None
    check(x, weights, lists(tokens, rows, device), config, activation, table, False)


def test_scales_among_the_words(device: str) -> None:
    """Packed weights are read by their strides."""
    apart = packed(96, 64, device)
    joined = torch.cat([apart.words, apart.scales], -1)
    weights = ExpertWeights(Mxfp4(joined[..., :128], joined[..., 128:]))
    x = torch.randn(14, 64, device=device).to(PACKED_DTYPE)
    check(x, weights, lists(7, 8, device), ProductConfig(64, 32, 2, 3, split=2), None, None, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 48}, "features = 48 must be a power of two"),
        ({"split": 2}, "split = 2 must be 1 with wgmma and else at least warps = 4"),
        ({"split": 4, "wgmma": True}, "split = 4 must be 1 with wgmma"),
        ({"launch": 4}, "launch = 4 must be at most 3"),
    ],
)
def test_a_configuration_checks_itself(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(ProductConfig(64, 96, warps=4, stages=3), **change)


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("sides", [1, 2])
def test_sums_of_decode_steps_have_one_order(kind: str, sides: int) -> None:
    """Whatever the step's size: a row's bits then depend on nothing but the row."""
    plain = torch.empty(32, 2880, 2880, device="meta")
    words = torch.empty(32, 90, 90, 128, dtype=torch.int32, device="meta")
    weights = ExpertWeights(plain if kind == "plain" else Mxfp4(words, words[..., :8]))
    sizes = [(tile_rows(tokens, 4, 32), min(4 * tokens, 32)) for tokens in (1, 2, 4, 8, 16, 32, 64)]
    configs = [product_config(weights, sides, rows, tiles) for rows, tiles in sizes]
    assert len({(config.split, config.depth, config.wgmma) for config in configs}) == 1


def test_small_activations_keep_their_digits(device: str) -> None:
    """Codes are 2^-126 times their value inside: sums with x of 1e-6 would be float32 subnormals."""
    weights = ExpertWeights(packed(64, 64, device))
    x = (torch.randn(14, 64, device=device) * 1e-6).to(PACKED_DTYPE)
    check(x, weights, lists(7, 8, device), ProductConfig(64, 64, 2, 3), None, None, False)
