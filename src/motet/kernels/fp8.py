"""Weights in eight-bit floats (e4m3) with one scale for each block, as DeepSeek V3 is published.

Semantics:
    w[..., n, k] = q[..., n, k] · scale[..., n // block[0], k // block[1]]
    q: [..., N, K] float8_e4m3fn; scale: [..., ceil(N / block[0]), ceil(K / block[1])] in any float dtype;
    result [..., N, K] float32. The last blocks of a row and of a column may be cut off.

Run once per weight while a model is loaded, so torch is enough: it reads 1 byte, writes 4, and makes no other copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantise_torch(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Reference: every scale repeated over its block."""
    every = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return q.float() * every[..., : q.shape[-2], : q.shape[-1]]


def dequantise(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """q in float8_e4m3fn to float32; ValueError if the scales are not the blocks'."""
    if tuple(scale.shape) != scale_shape(tuple(q.shape), block):
        raise ValueError(
            f"scales {tuple(scale.shape)} do not fit a weight {tuple(q.shape)} in blocks {block}"
        )
    result = q.to(torch.float32)
    rows = scale.float().repeat_interleave(block[0], -2)[..., : q.shape[-2], :]
    for column in range(scale.shape[-1]):
        result[..., column * block[1] : (column + 1) * block[1]] *= rows[..., column : column + 1]
    return result
