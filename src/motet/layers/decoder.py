"""The pre-norm decoder that all families share: attention and feed-forward around one residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from motet.layers.attention import Attention
from motet.layers.batch import Batch, Branch, LinearMap
from motet.layers.latent import LatentAttention
from motet.layers.mlp import DenseMLP, SparseMLP


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: norm → attention → norm → feed-forward; the residual addition is fused into the norms."""

    attention_norm: Tensor
    attention: Attention | LatentAttention
    mlp_norm: Tensor
    mlp: DenseMLP | SparseMLP


@dataclass(frozen=True)
class Decoder:
    """Token ids to logits. `embedding` is [V, H], `embed_site` its index in the adapter table."""

    embedding: Tensor
    embed_site: int
    layers: Sequence[DecoderLayer]
    norm: Tensor
    head: LinearMap
    eps: float

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [S, V] of the rows of the step of which they are wanted.

        What the last layer does after its keys and values are written, it does for these rows only.
        """
        x: Branch = batch.embed(self.embedding, self.embed_site)
        residual: Tensor | None = None
        for number, layer in enumerate(self.layers):
            batch.begin(number)
            x, residual = batch.norm(x, residual, layer.attention_norm, self.eps)
            x = layer.attention(x, batch)
            if layer is self.layers[-1]:
                x, residual, batch = batch.wanted(x, residual)
            x = batch.linear(x, layer.attention.out)
            x, residual = layer.mlp.normed(x, residual, layer.mlp_norm, self.eps, batch)
        x, _ = batch.norm(x, residual, self.norm, self.eps)
        return batch.linear(x, self.head)
