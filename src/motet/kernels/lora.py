"""Low-rank updates of many adapters in one batch: shrink, scale, expand, added in place.

Semantics, for a row t of adapter slot s at site e (a site is one linear map of the base):
    y[t, cols] += scale * (x[t] @ A.T) @ B      summed over the chunks of (e, s)
    x: [T, K] float32, y: [T, N] float32; A: [r, K] and B: [r, width] row-major in the pool, bfloat16 or float32.

An adapter's factors are found through the pointer table: (site, slot) names a run of chunks, a chunk names rank,
scaling, dtype and where its A and B lie. A rank is data: nothing is padded, a missing module has no chunks, and rows
of the base model (slot -1) never come here.

Rows of short segments go through one kernel that streams A and B once per row, four ranks at a time. Long segments
(prefill) are compute-bound: a block of rows shrinks for all sites that read x at once, through `kernels.tile`, and
expands each site's columns. Threads share rows and blocks. Expanding is bound by y, which comes from memory and goes
back; a product that unpacks its weights (`kernels.bfloat16`) does it with the product instead, the sums still in
registers: of SmolLM2-135M's 1,024 rows, rank 16 on all sites, LoRA then takes 45 ms on two cores, by itself 74.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.kernels.jit import kernel, prange, shared
from motet.kernels.tile import LANES, ROWS, WIDTH, multiply, multiply_slim, spread, transpose, widen

F32 = NDArray[np.float32]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
Table = tuple[NDArray[Any], ...]

LONG_SEGMENT = 12
"""Rows from which a block beats the row kernel (measured crossover 8–16 at rank 16)."""
BLOCK = 128
"""Rows of a long segment that one thread takes at a time; for each block A and B are read and laid out again."""

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
    arrays: Table = field(init=False)
    """What kernels take: the fields from `first` to `scale`, and the pool seen as bfloat16 bits and as float32."""

    def __post_init__(self) -> None:
        """Made once, because a view costs as much as a short row's update."""
        pools = self.pool.view(torch.uint16).numpy(), self.pool.view(torch.float32).numpy()
        fields = self.first, self.count, self.a, self.b, self.rank, self.dtype, self.scale
        object.__setattr__(self, "arrays", (*fields, *pools))


NO_TABLE = LoraTable(
    np.zeros((0, 0), np.int32), np.zeros((0, 0), np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64),
    np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), torch.zeros(0, dtype=torch.uint8),
)  # fmt: skip
NO_BLOCKS = np.zeros((0, 4), np.int64), 0, np.zeros(0, np.int64), *NO_TABLE.arrays
"""What kernels take that find nothing to add."""


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

    @cached_property
    def singles(self) -> LoraRows:
        """The single rows alone."""
        return replace(self, long=(), blocks=self.blocks[:0])


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
    if len(rows.rows):
        singles = rows.rows, rows.slots, rows.sites
        _rows_kernel(y.numpy(), x.numpy(), *singles, *where, *table.arrays)
    if len(rows.blocks):
        _blocks_kernel(y.numpy(), x.numpy(), rows.blocks, *where, *table.arrays)
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
def _ranks(slot: int, site: int, sites: int, first: I32, count: I32, rank: I32) -> int:
    """The ranks of a slot's chunks at so many sites, all together."""
    total = slot - slot
    for where in range(site, site + sites):
        for chunk in range(first[where, slot], first[where, slot] + count[where, slot]):
            total += rank[chunk]
    return total


