"""Multi-head latent attention over the paged cache of latents, with absorbed key and value projections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from motet.layers.batch import Batch, LatentForm, LinearMap


@dataclass(frozen=True)
class QueryUp:
    """What makes queries of a low-rank projection: its RMSNorm and the projection up."""

    norm: Tensor
    eps: float
    up: LinearMap


@dataclass(frozen=True)
class LatentAttention:
    """Down-projections of query and latent in one product, and attention among the latents; `out` comes after it.

    The first columns that `down` gives are the queries, or what `query_up` makes queries of; the others are a token's
    latent and the key part that rotates.
    """

    down: LinearMap
    query_up: QueryUp | None
    out: LinearMap
    form: LatentForm

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] normalised hidden states to what the heads found, [T, Hq·value]."""
        z = q = batch.linear(x, self.down)
        column, up = self.down.widths[0], self.query_up
        if up is not None:
            batch.norm_columns(z, up.norm, up.eps)
            q = batch.linear(z[:, :column].contiguous(), up.up)
        return batch.latent_attention(q, z, column, self.form)
