"""Grouped-query self-attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from motet.kernels.attention import paged_attention
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


class Attention:
    """q k v in one product, rotation and KV write in one pass, paged attention, output projection."""

    def __init__(
        self,
        qkv: AdaptedLinear,
        out: AdaptedLinear,
        rotary: Rotary,
        layer: int,
        num_heads: int,
        norms: HeadNorms | None = None,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.rotary = rotary
        self.layer = layer
        self.num_heads = num_heads
        self.norms = norms
        self.scale = (qkv.widths[0] // num_heads) ** -0.5

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] normalised hidden states to [T, H]."""
        qkv, kv, heads = self.qkv(x, batch), batch.kv, self.num_heads
        if self.norms is not None:
            head_rms_norm(qkv, 0, heads, self.norms.q, self.norms.eps)
            head_rms_norm(qkv, heads, kv.num_kv_heads, self.norms.k, self.norms.eps)
        cos, sin = self.rotary.cos, self.rotary.sin
        rotary_kv_write(qkv, batch.positions, batch.kv_slots, cos, sin, kv, self.layer, heads)
        mixed = paged_attention(qkv, kv, self.layer, batch.attention, heads, self.scale)
        return self.out(mixed, batch)
