"""What tokens become rows with: tokens that the step before chose, and low-rank updates of the embedding.

Semantics of `known_tokens`: tokens [T] int32, where t < 0 stands for chosen[-1 - t] (`stand_in` of a place in it).

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


def known_tokens_torch(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Reference in plain torch."""
    return torch.where(tokens < 0, chosen[(-1 - tokens).clamp_min(0)], tokens)


def known_tokens(tokens: Tensor, chosen: Tensor) -> Tensor:
    """tokens with none to look up any more."""
    out = torch.empty_like(tokens)
    if len(tokens):
        _known_tokens_kernel[(triton.cdiv(len(tokens), BLOCK),)](
            tokens, chosen, out, len(tokens), BLOCK=BLOCK
        )
    return out


@kernel(do_not_specialize=["count"])
def _known_tokens_kernel(tokens, chosen, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + i, i < count, other=0)
    known = tl.load(chosen + (-1 - token), (i < count) & (token < 0), other=0)
    tl.store(out + i, tl.where(token < 0, known, token), i < count)


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
