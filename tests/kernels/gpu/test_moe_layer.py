"""A whole layer of experts on the GPU kernels, against the CPU's reference and as a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from motet.kernels.activation import SILU, Activation
from motet.kernels.gpu.combine import combine
from motet.kernels.gpu.lora import RankBlocks
from motet.kernels.gpu.moe import ExpertWeights, ProductConfig, product
from motet.kernels.gpu.moe_lora import DECODE, ExpertUpdate, shrink, shrunk
from motet.kernels.gpu.mxfp4 import Mxfp4
from motet.kernels.gpu.route import Sorted, route
from motet.kernels.lora import FLOAT32, LoraTable
from motet.kernels.moe import ExpertLora, Experts, moe_torch
from motet.kernels.route import RoutingRule
from tests.close import assert_close
from tests.kernels.gpu.conftest import ON_DEVICE
from tests.kernels.gpu.expert_table import expert_table

HIDDEN, WIDE, EXPERTS, RANKS = 96, 64, 6, (5, 33)


@dataclass
class Layer:
    """Weights, adapters and workspaces; the rule decides bias and activation as the models of its kind have them."""

    rule: RoutingRule
    gate_up: ExpertWeights
    down: ExpertWeights
    table: RankBlocks
    slots: Tensor
    x: Tensor
    logits: Tensor
    config: ProductConfig
    residual: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.residual = torch.zeros(len(self.x), HIDDEN, device=self.x.device)

    @property
    def activation(self) -> Activation:
        return Activation(1.5, 1.7) if self.rule.normalise else SILU

    def __call__(self, *, pdl: bool = False) -> None:
        """Adds the layer's output to the residual."""
        tokens, k = len(self.x), self.rule.top_k
        work = Sorted.empty(tokens, k, EXPERTS, 8, len(RANKS), self.x.device)
        a = self.x.new_empty(tokens * k, WIDE)
        y = torch.empty(tokens * k, HIDDEN, device=self.x.device)
        up = ExpertUpdate(self.table, 2, shrunk(tokens * k, 2, max(RANKS), self.x))
        down = ExpertUpdate(self.table, 4, shrunk(tokens * k, 1, max(RANKS), self.x))
        config, weigh = self.config, self.rule.on_input
        route(self.logits, self.rule, self.slots, work, pdl=pdl)
        shrink(self.x, work, up, gather=True, config=DECODE, pdl=pdl)
        product(
            self.x, self.gate_up, work, a, config, gather=True, activation=self.activation, update=up,
            weigh_input=weigh, pdl=pdl,
        )  # fmt: skip
        shrink(a, work, down, gather=False, config=DECODE, pdl=pdl)
        product(a, self.down, work, y, config, gather=False, update=down, pdl=pdl)
        combine(y, work, self.residual, weighed=weigh, pdl=pdl)


def make(
    rule: RoutingRule, tokens: int, packed: bool, config: ProductConfig, dtype: torch.dtype, device: str
) -> Layer:
    def weights(features: int, depth: int) -> ExpertWeights:
        bias = torch.randn(EXPERTS, features, device=device) if rule.normalise else None
        if not packed:
            weight = torch.randn(EXPERTS, features, depth, device=device) / depth**0.5
            return ExpertWeights(weight.to(dtype), bias)
        codes = torch.randint(0, 256, (EXPERTS, features, depth // 2), dtype=torch.uint8, device=device)
        scales = torch.randint(119, 124, (EXPERTS, features, depth // 32), dtype=torch.uint8, device=device)
        return ExpertWeights(Mxfp4.pack(codes, scales), bias)

    table = expert_table(EXPERTS, HIDDEN, WIDE, RANKS, dtype, device)
    slots = torch.randint(-1, len(RANKS), (tokens,), dtype=torch.int32, device=device)
    x = torch.randn(tokens, HIDDEN, device=device).to(dtype)
    logits = torch.randn(tokens, EXPERTS, device=device)
    return Layer(rule, weights(2 * WIDE, HIDDEN), weights(HIDDEN, WIDE), table, slots, x, logits, config)


def expected(layer: Layer) -> Tensor:
    """The CPU's reference on the same weights and factors."""
    table, pool = layer.table, layer.table.pool.float().cpu()
    lora = LoraTable(
        table.first.cpu().numpy(), table.count.cpu().numpy(), table.a.cpu().numpy(), table.b.cpu().numpy(),
        table.rank.cpu().numpy(), np.full(len(table.rank), FLOAT32, np.int32), table.scale.cpu().numpy(),
        pool.view(torch.uint8),
    )  # fmt: skip
    gate_up, down = ([w.of(e).float().cpu() for e in range(EXPERTS)] for w in (layer.gate_up, layer.down))
    biases = [None if w.bias is None else w.bias.cpu() for w in (layer.gate_up, layer.down)]
    experts = Experts([], [], biases[0], biases[1], layer.activation)
    adapters = ExpertLora(lora, 2, layer.slots.cpu())
    return moe_torch(layer.x.float().cpu(), layer.logits.cpu(), layer.rule, gate_up, down, experts, adapters)


DTYPE = torch.bfloat16 if ON_DEVICE else torch.float32
RULES = [RoutingRule(2, normalise=True), RoutingRule(1, scoring="sigmoid", on_input=True)]
CONFIGS = [ProductConfig(32, 32, 1, 3), ProductConfig(32, 32, 2, 3, split=2, ahead=True, launch=3)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("config", CONFIGS)
def test_layer_equals_the_cpus(rule: RoutingRule, config: ProductConfig, packed: bool, device: str) -> None:
    layer = make(rule, 7, packed, config, DTYPE, device)
    layer()
    assert_close(layer.residual.cpu(), expected(layer), 2e-2 if ON_DEVICE else 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_DEVICE, reason="a CUDA graph needs a device")
@pytest.mark.parametrize("config", CONFIGS)
def test_graph_replays_repeat_the_eager_bits(config: ProductConfig) -> None:
    layer = make(RULES[0], 13, True, config, DTYPE, "cuda")
    layer()
    eager = layer.residual.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(pdl=True)
    for _ in range(2):
        layer.residual.zero_()
        graph.replay()
        assert torch.equal(layer.residual, eager)
