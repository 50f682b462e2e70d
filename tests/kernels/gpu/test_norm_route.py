from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.gpu.dense import arrivals
from motet.kernels.gpu.norm_route import (
    MOST_PRODUCTS,
    MOST_ROWS,
    NormRouteConfig,
    norm_route,
    norm_route_config,
    norm_scores,
    takes,
)
from motet.kernels.gpu.route import Sorted, route_torch
from motet.kernels.norm import add_rms_norm_torch
from motet.kernels.route import RoutingRule
from tests.close import assert_close
from tests.kernels.gpu.conftest import ON_DEVICE, TOLERANCE
from tests.kernels.gpu.test_route import assert_same

EPS = 1e-5
RULES = {
    "top4 of 32": (RoutingRule(4, normalise=True), 32),
    "top8 of 128": (RoutingRule(8, normalise=True), 128),
    "sigmoid": (RoutingRule(1, scoring="sigmoid", on_input=True), 9),
    "groups": (RoutingRule(3, groups=3, top_groups=2, scale=2.5), 12),
    "top2 of groups": (
        RoutingRule(6, True, "sigmoid", groups=8, top_groups=4, group_score="top2", bias=torch.randn(64)),
        64,
    ),
    "mixtral": (RoutingRule(2, normalise=True), 8),
}
TINY = NormRouteConfig(experts=4, warps=4, programs=6)
"""Several rows for a program."""


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of what is no number."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Case:
    """Operands of a launch, and counters that must be ready for the next."""

    def __init__(
        self, rows: int, width: int, experts: int, dtype: torch.dtype, device: str, biased: bool
    ) -> None:
        self.x = torch.randn(rows, width, device=device).to(dtype)
        self.residual = torch.randn(rows, width, device=device)
        self.weight = torch.randn(width, device=device)
        self.router = (torch.randn(experts, width, device=device) / width**0.5).to(dtype)
        self.bias = torch.randn(experts, device=device).to(dtype) if biased else None
        self.arrived = arrivals(device)

    def __call__(
        self, rule: RoutingRule, slots: Tensor | None, work: Sorted, tokens: Tensor | None = None,
        config: NormRouteConfig | None = None, pdl: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with poisoned():
            found = norm_route(
                self.x, self.residual, self.weight, EPS, self.router, self.bias, rule, slots, work, tokens,
                self.arrived, config=config, pdl=pdl,
            )  # fmt: skip
        assert not self.arrived.any(), "the counter is not ready for the next launch"
        return found

    def first(self, rows: int) -> Case:
        """The same with fewer rows."""
        part = object.__new__(Case)
        vars(part).update(vars(self))
        part.x, part.residual = self.x[:rows].clone(), self.residual[:rows].clone()
        return part

    def check(self, y: Tensor, total: Tensor, scores: Tensor) -> None:
        dtype, residual = self.x.dtype, self.residual.clone()
        expected, expected_total = add_rms_norm_torch(self.x.float(), residual, self.weight, EPS)
        assert y.dtype == scores.dtype == dtype
        assert_close(y.float(), expected, TOLERANCE[dtype])
        assert_close(total, expected_total)
        product = y.double() @ self.router.double().T
        product += 0 if self.bias is None else self.bias.double()
        assert_close(scores.double(), product, TOLERANCE[dtype])


def make_work(case: Case, rule: RoutingRule, slots: Tensor | None, rows: int = 8) -> Sorted:
    adapters = 0 if slots is None else len(set(slots.tolist()) - {-1})
    work = Sorted.empty(len(case.x), rule.top_k, len(case.router), rows, adapters, case.x.device)
    for part in (work.order, work.inverse, work.weight, work.counts, work.tiles, work.segments):
        part.fill_(-77)
    return work


def check_work(
    work: Sorted, scores: Tensor, rule: RoutingRule, slots: Tensor | None, tokens: Tensor | None = None
) -> None:
    """Against the reference, to which equal scores are told apart."""
    copies: dict[str, Any] = {
        name: part.clone() for name, part in vars(work).items() if isinstance(part, Tensor)
    }
    reference = replace(work, **copies)
    told = scores.double() - 1e-9 * torch.arange(scores.shape[1], device=scores.device)
    route_torch(told, rule, slots, reference, tokens)
    assert_same(work, reference)


def make_slots(rows: int, adapters: int, device: str) -> Tensor:
    return torch.randint(-1, adapters, (rows,), dtype=torch.int32, device=device)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("rows", "width", "with_slots"),
    [(1, 96, True), (3, 577, False), (16, 130, True), (47, 48, True), (64, 64, False)],
)
def test_matches_the_references(
    name: str, rows: int, width: int, with_slots: bool, dtype: torch.dtype, device: str
) -> None:
    rule, experts = RULES[name]
    if rule.bias is not None:
        rule = replace(rule, bias=rule.bias.to(device))
    case = Case(rows, width, experts, dtype, device, biased=rows % 2 == 1)
    slots = make_slots(rows, 5, device) if with_slots else None
    residual, work = case.residual.clone(), make_work(case, rule, slots)
    found = case(rule, slots, work)
    assert torch.equal(case.residual, residual)
    case.check(*found)
    check_work(work, found[2], rule, slots)


def test_wide_rows(dtype: torch.dtype, device: str) -> None:
    """gpt-oss-20b's."""
    rule = RoutingRule(4, True)
    case, slots = Case(5, 2880, 32, dtype, device, biased=True), make_slots(5, 3, device)
    work = make_work(case, rule, slots)
    found = case(rule, slots, work)
    case.check(*found)
    check_work(work, found[2], rule, slots)


