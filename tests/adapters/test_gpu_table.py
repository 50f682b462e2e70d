"""The pointer table of a GPU, on tensors of the CPU: who has room in it, and who is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motet.adapters.gpu_table import MAX_SITE_BLOCKS, MAX_SLOTS, GpuTable
from motet.adapters.image import ChunkTable
from motet.errors import MotetError
from motet.kernels.lora import BFLOAT16

PAGE = 1 << 16


def chunks(ranks: list[int], site: int = 1) -> ChunkTable:
    """Chunks of one site, side by side in the adapter's first page."""
    count = len(ranks)

    def column(value: int, kind: type[np.number] = np.int32) -> np.ndarray:
        return np.full(count, value, kind)

    return ChunkTable(
        column(site), np.array(ranks, np.int32), column(BFLOAT16), column(1, np.float32), column(8), column(8),
        column(0, np.int64), column(0, np.int64), column(0, np.int64), column(64, np.int64),
    )  # fmt: skip


@pytest.fixture
def table() -> GpuTable:
    return GpuTable(3, torch.zeros(4 * PAGE, dtype=torch.uint8), PAGE)


def test_more_rank_blocks_than_a_step_has_room_for_are_refused(table: GpuTable) -> None:
    """Rows so wide that chunks have one rank take a block each."""
    with pytest.raises(MotetError, match=rf"{MAX_SITE_BLOCKS + 1} rank blocks at site 1"):
        table.add("wide", chunks([1] * (MAX_SITE_BLOCKS + 1)), (0,))
    assert "wide" not in table
    table.add("fits", chunks([1] * MAX_SITE_BLOCKS), (0,))
    table.add("deep", chunks([16 * MAX_SITE_BLOCKS]), (1,))
    assert table.rank_blocks == MAX_SITE_BLOCKS


def test_a_full_table_refuses_and_has_room_again(table: GpuTable) -> None:
    assert table.max_slots == MAX_SLOTS
    for i in range(MAX_SLOTS):
        table.add(f"{i}", chunks([4]), (0,))
    with pytest.raises(MotetError, match="have no place in the table"):
        table.add("more", chunks([4]), (0,))
    table.remove("7")
    assert table.add("more", chunks([4]), (0,)) == 7
