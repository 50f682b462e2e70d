"""Dense matrix product with a weight that is packed once.

Semantics:
    linear(x, w)[t, n] = sum_k x[t, k] * weight[n, k]
    x: [T, K] float32, weight: [N, K], result [T, N] float32.

A row of the result has the same bits whatever the other rows are: a request's base model output does not depend on
what else is in the batch. What can stand in `linear` is a `Weight`: one kept in bfloat16 (`kernels.bfloat16`), in four
bits (`kernels.mxfp4`), or in float32, here, for checkpoints that have more digits than bfloat16.

A float32 weight is kept in oneDNN's blocked order only. For SmolLM2-135M at 8 rows a step's products take 29 ms packed
against 45 ms with the plain layout (2 cores), and 16 ms in bfloat16; at 1,024 rows all take 0.61–0.64 s.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Weight(Protocol):
    """A matrix [N, K] in whatever form it is kept, `nbytes` of memory."""

    out_features: int
    in_features: int
    nbytes: int

    def times(self, x: Tensor) -> Tensor:
        """x [T, K] float32, T at least 1, to [T, N]; each row's bits depend on that row only."""


class PackedWeight:
    """A float32 weight [N, K] in the order in which oneDNN reads it."""

    def __init__(self, weight: Tensor) -> None:
        if weight.dim() != 2 or weight.dtype != torch.float32:
            raise ValueError(f"a packed weight is float32 [N, K], got {weight.dtype} {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def times(self, x: Tensor) -> Tensor:
        """x [T, K] to [T, N]."""
        return product(x, self.packed)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's x [T, K] times weight [N, K] transposed; `weight` is packed, or plain and contiguous.

    A row's bits do not depend on the others from two rows up: a lone row is computed twice, which costs 5 %.
    """
    if len(x) == 1:
        return product(x.expand(2, -1).contiguous(), weight)[:1]
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


def linear_torch(x: Tensor, weight: Tensor) -> Tensor:
    """Reference: x [T, K] @ weight [N, K] transposed."""
    return x @ weight.T


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [T, K] float32 times a weight [N, K], giving [T, N]."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.out_features)
    return weight.times(x)
