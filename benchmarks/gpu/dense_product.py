"""Products of few rows with the updates of their adapters in them: `python benchmarks/gpu/dense_product.py [--quick]`.

Checks the kernel against float64 on fresh random inputs with poisoned outputs; that a row has the same bits alone, in
batches of every size, beside adapters and in a step without any; that replays of a graph equal eager launches and
programmatic launches equal plain ones. Then times it beside cuBLAS and `lora_add` for 1 to 64 rows: where it is no
longer faster, `dense.MOST_ROWS` should end. Then configurations, at 16 rows of 8 adapters of rank 32.

Shapes are gpt-oss-20b's; weights and factors rotate through 12 layers, much more than the L2 cache. --quick leaves the
configurations out; --tune DIR writes the best ones to a file for `motet serve --tuned-configs DIR`. About 4 minutes,
most of it compilation. The exit code is 1 if a check fails. The table comes last.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu.measure import F32, Report, normal, replays_equal  # noqa: I001  # first: it finds Motet
from benchmarks.gpu.dense_checks import HIDDEN, RANK, WIDTHS, lora_table, tiles_of
from motet.kernels.gpu import lora, tuned
from motet.kernels.gpu.dense import (
    DenseConfig,
    DenseUpdate,
    arrivals,
    dense_config,
    dense_product,
    dense_product_torch,
)
from motet.kernels.gpu.lora import LoraConfig, LoraTiles, RankBlocks, lora_add, lora_shrink, shrunk
from motet.kernels.gpu.norm import add_rms_norm

LAYERS, SITES = 12, 6
SLOTS = [i // 2 for i in range(16)]
"""Rows and their adapters, as the configurations are timed."""


@dataclass(frozen=True)
class Map:
    """A linear map of every layer: its first site among a layer's, and how many layers' weights to rotate through."""

    name: str
    depth: int
    widths: tuple[int, ...]
    site: int
    layers: int = LAYERS

    @property
    def features(self) -> int:
        return sum(self.widths)


MAPS = (
    Map("qkv", HIDDEN, WIDTHS, 0),
    Map("o", WIDTHS[0], (HIDDEN,), 3),
    Map("router", HIDDEN, (32,), 4),
    Map("odd", 577, (727,), 5),
)
HEAD = Map("head", HIDDEN, (201_088,), -1, 1)


def all_sites(rank: int = RANK, layers: int = LAYERS) -> RankBlocks:
    return lora_table([(one.depth, width) for one in MAPS for width in one.widths], layers, rank)


@dataclass(frozen=True)
class Case:
    """One map of one layer with its inputs; `slots` are the rows' adapters."""

    of: Map
    weight: Tensor
    bias: Tensor
    table: RankBlocks | None
    counters: Tensor

    @classmethod
    def random(cls, of: Map, table: RankBlocks | None) -> Case:
        weight = normal(of.features, of.depth) / math.sqrt(of.depth)
        return cls(of, weight, normal(of.features), table, arrivals("cuda"))

    def tiles(self, slots: Sequence[int], rows: int = lora.DECODE.rows) -> LoraTiles:
        return tiles_of(slots, rows, len(slots))

    def workspace(self, slots: Sequence[int], config: LoraConfig) -> Tensor:
        assert self.table is not None
        columns = len(self.of.widths) * int(self.table.count.max()) * lora.RANKS
        return shrunk(len(slots), self.of.depth, columns, config, "cuda")

    def fused(
        self, x: Tensor, out: Tensor, config: DenseConfig, layer: int = 0, tiles: LoraTiles | None = None,
        z: Tensor | None = None, how: LoraConfig = lora.DECODE, pdl: bool = True, shrink: bool = True,
    ) -> None:  # fmt: skip
        """The product; with tiles and z, shrink in front of it and the update in it."""
        update = None
        if tiles is not None and z is not None and self.table is not None:
            site = SITES * layer + self.of.site
            if shrink:
                lora_shrink(x, self.table, site, len(self.of.widths), tiles, z, how, pdl=pdl)
            update = DenseUpdate(self.table, site, self.of.widths, tiles, z)
        dense_product(x, self.weight, self.bias, out, self.counters, config, update=update, pdl=pdl)


def inputs(case: Case, rows: int) -> tuple[Tensor, Tensor]:
    """x, and an output that is not a number."""
    return normal(rows, case.of.depth), torch.full(
        (rows, case.of.features), torch.nan, device="cuda"
    ).bfloat16()


def configs(of: Map) -> list[DenseConfig]:
    """The default, one without splits and masks everywhere, one of twice the features."""
    base = dense_config(of.features, of.depth)
    return [base, replace(base, splits=1, even=False), replace(base, features=128, warps=8, prefetch=256)]


