"""Products with a weight of each head's own, as latent attention absorbs its key and value projections.

Semantics (reference: `motet.kernels.latent_attention.per_head`):
    out[t, h] = x[t, h] @ W[h]
    x: [T, Hq, K] and out: [T, Hq, N], rows and heads of both may lie apart; W: [Hq, K, N]. Sums are float32.

Up to `dense.MOST_ROWS` rows are multiplied here: programs (head, block of N), weights the first operand and rows the
columns of the second, so that a row's bits do not depend on how many there are, as in `dense`. The first weights are
read before waiting for the kernel in front: no kernel of the same chain may write them. More rows are cuBLAS's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motet.kernels.gpu.dense import LEAST_ROWS, MOST_ROWS
from motet.kernels.gpu.jit import kernel, launch_options, tl, triton

DEPTH = 128
"""Of a step of the loop."""
FEATURES = 64
"""Of a program."""


def per_head(x: Tensor, weight: Tensor, out: Tensor, *, pdl: bool = False) -> None:
    """Fills out; see the module's semantics."""
    rows, num_heads, depth = x.shape
    features = weight.shape[2]
    assert weight.shape == (num_heads, depth, features)
    assert out.shape == (rows, num_heads, features)
    if not 0 < rows <= MOST_ROWS:
        torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
        return
    assert weight.is_contiguous()
    assert x.stride(2) == out.stride(2) == 1
    _per_head_kernel[(num_heads, triton.cdiv(features, FEATURES))](
        x, weight, out, rows, x.stride(0), x.stride(1), out.stride(0), out.stride(1), K=depth, N=features,
        ROWS=max(triton.next_power_of_2(rows), LEAST_ROWS), F=FEATURES,
        DEPTH=min(max(triton.next_power_of_2(depth), 16), DEPTH), num_warps=4, **launch_options(pdl),
    )  # fmt: skip


@kernel(do_not_specialize=["rows"])
def _per_head_kernel(  # type: ignore[no-untyped-def]
    x, weight, out, rows, x_row, x_head, out_row, out_head, K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    F: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, n = tl.program_id(0), tl.program_id(1) * F + tl.arange(0, F)
    t, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    w_at = weight + (head * K + k).to(tl.int64)[:, None] * N + n[None, :]
    x_at = x + (t.to(tl.int64) * x_row + head * x_head)[:, None] + k[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(w_at, (k < K)[:, None] & (n < N)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    v = tl.load(x_at, (t < rows)[:, None] & (k < K)[None, :], other=0.0)
    acc = tl.zeros([F, ROWS], tl.float32)
    for ahead in tl.static_range(DEPTH, K + DEPTH, DEPTH):  # the last loads nothing
        next_w = tl.load(w_at + ahead * N, (ahead + k < K)[:, None] & (n < N)[None, :], other=0.0)
        next_v = tl.load(x_at + ahead, (t < rows)[:, None] & (ahead + k < K)[None, :], other=0.0)
        acc = tl.dot(tl.trans(w), tl.trans(v), acc, input_precision="ieee")
        w, v = next_w, next_v
    to = out + (t.to(tl.int64) * out_row + head * out_head)[None, :] + n[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), (t < rows)[None, :] & (n < N)[:, None])
