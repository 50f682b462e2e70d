"""Feed-forward blocks: dense SwiGLU, and a mixture of experts."""

from __future__ import annotations

from torch import Tensor

from motet.kernels.activation import silu_mul
from motet.kernels.moe import ExpertLora, Experts, moe
from motet.kernels.route import RoutingRule
from motet.layers.batch import Batch
from motet.layers.linear import AdaptedLinear


class DenseMLP:
    """down(silu(gate x) * up x)."""

    def __init__(self, gate_up: AdaptedLinear, down: AdaptedLinear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] to [T, H]."""
        return self.down(silu_mul(self.gate_up(x, batch)), batch)


class SparseMLP:
    """A router, its experts, and possibly a shared expert that every token passes beside them.

    Expert e's gate, up and down are table sites `site + 3·e` and the two after it.
    """

    def __init__(
        self,
        router: AdaptedLinear,
        rule: RoutingRule,
        experts: Experts,
        site: int,
        shared: DenseMLP | None = None,
    ) -> None:
        self.router = router
        self.rule = rule
        self.experts = experts
        self.site = site
        self.shared = shared

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] to [T, H]."""
        lora = None if batch.lora is None else ExpertLora(batch.lora.table, self.site, batch.lora.slots)
        out = moe(x, self.router(x, batch), self.rule, self.experts, lora)
        return out if self.shared is None else out.add_(self.shared(x, batch))
