"""Projections of the base model with the batch's adapters added in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from motet.kernels.linear import PackedWeight, linear
from motet.kernels.lora import lora_add
from motet.layers.batch import Batch


class AdaptedLinear:
    """One packed weight holding projections that read the same input, side by side (q k v, or gate and up).

    `site` is the table index of the first projection, the others follow; `widths` are their output features.
    """

    def __init__(self, weight: PackedWeight, site: int, widths: Sequence[int]) -> None:
        self.weight = weight
        self.site = site
        self.widths = tuple(widths)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, K] to [T, sum(widths)]."""
        y = linear(x, self.weight)
        if batch.lora is not None:
            lora_add(y, x, batch.lora.table, self.site, self.widths, batch.lora.rows)
        return y
