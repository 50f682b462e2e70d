"""A block of a matrix product held in registers: what products, low-rank updates and attention on the CPU are made of.

Semantics, for rows of x that lie `x_stride` apart and a panel of WIDTH columns, its rows one after the other:
    y[r, c] = sum_k x[r, k] * panel[k, c]        c < cols <= WIDTH, or y[r, c] += it with `add`
    x, y: float32; panel: [K, WIDTH] float32, or [K, LANES] uint32, pairs of bfloat16: column c in the low and column
    c + LANES in the high half, which costs one load and two cheap operations for WIDTH weights.
`multiply_two` does [x | z] at once, with a panel that has rows for both; `multiply_slim` has LANES columns.
All are flat arrays, addressed by the offset of the block's first element.

Each sum runs over k from 0 up, by itself: its bits depend neither on how many rows and columns there are nor on where
the block lies. Numba cannot keep an array in registers across a loop, so the innermost loop is written in LLVM's
language. On one core of an Emerald Rapids server it does 187–192 GFLOP/s with pairs, from 8 rows up; oneDNN's float32
product does 168–189 with 1,024 rows, and 75 with 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motet.kernels.jit import cpu_has, inline, intrinsic, kernel

F32 = NDArray[np.float32]

LANES, SIZES = (16, (12, 8, 4, 1)) if cpu_has("avx512f") else (8, (6, 4, 2, 1))
"""Columns in a vector, and rows that are taken at a time: two vectors of sums for each must fit the registers."""
WIDTH, ROWS = 2 * LANES, SIZES[0]
AHEAD = 4096
"""Bytes that pairs are fetched in advance: 8 rows times weights that are in no cache take 24 ms, 41 without (one core,
134 million weights)."""


def _tile(rows: int, vectors: int = 2) -> Callable[..., None]:
    """The innermost loop for so many rows and vectors of columns."""

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]  # Numba types
        _context, y, _y_at, _y_stride, x, _x_at, _x_stride, panel, _at, _depth, add, z, _z_at, _z_stride, _z_depth
    ):  # fmt: skip
        from numba import types

        number = types.intp
        signature = types.void(
            y, number, number, x, number, number, panel, number, number, add, z, number, number, number
        )
        return signature, lambda *how: _emit(rows, vectors, *how)

    return tile


def _emit(rows: int, vectors: int, context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """LLVM's code of the loop."""
    from llvmlite import ir
    from numba.core import cgutils, types

    _, y_at, y_stride, _, x_at, x_stride, _, at, depth, add, _, z_at, z_stride, z_depth = args
    i32, i64 = ir.IntType(32), ir.IntType(64)
    floats = ir.VectorType(ir.FloatType(), LANES)
    unset, everywhere = ir.Constant(floats, ir.Undefined), ir.Constant(ir.VectorType(i32, LANES), [0] * LANES)

    def pointer(index: int, offset: Any) -> Any:
        array = context.make_array(signature.args[index])(context, builder, args[index])
        return builder.gep(array.data, [offset])

    def rows_of(first: Any, stride: Any) -> list[Any]:
        return [builder.gep(first, [builder.mul(stride, i64(row))]) for row in range(rows)]

    def splat(value: Any) -> Any:
        return builder.shuffle_vector(builder.insert_element(unset, value, i32(0)), unset, everywhere)

    targets = [
        builder.bitcast(builder.gep(row, [i64(half * LANES)]), floats.as_pointer())
        for row in rows_of(pointer(0, y_at), y_stride)
        for half in range(vectors)
    ]
    sums = [cgutils.alloca_once_value(builder, ir.Constant(floats, None)) for _ in targets]
    with builder.if_then(add):
        for total, target in zip(sums, targets, strict=True):
            builder.store(builder.load(target, align=1), total)
    first, kind = pointer(6, at), signature.args[6].dtype
    step = i64(vectors * LANES if kind == types.float32 else LANES)

    def accumulate(sources: list[Any], first: Any, depth: Any) -> None:
        with cgutils.for_range(builder, depth) as loop:
            weights = _panel_row(builder, kind, vectors, builder.gep(first, [builder.mul(loop.index, step)]))
            for row, source in enumerate(sources):
                value = splat(builder.load(builder.gep(source, [loop.index])))
                for total, weight in zip(sums[vectors * row : vectors * (row + 1)], weights, strict=True):
                    product = builder.fmul(value, weight, flags=["contract"])
                    builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)

    accumulate(rows_of(pointer(3, x_at), x_stride), first, depth)
    accumulate(rows_of(pointer(10, z_at), z_stride), builder.gep(first, [builder.mul(depth, step)]), z_depth)
    for total, target in zip(sums, targets, strict=True):
        builder.store(builder.load(total), target, align=1)
    return context.get_dummy_value()


