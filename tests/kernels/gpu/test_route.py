from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.kernels.gpu import route as routing
from motet.kernels.gpu.route import MAX_PAIRS, MAX_RANKED, Sorted, route, route_torch
from motet.kernels.route import RoutingRule
from tests.close import assert_close
from tests.kernels.gpu.conftest import ON_DEVICE

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
    route_torch(logits.float(), rule, slots, both[1], tokens)
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


def random(tokens: int, num_experts: int, adapters: int, device: str) -> tuple[Tensor, Tensor]:
    slots = torch.randint(-1, adapters, (tokens,), dtype=torch.int32, device=device)
    return torch.randn(tokens, num_experts, device=device), slots


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "rows"),
    [
        (MAX_PAIRS // 4, 4, 33, 8),
        (MAX_PAIRS // 4 + 1, 4, 33, 8),
        (65, 8, 256, 8),
        (1024, 1, 5, 128),
        (171, 6, 160, 16),
    ],
)
@pytest.mark.parametrize("with_slots", [False, True])
def test_sizes_around_those_of_programs(
    tokens: int, top_k: int, num_experts: int, rows: int, with_slots: bool, device: str
) -> None:
    logits, slots = random(tokens, num_experts, 5, device)
    assert_same(*results(logits, RoutingRule(top_k, True), slots if with_slots else None, rows, None))


def test_segments_are_counted_over_many_places(device: str) -> None:
    logits, slots = random(401, 129, 9, device)
    mine, reference = results(logits, RoutingRule(8, True), slots, 32, None)
    assert_same(mine, reference)
    assert int(mine.counts[1]) > 1000


@pytest.mark.parametrize("real", [0, 1, 256, 511, 600])
def test_padding_among_many_pairs(real: int, device: str) -> None:
    logits, slots = random(600, 12, 4, device)
    logits[real:] = torch.nan
    count = torch.tensor([real], dtype=torch.int32, device=device)
    mine, reference = results(logits, RoutingRule(3, True), slots, 16, count)
    assert_same(mine, reference)
    assert int(mine.tiles[:, 2].sum()) == 3 * real
    assert not bool(mine.weight[real:].any())


@pytest.mark.parametrize("expert", [0, 6])
@pytest.mark.parametrize("slots", ["none", "base", "one", "turns", "halves"])
def test_one_expert_has_all_pairs(slots: str, expert: int, device: str) -> None:
    """Tiles and segments then go on from one program's places to the next one's."""
    logits = torch.randn(1100, 7, device=device)
    logits[:, expert] += 50
    place = torch.arange(1100, dtype=torch.int32, device=device)
    of = {
        "none": None,
        "base": place * 0 - 1,
        "one": place * 0 + 3,
        "turns": place % 5 - 1,
        "halves": place // 550,
    }
    mine, reference = results(logits, RoutingRule(1), of[slots], 48, None)
    assert_same(mine, reference)
    assert int(mine.counts[0]) == 23


@pytest.mark.parametrize("spare", [-1, 0])
@pytest.mark.parametrize("with_slots", [False, True])
def test_torch_sorts_more_pairs_alike(
    spare: int, with_slots: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorts: list[int] = []
    sort = routing._sort

    def counted(keys: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        sorts.append(len(keys))
        return sort(keys, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(routing, "_sort", counted)
    monkeypatch.setattr(routing, "MAX_RANKED", 4 * 331 + spare)
    logits, slots = random(331, 11, 6, device)
    count = torch.tensor([307], dtype=torch.int32, device=device)
    assert_same(*results(logits, RoutingRule(4, True), slots if with_slots else None, 32, count))
    assert sorts == ([4 * 331] if spare else [])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_DEVICE, reason="the interpreter takes minutes")
@pytest.mark.parametrize("tokens", [1600, MAX_RANKED // 8, MAX_RANKED // 8 + 1, 8192])
def test_prompts_of_every_size(tokens: int) -> None:
    logits, slots = random(tokens, 160, 9, "cuda")
    count = torch.tensor([tokens - 37], dtype=torch.int32, device="cuda")
    assert_same(*results(logits, RoutingRule(8, True), slots, 64, count))


@pytest.mark.parametrize("tokens", [9, 400])
def test_logits_of_any_type(tokens: int, dtype: torch.dtype, device: str) -> None:
    spread = torch.rand(tokens, 11, device=device).argsort(1) * 0.37 - 2  # no two alike in any type
    logits = spread.to(dtype)
    assert_same(*results(logits, RoutingRule(3, True, scale=1.5), None, 8, None))


@pytest.mark.parametrize("ranked", [0, MAX_RANKED])
@pytest.mark.parametrize("tokens", [43, 211])
def test_nothing_else_is_written(
    tokens: int, ranked: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "MAX_RANKED", ranked)
    around = 64
    logits, slots = random(tokens, 9, 3, device)
    out = Sorted.empty(tokens, 3, 9, 8, 3, device)
    outputs = {name: part for name, part in vars(out).items() if isinstance(part, Tensor)}
    wide = {name: part.new_full((part.numel() + 2 * around,), -77) for name, part in outputs.items()}
    inner: dict[str, Any] = {
        name: wide[name][around:-around].view(part.shape) for name, part in outputs.items()
    }
    out = replace(out, **inner)
    real = torch.tensor([tokens - 5], dtype=torch.int32, device=device)
    route(logits, RoutingRule(3, True), slots, out, real)
    for name, part in wide.items():
        edges = torch.cat((part[:around], part[-around:]))
        assert bool((edges == -77).all()), name
    segments = int(out.counts[1])
    assert segments < len(out.segments)
    assert bool((out.segments[segments:] == -77).all())


@pytest.mark.gpu
@pytest.mark.skipif(not ON_DEVICE, reason="a CUDA graph needs a device")
@pytest.mark.parametrize("tokens", [16, 1600, 8192])
@pytest.mark.parametrize("launch", [0, 1, 2])
def test_graph_replays_equal_the_reference(tokens: int, launch: int) -> None:
    """Every replay has other logits, written by the kernel in front of those that may start early."""
    rule, device = RoutingRule(4, True), "cuda"
    logits, slots = random(tokens, 32, 4, device)
    given, out = logits.clone(), Sorted.empty(tokens, 4, 32, 32, 4, device)

    def step() -> None:
        torch.mul(given, 1, out=logits)
        for _ in range(3):
            route(logits, rule, slots, out, config=routing.RouteConfig(launch=launch), pdl=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(2):
        given.normal_()
        graph.replay()
        reference = Sorted.empty(tokens, 4, 32, 32, 4, device)
        route_torch(given, rule, slots, reference)
        assert_same(out, reference)


def test_equal_scores_choose_different_experts(device: str) -> None:
    mine, _ = results(torch.zeros(2, 6, device=device), RoutingRule(4, True), None, 8, None)
    assert mine.tiles[: int(mine.counts[0]), 0].tolist() == [0, 1, 2, 3]


def test_no_tokens(device: str) -> None:
    out = Sorted.empty(0, 2, 4, 8, 1, device)
    route(torch.empty(0, 4, device=device), RoutingRule(2), None, out)
    assert out.counts.tolist() == [0, 0]
