"""Feed-forward blocks: dense SwiGLU, and a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from motet.kernels.route import RoutingRule
from motet.layers.batch import Batch, Branch, ExpertSet, LinearMap


@dataclass(frozen=True)
class DenseMLP:
    """down(silu(gate x) * up x)."""

    gate_up: LinearMap
    down: LinearMap

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] to [T, H]."""
        return batch.linear(batch.silu_mul(batch.linear(x, self.gate_up)), self.down)

    def normed(
        self, x: Tensor, residual: Tensor, norm: Tensor, eps: float, batch: Batch
    ) -> tuple[Branch, Tensor]:
        """What it adds to the sum of x and residual [T, H], given the RMSNorm of that sum; and the sum."""
        x, residual = batch.norm(x, residual, norm, eps)
        return self(x, batch), residual


@dataclass(frozen=True)
class SparseMLP:
    """A router, its experts, and possibly a shared expert that every token passes beside them.

    Expert e's gate, up and down are table sites `site + 3·e` and the two after it.
    """

    router: LinearMap
    rule: RoutingRule
    experts: ExpertSet
    site: int
    shared: DenseMLP | None = None

    def normed(
        self, x: Tensor, residual: Tensor, norm: Tensor, eps: float, batch: Batch
    ) -> tuple[Branch, Tensor]:
        """As `DenseMLP.normed`."""
        x, residual, routing = batch.norm_route(x, residual, norm, eps, self.router, self.rule)
        shared = None if self.shared is None else self.shared(x, batch)
        return batch.experts(x, routing, self.rule, self.experts, self.site, shared), residual
