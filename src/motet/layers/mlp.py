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

    def __call__(self, x: Tensor, batch: Batch) -> Branch:
        """x [T, H] to what it adds to the residual stream."""
        scores = batch.linear(x, self.router)
        shared = None if self.shared is None else self.shared(x, batch)
        return batch.experts(x, scores, self.rule, self.experts, self.site, shared)
