"""Rows of the embedding: of tokens that the step before chose too, and low-rank updates of them.

Semantics of `embed`: x[t] = table[token t]; tokens [T] int32, where t < 0 stands for chosen[-1 - t] (`stand_in` of a
place in it); table [V, H]. Of 16 rows torch's lookup alone took 12 us on an H200.

Semantics of `lora_embed` (reference: `motet.kernels.lora.lora_embed`; its input is a one-hot token), for a row t of
adapter slot s:
    x[t] += sum over the rank blocks i of (site, s) of scale[i] · A_i[:, tokens[t]] @ B_i
    x: [T, H] bfloat16, in place; tokens, slots: [T] int32, slot -1 for rows of the base, which are left alone;
    A_i: [rank[i], vocabulary], of which a token reads one column, B_i: [rank[i], H] in the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motet.kernels.gpu.jit import kernel, tl, triton
from motet.kernels.gpu.lora import RANKS, RankBlocks

BLOCK = 512


def stand_in(place: int) -> int:
    """What stands for `chosen[place]` among tokens."""
    return -1 - place


def embed_torch(tokens: Tensor, chosen: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    known = torch.where(tokens < 0, chosen[(-1 - tokens).clamp_min(0)], tokens)
    return table[known.long()], known


def embed(tokens: Tensor, chosen: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Their rows of the table, and the tokens with none to look up any more."""
    known, width = torch.empty_like(tokens), table.shape[1]
    x = table.new_empty(len(tokens), width)
    assert table.is_contiguous()
    if len(tokens):
        _embed_kernel[(len(tokens), triton.cdiv(width, BLOCK))](
            tokens, chosen, table, known, x, width, BLOCK=BLOCK
        )
    return x, known


@kernel()
def _embed_kernel(tokens, chosen, table, known, x, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    token = tl.where(token < 0, tl.load(chosen + (-1 - token), token < 0, other=0), token)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(table + token.to(tl.int64) * width + column, column < width)
    tl.store(x + row * width + column, found, column < width)
    tl.store(known + row, token, tl.program_id(1) == 0)


def lora_embed(
    x: Tensor, tokens: Tensor, vocabulary: int, table: RankBlocks, site: int, slots: Tensor
) -> None:
    """See the module's semantics."""
    rows, width = x.shape
    if rows:
        _lora_embed_kernel[(rows, triton.cdiv(width, BLOCK))](
            x, tokens, slots, table.first, table.count, table.a, table.b, table.rank, table.scale, table.pool,
            site, table.first.stride(0), vocabulary, width, RANKS=RANKS, BLOCK=BLOCK,
        )  # fmt: skip


@kernel(do_not_specialize=["site", "slot_count"])
def _lora_embed_kernel(  # type: ignore[no-untyped-def]
    x, tokens, slots, first, count, a, b, rank, scale, pool, site, slot_count, vocabulary, width,
    RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    run, blocks = tl.load(first + site * slot_count + slot), tl.load(count + site * slot_count + slot)
    token = tl.load(tokens + row)
    column, r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, RANKS)
    inside = column < width
    to = x + row * width + column
    total = tl.load(to, inside, other=0.0).to(tl.float32)
    for i in range(run, run + blocks):
        there = r < tl.load(rank + i)
        z = tl.load(pool + tl.load(a + i) + r * vocabulary + token, there, other=0.0).to(tl.float32)
        factor = pool + tl.load(b + i) + r[:, None] * width + column[None, :]
        w = tl.load(factor, there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(z[:, None] * w, 0) * tl.load(scale + i)
    tl.store(to, total.to(x.dtype.element_ty), inside)
