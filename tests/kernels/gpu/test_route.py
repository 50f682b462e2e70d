from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motet.kernels.gpu.route import Sorted, route, route_torch
from motet.kernels.route import RoutingRule
from tests.close import assert_close

RULES = [
    (RoutingRule(4, normalise=True), 33),
    (RoutingRule(1, scoring="sigmoid", on_input=True), 5),
    (RoutingRule(3, groups=3, top_groups=2, scale=2.5), 12),
    (RoutingRule(8, True, "sigmoid", groups=8, top_groups=4, group_score="top2", bias=torch.randn(256)), 256),
]


def results(
    logits: Tensor, rule: RoutingRule, slots: Tensor | None, rows: int, tokens: Tensor | None
) -> tuple[Sorted, Sorted]:
    adapters = 0 if slots is None else len(set(slots.tolist()) - {-1})
    both = [
        Sorted.empty(len(logits), rule.top_k, logits.shape[1], rows, adapters, logits.device)
        for _ in range(2)
    ]
    for one in both:
        for part in (one.order, one.inverse, one.weight, one.counts, one.tiles, one.segments):
            part.fill_(-77)
    route(logits, rule, slots, both[0], tokens)
    route_torch(logits, rule, slots, both[1], tokens)
    return both[0], both[1]


def assert_same(mine: Sorted, reference: Sorted) -> None:
    assert_close(mine.weight, reference.weight)
    assert torch.equal(mine.counts, reference.counts)
    tiles, segments = mine.counts.tolist()
    assert torch.equal(mine.inverse, reference.inverse)
    real = int((mine.inverse >= 0).sum())
    assert torch.equal(mine.order[:real], reference.order[:real])
    assert torch.equal(mine.tiles[:tiles], reference.tiles[:tiles])
    assert not bool(mine.tiles[tiles:, 2].any())
    assert torch.equal(mine.segments[:segments], reference.segments[:segments])


@pytest.mark.parametrize(("rule", "num_experts"), RULES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 47])
@pytest.mark.parametrize("with_slots", [False, True])
def test_one_program_matches_reference(
    rule: RoutingRule, num_experts: int, tokens: int, with_slots: bool, device: str
) -> None:
    if rule.bias is not None:
        rule = replace(rule, bias=rule.bias.to(device))
    logits = torch.randn(tokens, num_experts, device=device)
    slots = torch.randint(-1, 5, (tokens,), dtype=torch.int32, device=device) if with_slots else None
    assert_same(*results(logits, rule, slots, 8, None))


@pytest.mark.parametrize("real", [0, 1, 13])
def test_padding_belongs_to_nothing(real: int, device: str) -> None:
    logits = torch.randn(16, 32, device=device)
    logits[real:] = torch.nan
    slots = torch.randint(-1, 3, (16,), dtype=torch.int32, device=device)
    count = torch.tensor([real], dtype=torch.int32, device=device)
    mine, reference = results(logits, RoutingRule(4, True), slots, 8, count)
    assert_same(mine, reference)
    assert int(mine.tiles[:, 2].sum()) == 4 * real
    assert not bool(mine.weight[real:].any())


@pytest.mark.parametrize("rows", [8, 64])
def test_all_tokens_to_few_experts(rows: int, device: str) -> None:
    logits = torch.randn(50, 9, device=device)
    logits[:, 2:4] += 20
    slots = torch.randint(-1, 3, (50,), dtype=torch.int32, device=device)
    assert_same(*results(logits, RoutingRule(2, True), slots, rows, None))


@pytest.mark.parametrize("skew", [0, 8])
@pytest.mark.parametrize("with_slots", [False, True])
def test_many_pairs_match_reference(skew: int, with_slots: bool, device: str) -> None:
    logits = torch.randn(701, 12, device=device)
    logits[:, 0] += skew
    slots = torch.randint(-1, 7, (701,), dtype=torch.int32, device=device) if with_slots else None
    count = torch.tensor([650], dtype=torch.int32, device=device)
    assert_same(*results(logits, RoutingRule(3, True), slots, 64, count))


def test_equal_scores_choose_different_experts(device: str) -> None:
    mine, _ = results(torch.zeros(2, 6, device=device), RoutingRule(4, True), None, 8, None)
    assert mine.tiles[: int(mine.counts[0]), 0].tolist() == [0, 1, 2, 3]


def test_no_tokens(device: str) -> None:
    out = Sorted.empty(0, 2, 4, 8, 1, device)
    route(torch.empty(0, 4, device=device), RoutingRule(2), None, out)
    assert out.counts.tolist() == [0, 0]
