from __future__ import annotations

import pytest
import torch
from torch import Tensor

from motet.kernels import latent_attention as latent
from motet.kernels.attention import AttentionBatch, PrefillChunk
from motet.kernels.kv_write import KVLayout, empty_kv
from motet.kernels.latent_attention import (
    LatentHeads,
    latent_attention,
    latent_attention_torch,
    latent_write,
    latent_write_torch,
    per_head,
)
from motet.kernels.latent_lora import lora_key_query, lora_value
from motet.kernels.lora import Segment
from motet.layers.rotary import rotary_table
from tests.close import assert_close
from tests.kernels.test_lora import make_table

PAGES, LAYERS, TOKENS = 13, 2, 5
SHAPES = [
    LatentHeads(num=4, nope=6, rope=4, rank=11, value=7, scale=0.3),
    LatentHeads(num=9, nope=16, rope=8, rank=40, value=12, scale=0.1),
    LatentHeads(num=3, nope=5, rope=2, rank=8, value=9, scale=1.0),
]


def _kv(heads: LatentHeads) -> KVLayout:
    kv = empty_kv(PAGES, LAYERS, 1, TOKENS, heads.rank + heads.rope, planes=1)
    kv.flat.normal_()
    return kv


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("column", [0, 5])
def test_write_matches_reference(heads: LatentHeads, interleaved: bool, column: int) -> None:
    rows, cached = 7, heads.rank + heads.rope
    rotary = rotary_table(1.0 / 10000 ** (torch.arange(0, heads.rope, 2) / heads.rope), 40, 1.3)
    q = torch.randn(rows, heads.num * (heads.nope + heads.rope) + column)
    z = torch.randn(rows, column + cached + 2)
    positions = torch.tensor([0, 3, 39, 7, 8, 1, 2], dtype=torch.int32)
    slots = torch.tensor([4, 9, 64, 0, 21, 33, 50], dtype=torch.int32)
    norm = torch.randn(heads.rank)
    kv, kv_reference = _kv(heads), _kv(heads)
    kv_reference.flat.copy_(kv.flat)
    query = torch.randn(rows, heads.num, cached)
    expected = query.clone()
    for write, into, cache in ((latent_write_torch, expected, kv_reference), (latent_write, query, kv)):
        write(
            q, z, column, into, positions, slots, rotary.cos, rotary.sin, norm, 1e-3, cache, 1, heads, interleaved
        )  # fmt: skip
    assert_close(query, expected)
    assert_close(kv.flat, kv_reference.flat)


def _batch(decode: int, prefill: int) -> AttentionBatch:
    return AttentionBatch(
        decode_rows=torch.tensor([0, 12, 19][:decode], dtype=torch.int32),
        decode_lengths=torch.tensor([1, 11, 20][:decode], dtype=torch.int32),
        decode_pages=torch.tensor([[7, 0, 0, 0], [1, 3, 12, 0], [4, 2, 0, 5]][:decode], dtype=torch.int32),
        prefill=[
            PrefillChunk(1, 0, 11, torch.tensor([9, 8, 11])),
            PrefillChunk(13, 7, 6, torch.tensor([10, 6, 2, 1])),
        ][:prefill],
    )


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("max_scores", [1 << 22, 100])
def test_decode_and_prefill_in_one_batch_match_reference(
    heads: LatentHeads, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent, "MAX_SCORES", max_scores)  # the small one takes a few rows at a time
    kv, query = _kv(heads), torch.randn(20, heads.num, heads.rank + heads.rope)
    for decode, prefill in ((3, 2), (0, 2), (3, 0)):
        batch = _batch(decode, prefill)
        rows = [*batch.decode_rows.tolist(), *(c.row + i for c in batch.prefill for i in range(c.length))]
        expected = latent_attention_torch(query, kv, 1, batch, heads)
        assert_close(latent_attention(query, kv, 1, batch, heads)[rows], expected[rows])


