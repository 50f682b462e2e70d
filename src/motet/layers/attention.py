"""Grouped-query self-attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from motet.layers.batch import AttentionForm, Batch, LinearMap


@dataclass(frozen=True)
class Attention:
    """q k v in one product, and attention; `out` is the projection that comes after it."""

    qkv: LinearMap
    out: LinearMap
    form: AttentionForm

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] normalised hidden states to what the heads found, [T, Hq·D]."""
        return batch.attention(x, self.qkv, self.form)
