from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motet.errors import ConfigError
from motet.kernels.gpu.dense import (
    ROOM,
    DenseConfig,
    DenseUpdate,
    arrivals,
    dense_config,
    dense_product,
    dense_product_torch,
)
from motet.kernels.gpu.kv_write import KVWrite, rotary_kv_write
from motet.kernels.gpu.lora import DECODE, RANKS, RankBlocks, lora_add_torch, lora_shrink, shrunk
from motet.kernels.kv_write import rotary_kv_write_torch
from tests.close import assert_close
from tests.kernels.gpu.conftest import TOLERANCE
from tests.kernels.gpu.test_kv_write import PAGES, POSITIONS, TOKENS, make_how, make_kv
from tests.kernels.gpu.test_lora import make_table, make_tiles

SMALL = {
    "even": DenseConfig(depth=32, stages=2, ranks=32),
    "split": DenseConfig(depth=16, stages=2, splits=3, ranks=16),
    "masked": DenseConfig(features=128, warps=8, depth=64, stages=2, splits=2, ranks=64, even=False),
}
SHRINK = replace(DECODE, slice=64, depth=64, columns=32, groups=2)
SLOTS = {
    "one each": [-1, 0, 1, 2, 3, 4],
    "segments": [-1] * 2 + [0] * 20 + [3] * 7 + [4],
    "alone": [3],
    "base": [-1] * 5,
}
SPLIT = DenseConfig(depth=32, stages=2, splits=2, ranks=64)
HEADS = {
    "as long as a block": (4, 2, 64, SPLIT),
    "longer than a block": (2, 1, 128, SPLIT),
    "shorter": (2, 1, 128, SMALL["masked"]),
    "across blocks": (2, 1, 80, SPLIT),
    "small and odd": (5, 1, 14, replace(SPLIT, splits=1)),
}
"""Query heads, KV heads, head dim."""
SHAPES = {"odd": (130, (57, 9)), "wide": (96, (64, 128, 64)), "one": (100, (130,))}


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: DenseConfig, update: DenseUpdate | None = None
) -> Tensor:
    out = x.new_full((len(x), len(weight)), torch.nan)
    counters = arrivals(x.device)
    dense_product(x, weight, bias, out, counters, config, update=update)
    assert not counters.any(), "the counters are not ready for the next launch"
    return out


def make_update(
    x: Tensor, slots: list[int], widths: tuple[int, ...], table: RankBlocks, spare: int = 0
) -> DenseUpdate:
    tiles = make_tiles(slots, SHRINK.rows, 0, str(x.device))
    spare = min(spare, len(slots) - len(tiles.slot))  # there are never more tiles than rows
    tiles = make_tiles(slots, SHRINK.rows, spare, str(x.device))
    columns = len(widths) * int(table.count.max()) * RANKS
    z = shrunk(len(x) + 3, x.shape[1], columns, SHRINK, x.device).fill_(torch.nan)
    lora_shrink(x, table, 1, len(widths), tiles, z, SHRINK)
    return DenseUpdate(table, 1, widths, tiles, z)


def operands(
    rows: int, depth: int, features: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, depth, device=device) / depth**0.5
    weight, bias = torch.randn(features, depth, device=device), torch.randn(features, device=device)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS.keys())