@pytest.mark.parametrize("real", [0, 1, 13, 16])
def test_padding_belongs_to_nothing(real: int, device: str) -> None:
    rule = RoutingRule(4, True)
    case, slots = Case(16, 96, 32, torch.float32, device, biased=True), make_slots(16, 3, device)
    case.x[real:] = torch.nan
    work, count = make_work(case, rule, slots), torch.tensor([real], dtype=torch.int32, device=device)
    _, _, scores = case(rule, slots, work, count)
    check_work(work, scores, rule, slots, count)
    assert int(work.tiles[:, 2].sum()) == 4 * real
    assert not bool(work.weight[real:].any())


@pytest.mark.parametrize("config", [TINY, NormRouteConfig(16), NormRouteConfig(1, programs=1)], ids=str)
def test_programs_of_several_rows_and_of_any_part(config: NormRouteConfig, device: str) -> None:
    rule = RoutingRule(3, groups=3, top_groups=2)
    case, slots = Case(37, 130, 12, torch.float32, device, biased=True), make_slots(37, 4, device)
    for _ in range(3):  # the counter returns to zero
        work = make_work(case, rule, slots)
        found = case(rule, slots, work, config=config)
        case.check(*found)
        check_work(work, found[2], rule, slots)


def test_scores_alone_have_the_same_bits(dtype: torch.dtype, device: str) -> None:
    rule = RoutingRule(2, True)
    case = Case(21, 130, 9, dtype, device, biased=True)
    sorted_too = case(rule, None, make_work(case, rule, None))
    with poisoned():
        alone = norm_scores(case.x, case.residual, case.weight, EPS, case.router, case.bias)
    assert all(torch.equal(a, b) for a, b in zip(sorted_too, alone, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_a_rows_bits_depend_on_no_other(name: str, device: str) -> None:
    """Neither on how many rows there are; of what is sorted its weights."""
    rule, experts = RULES[name]
    if rule.bias is not None:
        rule = replace(rule, bias=rule.bias.to(device))
    dtype = torch.bfloat16 if ON_DEVICE else torch.float32
    case = Case(64, 2880 if ON_DEVICE else 96, experts, dtype, device, biased=True)
    work = make_work(case, rule, None)
    every = (*case(rule, None, work), work.weight)
    for rows in (1, 2, 3, 7, 16, 33, 48) if ON_DEVICE else (1, 33):
        fewer = case.first(rows)
        work = make_work(fewer, rule, None)
        for one, other in zip((*fewer(rule, None, work), work.weight), every, strict=True):
            assert torch.equal(one, other[:rows])


def test_too_many_rows_or_pairs_are_left_to_others() -> None:
    router = torch.empty(128, 2048, device="meta")
    assert takes(1, RoutingRule(8), router)
    assert takes(MOST_ROWS, RoutingRule(8), router)
    assert not takes(MOST_ROWS, RoutingRule(9), router)  # pairs
    assert not takes(MOST_ROWS + 1, RoutingRule(1), router)
    assert not takes(0, RoutingRule(8), router)
    assert not takes(33, RoutingRule(8), torch.empty(256, 64, device="meta"))  # scores
    wide = torch.empty(256, 7168, device="meta")
    limit = MOST_PRODUCTS // wide.numel()
    assert takes(limit, RoutingRule(8), wide)
    assert not takes(limit + 1, RoutingRule(8), wide)


def test_configurations() -> None:
    assert norm_route_config(32, 2880) == NormRouteConfig(4)
    assert norm_route_config(128, 2048) == NormRouteConfig(8, warps=16)
    assert norm_route_config(8, 64) == NormRouteConfig(8)
    assert norm_route_config(256, 7168) == NormRouteConfig(2, warps=16)
    with pytest.raises(ConfigError, match="experts = 3 must be a power of two"):
        NormRouteConfig(3)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_DEVICE, reason="a CUDA graph needs a device")
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("launch", [0, 1, 2, 3])
def test_graph_replays_equal_launches(rows: int, launch: int) -> None:
    """Every replay has another x, written by the kernel in front; three layers, of which each may start early."""
    rule, device = RoutingRule(4, True), "cuda"
    case, slots = Case(rows, 2880, 32, torch.bfloat16, device, biased=True), make_slots(rows, 4, device)
    config, given = replace(norm_route_config(32, 2880), launch=launch), case.x.clone()
    work, x = make_work(case, rule, slots), case.x

    def step(pdl: bool) -> tuple[Tensor, Tensor, Tensor]:
        case.x, residual = given * 1, case.residual
        for _ in range(3):
            case.x, total, scores = norm_route(
                case.x, residual, case.weight, EPS, case.router, case.bias, rule, slots, work, None, case.arrived,
                config=config, pdl=pdl,
            )  # fmt: skip
            residual = total
        return case.x, total, scores

    step(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(True)
    for _ in range(5):
        given.copy_(torch.randn_like(x))
        for part in (work.order, work.inverse, work.weight, work.counts, work.tiles, work.segments):
            part.fill_(-77)
        graph.replay()
        check_work(work, replayed[2], rule, slots)
        kept = [one.clone() for one in replayed]
        assert all(torch.equal(a, b) for a, b in zip(kept, step(False), strict=True))
    assert not case.arrived.any()
