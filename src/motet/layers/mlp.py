"""Feed-forward blocks: dense SwiGLU, and a mixture of SwiGLU experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from motet.kernels.activation import silu_mul
from motet.kernels.linear import PackedWeight
from motet.kernels.moe import ExpertLora, moe
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
    """A router and its experts; with `normalise`, the weights of a token's experts sum to one.

    Expert e's gate, up and down are table sites `site + 3·e` and the two after it.
    """

    def __init__(
        self,
        router: PackedWeight,
        gate_up: Sequence[PackedWeight],
        down: Sequence[PackedWeight],
        top_k: int,
        site: int,
        normalise: bool,
    ) -> None:
        self.router = router
        self.gate_up = gate_up
        self.down = down
        self.top_k = top_k
        self.site = site
        self.normalise = normalise

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] to [T, H]."""
        lora = None if batch.lora is None else ExpertLora(batch.lora.table, self.site, batch.lora.slots)
        return moe(x, self.router, self.gate_up, self.down, self.top_k, self.normalise, lora)
