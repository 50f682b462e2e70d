"""Low-rank updates of many adapters in one batch: shrink, scale, expand, added in place.

Semantics, for a row t of adapter slot s at site e (a site is one linear map of the base):
    y[t, cols] += scale * (x[t] @ A.T) @ B      summed over the chunks of (e, s)
    x: [T, K] float32, y: [T, N] float32; A: [r, K] and B: [r, width] row-major in the pool, bfloat16 or float32.

An adapter's factors are found through the pointer table: (site, slot) names a run of chunks, a chunk names rank,
scaling, dtype and where its A and B lie. A rank is data: nothing is padded, a missing module has no chunks, and rows
of the base model (slot -1) never come here.

Rows of short segments go through one kernel that streams A and B once per row, four ranks at a time: 8 adapters of
rank 16 on every projection of SmolLM2-135M add 6.7 ms to a decode step, one pair of torch products per adapter and
projection adds 19 ms (2 cores). Long segments (prefill) are compute-bound and use one matrix product per factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import inline, kernel

F32 = NDArray[np.float32]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

LONG_SEGMENT = 12
"""Rows from which one matrix product per factor beats the row kernel (measured crossover 8–16 at rank 16)."""

BFLOAT16, FLOAT32 = 0, 1

Observer = Callable[[int, Tensor, Tensor], None]
"""Is told of a site, what the base gave some rows there, and what the adapter added to it, both [n, width]."""


@dataclass(frozen=True)
class LoraTable:
    """The pointer table that kernels read.

    first, count: [sites, slots] int32, the run of chunks of a site and slot.
    a, b: [chunks] int64 offsets into the pool, in elements of the chunk's dtype; rank [chunks] int32,
    dtype [chunks] int32 (BFLOAT16 or FLOAT32), scale [chunks] float32. `pool` is the pool's bytes. `observer`, if
    given, is told of every update.
    """

    first: I32
    count: I32
    a: I64
    b: I64
    rank: I32
    dtype: I32
    scale: F32
    pool: Tensor
    observer: Observer | None = None
    pool16: U16 = field(init=False)
    pool32: F32 = field(init=False)

    def __post_init__(self) -> None:
        """The pool seen as each dtype, made once because a view costs as much as a short row's update."""
        object.__setattr__(self, "pool16", self.pool.view(torch.uint16).numpy())
        object.__setattr__(self, "pool32", self.pool.view(torch.float32).numpy())


@dataclass(frozen=True)
class Segment:
    """Rows [start, end) share adapter `slot`; `site` is relative to the site that the op is called with."""

    start: int
    end: int
    slot: int
    site: int = 0


@dataclass(frozen=True)
class LoraRows:
    """Which rows of a batch carry an adapter: long segments, and single rows with their slot and relative site."""

    long: Sequence[Segment]
    rows: I32
    slots: I32
    sites: I32


def split_rows(segments: Sequence[Segment]) -> LoraRows:
    """Sort segments into long ones and single rows."""
    short = [s for s in segments if s.end - s.start < LONG_SEGMENT]
    lengths = np.array([s.end - s.start for s in short], np.int32)
    starts = [np.arange(s.start, s.end, dtype=np.int32) for s in short]
    return LoraRows(
        long=[s for s in segments if s.end - s.start >= LONG_SEGMENT],
        rows=np.concatenate(starts) if starts else np.zeros(0, np.int32),
        slots=np.repeat(np.array([s.slot for s in short], np.int32), lengths),
        sites=np.repeat(np.array([s.site for s in short], np.int32), lengths),
    )


def lora_add_torch(
    y: Tensor, x: Tensor, table: LoraTable, site: int, widths: Sequence[int], segments: Sequence[Segment]
) -> None:
    """Reference, and what long segments use: one product per factor.

    Sites `site`, `site + 1`, … read the same x and own consecutive columns of y, `widths` wide.
    """
    for segment in segments:
        rows = slice(segment.start, segment.end)
        column = 0
        for member, width in enumerate(widths):
            index = site + segment.site + member, segment.slot
            first = int(table.first[index])
            for chunk in range(first, first + int(table.count[index])):
                a, b = (
                    _factor(table, chunk, table.a[chunk], x.shape[1]),
                    _factor(table, chunk, table.b[chunk], width),
                )
                z = (x[rows] @ a.T).mul_(float(table.scale[chunk]))
                y[rows, column : column + width].addmm_(z, b)
            column += width


