from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from motet.kernels.linear import PackedWeight
from motet.kernels.lora import BFLOAT16, FLOAT32, LoraTable, Segment, lora_add, lora_add_torch, split_rows
from motet.kernels.moe import ExpertLora, moe, moe_torch
from tests.close import assert_close

SITES = 15
Factors = dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]]


def make_table(
    shapes: Sequence[tuple[int, int]], ranks: Sequence[Sequence[int]], seed: int = 0
) -> tuple[LoraTable, Factors]:
    """A table over `shapes` (in, out per site); `ranks[slot]` are the chunk ranks of that slot on every other site."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.zeros(1 << 21, dtype=torch.uint8)
    first, count = (
        np.zeros((len(shapes), len(ranks)), np.int32),
        np.zeros((len(shapes), len(ranks)), np.int32),
    )
    a: list[int] = []
    b: list[int] = []
    rank: list[int] = []
    dtype: list[int] = []
    scale: list[float] = []
    factors: Factors = {}
    at = 64
    for slot, chunks in enumerate(ranks):
        for site, (depth, width) in enumerate(shapes):
            if (site + slot) % 3 == 2:
                continue
            first[site, slot], count[site, slot] = len(rank), len(chunks)
            for r in chunks:
                kind = BFLOAT16 if slot % 2 else FLOAT32
                torch_kind = torch.bfloat16 if slot % 2 else torch.float32
                size = 2 if slot % 2 else 4
                pair: list[Tensor] = []
                for cells in (depth, width):
                    factor = torch.randn(r, cells, generator=generator).to(torch_kind)
                    (a if cells is depth and len(pair) == 0 else b).append(at // size)
                    pool[at : at + factor.nbytes] = factor.view(torch.uint8).view(-1)
                    at += -(-factor.nbytes // 64) * 64
                    pair.append(factor.float())
                rank.append(r)
                dtype.append(kind)
                scale.append(0.25 * (slot + 1))
                factors.setdefault((site, slot), []).append((pair[0], pair[1], scale[-1]))
    table = LoraTable(
        first, count, np.array(a, np.int64), np.array(b, np.int64), np.array(rank, np.int32),
        np.array(dtype, np.int32), np.array(scale, np.float32), pool,
    )  # fmt: skip
    return table, factors


@pytest.mark.parametrize("ranks", [[[1], [3]], [[4], [16], [5, 2]], [[7], [64], [1], [33]]])
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [2, 13, 0, 30], [0, 0, 1, 12]])
def test_lora_add_matches_plain_mathematics(ranks: list[list[int]], lengths: list[int]) -> None:
    shapes = [(48, 20), (48, 13), (48, 13), (31, 48)]
    table, factors = make_table(shapes, ranks)
    slots = [s for s, n in zip(range(len(ranks)), lengths, strict=False) for _ in range(n)]
    rows = len(slots) + 3  # the first three rows are the base's
    x, y = torch.randn(rows, 48), torch.randn(rows, 46)
    expected = y.clone()
    for row, slot in enumerate(slots, start=3):
        column = 0
        for site, (_, width) in enumerate(shapes[:3]):
            for a, b, scale in factors.get((site, slot), []):
                expected[row, column : column + width] += scale * (b.T @ (a @ x[row]))
            column += width
    starts = np.cumsum([3, *lengths])
    segments = [Segment(int(starts[s]), int(starts[s + 1]), s) for s in range(len(ranks)) if lengths[s]]
    reference = y.clone()
    lora_add_torch(reference, x, table, 0, (20, 13, 13), segments)
    assert_close(reference, expected)
    base = y[:3].clone()
    lora_add(y, x, table, 0, (20, 13, 13), split_rows(segments))
    assert_close(y, expected)
    assert torch.equal(y[:3], base), "rows of the base model were touched"


@pytest.mark.parametrize("rows", [1, 2, 9, 70])
@pytest.mark.parametrize(("skew", "normalise"), [(False, True), (True, True), (False, False)])
def test_moe_with_adapters_matches_reference(rows: int, skew: bool, normalise: bool) -> None:
    hidden, wide, experts, top_k = 24, 40, 5, 2
    shapes = [(hidden, wide), (hidden, wide), (wide, hidden)] * experts
    table, _ = make_table(shapes, [[4], [3], [9, 1]])
    router = torch.randn(experts, hidden)
    if skew:
        router[1:] *= 0.01  # nearly every token chooses the first expert
    gate_up = [torch.randn(2 * wide, hidden) / 5 for _ in range(experts)]
    down = [torch.randn(hidden, wide) / 5 for _ in range(experts)]
    slots = torch.from_numpy(np.sort(np.random.default_rng(0).integers(-1, 3, rows)).astype(np.int32))
    x = torch.randn(rows, hidden)
    lora = ExpertLora(table, 0, slots)
    expected = moe_torch(x, router, gate_up, down, top_k, normalise, lora)
    packed = [PackedWeight(w) for w in gate_up], [PackedWeight(w) for w in down]
    assert_close(moe(x, PackedWeight(router), *packed, top_k, normalise, lora), expected)
    plain = moe_torch(x, router, gate_up, down, top_k, normalise)
    assert_close(moe(x, PackedWeight(router), *packed, top_k, normalise), plain)


def test_adapters_of_others_change_no_bit_of_a_base_row() -> None:
    hidden, wide, experts = 24, 40, 4
    table, _ = make_table([(hidden, wide), (hidden, wide), (wide, hidden)] * experts, [[8]])
    gate_up = [PackedWeight(torch.randn(2 * wide, hidden)) for _ in range(experts)]
    down = [PackedWeight(torch.randn(hidden, wide)) for _ in range(experts)]
    router, x = PackedWeight(torch.randn(experts, hidden)), torch.randn(6, hidden)
    slots = torch.tensor([-1, -1, -1, 0, 0, 0], dtype=torch.int32)
    mixed = moe(x, router, gate_up, down, 2, True, ExpertLora(table, 0, slots))
    alone = moe(x[:3].contiguous(), router, gate_up, down, 2, True)
    assert torch.equal(mixed[:3], alone)
