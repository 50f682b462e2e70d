"""Low-rank updates of a latent attention's key and value projection, which is never applied as such.

Semantics: the projection W [Hq · (nope + value), rank] gives head h the rows W_k[h] [nope, rank] and then W_v[h]
[value, rank], of which `kernels.latent_attention` uses W_k[h]ᵀ q and W_v[h] o. With an adapter W + scale · B A:
    query[t, h, :rank] += scale · Aᵀ B_k[h]ᵀ q[t, h, :nope]
    v[t, h]            += scale · B_v[h] A o[t, h]
    summed over the adapter's chunks, for its rows t; A: [r, rank], B (kept as its transpose): [r, Hq · (nope + value)].
    q: [T, Hq, ≥ nope], query: [T, Hq, ≥ rank], o: [T, Hq, rank], v: [T, Hq, value], all float32.

Two torch products per chunk and side: 8 decode rows of 8 adapters of rank 16 take 0.9 ms a layer in all for 16 heads,
rank 512 and nope = value = 128 (2 cores), where the layer's attention alone has 55 MB of weights to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from motet.kernels.latent_attention import LatentHeads
from motet.kernels.lora import LoraTable, Segment, chunk_factors


def lora_key_query(
    query: Tensor, q: Tensor, heads: LatentHeads, table: LoraTable, site: int, segments: Sequence[Segment]
) -> None:
    """Add every adapter's share of the keys to `query` in place."""
    for segment, a, b, scale in _chunks(heads, table, site, segments):
        rows = slice(segment.start, segment.end)
        update = torch.einsum("thn,rhn->thr", q[rows, :, : heads.nope], b[..., : heads.nope]).mul_(scale) @ a
        _add(query[rows, :, : heads.rank], update, table, site)


def lora_value(
    v: Tensor, o: Tensor, heads: LatentHeads, table: LoraTable, site: int, segments: Sequence[Segment]
) -> None:
    """Add every adapter's share of the values to v in place."""
    for segment, a, b, scale in _chunks(heads, table, site, segments):
        rows = slice(segment.start, segment.end)
        update = torch.einsum("thr,rhv->thv", (o[rows] @ a.T).mul_(scale), b[..., heads.nope :])
        _add(v[rows], update, table, site)


def _chunks(
    heads: LatentHeads, table: LoraTable, site: int, segments: Sequence[Segment]
) -> Iterator[tuple[Segment, Tensor, Tensor, float]]:
    """A [r, rank], B [r, Hq, nope + value] and the scale of each segment's chunks."""
    each = heads.nope + heads.value
    for segment in segments:
        for a, b, scale in chunk_factors(table, site, segment.slot, heads.rank, heads.num * each):
            yield segment, a, b.view(-1, heads.num, each), scale


def _add(y: Tensor, update: Tensor, table: LoraTable, site: int) -> None:
    if table.observer is not None:
        table.observer(site, y.flatten(1).clone(), update.flatten(1))
    y += update
