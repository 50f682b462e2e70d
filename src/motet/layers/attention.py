"""Grouped-query self-attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from motet.kernels.attention import Heads, paged_attention
from motet.kernels.kv_write import rotary_kv_write
from motet.kernels.norm import head_rms_norm
from motet.layers.batch import Batch
from motet.layers.linear import AdaptedLinear
from motet.layers.rotary import Rotary


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm weights [head dim] for every q head and every k head."""

    q: Tensor
    k: Tensor
    eps: float


@dataclass(frozen=True)
class KVPlace:
    """Where a layer's KV lives: its KV group, and its index among the group's layers."""

    group: int
    index: int


class Attention:
    """q k v in one product, rotation and KV write in one pass, paged attention, output projection.

    `temperature` [max positions], if given, multiplies each query by the value of its position.
    """

    def __init__(
        self,
        qkv: AdaptedLinear,
        out: AdaptedLinear,
        rotary: Rotary,
        place: KVPlace,
        heads: Heads,
        norms: HeadNorms | None = None,
        temperature: Tensor | None = None,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.rotary = rotary
        self.place = place
        self.heads = heads
        self.norms = norms
        self.temperature = temperature

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] normalised hidden states to [T, H]."""
        qkv, kv, heads = self.qkv(x, batch), batch.kv, self.heads
        if self.norms is not None:
            head_rms_norm(qkv, 0, heads.num, self.norms.q, self.norms.eps)
            head_rms_norm(qkv, heads.num, kv.num_kv_heads, self.norms.k, self.norms.eps)
        if self.temperature is not None:
            qkv[:, : self.qkv.widths[0]] *= self.temperature[batch.positions][:, None]
        group, rotary = batch.groups[self.place.group], self.rotary
        rotary_kv_write(
            qkv, batch.positions, group.slots, rotary.cos, rotary.sin, kv, self.place.index, heads.num,
            rotary.interleaved,
        )  # fmt: skip
        return self.out(paged_attention(qkv, kv, self.place.index, group.attention, heads), batch)