@kernel
def shrink(x: F32, start: int, end: int, blocks: I64, site: int, sites: int, table: Table) -> tuple[F32, int]:
    """For the rows [start, end) that blocks cover, z = scale · x @ A.T of all chunks side by side; and its columns."""
    first, count, a, _, rank, dtype, scale, pool16, pool32 = table
    depth, flat, columns = x.shape[1], x.reshape(-1), start - start
    for i in range(blocks.shape[0]):
        if blocks[i, 0] < end and blocks[i, 1] > start:
            columns = max(columns, _ranks(blocks[i, 2], site + blocks[i, 3], sites, first, count, rank))
    columns = (columns + LANES - 1) // LANES * LANES
    z, panels = np.empty((end - start) * columns, np.float32), np.zeros(columns * depth, np.float32)
    for i in range(blocks.shape[0]):
        begin, past, slot, base = (
            max(start, blocks[i, 0]),
            min(end, blocks[i, 1]),
            blocks[i, 2],
            blocks[i, 3] + site,
        )
        if begin >= past:
            continue
        column, z_at = start - start, (begin - start) * columns
        for where in range(base, base + sites):
            for chunk in range(first[where, slot], first[where, slot] + count[where, slot]):
                ranks = int(rank[chunk])
                if dtype[chunk] == BFLOAT16:
                    transpose(panels, LANES, column, pool16, a[chunk], ranks, depth)
                else:
                    transpose(panels, LANES, column, pool32, a[chunk], ranks, depth)
                column += ranks
        for group in range(0, column, LANES):
            at = group * depth
            multiply_slim(
                z, z_at + group, columns, flat, begin * depth, depth, past - begin, panels, at, depth
            )
        column = start - start
        for where in range(base, base + sites):
            for chunk in range(first[where, slot], first[where, slot] + count[where, slot]):
                for row in range(past - begin):
                    cells = z[z_at + row * columns + column : z_at + row * columns + column + rank[chunk]]
                    for j in range(rank[chunk]):
                        cells[j] *= scale[chunk]
                column += rank[chunk]
    return z, columns


@kernel
def factors(
    panel: F32, to: int, left: int, slot: int, site: int, widths: I64, table: Table
) -> tuple[int, int]:
    """Put B, as far as it owns y's columns [left, left + WIDTH), into a panel [·, WIDTH], from `to` on.

    Returns which of z's columns it is multiplied by: the first and their number.
    """
    first, count, _, b, rank, dtype, _, pool16, pool32 = table
    offset, column, begin, depth = left - left, left - left, left - left, left - left
    for member in range(widths.shape[0]):
        width, where = widths[member], site + member
        start, past = max(left, offset), min(left + WIDTH, offset + width)
        for chunk in range(first[where, slot], first[where, slot] + count[where, slot]):
            ranks = int(rank[chunk])
            if start < past:
                begin = column if depth == 0 else begin
                at, cell = b[chunk] + start - offset, to + depth * WIDTH
                if past - start < WIDTH:
                    panel[cell : cell + ranks * WIDTH] = np.float32(0)
                if dtype[chunk] == BFLOAT16:
                    spread(panel, cell + start - left, pool16, at, width, ranks, past - start)
                else:
                    spread(panel, cell + start - left, pool32, at, width, ranks, past - start)
                depth += ranks
            column += ranks
        offset += width
    return begin, depth


@shared
def _blocks_kernel(
    y: F32, x: F32, blocks: I64, site: int, widths: I64,
    first: I32, count: I32, a: I64, b: I64, rank: I32, dtype: I32, scale: F32, pool16: U16, pool32: F32, shares: int,
) -> None:  # fmt: skip
    flat, outputs = y.reshape(-1), y.shape[1]
    number = (outputs + WIDTH - 1) // WIDTH
    for share in prange(shares):
        table = first, count, a, b, rank, dtype, scale, pool16, pool32
        for i in range(share, blocks.shape[0], shares):
            start, end, slot, base = blocks[i, 0], blocks[i, 1], blocks[i, 2], blocks[i, 3] + site
            z, columns = shrink(x, start, end, blocks[i : i + 1], site, widths.shape[0], table)
            size = columns * WIDTH
            panels, of_z = np.empty(number * size, np.float32), np.empty((number, 2), np.int64)
            for panel in range(number):
                of_z[panel] = factors(panels, panel * size, panel * WIDTH, slot, base, widths, table)
            for row in range(start, end, ROWS):
                for panel in range(number):
                    column = panel * WIDTH
                    multiply(
                        flat, row * outputs + column, outputs, min(WIDTH, outputs - column),
                        z, (row - start) * columns + of_z[panel, 0], columns, min(ROWS, end - row),
                        panels, panel * size, of_z[panel, 1], True,
                    )  # fmt: skip