def chunk_factors(
    table: LoraTable, site: int, slot: int, inputs: int, outputs: int
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A [rank, inputs], B transposed [rank, outputs], both float32, and the scale of an adapter's chunks at a site."""
    first = int(table.first[site, slot])
    for chunk in range(first, first + int(table.count[site, slot])):
        a, b = _factor(table, chunk, table.a[chunk], inputs), _factor(table, chunk, table.b[chunk], outputs)
        yield a, b, float(table.scale[chunk])


def _factor(table: LoraTable, chunk: int, offset: np.int64, width: int) -> Tensor:
    """The [rank, width] factor at an element offset of the pool, as float32."""
    return _view(table, chunk, offset, width).float()


def _view(table: LoraTable, chunk: int, offset: np.int64, width: int) -> Tensor:
    """The same where it lies, in its own dtype."""
    kind = torch.bfloat16 if table.dtype[chunk] == BFLOAT16 else torch.float32
    rank = int(table.rank[chunk])
    return table.pool.view(kind)[int(offset) : int(offset) + rank * width].view(rank, width)


def lora_add(
    y: Tensor, x: Tensor, table: LoraTable, site: int, widths: Sequence[int], rows: LoraRows
) -> None:
    """Add every adapter's update of sites `site` … `site + len(widths) - 1` to y [T, sum(widths)] in place."""
    before = None if table.observer is None else y.clone()
    if len(rows.rows):
        _rows_kernel(
            y.numpy(), x.numpy(), rows.rows, rows.slots, rows.sites, site, np.array(widths, np.int64),
            table.first, table.count, table.a, table.b, table.rank, table.dtype, table.scale,
            table.pool16, table.pool32,
        )  # fmt: skip
    if rows.long:
        lora_add_torch(y, x, table, site, widths, rows.long)
    if before is not None:
        _observe(y, before, table, site, widths, rows)


def _observe(
    y: Tensor, before: Tensor, table: LoraTable, site: int, widths: Sequence[int], rows: LoraRows
) -> None:
    assert table.observer is not None
    single = zip(rows.rows.tolist(), rows.slots.tolist(), rows.sites.tolist(), strict=True)
    for segment in (*rows.long, *(Segment(row, row + 1, slot, where) for row, slot, where in single)):
        part, column = slice(segment.start, segment.end), 0
        for member, width in enumerate(widths):
            base = before[part, column : column + width]
            table.observer(site + segment.site + member, base, y[part, column : column + width] - base)
            column += width


def lora_embed(
    x: Tensor, tokens: Tensor, vocabulary: int, table: LoraTable, site: int, segments: Sequence[Segment]
) -> None:
    """Add the update of the embedding, whose input is a one-hot token: x[t] += scale * A[:, tokens[t]] @ B, in place.

    x: [T, H] float32, tokens: [T] int64; A is [r, vocabulary], of which a token reads one column.
    """
    for segment in segments:
        index = site, segment.slot
        first = int(table.first[index])
        for chunk in range(first, first + int(table.count[index])):
            rows = slice(segment.start, segment.end)
            a = _view(table, chunk, table.a[chunk], vocabulary)[:, tokens[rows]].float()
            b = _factor(table, chunk, table.b[chunk], x.shape[1])
            update = a.T.mul(float(table.scale[chunk])) @ b
            if table.observer is not None:
                table.observer(site, x[rows].clone(), update)
            x[rows] += update


@inline
def _widen(bits):  # type: ignore[no-untyped-def]  # a Numba scalar, not a Python value
    """The float32 with the bits of a bfloat16."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@kernel
def _row_bf16(y: F32, x: F32, pool: U16, a: int, b: int, rank: int, scale: np.float32) -> None:
    depth, width = x.shape[0], y.shape[0]
    j = 0
    while j + 4 <= rank:
        a0, a1 = pool[a + j * depth : a + (j + 1) * depth], pool[a + (j + 1) * depth : a + (j + 2) * depth]
        a2, a3 = (
            pool[a + (j + 2) * depth : a + (j + 3) * depth],
            pool[a + (j + 3) * depth : a + (j + 4) * depth],
        )
        z0, z1, z2, z3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for k in range(depth):
            v = x[k]
            z0 += v * _widen(a0[k])
            z1 += v * _widen(a1[k])
            z2 += v * _widen(a2[k])
            z3 += v * _widen(a3[k])
        z0, z1, z2, z3 = z0 * scale, z1 * scale, z2 * scale, z3 * scale
        b0, b1 = pool[b + j * width : b + (j + 1) * width], pool[b + (j + 1) * width : b + (j + 2) * width]
        b2, b3 = (
            pool[b + (j + 2) * width : b + (j + 3) * width],
            pool[b + (j + 3) * width : b + (j + 4) * width],
        )
        for n in range(width):
            y[n] += z0 * _widen(b0[n]) + z1 * _widen(b1[n]) + z2 * _widen(b2[n]) + z3 * _widen(b3[n])
        j += 4
    while j < rank:
        a0, b0 = pool[a + j * depth : a + (j + 1) * depth], pool[b + j * width : b + (j + 1) * width]
        z0 = np.float32(0)
        for k in range(depth):
            z0 += x[k] * _widen(a0[k])
        z0 = z0 * scale
        for n in range(width):
            y[n] += z0 * _widen(b0[n])
        j += 1


@kernel
def _row_f32(y: F32, x: F32, pool: F32, a: int, b: int, rank: int, scale: np.float32) -> None:
    depth, width = x.shape[0], y.shape[0]
    j = 0
    while j + 4 <= rank:
        a0, a1 = pool[a + j * depth : a + (j + 1) * depth], pool[a + (j + 1) * depth : a + (j + 2) * depth]
        a2, a3 = (
            pool[a + (j + 2) * depth : a + (j + 3) * depth],
            pool[a + (j + 3) * depth : a + (j + 4) * depth],
        )
        z0, z1, z2, z3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for k in range(depth):
            v = x[k]
            z0 += v * a0[k]
            z1 += v * a1[k]
            z2 += v * a2[k]
            z3 += v * a3[k]
        z0, z1, z2, z3 = z0 * scale, z1 * scale, z2 * scale, z3 * scale
        b0, b1 = pool[b + j * width : b + (j + 1) * width], pool[b + (j + 1) * width : b + (j + 2) * width]
        b2, b3 = (
            pool[b + (j + 2) * width : b + (j + 3) * width],
            pool[b + (j + 3) * width : b + (j + 4) * width],
        )
        for n in range(width):
            y[n] += z0 * b0[n] + z1 * b1[n] + z2 * b2[n] + z3 * b3[n]
        j += 4
    while j < rank:
        a0, b0 = pool[a + j * depth : a + (j + 1) * depth], pool[b + j * width : b + (j + 1) * width]
        z0 = np.float32(0)
        for k in range(depth):
            z0 += x[k] * a0[k]
        z0 = z0 * scale
        for n in range(width):
            y[n] += z0 * b0[n]
        j += 1


@kernel
def _rows_kernel(
    y: F32, x: F32, rows: I32, slots: I32, sites: I32, site: int, widths: I64,
    first: I32, count: I32, a: I64, b: I64, rank: I32, dtype: I32, scale: F32, pool16: U16, pool32: F32,
) -> None:  # fmt: skip
    for i in range(rows.shape[0]):
        source, target = x[rows[i]], y[rows[i]]
        column = 0
        for member in range(widths.shape[0]):
            out = target[column : column + widths[member]]
            where = site + sites[i] + member
            begin = first[where, slots[i]]
            for chunk in range(begin, begin + count[where, slots[i]]):
                if dtype[chunk] == 0:
                    _row_bf16(out, source, pool16, a[chunk], b[chunk], rank[chunk], scale[chunk])
                else:
                    _row_f32(out, source, pool32, a[chunk], b[chunk], rank[chunk], scale[chunk])
            column += widths[member]
