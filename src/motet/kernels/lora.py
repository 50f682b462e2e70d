"""Low-rank updates of many adapters in one batch: shrink, scale, expand, added in place.

Semantics, for a row t of adapter slot s at site e (a site is one linear map of the base):
    y[t, cols] += scale * (x[t] @ A.T) @ B      summed over the chunks of (e, s)
    x: [T, K] float32, y: [T, N] float32; A: [r, K] and B: [r, width] row-major in the pool, bfloat16 or float32.

An adapter's factors are found through the pointer table: (site, slot) names a run of chunks, a chunk names rank,
scaling, dtype and where its A and B lie. A rank is data: nothing is padded, a missing module has no chunks, and rows
of the base model (slot -1) never come here.

Rows of short segments go through one kernel that streams A and B once per row, four ranks at a time. Long segments
(prefill) are compute-bound: a block of rows shrinks for all sites that read x at once, through `kernels.tile`, and
expands each site's columns. Threads share rows and blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import kernel, prange, shared
from motet.kernels.tile import ROWS, WIDTH, multiply, spread, transpose, widen

F32 = NDArray[np.float32]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

LONG_SEGMENT = 12
"""Rows from which a block beats the row kernel (measured crossover 8–16 at rank 16)."""
BLOCK = 128
"""Rows of a long segment that one thread takes at a time; for each block A is read and transposed again."""

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
    """Which rows of a batch carry an adapter: long segments, also cut into blocks [n, 4] of (start, end, slot, site),
    and single rows with their slot and relative site."""

    long: Sequence[Segment]
    blocks: I64
    rows: I32
    slots: I32
    sites: I32


def split_rows(segments: Sequence[Segment]) -> LoraRows:
    """Sort segments into long ones and single rows."""
    short = [s for s in segments if s.end - s.start < LONG_SEGMENT]
    lengths = np.array([s.end - s.start for s in short], np.int32)
    starts = [np.arange(s.start, s.end, dtype=np.int32) for s in short]
    long = [s for s in segments if s.end - s.start >= LONG_SEGMENT]
    blocks = [
        (start, min(start + BLOCK, s.end), s.slot, s.site)
        for s in long
        for start in range(s.start, s.end, BLOCK)
    ]
    return LoraRows(
        long=long,
        blocks=np.array(blocks, np.int64).reshape(-1, 4),
        rows=np.concatenate(starts) if starts else np.zeros(0, np.int32),
        slots=np.repeat(np.array([s.slot for s in short], np.int32), lengths),
        sites=np.repeat(np.array([s.site for s in short], np.int32), lengths),
    )


def lora_add_torch(
    y: Tensor, x: Tensor, table: LoraTable, site: int, widths: Sequence[int], segments: Sequence[Segment]
) -> None:
    """Reference: one product per factor.

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
    x, where = x.contiguous(), (site, np.array(widths, np.int64))
    chunks = table.first, table.count, table.a, table.b, table.rank, table.dtype, table.scale
    if len(rows.rows):
        _rows_kernel(
            y.numpy(),
            x.numpy(),
            rows.rows,
            rows.slots,
            rows.sites,
            *where,
            *chunks,
            table.pool16,
            table.pool32,
        )
    if len(rows.blocks):
        _blocks_kernel(y.numpy(), x.numpy(), rows.blocks, *where, *chunks, table.pool16, table.pool32)
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


@kernel
def _row(y: F32, x: F32, pool: NDArray[Any], a: int, b: int, rank: int, scale: np.float32) -> None:
    """One chunk's update of one row, y += scale * (x @ A.T) @ B."""
    depth, width = x.shape[0], y.shape[0]
    j = 0
    while j + 4 <= rank:
        at = a + j * depth
        a0, a1 = pool[at : at + depth], pool[at + depth : at + 2 * depth]
        a2, a3 = pool[at + 2 * depth : at + 3 * depth], pool[at + 3 * depth : at + 4 * depth]
        z0, z1, z2, z3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for k in range(depth):
            v = x[k]
            z0 += v * widen(a0[k])
            z1 += v * widen(a1[k])
            z2 += v * widen(a2[k])
            z3 += v * widen(a3[k])
        z0, z1, z2, z3 = z0 * scale, z1 * scale, z2 * scale, z3 * scale
        at = b + j * width
        b0, b1 = pool[at : at + width], pool[at + width : at + 2 * width]
        b2, b3 = pool[at + 2 * width : at + 3 * width], pool[at + 3 * width : at + 4 * width]
        for n in range(width):
            y[n] += z0 * widen(b0[n]) + z1 * widen(b1[n]) + z2 * widen(b2[n]) + z3 * widen(b3[n])
        j += 4
    while j < rank:
        a0, b0 = pool[a + j * depth : a + (j + 1) * depth], pool[b + j * width : b + (j + 1) * width]
        z0 = np.float32(0)
        for k in range(depth):
            z0 += x[k] * widen(a0[k])
        z0 = z0 * scale
        for n in range(width):
            y[n] += z0 * widen(b0[n])
        j += 1


