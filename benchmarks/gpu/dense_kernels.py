"""The dense GPU kernels on a device: right first, then fast: `python benchmarks/gpu/dense_kernels.py [--quick]`.

Checks every kernel against float32 or float64 references on fresh random inputs with poisoned outputs, and that replays
of a CUDA graph equal eager launches bit for bit. Then times them, the median of graph replays that rotate over inputs
larger than the L2 cache, beside the floor: bytes that must move at 4.3 TB/s, or operations at 790 TFLOP/s. Shapes are
gpt-oss-20b's and, marked "d128", Qwen3-30B-A3B's. About 5 minutes, most of it compilation; --quick times no variants.
The exit code is 1 if a check fails. The table comes last.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu.measure import BF16, F32, Report, i32, normal  # noqa: I001  # first: it finds Motet
from benchmarks.gpu.dense_checks import (
    HIDDEN,
    RANK,
    RULES,
    SLOTS,
    WIDTHS,
    Cache,
    check_attention,
    check_kv_write,
    check_lora,
    check_norm,
    check_sample,
    lora_table,
    sampling_rows,
    tiles_of,
    truncates,
)
from motet.kernels.attention import Heads
from motet.kernels.gpu import lora
from motet.kernels.gpu.attention import (
    DecodeBatch,
    DecodeConfig,
    DecodeWorkspace,
    PrefillBatch,
    PrefillConfig,
    decode_attention,
    prefill_attention,
    prefill_rows,
    prefill_tiles,
)
from motet.kernels.gpu.dense import DenseUpdate, arrivals, dense_config, dense_product
from motet.kernels.gpu.kv_write import KVWrite, QueryKey, rotary_kv_write
from motet.kernels.gpu.lora import (
    LoraConfig,
    LoraTiles,
    RankBlocks,
    lora_expand,
    lora_shrink,
    shrunk,
)
from motet.kernels.gpu.norm import add_rms_norm
from motet.kernels.gpu.sample import sample
from motet.types import FULL, KVGroup

LAYERS = 12


def time_small(report: Report) -> None:
    weight = normal(HIDDEN, dtype=F32)
    for rows in (16, 64, 8192):
        sets = [
            (normal(rows, HIDDEN), normal(rows, HIDDEN, dtype=F32)) for _ in range(2 if rows > 64 else 48)
        ]
        calls = [partial(add_rms_norm, x, residual, weight, 1e-5, pdl=True) for x, residual in sets]
        report.time(f"norm {rows} rows", calls, rows * HIDDEN * 12)
    for heads, kv_heads, dim, norms in ((64, 8, 64, False), (32, 4, 128, True)):
        table = normal(4096, dim // 2, dtype=F32)
        how = QueryKey(table, table)
        if norms:
            how = replace(how, q_norm=normal(dim, dtype=F32), k_norm=normal(dim, dtype=F32), eps=1e-6)
        for rows in (16, 8192):
            cache, width = Cache.make(1, 8192, kv_heads, dim, 4), (heads + 2 * kv_heads) * dim
            qkvs = [normal(rows, width) for _ in range(2 if rows > 64 else 24)]
            positions, slots = i32(torch.randint(4096, (rows,))), i32(torch.randperm(8192)[:rows])
            writes = [
                partial(
                    rotary_kv_write, qkv, KVWrite(positions, slots, how, cache.kv, i % 4, heads), pdl=True
                )
                for i, qkv in enumerate(qkvs)
            ]
            report.time(f"kv write d{dim} {rows} rows{' norms' if norms else ''}", writes, rows * width * 4)


def time_decode(report: Report, quick: bool) -> None:
    window = KVGroup((), window=128)
    few = [(64, 4, 3), (64, 2, 3), (128, 4, 3), (64, 4, 5)]
    many = [*few, (64, 1, 3), (32, 1, 3), (32, 1, 5), (32, 2, 5)]
    for num, kv_heads, dim, reach, batch, length, variants, splits in (
        (64, 8, 64, FULL, 16, 1900, many, (256, 128, 512)), (64, 8, 64, window, 16, 1900, few, (256,)),
        (64, 8, 64, FULL, 1, 1900, few, (256, 128)), (64, 8, 64, FULL, 64, 1900, few[:2], (256, 512)),
        (64, 8, 64, FULL, 1, 100_000, few[:2], (256,)), (32, 4, 128, FULL, 16, 1900, few, (256, 128)),
    ):  # fmt: skip
        cache = Cache.make(batch, length, kv_heads, dim)
        heads = Heads(num, dim**-0.5, reach, normal(num, dtype=F32))
        qkv, out = normal(batch, (num + 2 * kv_heads) * dim), normal(batch, num * dim)
        decode = DecodeBatch(i32(range(batch)), i32([length] * batch), cache.tables)
        workspace = DecodeWorkspace.empty(batch, num, kv_heads, dim, "cuda")
        moved = batch * min(length, reach.window or length) * kv_heads * dim * 4 + batch * num * dim * 4
        for keys, warps, stages in variants[:1] if quick else variants:
            for split in splits if (keys, warps, stages) == few[0] and not quick else splits[:1]:
                calls = [
                    partial(
                        decode_attention, qkv, cache.kv, i, decode, heads, workspace, out,
                        config=DecodeConfig(keys, warps, stages), min_split=split, pdl=True,
                    )
                    for i in range(cache.kv.num_layers)
                ]  # fmt: skip
                name = f"decode {batch}x{length} d{dim}{' window' if reach is window else ''}"
                report.time(f"{name} {keys} keys {warps}w {stages}s split {split}", calls, moved)


def time_prefill(report: Report, quick: bool) -> None:
    window = KVGroup((), window=128)
    few = [(128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)]
    many = [*few, (128, 128, 8, 3), (128, 64, 8, 5)]
    for num, kv_heads, dim, reach, length, variants in (
        (64, 8, 64, FULL, 1600, many), (64, 8, 64, window, 1600, few), (64, 8, 64, FULL, 8192, few[:2]),
        (32, 4, 128, FULL, 1600, many),
    ):  # fmt: skip
        cache = Cache.make(1, length, kv_heads, dim, 3)
        heads = Heads(num, dim**-0.5, reach, normal(num, dtype=F32))
        qkv, out = normal(length, (num + 2 * kv_heads) * dim), normal(length, num * dim)
        seen = sum(min(i + 1, reach.window or length) for i in range(length))
        moved = length * (2 * num + 2 * kv_heads) * dim * 2
        for config in [PrefillConfig(*v) for v in (variants[:1] if quick else variants)]:
            tiles = i32(prefill_tiles([(0, 0, length, 0)], prefill_rows(num, kv_heads, config)))
            batch = PrefillBatch(tiles, cache.tables)
            calls = [
                partial(prefill_attention, qkv, cache.kv, i, batch, heads, out, config=config)
                for i in range(3)
            ]
            name = f"prefill {length} d{dim}{' window' if reach is window else ''}"
            name = f"{name} {config.rows}x{config.keys} {config.warps}w {config.stages}s"
            report.time(name, calls, moved, 4.0 * dim * num * seen)


def time_lora(report: Report, quick: bool) -> None:
    d, p = lora.DECODE, lora.PREFILL
    cases: list[tuple[str, list[int], list[LoraConfig]]] = [
        ("16 rows, 8 adapters", [i // 2 for i in range(16)], [
            d, replace(d, slice=256, depth=256), replace(d, slice=1024, depth=256), replace(d, ranks=32, groups=4),
            replace(d, shrink_warps=2), replace(d, columns=256), replace(d, columns=64, expand_warps=2),
            replace(d, expand_warps=2), replace(d, even=False),
        ]),
        ("16 rows, 16 segments", [i * 3 % 8 for i in range(16)], [d]),
        ("1600 rows, 1 adapter", [0] * 1600, [
            p, replace(p, ranks=64, groups=2), replace(p, slice=4096), replace(p, slice=1024),
            replace(p, rows=128, shrink_warps=8, expand_warps=8), replace(p, columns=256, expand_warps=8),
            replace(p, expand_ranks=16), replace(p, group=1), replace(p, group=8), replace(p, even=False),
        ]),
        ("8192 rows, 8 adapters", [i // 1024 for i in range(8192)], [
            p, replace(p, ranks=64, groups=2), replace(p, group=1), replace(p, group=8), replace(p, group=32),
        ]),
    ]  # fmt: skip
    shapes = [*((HIDDEN, width) for width in WIDTHS), (4096, HIDDEN)]
    table = lora_table(shapes, LAYERS)
    for name, slots, configs in cases:
        rows, used = len(slots), len(set(slots))
        for site, depth, widths in ((0, HIDDEN, WIDTHS), (3, 4096, (HIDDEN,))):
            xs, ys = ([normal(rows, n) for _ in range(2 if rows > 64 else 12)] for n in (depth, sum(widths)))
            parts = {
                "shrink": used * RANK * len(widths) * depth * 2 + rows * depth * 2,
                "expand": used * RANK * sum(widths) * 2 + rows * sum(widths) * 4,
            }
            parts["both"] = sum(parts.values())
            for config in configs[:1] if quick or site else configs:
                z, tiles = shrunk(rows, depth, 96, config, "cuda"), tiles_of(slots, config.rows, 16)
                for what in parts if config is configs[0] and not site else ("both",):
                    calls = [
                        partial(
                            update, what, xs[i % len(xs)], ys[i % len(ys)], table, 4 * i + site, widths, tiles, z,
                            config,
                        )
                        for i in range(LAYERS)
                    ]  # fmt: skip
                    label = f"lora {'o' if site else 'qkv'} {name} {what} {differs(config, configs[0])}"
                    report.time(label, calls, parts[what])


def update(
    what: str,
    x: Tensor,
    y: Tensor,
    table: RankBlocks,
    site: int,
    widths: tuple[int, ...],
    tiles: LoraTiles,
    z: Tensor,
    config: LoraConfig,
) -> None:
    if what != "expand":
        lora_shrink(x, table, site, len(widths), tiles, z, config, pdl=True)
    if what != "shrink":
        lora_expand(y, table, site, widths, tiles, z, config, pdl=True)


def differs(config: LoraConfig, base: LoraConfig) -> str:
    mine, other = vars(config), vars(base)
    return " ".join(f"{key}={mine[key]}" for key in mine if mine[key] != other[key])


def time_sample(report: Report) -> None:
    for count in (16, 64):
        logits = [normal(count, 201_088) * 3 for _ in range(12 if count == 16 else 3)]
        for one in logits:  # as peaked as a language model's
            one[:, :200] += torch.linspace(16, 0, 200, device="cuda", dtype=BF16)[
                torch.randperm(200, device="cuda")
            ]
        for name, rule in RULES.items():
            rows, truncate = sampling_rows(count, **rule), truncates(rule)
            calls = [partial(sample, one, rows, truncate, pdl=True) for one in logits]
            report.time(f"sample {count} rows {name}", calls, count * 201_088 * 2)


def time_layer(report: Report) -> None:
    """The attention half of a decode layer, as a step launches it: 6 kernels, 4 without adapters."""
    rows, num, kv_heads, dim, length = 16, 64, 8, 64, 1900
    cache = Cache.make(rows, length, kv_heads, dim, LAYERS)
    table, adapters = (
        normal(4096, dim // 2, dtype=F32),
        lora_table([*((HIDDEN, w) for w in WIDTHS), (4096, HIDDEN)], LAYERS),
    )
    heads, decode = Heads(num, dim**-0.5, FULL, normal(num, dtype=F32)), i32([length] * rows)
    batch = DecodeBatch(i32(range(rows)), decode, cache.tables)
    workspace = DecodeWorkspace.empty(rows, num, kv_heads, dim, "cuda")
    how, slots = QueryKey(table, table), cache.tables[:, -1] * 16 + length % 16 - 1
    weights = [(normal(sum(WIDTHS), HIDDEN) / 60, normal(HIDDEN, 4096) / 60) for _ in range(LAYERS)]
    norm, biases = normal(HIDDEN, dtype=F32), (normal(sum(WIDTHS)), normal(HIDDEN))
    counters = arrivals("cuda")
    tiles = tiles_of([i // 2 for i in range(rows)], 16, rows)
    z1, z2 = (shrunk(rows, depth, 96, lora.DECODE, "cuda") for depth in (HIDDEN, 4096))
    residual, branch, out = normal(rows, HIDDEN, dtype=F32), normal(rows, HIDDEN), normal(rows, num * dim)
    qkv = normal(rows, sum(WIDTHS))

    def project(x: Tensor, y: Tensor, i: int, side: int, z: Tensor, pdl: bool, with_lora: bool) -> None:
        weight, update = weights[i][side], None
        if with_lora:
            site, widths = (4 * i + 3, (HIDDEN,)) if side else (4 * i, WIDTHS)
            lora_shrink(x, adapters, site, len(widths), tiles, z, lora.DECODE, pdl=pdl)
            update = DenseUpdate(adapters, site, widths, tiles, z)
        write = None if side else KVWrite(decode, slots, how, cache.kv, i, num)
        dense_product(
            x, weight, biases[side], y, counters, dense_config(*weight.shape), update=update, write=write, pdl=pdl,
        )  # fmt: skip

    def layer(i: int, pdl: bool, with_lora: bool) -> None:
        x, _ = add_rms_norm(branch, residual, norm, 1e-5, pdl=pdl)
        project(x, qkv, i, 0, z1, pdl, with_lora)
        decode_attention(qkv, cache.kv, i, batch, heads, workspace, out, pdl=pdl)
        project(out, branch, i, 1, z2, pdl, with_lora)

    dense = 2 * (sum(WIDTHS) * HIDDEN + HIDDEN * 4096)
    ranks = SLOTS * RANK * 2 * (3 * HIDDEN + sum(WIDTHS) + 4096 + HIDDEN)
    moved = dense + rows * length * kv_heads * dim * 4
    for with_lora in (False, True):
        for pdl in (False, True):
            calls = [partial(layer, i, pdl, with_lora) for i in range(LAYERS)]
            name = f"attention half of a layer, 16 rows{', 8 adapters' if with_lora else ''}{', PDL' if pdl else ''}"
            report.time(name, calls, moved + ranks * with_lora)
    states = []
    for pdl in (False, True, True):
        torch.manual_seed(1)
        residual.normal_()
        branch.normal_()
        for i in range(LAYERS):
            layer(i, pdl, True)
        states.append(residual.clone())
    report.same(
        "12 layers with PDL equal those without",
        torch.equal(states[0], states[1]) and torch.equal(states[0], states[2]),
    )
    for name, x, side in (("qkv", residual.to(BF16), 0), ("o", out, 1)):
        products = [partial(linear, x, one[side], biases[side]) for one in weights]
        report.time(f"cuBLAS {name} 16 rows", products, weights[0][side].numel() * 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="no variants")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    report = Report()
    for check in (check_norm, check_kv_write, check_attention, check_lora, check_sample):
        report.section(check)
    report.time("copy of 2 GiB", [partial(normal(1 << 30).copy_, normal(1 << 30))], 4 << 30)
    for part in (time_layer, time_small, time_sample):
        report.section(part)
    for tuned in (time_decode, time_prefill, time_lora):
        report.section(partial(tuned, quick=quick))
    report.show()
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
