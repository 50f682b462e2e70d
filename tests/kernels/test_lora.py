from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from motet.kernels.bfloat16 import Bfloat16Weight
from motet.kernels.lora import (
    BFLOAT16,
    FLOAT32,
    LoraTable,
    Segment,
    lora_add,
    lora_add_torch,
    lora_embed,
    split_rows,
)
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


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("widths", "lengths"),
    [((32, 64, 32), [70, 40, 50]), ((20, 13, 113), [250, 0, 12]), ((5,), [12, 13, 128])],
)
def test_a_product_adds_the_updates_of_blocks_with_the_same_bits(
    widths: tuple[int, ...], lengths: list[int], threads: int
) -> None:
    table, _ = make_table([(48, width) for width in widths], [[4], [16, 3], [33]])
    starts = np.cumsum([7, *lengths])  # rows before, between and after are the base's
    segments = [Segment(int(starts[s]), int(starts[s + 1]) - s, s) for s in range(3) if lengths[s]]
    rows = split_rows(segments)
    weight = Bfloat16Weight(torch.randn(sum(widths), 48).bfloat16())
    x = torch.randn(int(starts[-1]) + 5, 48)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert weight.unpacks(x)
        together, apart = weight.adapted(x, table, 0, widths, rows.blocks), weight.times(x)
        base = apart.clone()
        lora_add(together, x, table, 0, widths, rows.singles)
        lora_add(apart, x, table, 0, widths, rows)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, apart)
    lora_add_torch(base, x, table, 0, widths, segments)
    assert_close(together, base)


def test_lora_embed_matches_plain_mathematics() -> None:
    vocabulary, hidden = 50, 12
    table, factors = make_table([(vocabulary, hidden)], [[3], [2, 1]])
    tokens = torch.tensor([4, 49, 0, 7, 7])
    x = torch.randn(5, hidden)
    expected = x.clone()
    for row, slot in ((1, 0), (2, 0), (3, 1), (4, 1)):
        for a, b, scale in factors[0, slot]:
            expected[row] += scale * (a[:, tokens[row]] @ b)
    lora_embed(x, tokens, vocabulary, table, 0, [Segment(1, 3, 0), Segment(3, 5, 1)])
    assert_close(x, expected)