@shared
def _rows_kernel(
    y: F32, x: F32, rows: I32, slots: I32, sites: I32, site: int, widths: I64,
    first: I32, count: I32, a: I64, b: I64, rank: I32, dtype: I32, scale: F32, pool16: U16, pool32: F32, shares: int,
) -> None:  # fmt: skip
    for share in prange(shares):
        for i in range(share, rows.shape[0], shares):
            source, target = x[rows[i]], y[rows[i]]
            column = 0
            for member in range(widths.shape[0]):
                out = target[column : column + widths[member]]
                where = site + sites[i] + member
                begin = first[where, slots[i]]
                for chunk in range(begin, begin + count[where, slots[i]]):
                    if dtype[chunk] == BFLOAT16:
                        _row(out, source, pool16, a[chunk], b[chunk], rank[chunk], scale[chunk])
                    else:
                        _row(out, source, pool32, a[chunk], b[chunk], rank[chunk], scale[chunk])
                column += widths[member]


@kernel
def _block(
    y: F32, x: F32, start: int, end: int, slot: int, site: int, widths: I64,
    first: I32, count: I32, a: I64, b: I64, rank: I32, dtype: I32, scale: F32, pool16: U16, pool32: F32,
) -> None:  # fmt: skip
    """All updates of rows [start, end), which have one adapter: z = x @ A.T for all sites, then y += scale · z @ B."""
    depth, stride, rows = x.shape[1], y.shape[1], end - start
    total = largest = 0
    for member in range(widths.shape[0]):
        for chunk in range(
            first[site + member, slot], first[site + member, slot] + count[site + member, slot]
        ):
            total += rank[chunk]
            largest = max(largest, rank[chunk] * ((widths[member] + WIDTH - 1) // WIDTH * WIDTH))
    columns = (total + WIDTH - 1) // WIDTH * WIDTH
    panels, z = np.zeros(max(columns * depth, largest), np.float32), np.empty(rows * columns, np.float32)
    column = start - start
    for member in range(widths.shape[0]):
        for chunk in range(
            first[site + member, slot], first[site + member, slot] + count[site + member, slot]
        ):
            ranks = int(rank[chunk])
            if dtype[chunk] == BFLOAT16:
                transpose(panels, column, pool16, a[chunk], ranks, depth)
            else:
                transpose(panels, column, pool32, a[chunk], ranks, depth)
            column += ranks
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    for group in range(0, columns, WIDTH):
        cols = min(WIDTH, columns - group)
        multiply(
            z, group, columns, cols, flat_x, start * depth, depth, rows, panels, group * depth, depth, False
        )
    column, at = start - start, start * stride
    for member in range(widths.shape[0]):
        width = widths[member]
        for chunk in range(
            first[site + member, slot], first[site + member, slot] + count[site + member, slot]
        ):
            ranks = int(rank[chunk])
            for row in range(rows):
                z[row * columns + column : row * columns + column + ranks] *= scale[chunk]
            if dtype[chunk] == BFLOAT16:
                spread(panels, pool16, b[chunk], width, ranks, width)
            else:
                spread(panels, pool32, b[chunk], width, ranks, width)
            for row in range(0, rows, ROWS):
                few = min(ROWS, rows - row)
                for n in range(0, width, WIDTH):
                    multiply(
                        flat_y, at + row * stride + n, stride, min(WIDTH, width - n),
                        z, row * columns + column, columns, few, panels, n * ranks, ranks, True,
                    )  # fmt: skip
            column += ranks
        at += width


@shared
def _blocks_kernel(
    y: F32, x: F32, blocks: I64, site: int, widths: I64,
    first: I32, count: I32, a: I64, b: I64, rank: I32, dtype: I32, scale: F32, pool16: U16, pool32: F32, shares: int,
) -> None:  # fmt: skip
    for share in prange(shares):
        for i in range(share, blocks.shape[0], shares):
            start, end, slot, relative = blocks[i]
            _block(
                y, x, start, end, slot, site + relative, widths, first, count, a, b, rank, dtype, scale,
                pool16, pool32,
            )  # fmt: skip
