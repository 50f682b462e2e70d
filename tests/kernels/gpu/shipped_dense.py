"""What the dense kernels launch at the shapes they were made for, for `hopper`: gpt-oss-20b, Qwen3 and odd ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from motet.kernels.attention import Heads
from motet.kernels.gpu.attention import (
    DecodeBatch,
    DecodeWorkspace,
    PrefillBatch,
    decode_attention,
    prefill_attention,
)
from motet.kernels.gpu.dense import DenseUpdate, arrivals, dense_config, dense_product
from motet.kernels.gpu.kv_write import KVWrite, QueryKey, rotary_kv_write
from motet.kernels.gpu.lora import DECODE, PREFILL, LoraTiles, RankBlocks, lora_add, shrunk
from motet.kernels.gpu.norm import add_rms_norm
from motet.kernels.gpu.sample import SamplingTensors, sample
from motet.kernels.kv_write import KVLayout
from motet.types import FULL, KVGroup


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


F32 = torch.float32
HEAD_DIMS = {(4096, 512, 512): 64, (4096, 1024, 1024): 128}
"""Of gpt-oss-20b and of Llama-3.1-8B, by the widths of q, k and v."""


def launches() -> None:
    norms()
    kv_writes()
    attentions()
    loras()
    products()
    samples()


def norms() -> None:
    for width in (2880, 16384):
        for residual in (None, meta(16, width, dtype=F32)):
            add_rms_norm(meta(16, width), residual, meta(width, dtype=F32), 1e-5, pdl=True)


def kv_layout(kv_heads: int, dim: int, layers: int = 12) -> KVLayout:
    stride = layers * 2 * kv_heads * 16 * dim
    return KVLayout(meta(1024 * stride), 1024, stride, layers, kv_heads, 16, dim)


def kv_writes() -> None:
    rows = meta(16, dtype=torch.int32)
    for heads, kv_heads, dim in ((64, 8, 64), (32, 4, 128)):
        qkv, weight = meta(16, (heads + 2 * kv_heads) * dim), meta(dim, dtype=F32)
        table = meta(4096, dim // 2, dtype=F32)
        for interleaved in (False, True):
            plain = QueryKey(table, table, interleaved)
            for how in (plain, replace(plain, q_norm=weight, k_norm=weight, temperature=table)):
                rotary_kv_write(qkv, KVWrite(rows, rows, how, kv_layout(kv_heads, dim), 3, heads), pdl=True)


def attentions() -> None:
    i32 = torch.int32
    decode = DecodeBatch(meta(16, dtype=i32), meta(16, dtype=i32), meta(16, 128, dtype=i32))
    prefill = PrefillBatch(meta(100, 4, dtype=i32), meta(16, 128, dtype=i32))
    window, chunk = KVGroup((), window=128), KVGroup((), chunk=8192)
    for num, kv_heads, dim, reach in (
        (64, 8, 64, FULL),
        (64, 8, 64, window),
        (32, 4, 128, FULL),
        (9, 3, 80, chunk),
    ):
        kv, qkv, out = kv_layout(kv_heads, dim), meta(1616, (num + 2 * kv_heads) * dim), meta(1616, num * dim)
        heads = Heads(num, dim**-0.5, reach, meta(num, dtype=F32) if dim == 64 else None)
        workspace = DecodeWorkspace.empty(16, num, kv_heads, dim, "meta")
        decode_attention(qkv, kv, 3, decode, heads, workspace, out, pdl=True)
        prefill_attention(qkv, kv, 3, prefill, heads, out, pdl=True)


def rank_blocks() -> RankBlocks:
    i32, i64 = torch.int32, torch.int64
    blocks = 1 << 16
    return RankBlocks(
        meta(300, 8, dtype=i32), meta(300, 8, dtype=i32), meta(blocks, dtype=i64), meta(blocks, dtype=i64),
        meta(blocks, dtype=i32), meta(blocks, dtype=F32), meta(1 << 30),
    )  # fmt: skip


def tiles(count: int) -> LoraTiles:
    return LoraTiles(*(meta(count, dtype=torch.int32) for _ in range(3)))


def loras() -> None:
    for depth, widths in ((2880, (4096, 512, 512)), (4096, (2880,)), (2048, (768, 768))):
        for config in (DECODE, PREFILL):
            x, y = meta(16, depth), meta(16, sum(widths))
            z = shrunk(16, depth, 96, config, "meta")
            lora_add(y, x, rank_blocks(), 5, widths, tiles(16), z, config, pdl=True)


def kv_write(rows: int, widths: tuple[int, ...]) -> KVWrite | None:
    """Where a product of these widths is one of q k v: what it may end with."""
    if widths not in HEAD_DIMS:
        return None
    dim, places = HEAD_DIMS[widths], meta(rows, dtype=torch.int32)
    table = meta(4096, dim // 2, dtype=F32)
    heads, kv_heads = widths[0] // dim, widths[1] // dim
    return KVWrite(places, places, QueryKey(table, table), kv_layout(kv_heads, dim), 3, heads)


def products() -> None:
    """qkv, o, router and head of gpt-oss-20b, qkv of Llama-3.1-8B, and what no block size divides."""
    for depth, widths, rows in (
        (2880, (4096, 512, 512), (1, 32, 64)), (4096, (4096, 1024, 1024), (1, 32)),
        (4096, (2880,), (16,)), (2880, (32,), (16,)), (2880, (201_088,), (16, 64)), (577, (727, 65), (1, 64)),
    ):  # fmt: skip
        features = sum(widths)
        for count in rows:
            x, bias, y = meta(count, depth), meta(features), meta(count, features)
            z = shrunk(count, depth, 96, DECODE, "meta")
            update, write = DenseUpdate(rank_blocks(), 5, widths, tiles(count), z), kv_write(count, widths)
            for adapted, writes in product((False, True), (False, True) if write else (False,)):
                dense_product(
                    x, meta(features, depth), bias, y, arrivals("meta"), dense_config(features, depth),
                    update=update if adapted else None, write=write if writes else None, pdl=True,
                )  # fmt: skip


def samples() -> None:
    i32, i64 = torch.int32, torch.int64
    rows = SamplingTensors(*(meta(16, dtype=kind) for kind in (F32, i64, i32, i32, F32, F32)))
    for logits in (meta(16, 201_088), meta(16, 201_088, dtype=F32)):
        for truncate in (False, True):
            sample(logits, rows, truncate, pdl=True)