def _panel_row(builder: Any, kind: Any, vectors: int, pointer: Any) -> list[Any]:
    """The weights from `pointer` on as vectors of float32."""
    from llvmlite import ir
    from numba.core import types

    floats, bits = (ir.VectorType(scalar, LANES) for scalar in (ir.FloatType(), ir.IntType(32)))
    half = ir.Constant(bits, [16] * LANES)

    def load(vector: Any, offset: int = 0) -> Any:
        place = builder.gep(pointer, [ir.IntType(64)(offset)])
        return builder.load(builder.bitcast(place, vector.as_pointer()), align=1)

    if kind == types.uint16:
        halves = [load(ir.VectorType(ir.IntType(16), LANES), vector * LANES) for vector in range(vectors)]
        return [builder.bitcast(builder.shl(builder.zext(number, bits), half), floats) for number in halves]
    if kind == types.float32:
        return [load(floats, vector * LANES) for vector in range(vectors)]
    _prefetch(builder, builder.gep(pointer, [ir.IntType(64)(AHEAD // 4)]))
    pairs = load(bits)
    words = [builder.shl(pairs, half), builder.and_(pairs, ir.Constant(bits, [-65536] * LANES))]
    return [builder.bitcast(word, floats) for word in words]


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for the cache line at `pointer`, wherever that is."""
    from llvmlite import ir

    i8, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [i8, i32, i32, i32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [i8], kind)
    builder.call(prefetch, [builder.bitcast(pointer, i8), i32(0), i32(3), i32(1)])  # to read, to keep, data


_tile_0, _tile_1, _tile_2, _tile_3 = (_tile(rows) for rows in SIZES)
_slim_0, _slim_1, _slim_2, _slim_3 = (_tile(rows, 1) for rows in (2 * ROWS, *SIZES[1:]))


@inline
def multiply(y, y_at, y_stride, cols, x, x_at, x_stride, rows, panel, at, depth, add):  # type: ignore[no-untyped-def]  # Numba values
    """A block [rows, cols] of a product, see the module's semantics. Inlined, because a call takes 1 % of a block."""
    if cols == WIDTH:
        _multiply(y, y_at, y_stride, x, x_at, x_stride, rows, panel, at, depth, add, x, 0, 0, 0)
    else:
        _narrow(y, y_at, y_stride, cols, x, x_at, x_stride, rows, panel, at, depth, add, x, 0, 0, 0)


@inline
def multiply_two(  # type: ignore[no-untyped-def]  # Numba values
    y, y_at, y_stride, cols, x, x_at, x_stride, rows, panel, at, depth, z, z_at, z_stride, z_depth
):  # fmt: skip
    """A block of [x | z] times a panel [depth + z_depth, WIDTH]; z is [rows, z_depth]."""
    more = z, z_at, z_stride, z_depth
    if cols == WIDTH:
        _multiply(y, y_at, y_stride, x, x_at, x_stride, rows, panel, at, depth, False, *more)
    else:
        _narrow(y, y_at, y_stride, cols, x, x_at, x_stride, rows, panel, at, depth, False, *more)


@kernel
def _narrow(
    y: F32, y_at: int, y_stride: int, cols: int, x: F32, x_at: int, x_stride: int, rows: int, panel: NDArray[Any],
    at: int, depth: int, add: bool, z: F32, z_at: int, z_stride: int, z_depth: int,
) -> None:  # fmt: skip
    """A block with fewer than WIDTH columns."""
    whole = np.zeros(rows * WIDTH, np.float32)
    for r in range(rows if add else 0):
        for c in range(cols):
            whole[r * WIDTH + c] = y[y_at + r * y_stride + c]
    _multiply(whole, 0, WIDTH, x, x_at, x_stride, rows, panel, at, depth, add, z, z_at, z_stride, z_depth)
    for r in range(rows):
        for c in range(cols):
            y[y_at + r * y_stride + c] = whole[r * WIDTH + c]


@kernel
def _multiply(
    y: F32, y_at: int, y_stride: int, x: F32, x_at: int, x_stride: int, rows: int, panel: NDArray[Any],
    at: int, depth: int, add: bool, z: F32, z_at: int, z_stride: int, z_depth: int,
) -> None:  # fmt: skip
    """A block with all WIDTH columns."""
    row = 0
    while row < rows:
        left, y_row, x_row, z_row = (
            rows - row,
            y_at + row * y_stride,
            x_at + row * x_stride,
            z_at + row * z_stride,
        )
        if left >= SIZES[0]:
            _tile_0(
                y, y_row, y_stride, x, x_row, x_stride, panel, at, depth, add, z, z_row, z_stride, z_depth
            )
            row += SIZES[0]
        elif left >= SIZES[1]:
            _tile_1(
                y, y_row, y_stride, x, x_row, x_stride, panel, at, depth, add, z, z_row, z_stride, z_depth
            )
            row += SIZES[1]
        elif left >= SIZES[2]:
            _tile_2(
                y, y_row, y_stride, x, x_row, x_stride, panel, at, depth, add, z, z_row, z_stride, z_depth
            )
            row += SIZES[2]
        else:
            _tile_3(
                y, y_row, y_stride, x, x_row, x_stride, panel, at, depth, add, z, z_row, z_stride, z_depth
            )
            row += SIZES[3]


@kernel
def multiply_slim(
    y: F32,
    y_at: int,
    y_stride: int,
    x: F32,
    x_at: int,
    x_stride: int,
    rows: int,
    panel: F32,
    at: int,
    depth: int,
) -> None:
    """The same with LANES columns and a float32 panel [K, LANES]; more rows at a time make up for it."""
    row = 0
    while row < rows:
        left, x_row, y_row = rows - row, x_at + row * x_stride, y_at + row * y_stride
        if left >= 2 * ROWS:
            _slim_0(y, y_row, y_stride, x, x_row, x_stride, panel, at, depth, False, x, 0, 0, 0)
            row += 2 * ROWS
        elif left >= SIZES[1]:
            _slim_1(y, y_row, y_stride, x, x_row, x_stride, panel, at, depth, False, x, 0, 0, 0)
            row += SIZES[1]
        elif left >= SIZES[2]:
            _slim_2(y, y_row, y_stride, x, x_row, x_stride, panel, at, depth, False, x, 0, 0, 0)
            row += SIZES[2]
        else:
            _slim_3(y, y_row, y_stride, x, x_row, x_stride, panel, at, depth, False, x, 0, 0, 0)
            row += SIZES[3]


@intrinsic
def widen(_context, number):  # type: ignore[no-untyped-def]  # Numba types
    """The float32 with the bits of a bfloat16 (uint16), or a float32 as it is."""
    from llvmlite import ir
    from numba import types

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if number == types.float32:
            return args[0]
        i32 = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], i32), i32(16)), ir.FloatType())

    return types.float32(number), emit


