from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motet.kernels.gpu.kv_write import KVWrite, QueryKey, rotary_kv_write
from motet.kernels.kv_write import KVLayout, rotary_kv_write_torch
from motet.kernels.norm import head_rms_norm_torch
from tests.close import assert_close
from tests.kernels.gpu.conftest import TOLERANCE

PAGES, LAYERS, TOKENS, POSITIONS = 15, 3, 16, 40
Shape = tuple[int, int, int]


def make_kv(kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> KVLayout:
    """Random pages with a gap behind each, as when a pool's pages are not all KV."""
    stride = LAYERS * 2 * kv_heads * TOKENS * dim + 64
    flat = torch.randn(PAGES * stride, device=device).to(dtype)
    return KVLayout(flat, PAGES, stride, LAYERS, kv_heads, TOKENS, dim)


def make_how(dim: int, device: str, interleaved: bool, extras: bool) -> QueryKey:
    angles = torch.outer(torch.arange(POSITIONS).float(), torch.rand(dim // 2)).to(device)
    how = QueryKey(angles.cos(), angles.sin(), interleaved)
    if not extras:
        return how
    q, k, temperature = (torch.rand(size, device=device) + 0.5 for size in (dim, dim, POSITIONS))
    return replace(how, q_norm=q, k_norm=k, eps=1e-6, temperature=temperature)


def reference(
    qkv: Tensor, positions: Tensor, slots: Tensor, how: QueryKey, kv: KVLayout, layer: int, heads: int
) -> tuple[Tensor, Tensor]:
    """The float32 (qkv, pages) of rows with slots of their own."""
    out, wide = qkv.float(), replace(kv, flat=kv.flat.float())
    if how.q_norm is not None and how.k_norm is not None:
        head_rms_norm_torch(out, 0, heads, how.q_norm, how.eps)
        head_rms_norm_torch(out, heads, kv.num_kv_heads, how.k_norm, how.eps)
    if how.temperature is not None:
        out[:, : heads * kv.head_dim] *= how.temperature[positions][:, None]
    rotary_kv_write_torch(out, positions, slots, how.cos, how.sin, wide, layer, heads, how.interleaved)
    return out, wide.flat


@pytest.mark.parametrize("shape", [(4, 2, 12), (9, 3, 64), (16, 1, 80), (3, 3, 128)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "norms and temperature"])
def test_matches_reference(
    shape: Shape, interleaved: bool, extras: bool, dtype: torch.dtype, device: str
) -> None:
    heads, kv_heads, dim = shape
    kv, how = make_kv(kv_heads, dim, dtype, device), make_how(dim, device, interleaved, extras)
    qkv = torch.randn(6, (heads + 2 * kv_heads) * dim, device=device).to(dtype)
    positions = torch.tensor([0, 3, 39, 7, 8, 1], dtype=torch.int32, device=device)
    slots = torch.tensor([4, 9, 64, 0, 111, 33], dtype=torch.int32, device=device)
    expected, pages = reference(qkv, positions, slots, how, kv, 1, heads)
    keys_and_values = qkv[:, heads * dim :].clone()
    rotary_kv_write(qkv, KVWrite(positions, slots, how, kv, 1, heads))
    assert_close(qkv[:, : heads * dim].float(), expected[:, : heads * dim], TOLERANCE[dtype])
    assert_close(kv.flat.float(), pages, TOLERANCE[dtype])
    assert torch.equal(qkv[:, heads * dim :], keys_and_values)


def test_padding_rows_touch_nothing(device: str) -> None:
    kv, how = make_kv(2, 8, torch.float32, device), make_how(8, device, False, True)
    qkv = torch.randn(2, 64, device=device)
    before, pages = qkv.clone(), kv.flat.clone()
    rows = (
        torch.tensor([0, 0], dtype=torch.int32, device=device),
        torch.tensor([-1, -1], dtype=torch.int32, device=device),
    )
    rotary_kv_write(qkv, KVWrite(*rows, how, kv, 0, 4))
    assert torch.equal(qkv, before)
    assert torch.equal(kv.flat, pages)


def test_what_a_product_can_end_with(device: str) -> None:
    none = torch.zeros(0, dtype=torch.int32, device=device)
    kv, plain = make_kv(2, 8, torch.float32, device), make_how(8, device, False, False)
    extras = make_how(8, device, False, True)
    found = [
        KVWrite(none, none, how, kv, 0, 4).fusible
        for how in (
            plain,
            replace(plain, interleaved=True),
            replace(extras, temperature=None),
            replace(plain, temperature=extras.temperature),
        )
    ]
    assert found == [True, False, False, False]


def test_no_rows(device: str) -> None:
    kv, how = make_kv(2, 8, torch.float32, device), make_how(8, device, False, False)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    rotary_kv_write(torch.zeros(0, 64, device=device), KVWrite(none, none, how, kv, 0, 4))
