from __future__ import annotations

import pytest
import torch

from motet.kernels.activation import SILU, Activation
from motet.kernels.linear import PackedWeight
from motet.kernels.moe import ExpertLora, Experts, moe, moe_torch
from motet.kernels.route import RoutingRule, choose_experts
from tests.close import assert_close
from tests.kernels.test_lora import make_table

HIDDEN, WIDE, EXPERTS = 24, 20, 6
RULES = [
    RoutingRule(2, normalise=True),
    RoutingRule(3),
    RoutingRule(1, scoring="sigmoid", on_input=True),
    RoutingRule(2, groups=3, top_groups=2, scale=2.5),
    RoutingRule(
        2, True, "sigmoid", groups=2, top_groups=1, group_score="top2", bias=torch.linspace(-1, 1, EXPERTS)
    ),
]


@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_lora", [False, True])
def test_moe_matches_reference(tokens: int, rule: RoutingRule, with_lora: bool) -> None:
    gate_up = [torch.randn(2 * WIDE, HIDDEN) for _ in range(EXPERTS)]
    down = [torch.randn(HIDDEN, WIDE) for _ in range(EXPERTS)]
    experts = Experts(
        [PackedWeight(w) for w in gate_up],
        [PackedWeight(w) for w in down],
        torch.randn(EXPERTS, 2 * WIDE) if rule.normalise else None,
        torch.randn(EXPERTS, HIDDEN) if rule.normalise else None,
        Activation(limit=1.5, alpha=1.7) if rule.normalise else SILU,
    )
    x, logits = torch.randn(tokens, HIDDEN), torch.randn(tokens, EXPERTS)
    logits[:, 0] += 3 * (tokens == 33)  # then nearly every token chooses the first expert
    lora = None
    if with_lora:
        shapes = [(HIDDEN, WIDE), (HIDDEN, WIDE), (WIDE, HIDDEN)] * EXPERTS
        table, _ = make_table(shapes, [[3], [5], [2, 4]])
        lora = ExpertLora(table, 0, torch.randint(-1, 3, (tokens,), dtype=torch.int32))
    expected = moe_torch(x, logits, rule, gate_up, down, experts, lora)
    assert_close(moe(x, logits, rule, experts, lora), expected)


def test_experts_outside_the_best_groups_are_never_chosen() -> None:
    rule = RoutingRule(2, scoring="sigmoid", groups=3, top_groups=1, group_score="top2", normalise=True)
    logits = torch.tensor([[9.0, -9.0, 1.0, 1.0, 2.0, -3.0]])
    weights, experts = choose_experts(logits, rule)
    assert sorted(experts[0].tolist()) == [2, 3]
    assert_close(weights.sum(-1), torch.ones(1))


def test_the_bias_chooses_and_does_not_weigh() -> None:
    rule = RoutingRule(1, scoring="sigmoid", bias=torch.tensor([0.0, 5.0, 0.0]), scale=3.0)
    weights, experts = choose_experts(torch.tensor([[1.0, 0.0, 2.0]]), rule)
    assert experts.item() == 1
    assert_close(weights, torch.tensor([[1.5]]))


def test_adapters_of_others_change_no_bit_of_a_base_row() -> None:
    table, _ = make_table([(HIDDEN, WIDE), (HIDDEN, WIDE), (WIDE, HIDDEN)] * EXPERTS, [[8]])
    experts = Experts(
        [PackedWeight(torch.randn(2 * WIDE, HIDDEN)) for _ in range(EXPERTS)],
        [PackedWeight(torch.randn(HIDDEN, WIDE)) for _ in range(EXPERTS)],
    )
    x, logits, rule = torch.randn(6, HIDDEN), torch.randn(6, EXPERTS), RoutingRule(2, normalise=True)
    slots = torch.tensor([-1, -1, -1, 0, 0, 0], dtype=torch.int32)
    mixed = moe(x, logits, rule, experts, ExpertLora(table, 0, slots))
    alone = moe(x[:3].contiguous(), logits[:3], rule, experts)
    assert torch.equal(mixed[:3], alone)