@intrinsic
def unpack(_context, panel, _to, source, _at, _stride, _depth):  # type: ignore[no-untyped-def]  # Numba types
    """Write a panel [depth, WIDTH] of float32, from `to` on: pairs, or WIDTH numbers of bfloat16 (uint16) or float32
    each, that lie from `at` on, their rows `stride` apart."""
    from numba import types

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from llvmlite import ir
        from numba.core import cgutils

        i64, floats = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES).as_pointer()
        target, first = (
            builder.gep(context.make_array(signature.args[i])(context, builder, args[i]).data, [args[i + 1]])
            for i in (0, 2)
        )
        with cgutils.for_range(builder, args[5]) as loop:
            row = builder.gep(first, [builder.mul(loop.index, args[4])])
            cells = builder.gep(target, [builder.mul(loop.index, i64(WIDTH))])
            for half, weights in enumerate(_panel_row(builder, signature.args[2].dtype, 2, row)):
                place = builder.gep(cells, [i64(half * LANES)])
                builder.store(weights, builder.bitcast(place, floats), align=1)
        return context.get_dummy_value()

    return types.void(panel, types.intp, source, types.intp, types.intp, types.intp), emit


@kernel
def spread(panel: F32, to: int, source: NDArray[Any], at: int, stride: int, depth: int, width: int) -> None:
    """The same with rows of `width` numbers, at most WIDTH; of those that miss, cells stay as they are."""
    if width == WIDTH:
        unpack(panel, to, source, at, stride, depth)
        return
    for k in range(depth):
        for c in range(width):
            panel[to + k * WIDTH + c] = widen(source[at + k * stride + c])


@kernel
def transpose(
    panels: F32, width: int, column: int, source: NDArray[Any], at: int, count: int, depth: int
) -> None:
    """Put rows of `source` [count, depth], from `at` on, into columns of panels [·, depth, width] from `column` on.

    Four rows at a time: 0.4 ns an element, one by one 1.5.
    """
    j = 0
    while j < count:
        here, to = at + j * depth, (column + j) // width * width * depth + (column + j) % width
        if j + 4 <= count and (column + j) % width + 4 <= width:
            r0, r1 = source[here : here + depth], source[here + depth : here + 2 * depth]
            r2, r3 = source[here + 2 * depth : here + 3 * depth], source[here + 3 * depth : here + 4 * depth]
            for k in range(depth):
                cells = panels[to + k * width : to + k * width + 4]
                cells[0], cells[1], cells[2], cells[3] = (
                    widen(r0[k]),
                    widen(r1[k]),
                    widen(r2[k]),
                    widen(r3[k]),
                )
            j += 4
        else:
            for k in range(depth):
                panels[to + k * width] = widen(source[here + k])
            j += 1
