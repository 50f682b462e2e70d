"""Projections of the base model with the batch's adapters added in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from motet.kernels.linear import PackedWeight, linear
from motet.kernels.lora import LoraRows, lora_add
from motet.layers.batch import Batch


class AdaptedLinear:
    """One packed weight holding projections that read the same input, side by side (q k v, or gate and up).

    `site` is the table index of the first projection, the others follow; `widths` are their output features;
    `bias` is [sum(widths)].
    """

    def __init__(
        self, weight: PackedWeight, site: int, widths: Sequence[int], bias: Tensor | None = None
    ) -> None:
        self.weight = weight
        self.site = site
        self.widths = tuple(widths)
        self.bias = bias

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, K] to [T, sum(widths)]."""
        return self.of_rows(x, batch, batch.lora.rows if batch.lora is not None else None)

    def of_rows(self, x: Tensor, batch: Batch, rows: LoraRows | None) -> Tensor:
        """The same for some rows of the batch, of which `rows` carry adapters (None: none does)."""
        y = linear(x, self.weight)
        if self.bias is not None:
            y += self.bias
        if batch.lora is not None and rows is not None:
            lora_add(y, x, batch.lora.table, self.site, self.widths, rows)
        return y
