"""What steps of a GPU are written into, on tensors of the CPU: page tables that grow, and sites that no adapter has."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from motet.adapters.gpu_table import GpuTable
from motet.adapters.image import ChunkTable
from motet.engine.gpu_inputs import StepBuilder
from motet.memory.pool import Pool
from motet.models.registry import load_spec
from motet.types import BASE, Chunk
from tests.adapters.test_gpu_table import chunks as rank_blocks
from tests.tiny import write_model

PAGE_TOKENS = 8


@pytest.fixture
def builder(tmp_path: Path) -> StepBuilder:
    spec = load_spec(write_model(tmp_path / "model", "gpt-oss"))
    pool = Pool(spec, 32 << 20, PAGE_TOKENS, kv_dtype=torch.bfloat16, device="cpu")
    table = GpuTable(len(spec.sites), pool.flat, pool.page_bytes)
    return StepBuilder(pool, table, 256, spec.num_heads, 16)


def test_page_tables_are_those_of_this_step_whatever_came_before(builder: StepBuilder) -> None:
    """Sequences grow, end, come back with other pages and change their rows."""
    rng = random.Random(0)
    staging, groups = builder.captured(8), len(builder.groups)
    tables: dict[int, list[list[int]]] = {}
    for step in range(200):
        for seq in rng.sample(range(12), 5):
            if seq not in tables or rng.random() < 0.2:
                tables[seq] = [[rng.randrange(1000)] for _ in range(groups)]
            elif rng.random() < 0.1:
                tables[seq] = [pages[:1] for pages in tables[seq]]
            else:
                for pages in tables[seq]:
                    pages.append(rng.randrange(1000))
                    del pages[30:]
        here = rng.sample(sorted(tables), min(len(tables), 8))
        plan = [
            Chunk(
                seq,
                (step,),
                len(tables[seq][0]) * PAGE_TOKENS - 1,
                tuple(map(tuple, tables[seq])),
                BASE,
                True,
            )
            for seq in here
        ]
        host = staging.host
        builder.fill_decode(staging, plan)
        for group in range(groups):
            for row, seq in enumerate(here):
                expected = tables[seq][group]
                assert host[f"pages{group}"][row, : len(expected)].tolist() == expected
                assert host[f"kv_slots{group}"][row] == expected[-1] * PAGE_TOKENS + PAGE_TOKENS - 1
        staging.upload()


def test_rare_sites_are_idle_all_or_none(builder: StepBuilder) -> None:
    """So that a server captures graphs for two kinds of steps with adapters, not for every set of sites."""

    def at(*sites: int) -> ChunkTable:
        parts = [rank_blocks([4], site) for site in sites]
        columns = [[getattr(part, name) for part in parts] for name in ChunkTable.__dataclass_fields__]
        return ChunkTable(*(np.concatenate(column) for column in columns))

    common = next(i for i in range(len(builder.pool.spec.sites)) if i not in builder.rare)
    first, second, *_ = sorted(builder.rare)
    for name, sites in (("plain", (common,)), ("one", (common, first)), ("other", (second,))):
        builder.table.add(name, at(*sites), (0,))

    def idle(*adapters: str) -> frozenset[int]:
        return builder.idle([Chunk(i, (1,), 0, ((0,),), name, True) for i, name in enumerate(adapters)])

    assert builder.rare
    assert idle("plain", BASE) == builder.rare
    assert idle("plain", "one") == idle("other") == idle("one", "other") == frozenset()
