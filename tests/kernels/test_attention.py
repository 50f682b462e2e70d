from __future__ import annotations

import pytest
import torch

from motet.kernels.attention import (
    AttentionBatch,
    Heads,
    PrefillChunk,
    paged_attention,
    paged_attention_torch,
)
from motet.kernels.kv_write import KVLayout, empty_kv, rotary_kv_write, rotary_kv_write_torch
from motet.layers.rotary import rotary_table
from motet.types import FULL, KVGroup
from tests.close import assert_close

PAGES, LAYERS, TOKENS = 13, 2, 5


def _kv(heads: int, dim: int) -> KVLayout:
    kv = empty_kv(PAGES, LAYERS, heads, TOKENS, dim)
    kv.flat.normal_()
    return kv


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 12), (9, 3, 64), (3, 3, 8)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_and_write_match_reference(heads: int, kv_heads: int, dim: int, interleaved: bool) -> None:
    rows = 7
    rotary = rotary_table(1.0 / 10000 ** (torch.arange(0, dim, 2) / dim), 40, 1.0)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
    positions = torch.tensor([0, 3, 39, 7, 8, 1, 2], dtype=torch.int32)
    slots = torch.tensor([4, 9, 64, 0, 21, 33, 50], dtype=torch.int32)
    kv, kv_reference = _kv(kv_heads, dim), _kv(kv_heads, dim)
    kv_reference.flat.copy_(kv.flat)
    expected = qkv.clone()
    rotary_kv_write_torch(
        expected, positions, slots, rotary.cos, rotary.sin, kv_reference, 1, heads, interleaved
    )
    rotary_kv_write(qkv, positions, slots, rotary.cos, rotary.sin, kv, 1, heads, interleaved)
    assert_close(qkv[:, : heads * dim], expected[:, : heads * dim])
    assert_close(kv.flat, kv_reference.flat)


REACHES = [FULL, KVGroup((), window=7), KVGroup((), window=1), KVGroup((), chunk=6), KVGroup((), window=100)]


@pytest.mark.parametrize("reach", REACHES, ids=["full", "window 7", "window 1", "chunk 6", "window 100"])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 12), (9, 3, 64), (3, 3, 8)])
def test_decode_and_prefill_in_one_batch_match_reference(
    heads: int, kv_heads: int, dim: int, with_sinks: bool, reach: KVGroup
) -> None:
    kv = _kv(kv_heads, dim)
    qkv = torch.randn(20, (heads + 2 * kv_heads) * dim)
    batch = AttentionBatch(
        decode_rows=torch.tensor([0, 12, 19], dtype=torch.int32),
        decode_lengths=torch.tensor([1, 11, 20], dtype=torch.int32),
        decode_pages=torch.tensor([[7, 0, 0, 0], [1, 3, 12, 0], [4, 2, 0, 5]], dtype=torch.int32),
        prefill=[
            PrefillChunk(1, 0, 11, torch.tensor([6, 8, 9])),
            PrefillChunk(13, 7, 6, torch.tensor([11, 10, 3])),
        ],
    )
    how = Heads(heads, dim**-0.5, reach, torch.randn(heads) if with_sinks else None)
    expected = paged_attention_torch(qkv, kv, 1, batch, how)
    assert_close(paged_attention(qkv, kv, 1, batch, how), expected)


def test_pages_before_the_window_are_not_read() -> None:
    kv = _kv(1, 8)
    kv.pages[9] = torch.nan
    qkv = torch.randn(4, 24)
    batch = AttentionBatch(
        decode_rows=torch.tensor([0], dtype=torch.int32),
        decode_lengths=torch.tensor([14], dtype=torch.int32),
        decode_pages=torch.tensor([[9, 3, 4]], dtype=torch.int32),
        prefill=[PrefillChunk(1, 12, 3, torch.tensor([-1, 5, 6]))],
    )
    out = paged_attention(qkv, kv, 1, batch, Heads(1, 0.3, KVGroup((), window=7)))
    assert bool(torch.isfinite(out).all())


def test_huge_scores_do_not_overflow() -> None:
    kv = _kv(1, 8)
    kv.flat.mul_(100)
    qkv = torch.randn(1, 24) * 100
    tables = torch.tensor([[0, 1]], dtype=torch.int32)
    one = torch.tensor([0], dtype=torch.int32)
    batch = AttentionBatch(one, torch.tensor([9], dtype=torch.int32), tables, [])
    how = Heads(1, 1.0)
    assert_close(paged_attention(qkv, kv, 0, batch, how), paged_attention_torch(qkv, kv, 0, batch, how))