@pytest.mark.parametrize(("depth", "widths"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_matches_reference(
    slots: list[int],
    depth: int,
    widths: tuple[int, ...],
    config: DenseConfig,
    dtype: torch.dtype,
    device: str,
) -> None:
    table = make_table(depth, widths, dtype, device)
    x, weight, bias = operands(len(slots), depth, sum(widths), dtype, device)
    update = make_update(x, slots, widths, table, spare=2)
    exact = torch.empty(len(x), len(weight), dtype=torch.float64, device=device)
    dense_product_torch(x, weight, bias, exact, update)
    expected = x.double() @ weight.double().T + bias
    lora_add_torch(expected, x.double(), table, 1, widths, update.tiles)
    assert_close(exact, expected, 1e-5 if dtype == torch.float32 else 1e-3)  # z is float32
    assert_close(product(x, weight, bias, config, update).double(), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 9, 33, ROOM])
def test_base_rows_alone(rows: int, dtype: torch.dtype, device: str) -> None:
    x, weight, _ = operands(rows, 72, 100, dtype, device)
    apart = torch.randn(rows, 90, device=device).to(dtype)
    apart[:, :72] = x
    expected = x.double() @ weight.double().T
    for config in SMALL.values():
        assert_close(product(x, weight, None, config).double(), expected, TOLERANCE[dtype])
        assert torch.equal(product(apart[:, :72], weight, None, config), product(x, weight, None, config))


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_any_rank(config: DenseConfig, device: str) -> None:
    """512 beside 1 and a row of the base, on one of two members only."""
    widths, ranks = (70, 64), [[16] * 32, [1]]
    table = make_table(65, widths, torch.float32, device, ranks)
    x, weight, bias = operands(4, 65, sum(widths), torch.float32, device)
    expected = x.double() @ weight.double().T + bias
    update = make_update(x, [-1, 0, 0, 1], widths, table)
    lora_add_torch(expected, x.double(), table, 1, widths, update.tiles)
    assert_close(product(x, weight, bias, config, update).double(), expected, 3e-5)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_a_row_has_the_same_bits_in_every_batch(config: DenseConfig, dtype: torch.dtype, device: str) -> None:
    """Alone, beside others, in a step without adapters. The interpreter's products sum in one order, so here this
    tells of masks, parts and the order of rank blocks; `benchmarks/gpu/dense_product.py` tells of tensor cores."""
    widths, slots = (57, 9), [-1, -1, 0, 0, 3, 4, 2]
    table = make_table(130, widths, dtype, device)
    x, weight, bias = operands(len(slots), 130, sum(widths), dtype, device)
    together = product(x, weight, bias, config, make_update(x, slots, widths, table))
    base = product(x, weight, bias, config)
    assert torch.equal(together[:2], base[:2])
    assert not torch.equal(together[2], base[2])
    for row, slot in enumerate(slots):
        one = x[row : row + 1]
        update = make_update(one, [slot], widths, table)
        assert torch.equal(product(one, weight, bias, config, update)[0], together[row])


def make_write(heads: int, kv_heads: int, dim: int, rows: int, dtype: torch.dtype, device: str) -> KVWrite:
    """Every fourth row is padding."""
    slots = torch.randperm(PAGES * TOKENS)[:rows].where(torch.arange(rows) % 4 != 2, -1)
    positions, slots = (one.to(device, torch.int32) for one in (torch.randint(POSITIONS, (rows,)), slots))
    how, kv = make_how(dim, device, False, False), make_kv(kv_heads, dim, dtype, device)
    return KVWrite(positions, slots, how, kv, 1, heads)


@pytest.mark.parametrize(
    ("rows", "adapted"), [(1, True), (5, False), (5, True), (16, False), (32, True)], ids=str
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "config"), HEADS.values(), ids=HEADS.keys())
def test_writes_what_the_kernel_behind_it_would(
    heads: int,
    kv_heads: int,
    dim: int,
    config: DenseConfig,
    adapted: bool,
    rows: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    """The same bits in q and in pages, nothing else touched; and both are right."""
    write = make_write(heads, kv_heads, dim, rows, dtype, device)
    x, weight, bias = operands(rows, 72, sum(write.widths), dtype, device)
    update = None
    if adapted:
        table = make_table(72, write.widths, dtype, device, [[16, 9], [], [1], [16, 4]])
        update = make_update(x, sorted(i % 5 - 1 for i in range(rows)), write.widths, table)
    before = write.kv.flat.clone()

    apart = replace(write, kv=replace(write.kv, flat=before.clone()))
    expected = product(x, weight, bias, config, update)
    rotary_kv_write(expected, apart)
    counters, queries = arrivals(device), write.widths[0]
    for _ in range(2):
        write.kv.flat.copy_(before)
        out = expected.new_full(expected.shape, torch.nan)
        dense_product(x, weight, bias, out, counters, config, update=update, write=write)
        assert not counters.any()
        assert torch.equal(out[:, :queries], expected[:, :queries])
        assert out[:, queries:].isnan().all()
        assert torch.equal(write.kv.flat, apart.kv.flat)

    exact = torch.empty(rows, len(weight), dtype=torch.float64, device=device)
    dense_product_torch(x, weight, bias, exact, update)
    wide, real = replace(write.kv, flat=before.double()), write.slots >= 0
    rotated = exact[real]
    cos, sin = write.how.cos.double(), write.how.sin.double()
    rotary_kv_write_torch(rotated, write.positions[real], write.slots[real], cos, sin, wide, 1, heads)
    exact[real] = rotated
    assert_close(out[:, :queries].double(), exact[:, :queries], TOLERANCE[dtype])
    assert_close(write.kv.flat.double(), wide.flat, TOLERANCE[dtype])


def test_a_row_is_written_alike_in_every_batch(device: str) -> None:
    """With others beside it or alone, with adapters in the step or without."""
    write = make_write(2, 1, 64, 5, torch.float32, device)
    x, weight, _ = operands(5, 72, sum(write.widths), torch.float32, device)
    table, slots = make_table(72, write.widths, torch.float32, device, [[16, 9], [16]]), [-1, 0, 1, 1, 1]

    def written(begin: int, end: int, adapted: bool) -> list[Tensor]:
        """What is left of each row: q, and where its slot is one, k and v."""
        few, at = x[begin:end], write.slots[begin:end]
        update = make_update(few, slots[begin:end], write.widths, table) if adapted else None
        out = x.new_full((len(few), len(weight)), torch.nan)
        part = replace(write, positions=write.positions[begin:end], slots=at)
        dense_product(few, weight, None, out, arrivals(device), SPLIT, update=update, write=part)
        pages = write.kv.pages[at // TOKENS, 1, :, :, at % TOKENS].flatten(1) * (at >= 0)[:, None]
        return list(torch.cat([out[:, : write.widths[0]], pages], dim=1))

    together, base = written(0, 5, True), written(0, 5, False)
    for row, slot in enumerate(slots):
        (alone,) = written(row, row + 1, True)
        assert torch.equal(alone, together[row])
        assert torch.equal(alone, base[row]) == (slot < 0)


def test_the_choice_for_shapes() -> None:
    """Sums of few features are split, none of many; no part of K is empty."""
    assert dense_config(5120, 2880).splits == 3
    assert dense_config(201_088, 2880).splits == 1
    for features, depth in ((2880, 4096), (32, 2880), (64, 577), (6144, 14336), (1, 1)):
        config = dense_config(features, depth)
        steps = -(-depth // config.depth)
        assert (config.splits - 1) * -(-steps // config.splits) < steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 32}, "features = 32"),
        ({"warps": 8}, "warps = 8"),
        ({"depth": 48}, "depth = 48 must be a power of two"),
        ({"splits": 0}, "splits = 0 must be at least 1"),
        ({"prefetch": 32}, "prefetch = 32"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DenseConfig(**options)  # type: ignore[arg-type]


def test_steps_of_one_bucket_need_one_compilation() -> None:
    """Whatever their tiles, sites and ranks: a server that serves must not meet the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.hopper", "tests.kernels.gpu.varied_dense"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    compiled = sorted(line.split()[0] for line in done.stdout.splitlines())
    assert compiled == ["_dense_kernel", "_dense_kernel", "_expand_kernel", "_shrink_kernel"], done.stderr[
        -2000:
    ]
