from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.gpu.lora import (
    DECODE,
    PREFILL,
    RANKS,
    LoraConfig,
    LoraTiles,
    RankBlocks,
    lora_add,
    lora_add_torch,
    row_tiles,
    shrunk,
)
from tests.close import assert_close
from tests.kernels.gpu.conftest import TOLERANCE

RANKS_OF = [[16, 9], [], [1], [16] * 4, [4, 4, 4]]
"""Rank blocks of each slot, on every site it adapts; see `make_table`."""
SMALL = {
    "decode": replace(DECODE, slice=64, depth=64, columns=32, groups=2),
    "prefill": replace(PREFILL, rows=32, slice=96, depth=32, columns=32, expand_ranks=16, groups=1),
    "grouped": replace(PREFILL, rows=16, slice=64, depth=32, columns=16, groups=2, group=3, even=False),
}


def make_table(
    depth: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: str,
    ranks_of: Sequence[Sequence[int]] = RANKS_OF,
) -> RankBlocks:
    """Site 0 is nobody's; sites 1 … are the group; slot s leaves out member (s mod 4), and slot 4's members share A.

    What lies between the factors is not a number.
    """
    slots = len(ranks_of)
    first, count = np.zeros((1 + len(widths), slots), np.int32), np.zeros((1 + len(widths), slots), np.int32)
    a: list[int] = []
    b: list[int] = []
    rank: list[int] = []
    scale: list[float] = []
    pool, at = torch.full((400_000,), torch.nan), 64

    def put(place: int, size: int) -> None:
        pool[place : place + size] = torch.randn(size)

    for slot, ranks in enumerate(ranks_of):
        shared = at
        for member, width in enumerate(widths):
            if slot % 4 == member:
                continue
            first[1 + member, slot], count[1 + member, slot] = len(rank), len(ranks)
            for i, r in enumerate(ranks):
                assert r <= RANKS
                a.append(shared + 1024 * i if slot == 4 else at)
                put(a[-1], r * depth)
                at += -(-r * depth // 32) * 32 + 4096 * (slot == 4)
                b.append(at)
                put(at, r * width)
                at += -(-r * width // 32) * 32
                rank.append(r)
                scale.append(0.5 + len(rank))
    assert at < len(pool)

    def on_device(values: object, kind: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=kind, device=device)

    return RankBlocks(
        on_device(first, torch.int32), on_device(count, torch.int32), on_device(a, torch.int64),
        on_device(b, torch.int64), on_device(rank, torch.int32), on_device(scale, torch.float32),
        pool.to(device, dtype),
    )  # fmt: skip


def make_tiles(slots: Sequence[int], rows: int, spare: int, device: str) -> LoraTiles:
    tiles = np.pad(row_tiles(np.array(slots, np.int32), rows), ((0, 0), (0, spare)))
    return LoraTiles(*torch.from_numpy(tiles).to(device))


SLOTS = {
    "one each": [0, 1, 2, 3, 4, -1],
    "segments": [3] * 37 + [-1] * 2 + [0] * 20 + [4],
    "base only": [-1, -1],
    "none": [],
}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS.keys())
@pytest.mark.parametrize(("depth", "widths"), [(96, (48, 16, 80)), (130, (57,)), (64, (96, 96))], ids=str)
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_matches_reference(
    slots: list[int], depth: int, widths: tuple[int, ...], config: LoraConfig, dtype: torch.dtype, device: str
) -> None:
    table = make_table(depth, widths, dtype, device)
    tiles = make_tiles(slots, config.rows, 2, device)
    x = (torch.randn(len(slots), depth, device=device) / depth**0.5).to(dtype)
    y = torch.randn(len(slots), sum(widths), device=device).to(dtype)
    expected = y.double()
    lora_add_torch(expected, x.double(), table, 1, widths, tiles)
    z = shrunk(len(slots) + 3, depth, 12 * RANKS, config, device).fill_(torch.nan)
    lora_add(y, x, table, 1, widths, tiles, z, config)
    assert_close(y.double(), expected, TOLERANCE[dtype])


def test_any_rank(device: str) -> None:
    """512 beside 1, on one of two members only."""
    table = make_table(70, (40, 33), torch.float32, device, [[16] * 32, [1]])
    for config in SMALL.values():
        tiles = make_tiles([0, 0, -1, 1], config.rows, 0, device)
        x, y = torch.randn(4, 70, device=device) / 70**0.5, torch.randn(4, 73, device=device)
        expected = y.double()
        lora_add_torch(expected, x.double(), table, 1, (40, 33), tiles)
        z = shrunk(4, 70, 64 * RANKS, config, device).fill_(torch.nan)
        lora_add(y, x, table, 1, (40, 33), tiles, z, config)
        assert_close(y.double(), expected, 3e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 8}, "rows = 8 must be at least 16"),
        ({"columns": 96}, "columns = 96 must be a power of two"),
        ({"slice": 700}, "slice = 700 must be a multiple"),
        ({"group": -1}, "group = -1 must be at least 0"),
        ({"stages": 0}, "stages = 0 must be at least 1"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PREFILL, **options)  # type: ignore[arg-type]


def test_row_tiles_cut_runs_and_leave_out_the_base() -> None:
    tiles = row_tiles(np.array([2, 2, 2, -1, -1, 0, 2], np.int32), 2)
    assert tiles.tolist() == [[2, 2, 0, 2], [0, 2, 5, 6], [2, 1, 1, 1]]
    assert row_tiles(np.zeros(0, np.int32), 2).shape == (3, 0)
