from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from motet.errors import ConfigError
from motet.kernels.gpu.moe_lora import (
    DECODE,
    PREFILL,
    ExpertUpdate,
    ShrinkConfig,
    shrink,
    shrink_torch,
    shrunk,
)
from motet.kernels.gpu.route import Sorted, route_torch
from motet.kernels.route import RoutingRule
from tests.close import assert_close
from tests.kernels.gpu.conftest import TOLERANCE
from tests.kernels.gpu.expert_table import expert_table

HIDDEN, WIDE, EXPERTS, RANKS = 96, 67, 6, (5, 16, 40, 33)
CONFIGS = {"decode": replace(DECODE, depth=16, warps=4), "prefill": replace(PREFILL, depth=32)}


def test_the_product_may_not_start_before_shrink_has_waited() -> None:
    with pytest.raises(ConfigError, match="launch = 1 must be 0 or 2"):
        ShrinkConfig(launch=1)


def work(tokens: int, rows: int, device: str) -> Sorted:
    out = Sorted.empty(tokens, 2, EXPERTS, rows, len(RANKS), device)
    slots = torch.randint(-1, len(RANKS), (tokens,), dtype=torch.int32)
    route_torch(torch.randn(tokens, EXPERTS, device=device), RoutingRule(2), slots, out)
    return out


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("sides", "tokens"), [(2, 1), (2, 13), (1, 13)])
def test_matches_reference(kind: str, sides: int, tokens: int, dtype: torch.dtype, device: str) -> None:
    config: ShrinkConfig = CONFIGS[kind]
    table = expert_table(EXPERTS, HIDDEN, WIDE, RANKS, dtype, device)
    lists = work(tokens, 8 if kind == "decode" else 16, device)
    x = torch.randn(tokens if sides == 2 else 2 * tokens, HIDDEN if sides == 2 else WIDE, device=device).to(
        dtype
    )
    mine, reference = (
        ExpertUpdate(table, 2 if sides == 2 else 4, shrunk(2 * tokens, sides, max(RANKS), x))
        for _ in range(2)
    )
    mine.z.fill_(torch.nan)
    shrink(x, lists, mine, gather=sides == 2, config=config)
    shrink_torch(x, lists, reference, gather=sides == 2)
    for expert, slot, start, rows in lists.segments[: int(lists.counts[1])].tolist():
        for side in range(sides):
            ranks = 16 * int(table.count[mine.site + 3 * expert + side, slot])
            got, expected = (one.z[start : start + rows, side, :ranks].float() for one in (mine, reference))
            assert_close(got, expected, TOLERANCE[dtype])
