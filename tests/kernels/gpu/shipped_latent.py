"""What the kernels of latent attention launch at DeepSeek V2-Lite's and V3's shapes, for `hopper`."""

from __future__ import annotations

import torch

from motet.kernels.gpu.attention import DecodeBatch, PrefillBatch
from motet.kernels.gpu.latent_attention import (
    decode_workspace,
    latent_decode,
    latent_prefill,
    latent_write,
)
from motet.kernels.gpu.latent_lora import lora_key_query, lora_value
from motet.kernels.gpu.lora import DECODE, PREFILL, LoraTiles
from motet.kernels.gpu.per_head import per_head
from motet.kernels.kv_write import KVLayout
from motet.kernels.latent_attention import LatentHeads
from tests.kernels.gpu.shipped_moe import meta, table

F32, I32 = torch.float32, torch.int32
V2_LITE = LatentHeads(num=16, nope=128, rope=64, rank=512, value=128, scale=0.11)
V3 = LatentHeads(num=128, nope=128, rope=64, rank=512, value=128, scale=0.13)
Q_RANK = 1536
"""Of V2's and V3's queries; V2-Lite's lie beside the latents."""


def launches() -> None:
    for heads in (V2_LITE, V3):
        writes(heads)
        products(heads)
        attentions(heads)
        loras(heads)


def kv_layout(heads: LatentHeads) -> KVLayout:
    cached = heads.rank + heads.rope
    stride = 27 * 16 * cached
    return KVLayout(meta(1024 * stride), 1024, stride, 27, 1, 16, cached, planes=1)


def writes(heads: LatentHeads) -> None:
    queries = heads.num * (heads.nope + heads.rope)
    column = queries if heads is V2_LITE else Q_RANK
    z = meta(16, column + heads.rank + heads.rope)
    q = z if heads is V2_LITE else meta(16, queries)
    rows, angles = meta(16, dtype=I32), meta(4096, heads.rope // 2, dtype=F32)
    query, norm = meta(16, heads.num, heads.rank + heads.rope), meta(heads.rank, dtype=F32)
    for interleaved in (False, True):
        latent_write(
            q, z, column, query, rows, rows, angles, angles, norm, 1e-6, kv_layout(heads), 3, heads, interleaved,
            pdl=True,
        )  # fmt: skip


def products(heads: LatentHeads) -> None:
    cached, each = heads.rank + heads.rope, heads.nope + heads.rope
    for rows in (1, 24, 64):
        q, query = meta(rows, heads.num, each), meta(rows, heads.num, cached)
        o, v = meta(rows, heads.num, heads.rank), meta(rows, heads.num, heads.value)
        keys, values = (
            meta(heads.num, heads.nope, heads.rank),
            meta(heads.num, heads.rank, heads.value),
        )
        per_head(q[..., : heads.nope], keys, query[..., : heads.rank], pdl=True)
        per_head(o, values, v, pdl=True)


def attentions(heads: LatentHeads) -> None:
    decode = DecodeBatch(meta(16, dtype=I32), meta(16, dtype=I32), meta(16, 128, dtype=I32))
    prefill = PrefillBatch(meta(100, 4, dtype=I32), meta(16, 128, dtype=I32))
    kv, query = kv_layout(heads), meta(1616, heads.num, heads.rank + heads.rope)
    out, workspace = meta(1616, heads.num, heads.rank), decode_workspace(16, heads.num, kv.head_dim, "meta")
    latent_decode(query, kv, 3, decode, heads, workspace, out, pdl=True)
    latent_prefill(query, kv, 3, prefill, heads, out, pdl=True)


def loras(heads: LatentHeads) -> None:
    tiles = LoraTiles(*(meta(16, dtype=I32) for _ in range(3)))
    q, query = meta(16, heads.num * (heads.nope + heads.rope)), meta(16, heads.num, heads.rank + heads.rope)
    o, v = meta(16, heads.num, heads.rank), meta(16, heads.num, heads.value)
    for config in (DECODE, PREFILL):
        lora_key_query(query, q, heads, table(), 5, tiles, config, pdl=True)
        lora_value(v, o, heads, table(), 5, tiles, config, pdl=True)
