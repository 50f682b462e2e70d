"""Grouped-query self-attention over the paged KV cache."""

from __future__ import annotations

from torch import Tensor

from motet.kernels.attention import paged_attention
from motet.kernels.kv_write import rotary_kv_write
from motet.layers.batch import Batch
from motet.layers.linear import AdaptedLinear
from motet.layers.rotary import Rotary


class Attention:
    """q k v in one product, rotation and KV write in one pass, paged attention, output projection."""

    def __init__(
        self, qkv: AdaptedLinear, out: AdaptedLinear, rotary: Rotary, layer: int, num_heads: int
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.rotary = rotary
        self.layer = layer
        self.num_heads = num_heads
        self.scale = (qkv.widths[0] // num_heads) ** -0.5

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] normalised hidden states to [T, H]."""
        qkv = self.qkv(x, batch)
        rotary_kv_write(
            qkv,
            batch.positions,
            batch.kv_slots,
            self.rotary.cos,
            self.rotary.sin,
            batch.kv,
            self.layer,
            self.num_heads,
        )
        mixed = paged_attention(qkv, batch.kv, self.layer, batch.attention, self.num_heads, self.scale)
        return self.out(mixed, batch)