@pytest.mark.parametrize("heads", SHAPES)
def test_absorption_is_attention_over_expanded_keys_and_values(heads: LatentHeads) -> None:
    """The plain mathematics: every key and value made of its latent."""
    length, kv = 13, _kv(heads)
    pages = torch.tensor([5, 2, 7])
    keys = torch.randn(heads.num, heads.nope, heads.rank)
    values = torch.randn(heads.num, heads.value, heads.rank)
    q = torch.randn(length, heads.num, heads.nope + heads.rope)
    query = torch.cat([per_head(q[..., : heads.nope], keys), q[..., heads.nope :]], dim=-1)
    empty = torch.zeros(0, dtype=torch.int32)
    chunk = PrefillChunk(0, 0, length, pages)
    batch = AttentionBatch(empty, empty, torch.zeros(0, 0, dtype=torch.int32), [chunk])
    actual = per_head(latent_attention(query, kv, 0, batch, heads), values.transpose(1, 2))

    cached = kv.pages[pages, 0, 0, 0].reshape(-1, heads.rank + heads.rope)[:length]
    latents, rotated = cached.split([heads.rank, heads.rope], dim=1)
    k = torch.cat([torch.einsum("tr,hnr->htn", latents, keys), rotated.expand(heads.num, -1, -1)], dim=-1)
    v = torch.einsum("tr,hvr->htv", latents, values)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k, v, is_causal=True, scale=heads.scale
    )
    assert_close(actual, expected.transpose(0, 1))


def test_rows_of_a_product_do_not_depend_on_each_other() -> None:
    x, weight = torch.randn(70, 3, 10), torch.randn(3, 10, 22)
    whole = per_head(x, weight)
    for rows in (1, 2, 5, 33):
        assert torch.equal(per_head(x[4 : 4 + rows], weight), whole[4 : 4 + rows])


@pytest.mark.parametrize("heads", SHAPES)
def test_adapters_are_a_changed_projection(heads: LatentHeads) -> None:
    each, rows = heads.nope + heads.value, 9
    table, factors = make_table([(heads.rank, heads.num * each)], [[3], [2, 5], [4]])
    # rows 0 and 1 are the base's, slot 2 has no chunks here
    segments = [Segment(2, 3, 0), Segment(3, 7, 1), Segment(7, 9, 2)]
    q, o = torch.randn(rows, heads.num, heads.nope + heads.rope), torch.randn(rows, heads.num, heads.rank)
    query = torch.randn(rows, heads.num, heads.rank + heads.rope)
    v = torch.randn(rows, heads.num, heads.value)
    expected_query, expected_v = query.clone(), v.clone()
    for segment in segments:
        delta = torch.zeros(heads.num * each, heads.rank)
        for a, b, scale in factors.get((0, segment.slot), []):
            delta += scale * (b.T @ a)
        keys, values = delta.view(heads.num, each, heads.rank).split([heads.nope, heads.value], dim=1)
        part = slice(segment.start, segment.end)
        expected_query[part, :, : heads.rank] += torch.einsum("thn,hnr->thr", q[part, :, : heads.nope], keys)
        expected_v[part] += torch.einsum("thr,hvr->thv", o[part], values)
    lora_key_query(query, q, heads, table, 0, segments)
    lora_value(v, o, heads, table, 0, segments)
    assert_close(query, expected_query)
    assert_close(v, expected_v)


def test_adapters_are_observed() -> None:
    heads = SHAPES[0]
    table, _ = make_table([(heads.rank, heads.num * (heads.nope + heads.value))], [[3]])
    seen: list[tuple[int, Tensor, Tensor]] = []
    object.__setattr__(table, "observer", lambda *told: seen.append(told))
    v = torch.randn(2, heads.num, heads.value)
    before = v.clone()
    lora_value(v, torch.randn(2, heads.num, heads.rank), heads, table, 0, [Segment(1, 2, 0)])
    ((site, base, update),) = seen
    assert site == 0
    assert torch.equal(base, before[1:].flatten(1))
    assert_close(v[1:].flatten(1), base + update)
