from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motet.kernels.attention import AttentionBatch, PrefillChunk
from motet.kernels.gpu import latent_attention as latent
from motet.kernels.gpu.attention import DecodeBatch, PrefillBatch, prefill_tiles
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
from motet.kernels.kv_write import KVLayout
from motet.kernels.latent_attention import LatentHeads, latent_attention_torch, latent_write_torch
from tests.close import assert_close
from tests.kernels.gpu.conftest import TOLERANCE
from tests.kernels.gpu.test_attention import CHUNKS, LENGTHS, TABLES
from tests.kernels.gpu.test_lora import SLOTS, SMALL, make_table, make_tiles

PAGES, LAYERS, TOKENS, POSITIONS = 15, 3, 16, 40
SHAPES = [
    LatentHeads(num=4, nope=6, rope=4, rank=12, value=7, scale=0.3),
    LatentHeads(num=9, nope=16, rope=8, rank=40, value=12, scale=0.1),
    LatentHeads(num=16, nope=33, rope=18, rank=64, value=24, scale=0.12),
    LatentHeads(num=70, nope=5, rope=2, rank=8, value=17, scale=0.5),
]
"""One block of heads or two, full or not; sizes that are powers of two or not."""


def ints(values: object, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def make_kv(heads: LatentHeads, dtype: torch.dtype, device: str) -> KVLayout:
    """Random pages with a gap behind each, as when a pool's pages are not all KV."""
    cached = heads.rank + heads.rope
    stride = LAYERS * TOKENS * cached + 64
    flat = torch.randn(PAGES * stride, device=device).to(dtype)
    return KVLayout(flat, PAGES, stride, LAYERS, 1, TOKENS, cached, planes=1)


@pytest.mark.parametrize("heads", SHAPES, ids=lambda heads: f"{heads.num} heads")
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("beside", [False, True], ids=["q by itself", "q beside z"])
def test_write_matches_reference(
    heads: LatentHeads, interleaved: bool, beside: bool, dtype: torch.dtype, device: str
) -> None:
    kv, queries = make_kv(heads, dtype, device), heads.num * (heads.nope + heads.rope)
    positions, slots = ints([0, 3, 39, 7, 8, 1], device), ints([4, 9, 64, 0, 111, 33], device)
    angles = torch.outer(torch.arange(POSITIONS).float(), torch.rand(heads.rope // 2)).to(device)
    cos, sin = angles.cos(), angles.sin()
    column = queries if beside else 5
    z = torch.randn(6, column + kv.head_dim + 3, device=device).to(dtype)
    q = z if beside else torch.randn(6, queries, device=device).to(dtype)
    norm = torch.rand(heads.rank, device=device) + 0.5
    query = z.new_full((6, heads.num, kv.head_dim), torch.nan)
    expected, wide = query.float(), replace(kv, flat=kv.flat.float())
    latent_write_torch(
        q.float(), z.float(), column, expected, positions, slots, cos, sin, norm, 1e-3, wide, 1, heads, interleaved
    )  # fmt: skip
    before = z.clone()
    latent_write(
        q, z, column, query, positions, slots, cos, sin, norm, 1e-3, kv, 1, heads, interleaved
    )  # fmt: skip
    assert bool(query[..., : heads.rank].isnan().all())
    assert_close(query[..., heads.rank :].float(), expected[..., heads.rank :], TOLERANCE[dtype])
    assert_close(kv.flat.float(), wide.flat, TOLERANCE[dtype])
    assert torch.equal(z, before)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_padding_rows_touch_nothing(interleaved: bool, device: str) -> None:
    heads = SHAPES[1]
    kv, table = make_kv(heads, torch.float32, device), torch.ones(3, heads.rope // 2, device=device)
    q = torch.randn(2, heads.num * (heads.nope + heads.rope), device=device)
    z, norm = torch.randn(2, kv.head_dim, device=device), torch.ones(heads.rank, device=device)
    query, pages = torch.full((2, heads.num, kv.head_dim), torch.nan, device=device), kv.flat.clone()
    rows = ints([0, 0], device), ints([-1, -1], device)
    latent_write(q, z, 0, query, *rows, table, table, norm, 1e-6, kv, 0, heads, interleaved)
    assert bool(query.isnan().all())
    assert torch.equal(kv.flat, pages)


def test_no_rows(device: str) -> None:
    heads = SHAPES[0]
    kv, table = make_kv(heads, torch.float32, device), torch.ones(3, heads.rope // 2, device=device)
    none, norm = ints([], device), torch.ones(heads.rank, device=device)
    q, query = (
        torch.zeros(0, heads.num, dim, device=device) for dim in (heads.nope + heads.rope, kv.head_dim)
    )
    z = torch.zeros(0, kv.head_dim, device=device)
    latent_write(q.flatten(1), z, 0, query, none, none, table, table, norm, 1e-6, kv, 0, heads, False)


def make_batch(kv: KVLayout, heads: LatentHeads, device: str) -> tuple[Tensor, DecodeBatch, PrefillBatch]:
    query = torch.randn(123, heads.num, kv.head_dim, device=device).to(kv.flat.dtype)
    tiles = torch.from_numpy(prefill_tiles(CHUNKS, prefill_rows(heads.num))).to(device)
    decode = DecodeBatch(ints([0, 80, 121, 75], device), ints(LENGTHS, device), ints(TABLES[:4], device))
    return query, decode, PrefillBatch(tiles, ints(TABLES, device))


def attend(
    query: Tensor, kv: KVLayout, heads: LatentHeads, decode: DecodeBatch, prefill: PrefillBatch
) -> Tensor:
    out = query.new_full((*query.shape[:2], heads.rank), torch.nan)
    workspace = decode_workspace(5, heads.num, kv.head_dim, query.device)
    workspace.partial.fill_(torch.nan)
    workspace.state.fill_(torch.nan)
    latent_decode(query, kv, 1, decode, heads, workspace, out, min_split=16)
    latent_prefill(query, kv, 1, prefill, heads, out)
    assert not workspace.arrivals.any()
    return out


@pytest.mark.parametrize("heads", SHAPES, ids=lambda heads: f"{heads.num} heads")
def test_decode_and_prefill_in_one_batch_match_reference(
    heads: LatentHeads, dtype: torch.dtype, device: str
) -> None:
    kv = make_kv(heads, dtype, device)
    query, decode, prefill = make_batch(kv, heads, device)
    chunks = [
        PrefillChunk(row, position, length, prefill.pages[table]) for row, position, length, table in CHUNKS
    ]
    batch = AttentionBatch(decode.rows[:3], decode.lengths[:3], decode.pages[:3], chunks)
    wide = replace(kv, flat=kv.flat.float())
    expected = latent_attention_torch(query.float(), wide, 1, batch, heads)
    out = attend(query, kv, heads, decode, prefill)
    written = expected.flatten(1).abs().sum(1) > 0
    assert int(written.sum()) == 103
    assert_close(out[written].float(), expected[written], TOLERANCE[dtype])
    assert not out[75].any()
    written[75] = True
    assert bool(out[~written].isnan().all())


@pytest.mark.parametrize("heads", [SHAPES[1], SHAPES[3]], ids=["9 heads", "70 heads"])
def test_a_row_does_not_depend_on_its_batch(
    heads: LatentHeads, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = make_kv(heads, torch.float32, device)
    query, decode, prefill = make_batch(kv, heads, device)
    out = attend(query, kv, heads, decode, prefill)
    alone, workspace = torch.empty_like(out), decode_workspace(1, heads.num, kv.head_dim, device)
    one = DecodeBatch(decode.rows[2:3], decode.lengths[2:3], decode.pages[2:3])
    latent_decode(query, kv, 1, one, heads, workspace, alone, min_split=16)
    assert torch.equal(alone[121], out[121])
    monkeypatch.setattr(latent, "PROGRAMS", 1)  # one worker takes all splits of a row
    assert torch.equal(attend(query, kv, heads, decode, prefill)[121], out[121])


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS.keys())
@pytest.mark.parametrize("heads", SHAPES[:2], ids=lambda heads: f"{heads.num} heads")
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_adapters_match_reference(
    name: str, heads: LatentHeads, slots: list[int], dtype: torch.dtype, device: str
) -> None:
    rows, config = len(slots), replace(SMALL[name], columns=32)
    widths = 8, heads.num * (heads.nope + heads.value)
    table = make_table(heads.rank, widths, dtype, device)
    tiles = make_tiles(slots, config.rows, 2, device)
    q = torch.randn(rows, heads.num * (heads.nope + heads.rope) + 5, device=device).to(dtype)
    o = (torch.randn(rows, heads.num, heads.rank, device=device) / 8).to(dtype)
    query = torch.randn(rows, heads.num, heads.rank + heads.rope, device=device).to(dtype)
    v = torch.randn(rows, heads.num, heads.value, device=device).to(dtype)
    expected_query, expected_v, rotated = query.double(), v.double(), query[..., heads.rank :].clone()
    lora_key_query_torch(expected_query, q.double(), heads, table, 2, tiles)
    lora_value_torch(expected_v, o.double(), heads, table, 2, tiles)
    lora_key_query(query, q, heads, table, 2, tiles, config)
    lora_value(v, o, heads, table, 2, tiles, config)
    assert_close(query.double(), expected_query, TOLERANCE[dtype])
    assert_close(v.double(), expected_v, TOLERANCE[dtype])
    assert torch.equal(query[..., heads.rank :], rotated)


def test_the_reference_is_a_changed_projection(device: str) -> None:
    """The plain mathematics: what the adapter adds to the projection's weight, used as the weight is."""
    heads, slots = SHAPES[1], [3, 0, 4]
    each = heads.nope + heads.value
    table = make_table(heads.rank, (8, heads.num * each), torch.float32, device)
    tiles = make_tiles(slots, 1, 0, device)
    q = torch.randn(3, heads.num * (heads.nope + heads.rope), dtype=torch.float64, device=device)
    o = torch.randn(3, heads.num, heads.rank, dtype=torch.float64, device=device)
    query = torch.zeros(3, heads.num, heads.rank + heads.rope, dtype=torch.float64, device=device)
    v = torch.zeros(3, heads.num, heads.value, dtype=torch.float64, device=device)
    lora_key_query_torch(query, q, heads, table, 2, tiles)
    lora_value_torch(v, o, heads, table, 2, tiles)
    for row, slot in enumerate(slots):
        delta = torch.zeros(heads.num * each, heads.rank, dtype=torch.float64, device=device)
        begin, count = int(table.first[2, slot]), int(table.count[2, slot])
        for i in range(begin, begin + count):
            r, a, b = int(table.rank[i]), int(table.a[i]), int(table.b[i])
            down = table.pool[a : a + r * heads.rank].view(r, -1).double()
            up = table.pool[b : b + r * heads.num * each].view(r, -1).double()
            delta += float(table.scale[i]) * up.T @ down
        keys, values = delta.view(heads.num, each, -1).split([heads.nope, heads.value], dim=1)
        of_row = q[row].view(heads.num, -1)[:, : heads.nope]
        assert_close(query[row, :, : heads.rank], torch.einsum("hn,hnr->hr", of_row, keys))
        assert_close(v[row], torch.einsum("hr,hvr->hv", o[row], values))
