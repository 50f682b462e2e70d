"""The pre-norm decoder that Llama-like models share: attention and feed-forward around one residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from motet.kernels.lora import lora_embed
from motet.kernels.norm import add_rms_norm
from motet.layers.attention import Attention
from motet.layers.batch import Batch
from motet.layers.latent import LatentAttention
from motet.layers.linear import AdaptedLinear
from motet.layers.mlp import DenseMLP, SparseMLP


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: norm → attention → norm → feed-forward; the residual addition is fused into the norms."""

    attention_norm: Tensor
    attention: Attention | LatentAttention
    mlp_norm: Tensor
    mlp: DenseMLP | SparseMLP


class Decoder:
    """Token ids to logits. `embedding` [V, H] in any float dtype; `head` is the output matrix.

    `embed_site` is the embedding's index in the adapter table, the head's is its own.
    """

    def __init__(
        self,
        embedding: Tensor,
        embed_site: int,
        layers: Sequence[DecoderLayer],
        norm: Tensor,
        head: AdaptedLinear,
        eps: float,
    ) -> None:
        self.embedding = embedding
        self.embed_site = embed_site
        self.layers = layers
        self.norm = norm
        self.head = head
        self.eps = eps

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [S, V] float32 of `batch.logit_rows`."""
        x = self._embed(batch)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = add_rms_norm(x, residual, layer.attention_norm, self.eps)
            x = layer.attention(x, batch)
            x, residual = add_rms_norm(x, residual, layer.mlp_norm, self.eps)
            x = layer.mlp(x, batch)
        x, _ = add_rms_norm(x, residual, self.norm, self.eps)
        return self.head.of_rows(x[batch.logit_rows], batch, batch.lora.head_rows if batch.lora else None)

    def _embed(self, batch: Batch) -> Tensor:
        x = torch.nn.functional.embedding(batch.tokens, self.embedding).float()
        if batch.lora is not None:
            vocabulary = len(self.embedding)
            lora_embed(x, batch.tokens, vocabulary, batch.lora.table, self.embed_site, batch.lora.segments)
        return x
