"""Checks of the dense GPU kernels on a device, and the inputs that their timings share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.measure import F32, Report, i32, normal, replays_equal
from motet.kernels.attention import AttentionBatch, Heads, PrefillChunk, paged_attention_torch
from motet.kernels.gpu import lora
from motet.kernels.gpu.attention import (
    DecodeBatch,
    DecodeWorkspace,
    PrefillBatch,
    decode_attention,
    prefill_attention,
    prefill_rows,
    prefill_tiles,
)
from motet.kernels.gpu.kv_write import KVWrite, QueryKey, rotary_kv_write
from motet.kernels.gpu.lora import LoraTiles, RankBlocks, lora_add, lora_add_torch, row_tiles, shrunk
from motet.kernels.gpu.norm import add_rms_norm
from motet.kernels.gpu.sample import SamplingTensors, sample, sample_torch
from motet.kernels.kv_write import KVLayout, rotary_kv_write_torch
from motet.kernels.norm import add_rms_norm_torch, head_rms_norm_torch
from motet.types import FULL, KVGroup

HIDDEN, WIDTHS, SLOTS, RANK = 2880, (4096, 512, 512), 8, 32
"""gpt-oss-20b's hidden size and widths of q, k and v; adapters and their rank."""


@dataclass(frozen=True)
class Cache:
    """A KV cache of `batch` sequences of `length` tokens in pages lying anywhere, and their block tables."""

    kv: KVLayout
    tables: Tensor

    @classmethod
    def make(cls, batch: int, length: int, kv_heads: int, dim: int, layers: int = 0) -> Cache:
        """As many layers as it takes to be several times as large as the L2 cache, unless told."""
        pages = -(-length // 16)
        layers = layers or min(max(int(4e8 / (batch * length * 4 * kv_heads * dim)), 3), 48)
        stride = layers * 2 * kv_heads * 16 * dim
        order = torch.randperm(batch * pages, device="cuda").to(torch.int32)
        flat = normal(batch * pages * stride)
        return cls(KVLayout(flat, batch * pages, stride, layers, kv_heads, 16, dim), order.view(batch, pages))


def _into(
    out: Sequence[Tensor], function: Callable[..., tuple[Tensor, ...]], *args: object, **kwargs: object
) -> None:
    """Copy what `function` returns first into tensors of ours."""
    for target, value in zip(out, function(*args, **kwargs), strict=False):
        target.copy_(value)


def check_norm(report: Report) -> None:
    for rows, width in ((16, HIDDEN), (33, 577), (5, 16384)):
        x, residual, weight = normal(rows, width), normal(rows, width, dtype=F32), normal(width, dtype=F32)
        expected, total = add_rms_norm_torch(x.float(), residual, weight, 1e-5)
        y, updated = add_rms_norm(x, residual, weight, 1e-5, pdl=True)
        report.check(f"norm {rows}x{width}", y, expected)
        report.check(f"norm {rows}x{width} residual", updated, total, 1e-6)
        out = torch.empty_like(y)
        go = partial(_into, [out], add_rms_norm, x, residual, weight, 1e-5, pdl=True)
        replays_equal(report, f"norm {rows}x{width}", go, [out], [residual])


def check_kv_write(report: Report) -> None:
    for heads, kv_heads, dim, norms, interleaved in (
        (64, 8, 64, False, False),
        (32, 4, 128, True, False),
        (9, 3, 80, True, True),
    ):
        cache = Cache.make(7, 40, kv_heads, dim, 3)
        angles = torch.outer(torch.arange(100, device="cuda").float(), torch.rand(dim // 2, device="cuda"))
        how = QueryKey(angles.cos(), angles.sin(), interleaved)
        if norms:
            how = replace(how, q_norm=normal(dim, dtype=F32), k_norm=normal(dim, dtype=F32), eps=1e-6)
        qkv, positions = normal(21, (heads + 2 * kv_heads) * dim), i32(torch.randint(100, (21,)))
        slots = i32(torch.randperm(cache.kv.num_pages * 16)[:21])
        expected, wide = qkv.float(), replace(cache.kv, flat=cache.kv.flat.float())
        if how.q_norm is not None and how.k_norm is not None:
            head_rms_norm_torch(expected, 0, heads, how.q_norm, how.eps)
            head_rms_norm_torch(expected, heads, kv_heads, how.k_norm, how.eps)
        rotary_kv_write_torch(expected, positions, slots, how.cos, how.sin, wide, 1, heads, interleaved)
        rotary_kv_write(qkv, KVWrite(positions, slots, how, cache.kv, 1, heads), pdl=True)
        report.check(f"kv write d{dim} q", qkv[:, : heads * dim], expected[:, : heads * dim])
        worst = float((cache.kv.flat - wide.flat).abs().max())
        report.same(f"kv write d{dim} pages: largest difference {worst:.3f}", worst < 0.08)
        go = partial(rotary_kv_write, qkv, KVWrite(positions, slots, how, cache.kv, 1, heads), pdl=True)
        replays_equal(report, f"kv write d{dim}", go, [], [qkv, cache.kv.flat])


def check_attention(report: Report) -> None:
    window, chunk = KVGroup((), window=128), KVGroup((), chunk=512)
    for num, kv_heads, dim, reach, sinks in (
        (64, 8, 64, FULL, True), (64, 8, 64, window, True), (32, 4, 128, FULL, False), (9, 3, 80, chunk, False),
    ):  # fmt: skip
        cache, name = (
            Cache.make(7, 1900, kv_heads, dim, 3),
            f"d{dim} {'full' if reach is FULL else 'bounded'}",
        )
        heads = Heads(num, dim**-0.5, reach, normal(num, dtype=F32) if sinks else None)
        rows, lengths = [0, 1, 302, 303], [1, 1900, 129, 777]
        chunks = [(2, 0, 300, 4), (304, 1500, 100, 5), (404, 511, 3, 6)]
        qkv = normal(407, (num + 2 * kv_heads) * dim)
        decode = DecodeBatch(i32(rows), i32(lengths), cache.tables[:4])
        tiles = i32(prefill_tiles(chunks, prefill_rows(num, kv_heads)))
        workspace = DecodeWorkspace.empty(16, num, kv_heads, dim, "cuda")
        out = normal(407, num * dim)
        go = partial(_attend, qkv, cache, decode, tiles, heads, workspace, out)
        replays_equal(report, f"attention {name}", go, [out], [])
        wide = replace(cache.kv, flat=cache.kv.flat.float())
        batch = AttentionBatch(
            decode.rows, decode.lengths, decode.pages,
            [PrefillChunk(row, start, length, cache.tables[table]) for row, start, length, table in chunks],
        )  # fmt: skip
        expected = paged_attention_torch(qkv.float(), wide, 1, batch, heads)
        report.check(f"attention {name} decode", out[rows], expected[rows])
        others = [i for i in range(407) if i not in rows]
        report.check(f"attention {name} prefill", out[others], expected[others])
        alone = torch.empty_like(out)
        one = DecodeBatch(i32([1]), i32([1900]), cache.tables[1:2])
        decode_attention(qkv, cache.kv, 1, one, heads, workspace, alone)
        report.same(f"attention {name}: a row alone equals it in a batch", torch.equal(alone[1], out[1]))


def _attend(
    qkv: Tensor,
    cache: Cache,
    decode: DecodeBatch,
    tiles: Tensor,
    heads: Heads,
    workspace: DecodeWorkspace,
    out: Tensor,
) -> None:
    decode_attention(qkv, cache.kv, 1, decode, heads, workspace, out, pdl=True)
    prefill_attention(qkv, cache.kv, 1, PrefillBatch(tiles, cache.tables), heads, out, pdl=True)


def lora_table(shapes: Sequence[tuple[int, int]], layers: int, rank: int = RANK) -> RankBlocks:
    """SLOTS adapters of one rank on all `shapes` (in, out) of every layer, as image.py lays them out, in one pool."""
    first, count = (np.zeros((layers * len(shapes), SLOTS), np.int32) for _ in range(2))
    a: list[int] = []
    b: list[int] = []
    ranks: list[int] = []
    at = 0
    for slot in range(SLOTS):
        for site in range(layers * len(shapes)):
            depth, width = shapes[site % len(shapes)]
            first[site, slot], count[site, slot] = len(ranks), -(-rank // 16)
            for r in range(0, rank, 16):
                ranks.append(min(16, rank - r))
                a.append(at + r * depth)
                b.append(at + rank * depth + r * width)
            at += -(-rank * (depth + width) // 32) * 32
    pool = normal(at) / 16
    to_device = torch.tensor(a, device="cuda"), torch.tensor(b, device="cuda")
    scale = torch.rand(len(ranks), device="cuda") + 0.5
    return RankBlocks(i32(first), i32(count), *to_device, i32(ranks), scale, pool)


def tiles_of(slots: Sequence[int], rows: int, capacity: int = 0) -> LoraTiles:
    tiles = row_tiles(np.array(slots, np.int32), rows)
    return LoraTiles(*i32(np.pad(tiles, ((0, 0), (0, max(capacity - tiles.shape[1], 0))))))


def check_lora(report: Report) -> None:
    cases = [
        ("decode", lora.DECODE, [0, 0, 1, -1, 7, 3, 3, 3, -1, -1, 2, 5, 4, 6, 1, 0]),
        ("prefill", lora.PREFILL, [3] * 333 + [-1] * 40 + [0] * 5 + [1] * 200),
    ]
    for rank in (RANK, 9, 100):
        table = lora_table([(HIDDEN, width) for width in WIDTHS], 2, rank)
        for kind, config, slots in cases:
            tiles = tiles_of(slots, config.rows, 16)
            x, y = normal(len(slots), HIDDEN) / 50, normal(len(slots), sum(WIDTHS)) / 20
            z = shrunk(len(slots), HIDDEN, -(-rank // 16) * 48, config, "cuda")
            expected, before = y.double(), y.clone()
            lora_add_torch(expected, x.double(), table, 3, WIDTHS, tiles)

            go = partial(lora_add, y, x, table, 3, WIDTHS, tiles, z, config, pdl=True)
            replays_equal(report, f"lora {kind} rank {rank}", go, [z], [y])
            report.check(
                f"lora {kind} rank {rank}", y.double() - before.double(), expected - before.double(), 2e-2
            )


def sampling_rows(count: int, **values: float) -> SamplingTensors:
    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), values.get(name, default), dtype=dtype, device="cuda")

    return SamplingTensors(
        column("temperature", 1, F32), torch.arange(count, device="cuda") + 7, column("position", 11, torch.int32),
        column("top_k", 0, torch.int32), column("top_p", 1, F32), column("min_p", 0, F32),
    )  # fmt: skip


RULES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 20, top_p 0.95": {"top_k": 20, "top_p": 0.95, "temperature": 0.7},
    "min_p 0.05": {"min_p": 0.05},
}


def truncates(rule: dict[str, float]) -> bool:
    return any(key in rule for key in ("top_k", "top_p", "min_p"))


def check_sample(report: Report) -> None:
    logits = normal(33, 201_088) * 3
    for name, rule in RULES.items():
        rows, truncate = sampling_rows(33, **rule), truncates(rule)
        expected, logprobs = sample_torch(logits, rows, truncate)
        tokens, mine = sample(logits, rows, truncate, pdl=True)
        again = sample(logits[5:6], SamplingTensors(*(getattr(rows, f)[5:6] for f in vars(rows))), truncate)
        out = torch.empty_like(tokens), torch.empty_like(mine)
        go = partial(_into, out, sample, logits, rows, truncate, pdl=True)
        replays_equal(report, f"sample {name}", go, out, [])
        off = int((tokens != expected).sum())
        report.same(f"sample {name}: {off} of 33 tokens differ from float64", off <= 1)
        report.same(f"sample {name}: a row alone equals it in a batch", bool(again[0] == tokens[5]))
        same = tokens == expected
        report.check(f"sample {name} logprobs", mine[same], logprobs[same], 1e-5)
    few, count = torch.tensor([0.0, 1.0, -1.0, 2.0], device="cuda"), 100_000
    tokens, _ = sample(few.expand(count, 4).contiguous(), sampling_rows(count), False)
    seen = torch.bincount(tokens, minlength=4) / count
    worst = float((seen - few.softmax(0)).abs().max())
    report.same(f"sample frequencies: largest difference {worst:.4f}", worst < 0.006)
