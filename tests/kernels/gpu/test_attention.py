from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motet.kernels.attention import AttentionBatch, Heads, PrefillChunk, paged_attention_torch
from motet.kernels.gpu import attention
from motet.kernels.gpu.attention import (
    DecodeBatch,
    DecodeWorkspace,
    PrefillBatch,
    decode_attention,
    prefill_attention,
    prefill_rows,
    prefill_tiles,
)
from motet.kernels.kv_write import KVLayout
from motet.types import FULL, KVGroup
from tests.close import assert_close
from tests.kernels.gpu.conftest import TOLERANCE
from tests.kernels.gpu.test_kv_write import make_kv

WINDOW, CHUNK = KVGroup((), window=7), KVGroup((), chunk=24)
CASES = [
    ((4, 2, 12), FULL, True), ((4, 2, 12), WINDOW, False), ((9, 3, 64), FULL, False), ((9, 3, 64), WINDOW, True),
    ((9, 3, 64), CHUNK, True), ((16, 1, 80), CHUNK, False), ((16, 1, 80), KVGroup((), window=1), True),
    ((3, 3, 8), KVGroup((), window=1000), False), ((3, 3, 8), KVGroup((), window=20, chunk=24), False),
]  # fmt: skip
"""((heads, KV heads, head dim), reach, with sinks)."""
LENGTHS = (1, 40, 65, 0)
TABLES = [
    [7, 0, 0, 0, 0],
    [1, 3, 12, 0, 0],
    [4, 2, 0, 5, 9],
    [0, 0, 0, 0, 0],
    [6, 8, 9, 10, 11],
    [13, 14, 3, 0, 0],
]
CHUNKS = [(1, 0, 70, 4), (90, 7, 30, 5)]
"""(row, position, length, table) of the prefill chunks; decode rows are 0, 80, 121 and 75."""
Shape = tuple[int, int, int]


def make_batch(kv: KVLayout, heads: Heads, device: str) -> tuple[Tensor, DecodeBatch, PrefillBatch]:
    qkv = torch.randn(123, (heads.num + 2 * kv.num_kv_heads) * kv.head_dim, device=device).to(kv.flat.dtype)

    def ints(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    tiles = prefill_tiles(CHUNKS, prefill_rows(heads.num, kv.num_kv_heads))
    decode = DecodeBatch(ints([0, 80, 121, 75]), ints(LENGTHS), ints(TABLES[:4]))
    return qkv, decode, PrefillBatch(torch.from_numpy(tiles).to(device), ints(TABLES))


def reference(qkv: Tensor, kv: KVLayout, heads: Heads, decode: DecodeBatch, prefill: PrefillBatch) -> Tensor:
    chunks = [
        PrefillChunk(row, position, length, prefill.pages[table]) for row, position, length, table in CHUNKS
    ]
    batch = AttentionBatch(decode.rows[:3], decode.lengths[:3], decode.pages[:3], chunks)
    return paged_attention_torch(qkv.float(), replace(kv, flat=kv.flat.float()), 1, batch, heads)


def attend(
    qkv: Tensor, kv: KVLayout, heads: Heads, decode: DecodeBatch, prefill: PrefillBatch, min_split: int
) -> Tensor:
    out = qkv.new_full((len(qkv), heads.num * kv.head_dim), torch.nan)
    workspace = DecodeWorkspace.empty(5, heads.num, kv.num_kv_heads, kv.head_dim, qkv.device)
    decode_attention(qkv, kv, 1, decode, heads, workspace, out, min_split=min_split)
    prefill_attention(qkv, kv, 1, prefill, heads, out)
    assert not workspace.arrivals.any()
    return out


@pytest.mark.parametrize(("shape", "reach", "with_sinks"), CASES, ids=str)
def test_decode_and_prefill_in_one_batch_match_reference(
    shape: Shape, reach: KVGroup, with_sinks: bool, dtype: torch.dtype, device: str
) -> None:
    num_heads, kv_heads, dim = shape
    kv = make_kv(kv_heads, dim, dtype, device)
    heads = Heads(num_heads, dim**-0.5, reach, torch.randn(num_heads, device=device) if with_sinks else None)
    qkv, decode, prefill = make_batch(kv, heads, device)
    expected = reference(qkv, kv, heads, decode, prefill)
    out = attend(qkv, kv, heads, decode, prefill, 16)
    written = expected.abs().sum(1) > 0
    assert_close(out[written].float(), expected[written], TOLERANCE[dtype])
    assert not out[75].any()
    written[75] = True
    assert bool(out[~written].isnan().all())


def test_a_row_does_not_depend_on_its_batch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = make_kv(2, 16, torch.float32, device)
    heads = Heads(6, 0.25)
    qkv, decode, prefill = make_batch(kv, heads, device)
    out = attend(qkv, kv, heads, decode, prefill, 16)
    alone, workspace = torch.empty_like(out), DecodeWorkspace.empty(1, 6, 2, 16, device)
    one = DecodeBatch(decode.rows[2:3], decode.lengths[2:3], decode.pages[2:3])
    decode_attention(qkv, kv, 1, one, heads, workspace, alone, min_split=16)
    assert torch.equal(alone[121], out[121])
    monkeypatch.setattr(attention, "PROGRAMS", 1)  # one worker takes all splits of a row
    assert torch.equal(attend(qkv, kv, heads, decode, prefill, 16)[121], out[121])


def test_pages_out_of_reach_are_not_read(device: str) -> None:
    kv = make_kv(1, 16, torch.float32, device)
    kv.pages[9] = torch.nan
    heads = Heads(2, 0.25, KVGroup((), window=5))
    qkv = torch.randn(4, 64, device=device)
    table = torch.tensor([[9, 3, 4], [-1, 5, 6]], dtype=torch.int32, device=device)
    rows, lengths = (torch.tensor([value], dtype=torch.int32, device=device) for value in (0, 40))
    tiles = torch.from_numpy(prefill_tiles([(1, 36, 3, 1)], 8)).to(device)
    out, workspace = torch.empty(4, 32, device=device), DecodeWorkspace.empty(1, 2, 1, 16, device)
    decode_attention(qkv, kv, 1, DecodeBatch(rows, lengths, table[:1]), heads, workspace, out)
    prefill_attention(qkv, kv, 1, PrefillBatch(tiles, table), heads, out)
    assert bool(torch.isfinite(out).all())