def check_product(report: Report) -> None:
    for rank in (RANK, 9, 512):
        table = all_sites(rank, 2)
        for of in MAPS:
            case = Case.random(of, table)
            for slots in ([-1, 0, 0, 7, 3], [-1] * 3 + [5] * 20 + [1] * 9, [i % 8 for i in range(64)]):
                slots = sorted(slots)
                tiles, z = case.tiles(slots), case.workspace(slots, lora.DECODE)
                x, out = inputs(case, len(slots))
                for number, config in enumerate(configs(of)):
                    z.fill_(torch.nan)
                    out.fill_(torch.nan)
                    case.fused(x, out, config, 1, tiles, z)
                    update = DenseUpdate(table, SITES + of.site, of.widths, tiles, z)
                    expected = torch.empty(out.shape, dtype=torch.float64, device="cuda")
                    dense_product_torch(x, case.weight, case.bias, expected, update)
                    name = f"product {of.name} rank {rank} {len(slots)} rows config {number}"
                    report.check(name, out, expected)
                    report.same(f"{name}: counters", not bool(case.counters.any()))
                    go = partial(case.fused, x, out, config, 1, tiles, z)
                    if rank == RANK:
                        replays_equal(report, name, go, [out, z], [])


def check_bits(report: Report) -> None:
    """Rows of a batch of 64 against the same rows in smaller batches, alone, and without adapters."""
    table = all_sites(RANK, 1)
    for of in (*MAPS, HEAD):
        case = Case.random(of, table if of.site >= 0 else None)
        for number, config in enumerate(configs(of)):
            slots = [-1] * 24 + [i // 5 for i in range(40)]
            x, together = inputs(case, 64)

            def run(picked: Sequence[int], with_lora: bool, case: Case = case, x: Tensor = x,
                    config: DenseConfig = config, slots: Sequence[int] = slots) -> Tensor:  # fmt: skip
                few, out = x[list(picked)].contiguous(), inputs(case, len(picked))[1]
                if with_lora and case.table is not None:
                    mine = [slots[i] for i in picked]
                    case.fused(few, out, config, 0, case.tiles(mine), case.workspace(mine, lora.DECODE))
                else:
                    case.fused(few, out, config)
                return out

            together = run(range(64), True)
            base, differ = run(range(64), False), 0
            for count in (1, 2, 7, 16, 17, 32, 33, 48):
                for first in (0, 10, 64 - count):
                    picked = range(first, first + count)
                    differ += int((run(picked, True) != together[first : first + count]).sum())
                    differ += int((run(picked, False) != base[first : first + count]).sum())
            differ += int((base[:24] != together[:24]).sum())
            report.same(
                f"bits {of.name} config {number}: {differ} elements differ between batches", differ == 0
            )


def check_chain(report: Report) -> None:
    """norm → shrink → product → norm of 12 layers with and without programmatic launches."""
    table, tiles = all_sites(), tiles_of(SLOTS, 16, 16)
    cases = [(Case.random(MAPS[1], table), Case.random(MAPS[0], table)) for _ in range(LAYERS)]
    norm, results = normal(HIDDEN, dtype=F32), []
    torch.manual_seed(1)
    start = normal(16, HIDDEN)
    for pdl in (False, True, True):
        x, residual = start, torch.zeros(16, HIDDEN, device="cuda")
        for i, (o, qkv) in enumerate(cases):
            y, residual = add_rms_norm(x, residual, norm, 1e-5, pdl=pdl)
            wide, x = inputs(qkv, 16)[1], inputs(o, 16)[1]
            qkv.fused(
                y, wide, dense_config(5120, HIDDEN), i, tiles, qkv.workspace(SLOTS, lora.DECODE), pdl=pdl
            )
            heads = wide[:, : WIDTHS[0]].contiguous()
            o.fused(
                heads, x, dense_config(HIDDEN, WIDTHS[0]), i, tiles, o.workspace(SLOTS, lora.DECODE), pdl=pdl
            )
        results.append(x.clone())
    same = torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    report.same("12 layers with programmatic launches equal those without", same)


def moved(of: Map, rows: int, adapters: int, shrink: bool) -> float:
    """Bytes of weights, activations and the factors of so many adapters."""
    factors = adapters * RANK * (of.features + shrink * len(of.widths) * of.depth)
    return 2.0 * (of.features * of.depth + rows * (of.depth + of.features) + factors)


def time_rows(report: Report) -> None:
    """cuBLAS and `lora_add` against the kernel, for rows of base and of 8 adapters."""
    table = all_sites()
    for of in (*MAPS[:3], HEAD):
        cases = [Case.random(of, table if of.site >= 0 else None) for _ in range(of.layers)]
        config = dense_config(of.features, of.depth)
        for rows in (1, 2, 4, 8, 16, 24, 32, 48, 64):
            x, out = inputs(cases[0], rows)
            slots = sorted(i % 8 for i in range(rows))
            name, used = f"{of.name} {rows} rows", len(set(slots))
            calls: list[Callable[[], object]] = [partial(linear, x, one.weight, one.bias) for one in cases]
            report.time(f"{name} base cuBLAS", calls, moved(of, rows, 0, False))
            calls = [partial(one.fused, x, out, config) for one in cases]
            report.time(f"{name} base product", calls, moved(of, rows, 0, False))
            if of.site < 0:
                continue
            tiles, z = cases[0].tiles(slots), cases[0].workspace(slots, lora.DECODE)
            calls = [partial(separately, one, x, i, tiles, z) for i, one in enumerate(cases)]
            report.time(f"{name} lora  cuBLAS, shrink, expand", calls, moved(of, rows, used, True))
            calls = [partial(one.fused, x, out, config, i, tiles, z) for i, one in enumerate(cases)]
            report.time(f"{name} lora  shrink, product", calls, moved(of, rows, used, True))


def separately(case: Case, x: Tensor, layer: int, tiles: LoraTiles, z: Tensor) -> None:
    assert case.table is not None
    y = linear(x, case.weight, case.bias)
    site = SITES * layer + case.of.site
    lora_add(y, x, case.table, site, case.of.widths, tiles, z, lora.DECODE, pdl=True)


def variants(of: Map) -> Iterator[DenseConfig]:
    base = dense_config(of.features, of.depth)
    yield base
    for splits in range(1, 7):
        if splits != base.splits and of.site >= 0:
            yield replace(base, splits=splits)
    depth = 192 - base.depth
    yield replace(base, depth=depth, stages=512 // depth)
    yield replace(base, stages=base.stages // 2)
    yield replace(base, stages=base.stages * 3 // 4)
    yield replace(base, features=128, warps=4)
    yield replace(base, features=128, warps=8)
    yield replace(base, features=128, warps=8, splits=max(base.splits * 2, 1) if of.site >= 0 else 1)
    for prefetch in (64, 256, 512):
        yield replace(base, prefetch=prefetch)
    yield replace(base, even=False)
    if of.site >= 0:
        for ranks in (16, 32, 128):
            yield replace(base, ranks=ranks)


def differs(config: object, base: object) -> str:
    mine, other = vars(config), vars(base)
    return " ".join(f"{key}={mine[key]}" for key in mine if mine[key] != other[key]) or "default"


def time_variants(report: Report, best: dict[str, DenseConfig]) -> None:
    """`best` gets each map's fastest configuration, by the sum of base and adapted rows."""
    table = all_sites()
    for of in (*MAPS[:3], HEAD):
        cases = [Case.random(of, table if of.site >= 0 else None) for _ in range(of.layers)]
        x, out = inputs(cases[0], len(SLOTS))
        tiles = cases[0].tiles(SLOTS)
        z = cases[0].workspace(SLOTS, lora.DECODE) if of.site >= 0 else None
        times: dict[DenseConfig, float] = {}
        base = dense_config(of.features, of.depth)
        for config in variants(of):
            name = f"{of.name} {differs(config, base)}"
            calls = [partial(one.fused, x, out, config) for one in cases]
            times[config] = report.time(f"{name} base", calls, moved(of, len(SLOTS), 0, False))
            if z is not None:
                calls = [partial(one.fused, x, out, config, i, tiles, z) for i, one in enumerate(cases)]
                times[config] += report.time(f"{name} lora", calls, moved(of, len(SLOTS), 8, True))
        best[of.name] = min(times, key=times.__getitem__)
        if z is None:
            continue
        for size in (
            1024,
            2048,
            4096,
        ):  # fewer partial sums to read, and longer sums in shrink, beside the product
            how = replace(lora.DECODE, slice=size, depth=min(size, 512))
            z = cases[0].workspace(SLOTS, how)
            calls = [partial(one.fused, x, out, base, i, tiles, z, how) for i, one in enumerate(cases)]
            report.time(f"{of.name} shrink slice={size} lora", calls, moved(of, len(SLOTS), 8, True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="no configurations but the default")
    parser.add_argument("--tune", type=Path, help="folder for the best configurations")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report, best = Report(), dict[str, DenseConfig]()
    for part in (check_product, check_bits, check_chain, time_rows):
        report.section(part)
    if not arguments.quick or arguments.tune:
        report.section(partial(time_variants, best=best))
    report.show()
    for name, config in best.items():
        print(f"best for {name}: {config}")
    if arguments.tune and best:
        shapes = {of.name: {"features": of.features, "depth": of.depth} for of in (*MAPS, HEAD)}
        found = [(shapes[name], config) for name, config in best.items()]
        arguments.tune.mkdir(parents=True, exist_ok=True)
        file = arguments.tune / "dense_product.json"
        file.write_text(tuned.dump(torch.cuda.get_device_name(), "dense_product", found))
        print(f"written to {file}")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
