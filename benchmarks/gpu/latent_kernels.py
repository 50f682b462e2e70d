"""Latent attention on a device: right first, then fast: `python benchmarks/gpu/latent_kernels.py [--quick]`.

Checks every kernel at DeepSeek V2-Lite's and V3's shapes against float32 or float64 references on fresh random inputs
with poisoned outputs, that replays of a CUDA graph equal eager launches bit for bit, that a row's bits do not depend on
its batch, and that a chain with PDL equals one without. Then times them as `dense_kernels.py` does. About 4 minutes,
most of it compilation; --quick times no variants. The exit code is 1 if a check fails. The table comes last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu.measure import F32, Report, i32, normal, replays_equal  # noqa: I001  # first: it finds Motet
from benchmarks.gpu.dense_checks import RANK, SLOTS, lora_table, tiles_of
from motet.kernels.attention import AttentionBatch, PrefillChunk
from motet.kernels.gpu import lora
from motet.kernels.gpu.attention import (
    DecodeBatch,
    DecodeConfig,
    DecodeWorkspace,
    PrefillBatch,
    PrefillConfig,
    prefill_tiles,
)
from motet.kernels.gpu.latent_attention import (
    decode_workspace,
    latent_decode,
    latent_prefill,
    latent_write,
    prefill_rows,
)
from motet.kernels.gpu.latent_lora import (
    lora_key_query,
    lora_key_query_torch,
    lora_value,
    lora_value_torch,
)
from motet.kernels.gpu.lora import LoraTiles, RankBlocks
from motet.kernels.gpu.per_head import per_head
from motet.kernels.kv_write import KVLayout
from motet.kernels.latent_attention import LatentHeads, latent_attention_torch, latent_write_torch

LITE = LatentHeads(num=16, nope=128, rope=64, rank=512, value=128, scale=0.11)
V3 = LatentHeads(num=128, nope=128, rope=64, rank=512, value=128, scale=0.13)
SHAPES = {"v2-lite": LITE, "v3": V3}
CACHED, LAYERS = 576, 12


@dataclass(frozen=True)
class Cache:
    """Latents of `batch` sequences of `length` tokens in pages lying anywhere, and their block tables."""

    kv: KVLayout
    tables: Tensor

    @classmethod
    def make(cls, batch: int, length: int, layers: int = 0) -> Cache:
        """As many layers as it takes to be several times as large as the L2 cache, unless told."""
        pages = -(-length // 16)
        layers = layers or min(max(int(4e8 / (batch * length * 2 * CACHED)), 3), 48)
        stride = layers * 16 * CACHED
        order = torch.randperm(batch * pages, device="cuda").to(torch.int32)
        kv = KVLayout(normal(batch * pages * stride), batch * pages, stride, layers, 1, 16, CACHED, planes=1)
        return cls(kv, order.view(batch, pages))


def check_write(report: Report) -> None:
    for name, heads in SHAPES.items():
        for interleaved in (False, True):
            cache, queries = Cache.make(7, 40, 3), heads.num * (heads.nope + heads.rope)
            z = normal(21, queries + CACHED)
            query = normal(21, heads.num, CACHED)
            angles = torch.outer(torch.arange(100, device="cuda").float(), torch.rand(32, device="cuda"))
            positions, slots = i32(torch.randint(100, (21,))), i32(torch.randperm(7 * 48)[:21])
            slots[5] = -1
            norm = torch.rand(heads.rank, device="cuda") + 0.5
            real = slots >= 0
            expected, wide = query.float()[real], replace(cache.kv, flat=cache.kv.flat.float())
            latent_write_torch(
                z[real].float(), z[real].float(), queries, expected, positions[real], slots[real], angles.cos(),
                angles.sin(), norm, 1e-6, wide, 1, heads, interleaved,
            )  # fmt: skip
            go = partial(
                latent_write, z, z, queries, query, positions, slots, angles.cos(), angles.sin(), norm, 1e-6, cache.kv,
                1, heads, interleaved, pdl=True,
            )  # fmt: skip
            before = query[5].clone()
            replays_equal(report, f"write {name}", go, [], [query, cache.kv.flat])
            report.check(f"write {name} query", query[real], expected)
            worst = float((cache.kv.flat - wide.flat).abs().max())
            report.same(f"write {name} pages: largest difference {worst:.3f}", worst < 0.08)
            report.same(f"write {name}: padding", torch.equal(query[5], before))


def check_attention(report: Report) -> None:
    for name, heads in SHAPES.items():
        cache, rows, lengths = Cache.make(7, 1900, 3), [0, 1, 302, 303], [1, 1900, 129, 777]
        chunks = [(2, 0, 300, 4), (304, 1500, 100, 5), (404, 511, 3, 6)]
        query, out = normal(407, heads.num, CACHED), normal(407, heads.num, heads.rank)
        decode = DecodeBatch(i32(rows), i32(lengths), cache.tables[:4])
        prefill = PrefillBatch(i32(prefill_tiles(chunks, prefill_rows(heads.num))), cache.tables)
        workspace = decode_workspace(16, heads.num, CACHED, "cuda")

        def go(
            query: Tensor = query, cache: Cache = cache, heads: LatentHeads = heads, out: Tensor = out,
            decode: DecodeBatch = decode, prefill: PrefillBatch = prefill,
            workspace: DecodeWorkspace = workspace,
        ) -> None:  # fmt: skip
            latent_decode(query, cache.kv, 1, decode, heads, workspace, out, pdl=True)
            latent_prefill(query, cache.kv, 1, prefill, heads, out, pdl=True)

        replays_equal(report, f"attention {name}", go, [out], [])
        batch = AttentionBatch(
            decode.rows, decode.lengths, decode.pages,
            [PrefillChunk(row, start, length, cache.tables[table]) for row, start, length, table in chunks],
        )  # fmt: skip
        wide = replace(cache.kv, flat=cache.kv.flat.float())
        expected = latent_attention_torch(query.float(), wide, 1, batch, heads)
        others = [i for i in range(407) if i not in rows]
        report.check(f"attention {name} decode", out[rows], expected[rows])
        report.check(f"attention {name} prefill", out[others], expected[others])
        alone, one = torch.empty_like(out), DecodeBatch(i32([1]), i32([1900]), cache.tables[1:2])
        latent_decode(query, cache.kv, 1, one, heads, workspace, alone)
        report.same(f"attention {name}: a row alone equals it in a batch", torch.equal(alone[1], out[1]))


def check_products(report: Report) -> None:
    for name, heads in SHAPES.items():
        for side, depth, features in (("keys", heads.nope, heads.rank), ("values", heads.rank, heads.value)):
            x, weight = (
                normal(65, heads.num, depth + 64)[..., :depth],
                normal(heads.num, depth, features) / 16,
            )
            results = {}
            for rows in (1, 7, 16, 17, 40, 64, 65):
                out = normal(rows, heads.num, features)
                go = partial(per_head, x[:rows], weight, out, pdl=True)
                replays_equal(report, f"{side} {name} {rows} rows", go, [out], [])
                results[rows] = out
                expected = torch.bmm(x[:rows].double().transpose(0, 1), weight.double()).transpose(0, 1)
                report.check(f"{side} {name} {rows} rows", out, expected)
            for rows in (1, 7, 16, 17, 40):
                same = torch.equal(results[rows], results[64][:rows])
                report.same(f"{side} {name}: {rows} rows equal those among 64", same)


def check_lora(report: Report) -> None:
    cases = [
        ("decode", lora.DECODE, [0, 0, 1, -1, 7, 3, 3, 3, -1, -1, 2, 5, 4, 6, 1, 0]),
        ("prefill", lora.PREFILL, [3] * 333 + [-1] * 40 + [0] * 5 + [1] * 200),
    ]
    for name, heads in SHAPES.items():
        for rank in (RANK, 9, 500):
            table = lora_table([(heads.rank, heads.num * (heads.nope + heads.value))], 3, rank)
            for kind, config, slots in cases:
                rows, tiles = len(slots), tiles_of(slots, config.rows, 16)
                q, o = normal(rows, heads.num * 192), normal(rows, heads.num, heads.rank)
                query, v = normal(rows, heads.num, CACHED), normal(rows, heads.num, heads.value)
                for side, y, x, update, reference in (
                    ("keys", query, q, lora_key_query, lora_key_query_torch),
                    ("values", v, o, lora_value, lora_value_torch),
                ):
                    expected, before = y.double(), y.double()
                    reference(expected, x.double(), heads, table, 2, tiles)
                    go = partial(update, y, x, heads, table, 2, tiles, config, pdl=True)
                    replays_equal(report, f"lora {side} {name} {kind} rank {rank}", go, [], [y])
                    report.check(
                        f"lora {side} {name} {kind} rank {rank}", y - before, expected - before, 2e-2
                    )


def time_decode(report: Report, quick: bool) -> None:
    few = [(32, 4, 5), (32, 8, 5), (64, 8, 5), (32, 4, 3), (16, 4, 5)]
    many = [(64, 8, 3), (32, 8, 3), (32, 8, 5)]
    for name, batch, length, variants, splits in (
        ("v2-lite", 16, 1900, few, (256, 128, 512)), ("v2-lite", 1, 1900, few, (256, 128)),
        ("v2-lite", 64, 1900, few, (256, 512)), ("v2-lite", 1, 100_000, few[:3], (256,)),
        ("v3", 16, 1900, many, (256, 512)), ("v3", 64, 1900, many[:1], (256, 512)),
    ):  # fmt: skip
        heads, cache = SHAPES[name], Cache.make(batch, length)
        query, out = normal(batch, heads.num, CACHED), normal(batch, heads.num, heads.rank)
        decode = DecodeBatch(i32(range(batch)), i32([length] * batch), cache.tables)
        workspace = decode_workspace(batch, heads.num, CACHED, "cuda")
        moved = batch * (length + heads.num * 2) * CACHED * 2
        flops = 2.0 * batch * length * heads.num * (CACHED + heads.rank)
        for variant in variants[:1] if quick else variants:
            for split in splits if variant is variants[0] and not quick else splits[:1]:
                calls = [
                    partial(
                        latent_decode, query, cache.kv, i, decode, heads, workspace, out,
                        config=DecodeConfig(*variant), min_split=split, pdl=True,
                    )
                    for i in range(cache.kv.num_layers)
                ]  # fmt: skip
                label = "{} keys {}w {}s".format(*variant)
                report.time(f"decode {name} {batch}x{length} {label} split {split}", calls, moved, flops)


def time_prefill(report: Report, quick: bool) -> None:
    variants = [(64, 64, 8, 3), (64, 32, 8, 5), (64, 32, 8, 3), (32, 32, 8, 5), (32, 64, 8, 3)]
    for name, length in (("v2-lite", 1600), ("v2-lite", 8192), ("v3", 1600)):
        heads, cache = SHAPES[name], Cache.make(1, length, 3)
        query, out = normal(length, heads.num, CACHED), normal(length, heads.num, heads.rank)
        flops = heads.num * length * (length + 1.0) * (CACHED + heads.rank)
        for config in [PrefillConfig(*v) for v in (variants[:1] if quick else variants)]:
            tiles = i32(prefill_tiles([(0, 0, length, 0)], prefill_rows(heads.num, config)))
            batch = PrefillBatch(tiles, cache.tables)
            calls = [
                partial(latent_prefill, query, cache.kv, i, batch, heads, out, config=config)
                for i in range(3)
            ]
            label = f"{config.rows}x{config.keys} {config.warps}w {config.stages}s"
            report.time(f"prefill {name} {length} {label}", calls, query.nbytes + out.nbytes, flops)


def time_small(report: Report) -> None:
    """Writes and products; products also by cuBLAS."""
    for name, heads in SHAPES.items():
        for rows in (16, 64, 2048):
            cache, queries = Cache.make(1, 2048, 4), heads.num * (heads.nope + heads.rope)
            zs = [normal(rows, queries + CACHED) for _ in range(2 if rows > 64 else 24)]
            query, table = normal(rows, heads.num, CACHED), normal(4096, 32, dtype=F32)
            positions, slots = i32(torch.randint(4096, (rows,))), i32(torch.randperm(2048)[:rows])
            norm = normal(heads.rank, dtype=F32)
            calls: list[Callable[[], object]] = [
                partial(
                    latent_write, z, z, queries, query, positions, slots, table, table, norm, 1e-6, cache.kv, i % 4,
                    heads, True, pdl=True,
                )
                for i, z in enumerate(zs)
            ]  # fmt: skip
            report.time(f"write {name} {rows} rows", calls, rows * (heads.num * 64 + CACHED) * 4)
            for side, depth, features in (
                ("keys", heads.nope, heads.rank),
                ("values", heads.rank, heads.value),
            ):
                weights = [normal(heads.num, depth, features) for _ in range(24 if name == "v2-lite" else 6)]
                x, out = normal(rows, heads.num, depth), normal(rows, heads.num, features)
                moved, flops = weights[0].nbytes + x.nbytes + out.nbytes, 2.0 * rows * weights[0].numel()
                calls = [partial(per_head, x, weight, out, pdl=True) for weight in weights]
                report.time(f"{side} {name} {rows} rows", calls, moved, flops if rows > 64 else 0)
                if rows <= 64:
                    calls = [
                        partial(torch.bmm, x.transpose(0, 1), weight, out=out.transpose(0, 1))
                        for weight in weights
                    ]
                    report.time(f"{side} {name} {rows} rows cuBLAS", calls, moved)


def time_lora(report: Report, quick: bool) -> None:
    d, p = lora.DECODE, lora.PREFILL
    cases = [
        ("16 rows, 8 adapters", [i // 2 for i in range(16)], [
            d, replace(d, columns=256), replace(d, columns=512), replace(d, expand_ranks=16),
            replace(d, expand_warps=8),
        ]),
        ("1600 rows, 1 adapter", [0] * 1600, [p, replace(p, columns=256, expand_warps=8), replace(p, expand_ranks=16)]),
    ]  # fmt: skip
    for name, heads in SHAPES.items():
        width = heads.num * (heads.nope + heads.value)
        table = lora_table([(heads.rank, width)], LAYERS)
        for label, slots, configs in cases:
            rows, used = len(slots), len(set(slots))
            q, o = normal(rows, heads.num * 192), normal(rows, heads.num, heads.rank)
            query, v = normal(rows, heads.num, CACHED), normal(rows, heads.num, heads.value)
            for config in configs[:1] if quick else configs:
                tiles = tiles_of(slots, config.rows, 16)
                for side, y, x, update in (
                    ("keys", query, q, lora_key_query),
                    ("values", v, o, lora_value),
                ):
                    calls = [
                        partial(update, y, x, heads, table, i, tiles, config, pdl=True) for i in range(LAYERS)
                    ]
                    moved = (
                        used * RANK * 2 * (heads.rank + width // 2) + rows * heads.num * (512 + 128 * 2) * 2
                    )
                    changed = [f"{k}={n}" for k, n in vars(config).items() if n != getattr(configs[0], k)]
                    report.time(f"lora {side} {name} {label} {' '.join(changed)}", calls, moved)


def time_chain(report: Report) -> None:
    """Everything between the down-projection and the output projection of a decode layer."""
    for name, heads in SHAPES.items():
        rows, length, layers = 16, 1900, LAYERS if heads is LITE else 4
        cache = Cache.make(rows, length, layers)
        width, queries = heads.num * (heads.nope + heads.value), heads.num * (heads.nope + heads.rope)
        table, tiles = (
            lora_table([(heads.rank, width)], layers),
            tiles_of([i // 2 for i in range(rows)], 16, rows),
        )
        z = normal(rows, queries + CACHED)
        weights = [
            (normal(heads.num, heads.nope, heads.rank) / 12, normal(heads.num, heads.rank, heads.value) / 23)
            for _ in range(layers)
        ]
        angles, norm = normal(4096, 32, dtype=F32), torch.ones(heads.rank, device="cuda")
        lengths = i32([length] * rows)
        slots = cache.tables[:, -1] * 16 + length % 16 - 1
        step = DecodeBatch(i32(range(rows)), lengths, cache.tables)
        workspace = decode_workspace(rows, heads.num, CACHED, "cuda")
        chain = Chain(
            cache, heads, z, queries, lengths, slots, angles, norm, weights, table, tiles, step, workspace
        )
        moved = rows * length * CACHED * 2 + sum(weight.nbytes for weight in weights[0])
        ranks = SLOTS * RANK * 2 * (heads.rank + width)
        for with_lora in (False, True):
            for pdl in (False, True):
                calls = [partial(chain.layer, i, pdl, with_lora) for i in range(layers)]
                label = f"{', 8 adapters' if with_lora else ''}{', PDL' if pdl else ''}"
                report.time(f"latent layer {name}, 16 rows{label}", calls, moved + ranks * with_lora)
        plain, *others = [[chain.layer(i, pdl, True) for i in range(layers)] for pdl in (False, True, True)]
        same = all(torch.equal(a, b) for other in others for a, b in zip(plain, other, strict=True))
        report.same(f"{layers} layers {name} with PDL equal those without", same)


@dataclass(frozen=True)
class Chain:
    """What a layer's launches take."""

    cache: Cache
    heads: LatentHeads
    z: Tensor
    column: int
    positions: Tensor
    slots: Tensor
    angles: Tensor
    norm: Tensor
    weights: Sequence[tuple[Tensor, Tensor]]
    table: RankBlocks
    tiles: LoraTiles
    step: DecodeBatch
    workspace: DecodeWorkspace

    def layer(self, i: int, pdl: bool, with_lora: bool) -> Tensor:
        heads, z = self.heads, self.z
        keys, values = self.weights[i]
        per = z[:, : self.column].unflatten(1, (heads.num, -1))
        query = z.new_empty(len(z), heads.num, CACHED)
        per_head(per[..., : heads.nope], keys, query[..., : heads.rank], pdl=pdl)
        if with_lora:
            lora_key_query(query, z, heads, self.table, i, self.tiles, lora.DECODE, pdl=pdl)
        latent_write(
            z, z, self.column, query, self.positions, self.slots, self.angles, self.angles, self.norm, 1e-6,
            self.cache.kv, i, heads, True, pdl=pdl,
        )  # fmt: skip
        o = z.new_empty(len(z), heads.num, heads.rank)
        latent_decode(query, self.cache.kv, i, self.step, heads, self.workspace, o, pdl=pdl)
        v = z.new_empty(len(z), heads.num, heads.value)
        per_head(o, values, v, pdl=pdl)
        if with_lora:
            lora_value(v, o, heads, self.table, i, self.tiles, lora.DECODE, pdl=pdl)
        return v


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="no variants")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    report = Report()
    for check in (check_write, check_products, check_attention, check_lora):
        report.section(check)
    for part in (time_chain, time_small):
        report.section(part)
    for tuned in (time_decode, time_prefill, time_lora):
        report.section(partial(tuned, quick=quick))
    report.show()
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
