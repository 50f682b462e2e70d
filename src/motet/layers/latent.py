"""Multi-head latent attention over the paged cache of latents, with absorbed key and value projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motet.kernels.latent_attention import LatentHeads, latent_attention, latent_write, per_head
from motet.kernels.latent_lora import lora_key_query, lora_value
from motet.kernels.norm import head_rms_norm
from motet.layers.attention import KVPlace
from motet.layers.batch import Batch
from motet.layers.linear import AdaptedLinear
from motet.layers.rotary import Rotary


@dataclass(frozen=True)
class QueryUp:
    """What makes queries of a normalised low-rank projection: its RMSNorm weight and the projection up."""

    norm: Tensor
    up: AdaptedLinear


class KeyValueUp:
    """What makes keys and values of a normalised latent: its RMSNorm weight [rank] and, applied head by head, the
    projection `weight` [Hq · (nope + value), rank], whose adapters are those of table site `site`."""

    def __init__(self, norm: Tensor, weight: Tensor, site: int, heads: LatentHeads) -> None:
        keys, values = weight.view(heads.num, -1, heads.rank).split([heads.nope, heads.value], dim=1)
        self.norm = norm
        self.keys = keys.contiguous()
        self.values = values.transpose(1, 2).contiguous()
        self.site = site


class LatentAttention:
    """Down-projections of query and latent in one product, attention among the latents, output projection.

    The first columns that `down` gives are the queries, or what `query_up` makes queries of; the others are a token's
    latent and the key part that rotates. `eps` is that of the norms.
    """

    def __init__(
        self,
        down: AdaptedLinear,
        query_up: QueryUp | None,
        kv_up: KeyValueUp,
        out: AdaptedLinear,
        rotary: Rotary,
        place: KVPlace,
        heads: LatentHeads,
        eps: float,
    ) -> None:
        self.down = down
        self.query_up = query_up
        self.kv_up = kv_up
        self.out = out
        self.rotary = rotary
        self.place = place
        self.heads = heads
        self.eps = eps

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] normalised hidden states to [T, H]."""
        heads, lora, site = self.heads, batch.lora, self.kv_up.site
        group, rotary = batch.groups[self.place.group], self.rotary
        z = self.down(x, batch)
        wide = self._queries(z, batch)
        q = wide[:, : heads.num * (heads.nope + heads.rope)].unflatten(1, (heads.num, -1))
        query = torch.empty(len(x), heads.num, heads.rank + heads.rope)
        query[..., : heads.rank] = per_head(q[..., : heads.nope], self.kv_up.keys)
        if lora is not None:
            lora_key_query(query, q, heads, lora.table, site, lora.segments)
        latent_write(
            wide, z, self.down.widths[0], query, batch.positions, group.slots, rotary.cos, rotary.sin,
            self.kv_up.norm, self.eps, batch.kv, self.place.index, heads, rotary.interleaved,
        )  # fmt: skip
        o = latent_attention(query, batch.kv, self.place.index, group.attention, heads)
        v = per_head(o, self.kv_up.values).contiguous()
        if lora is not None:
            lora_value(v, o, heads, lora.table, site, lora.segments)
        return self.out(v.flatten(1), batch)

    def _queries(self, z: Tensor, batch: Batch) -> Tensor:
        """Rows that begin with every head's query."""
        if self.query_up is None:
            return z
        head_rms_norm(z, 0, 1, self.query_up.norm, self.eps)
        return self.query_up.up(z[:, : self.down.widths[0]].contiguous(), batch)
