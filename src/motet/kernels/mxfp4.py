"""Weights of four bits: MXFP4, as gpt-oss keeps its experts (OCP Microscaling Formats v1.0: E2M1 values, E8M0 scales).

Semantics, for a weight [N, K] with K a multiple of 32:
    w[n, k] = VALUES[code[n, k]] · 2^(scales[n, k // 32] - 127)
    codes: [N, K/2] uint8, code[n, 2j] in the low half of byte j of a row and code[n, 2j + 1] in the high half
    scales: [N, K/32] uint8; 255 is not a number.
    VALUES = 0, ½, 1, 1½, 2, 3, 4, 6, and the same negative (the highest bit of a code is the sign)

A weight takes 4.25 bits. The CPU turns a tile of rows into float32, multiplies by it while it is in the cache, and
takes the next. A matrix [5760, 2880] of gpt-oss times 2 rows takes 11 ms so, of which 6 ms are the dequantisation;
dequantised whole 36 ms, and packed then 76 ms (one core). A plain tile keeps the promise of `kernels.linear` as a
packed one does: a row's bits depend on that row only.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import kernel
from motet.kernels.linear import product

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

BLOCK = 32
"""Elements that share a scale."""
TILE_ROWS = 512
"""Rows dequantised at a time; any number from 128 to 2048 is as fast."""

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BYTES = np.arange(256)
_PAIRS = np.stack([VALUES[_BYTES & 15], VALUES[_BYTES >> 4]], axis=1)
_SCALES = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.nan).astype(np.float32)


def mxfp4_dequantise_torch(codes: Tensor, scales: Tensor) -> Tensor:
    """Reference: codes [N, K/2] and scales [N, K/32] to the weight [N, K] float32."""
    halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    values = torch.from_numpy(VALUES)[halves.long()]
    return values * torch.exp2(scales.double() - 127).float().repeat_interleave(BLOCK, 1)


def mxfp4_dequantise(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write the weight of contiguous codes [N, K/2] and scales [N, K/32] to out [N, K] float32."""
    _dequantise_kernel(codes.numpy(), scales.numpy(), _PAIRS, _SCALES, out.numpy())


class Mxfp4Weight:
    """A weight [N, K] kept in four bits; a `Weight` of `kernels.linear`. ValueError if the parts do not fit."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise ValueError(f"codes and scales are uint8, got {codes.dtype} and {scales.dtype}")
        if scales.dim() != 2 or codes.shape != (len(scales), scales.shape[1] * BLOCK // 2):
            raise ValueError(f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)} do not fit")
        self.out_features, self.in_features = len(codes), scales.shape[1] * BLOCK
        self.nbytes = codes.nbytes + scales.nbytes
        self.codes = codes.contiguous()
        self.scales = scales.contiguous()

    def times(self, x: Tensor) -> Tensor:
        """x [T, K] to [T, N], tile by tile."""
        out = x.new_empty(len(x), self.out_features)
        tile = torch.empty(min(TILE_ROWS, self.out_features), self.in_features)
        for start in range(0, self.out_features, TILE_ROWS):
            rows = slice(start, min(start + TILE_ROWS, self.out_features))
            weight = tile[: rows.stop - start]
            mxfp4_dequantise(self.codes[rows], self.scales[rows], weight)
            out[:, rows] = product(x, weight)
        return out


@kernel
def _dequantise_kernel(codes: U8, scales: U8, pairs: F32, powers: F32, out: F32) -> None:
    """One byte of two codes is one look-up of 8 bytes: 2.6 weights a nanosecond, one by one 2.3."""
    for n in range(codes.shape[0]):
        for block in range(scales.shape[1]):
            scale = powers[scales[n, block]]
            source = codes[n, block * 16 : block * 16 + 16]
            target = out[n, block * 32 : block * 32 + 32]
            for j in range(16):
                target[2 * j] = pairs[source[j], 0] * scale
                target[2 * j + 1] = pairs[source[j], 1] * scale
