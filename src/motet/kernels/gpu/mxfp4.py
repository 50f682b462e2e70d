"""Weights of four bits for tensor cores: MXFP4 in an order in which a thread's 16 bytes are its share of an operand.

Semantics (the format itself: `motet.kernels.mxfp4`): packed weights of [.., N, K] are
    words  [.., N/32, K/32, 128] int32: a tile of 32 rows times 32 columns (one scale group) in 512 bytes; word
           [8 g][4 t][2 mt][2 rh] holds row 16·mt + 8·rh + g, columns 16·step + 8·h + 2·t + half of step, h, half < 2
    scales [.., N/32, K/32, 8] int32: byte 2·mt + rh of word g belongs to the same row, its scale byte plus 126
A code is a sign and three bits em; `sign << 15 | em << 6` is the bfloat16 of 2^-126 times its value, also a subnormal.
Pair 2·step + h of a word (half 0 in the low 16 bits, half 1 in the high ones) comes out as, with M = 0x81C081C0,
    pair 0: word << 6 & M                pair 2: word rotated right by 4 & M
    pair 1: word << 2 & M                pair 3: word & 0x81808180 | word >> 8 & 0x00400040
That is 9 bit operations for 8 weights; four rotations of M cannot cover a word, so 7 are not possible.

The scale byte is the exponent of a float32 2^(s - 1) that also takes the 2^-126 back. It multiplies either the sums
of a group (few tokens) or the weights (many), exactly both times. Sums of such small weights times small activations
would leave float32's normal range, so they are taken of x · 2^64.

[S] sm_90, gate and up of 64 features, 8 tokens: 2.3 lane instructions a weight, of which 1.0 on the ALU pipe; HBM needs
these below 3.5 and 1.7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from motet.kernels.gpu.jit import kernel, tl
from motet.kernels.mxfp4 import BLOCK

TILE = 32
MAX_SCALE = 128
"""Scales above 2^1 do not fit an exponent of s + 126; weights of 12 and more are not found in models."""

# Bits of the codes of the low half, (em bits 0, 1, 2; sign), by pair; those of the high half are 16 higher, modulo 32.
_PLACES = (((0, 1, 2), 9), ((4, 5, 6), 13), ((10, 11, 12), 19), ((14, 7, 8), 15))


@dataclass(frozen=True)
class Mxfp4:
    """Packed weights [.., N, K]: `words` [.., N/32, K/32, 128] int32 and `scales` [.., N/32, K/32, 8] int32.

    Both may be views of one tensor in which the words and scales of a group follow each other.
    """

    words: Tensor
    scales: Tensor

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor) -> Self:
        """Codes [.., N, K/2] or [.., N, K/32, 16] (low half of a byte first) and scales [.., N, K/32], both uint8.

        ValueError if N is no multiple of 32 or a scale is not a number or above 2^1.
        """
        *lead, rows, groups = scales.shape
        if rows % TILE:
            raise ValueError(f"{rows} rows are not a multiple of {TILE}")
        if codes.numel() * 2 != scales.numel() * BLOCK:
            raise ValueError(f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)} do not fit")
        if scales.numel() and int(scales.max()) > MAX_SCALE:
            raise ValueError(
                f"a scale is 2^{int(scales.max()) - 127}; at most 2^{MAX_SCALE - 127} is supported"
            )
        flat_codes = codes.reshape(-1, rows, groups, BLOCK // 2)
        flat_scales = scales.reshape(-1, rows, groups)
        words = torch.stack(
            [_pack_words(one) for one in flat_codes]
        )  # one at a time: the way there takes 20 times
        return cls(
            words.view(*lead, rows // TILE, groups, 128),
            torch.stack([_pack_scales(one) for one in flat_scales]).view(*lead, rows // TILE, groups, 8),
        )

    def steps(self) -> tuple[int, int]:
        """Words between neighbouring groups in `words` and in `scales`, whose tiles and rows of tiles adjoin."""
        _, tiles, groups, _ = self.words.shape
        for part in (self.words, self.scales):
            step = part.stride(2)
            assert part.stride() == (tiles * groups * step, groups * step, step, 1)
        return self.words.stride(2), self.scales.stride(2)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Codes [.., N, K/2] and scales [.., N, K/32] as `pack` took them."""
        *lead, tiles, groups, _ = self.words.shape
        bits = self.words.to(torch.int64) & 0xFFFFFFFF
        codes = torch.stack([_take(bits, pair, half) for pair in range(4) for half in range(2)], -1)
        codes = codes.view(-1, tiles, groups, 8, 4, 2, 2, 2, 2, 2)  # g t mt rh step h half
        codes = codes.permute(0, 1, 5, 6, 3, 2, 7, 8, 4, 9).reshape(*lead, tiles * TILE, groups * BLOCK)
        shifts = torch.tensor([0, 8, 16, 24], device=bits.device)
        scales = (self.scales.to(torch.int64)[..., None] >> shifts) - 126 & 0xFF
        scales = scales.view(-1, tiles, groups, 8, 2, 2).permute(0, 1, 4, 5, 3, 2)
        pairs = codes.view(*lead, tiles * TILE, groups * BLOCK // 2, 2)
        return (
            (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8),
            scales.reshape(*lead, tiles * TILE, groups).to(torch.uint8),
        )

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [.., N, K], exactly, as kernels take them from a word: see the module's semantics."""
        *lead, tiles, groups, _ = self.words.shape
        word = self.words
        mask = 0x81C081C0 - (1 << 32)
        rotated = (word >> 4 & (1 << 28) - 1) | word << 28
        last = (word & 0x81808180 - (1 << 32)) | (word >> 8 & 0x00400040)
        pairs = torch.stack([word << 6 & mask, word << 2 & mask, rotated & mask, last], -1)
        shape = (math.prod(lead), tiles, groups, 8, 4, 2, 2, 2, 2, 2)  # g t mt rh step h half
        values = pairs.view(torch.bfloat16).view(shape).to(dtype)
        shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32, device=word.device)
        scales = ((self.scales[..., None] >> shifts & 0xFF) << 23).view(torch.float32)
        scaled = values * scales.view(*shape[:4], 1, 2, 2, 1, 1, 1).to(dtype)
        natural = scaled.permute(0, 1, 5, 6, 3, 2, 7, 8, 4, 9)
        return natural.reshape(*lead, tiles * TILE, groups * BLOCK)


def _pack_words(codes: Tensor) -> Tensor:
    """[N, K/32, 16] uint8 to [N/32, K/32, 128] int32."""
    rows, groups, _ = codes.shape
    nibbles = torch.stack([codes & 15, codes >> 4], -1).view(rows // TILE, 2, 2, 8, groups, 2, 2, 4, 2)
    nibbles = nibbles.permute(0, 4, 3, 7, 1, 2, 5, 6, 8)  # tile group g t mt rh step h half
    nibbles = nibbles.reshape(rows // TILE, groups, 128, 4, 2).to(torch.int64)
    word = torch.zeros_like(nibbles[..., 0, 0])
    for pair, (em, sign) in enumerate(_PLACES):
        for half in range(2):
            code = nibbles[..., pair, half]
            for bit, place in enumerate((*em, sign)):
                word |= (code >> bit & 1) << (place + 16 * half) % 32
    return _to_int32(word)


def _take(word: Tensor, pair: int, half: int) -> Tensor:
    em, sign = _PLACES[pair]
    code = torch.zeros_like(word)
    for bit, place in enumerate((*em, sign)):
        code |= (word >> (place + 16 * half) % 32 & 1) << bit
    return code


def _pack_scales(scales: Tensor) -> Tensor:
    """[N, K/32] uint8 to [N/32, K/32, 8] int32."""
    rows, groups = scales.shape
    tile = (
        scales.to(torch.int64).view(rows // TILE, 4, 8, groups).permute(0, 3, 2, 1) + 126
    )  # tile group g mt·rh
    shifts = torch.tensor([0, 8, 16, 24], device=scales.device)
    return _to_int32((tile << shifts).sum(-1))


def _to_int32(bits: Tensor) -> Tensor:
    """The int32 with the same 32 bits."""
    return ((bits ^ 1 << 31) - (1 << 31)).to(torch.int32)


@kernel()
def sums_then_scales(  # type: ignore[no-untyped-def]
    x_row, words, scales, expert, block,
    N: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, WORDS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """[SIDES · F, ROWS], rows ordered (mt, side, tile, rh, g), of block `block` and the rows x_row [ROWS].

    SPLIT parts take turns of DEPTH columns and are added up pairwise at the end: a warp takes whole parts, so that
    warps share neither weights nor columns of x.
    """
    HALF: tl.constexpr = F // 32
    TILES: tl.constexpr = SIDES * HALF
    KIND: tl.constexpr = x_row.dtype.element_ty
    EVEN: tl.constexpr = K % (SPLIT * DEPTH) == 0
    i = tl.arange(0, SPLIT * TILES)
    group = first_group(i % TILES, expert, block, N, K, SIDES, HALF) + i // TILES * (DEPTH // 32)
    at = words + group[:, None] * WORDS + tl.arange(0, 128)[None, :]
    at_scale = scales + group[:, None] * SCALES + tl.arange(0, 8)[None, :]
    first = i // TILES * DEPTH
    column = tl.arange(0, 16)
    if SPLIT > 1:
        first_x = tl.arange(0, SPLIT)[:, None, None] * DEPTH
        at_x = x_row[None, :, None] + first_x + column[None, None, :]
        acc = tl.zeros((SPLIT, TILES * 32, ROWS), tl.float32)
    else:
        at_x = x_row[:, None] + column[None, :]
        acc = tl.zeros((TILES * 32, ROWS), tl.float32)
    for step in tl.range(0, K, SPLIT * DEPTH, num_stages=STAGES):
        for g in tl.static_range(DEPTH // 32):
            if EVEN:
                w, s = tl.load(at + g * WORDS), tl.load(at_scale + g * SCALES)
                low, high = tl.load(at_x + g * 32), tl.load(at_x + g * 32 + 16)
            else:
                there, there_x = (first < K - step)[:, None], first_x < K - step
                w = tl.load(at + g * WORDS, there, other=0)
                s = tl.load(at_scale + g * SCALES, there, other=0)
                low = tl.load(at_x + g * 32, there_x, other=0.0)
                high = tl.load(at_x + g * 32 + 16, there_x, other=0.0)
            p0, p1, p2, p3 = unpack_pairs(w, SPLIT * TILES)
            v = order_columns(low, high, SPLIT, ROWS)
            v = (v * 18446744073709551616.0).to(KIND)  # 2^64
            product = tl.dot(join_pairs(p0, p1, p2, p3, SPLIT, TILES, EXACT), v, input_precision="ieee")
            acc += product * tl.expand_dims(scales_of_rows(s, SPLIT, TILES), -1)
        at += SPLIT * (DEPTH // 32) * WORDS
        at_scale += SPLIT * (DEPTH // 32) * SCALES
        at_x += SPLIT * DEPTH
    return add_parts(acc, SPLIT, TILES * 32, ROWS) * 5.421010862427522e-20  # 2^-64


@kernel()
def scales_then_sums(  # type: ignore[no-untyped-def]
    x_row, words, scales, expert, block,
    N: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, EXACT: tl.constexpr, WORDS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """The same for many rows: all warps on one sum, weights scaled on their way to wgmma."""
    HALF: tl.constexpr = F // 32
    TILES: tl.constexpr = SIDES * HALF
    group = first_group(tl.arange(0, TILES), expert, block, N, K, SIDES, HALF)
    at = words + group[:, None] * WORDS + tl.arange(0, 128)[None, :]
    at_scale = scales + group[:, None] * SCALES + tl.arange(0, 8)[None, :]
    at_x = x_row[:, None] + tl.arange(0, 32)[None, :]
    acc = tl.zeros((TILES * 32, ROWS), tl.float32)
    for _ in tl.range(0, K, DEPTH, num_stages=STAGES):
        for g in tl.static_range(DEPTH // 32):
            p0, p1, p2, p3 = unpack_pairs(tl.load(at + g * WORDS), TILES)
            s = tl.load(at_scale + g * SCALES)
            if EXACT:
                w = join_wide(p0, p1, p2, p3, TILES, True) * scales_of_rows(s, 1, TILES)[:, None]
            else:
                p0, p1, p2, p3 = scale_pairs(p0, p1, p2, p3, s, TILES)
                w = join_wide(p0, p1, p2, p3, TILES, False)
            acc = tl.dot(w, tl.trans(tl.load(at_x + g * 32)), acc, input_precision="ieee")
        at += (DEPTH // 32) * WORDS
        at_scale += (DEPTH // 32) * SCALES
        at_x += DEPTH
    return acc


@kernel()
def first_group(  # type: ignore[no-untyped-def]
    i, expert, block, N: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr, HALF: tl.constexpr
):
    """Where the groups of the block's tiles i begin, HALF tiles of each side."""
    tile = tl.minimum(block * HALF + i % HALF, N // 32 - 1) + i // HALF * (N // 32)
    return (expert * (SIDES * N // 32) + tile) * (K // 32)


@kernel()
def add_parts(acc, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """[M, N] of [SPLIT, M, N]: neighbours first, whatever thread holds them (`tl.sum` goes by the layout)."""
    if SPLIT == 8:
        acc = _add_pairs(acc, 4, M, N)
    if SPLIT >= 4:
        acc = _add_pairs(acc, 2, M, N)
    if SPLIT >= 2:
        acc = _add_pairs(acc, 1, M, N)
    return tl.reshape(acc, (M, N))


@kernel()
def _add_pairs(acc, PAIRS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    one, other = tl.split(tl.permute(tl.reshape(acc, (PAIRS, 2, M, N)), (0, 2, 3, 1)))
    return one + other


@kernel()
def unpack_pairs(words, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """words [TILES, 128] int32 to the four pairs of each, [TILES, 8 g, 4 t, 2 mt, 2 rh] int32."""
    words = tl.reshape(words, (TILES, 8, 4, 2, 2))
    mask: tl.constexpr = 0x81C081C0 - 0x100000000
    rotated = words.to(tl.uint32, bitcast=True)
    rotated = ((rotated >> 4) | (rotated << 28)).to(tl.int32, bitcast=True)
    last = (words & (0x81808180 - 0x100000000)) | ((words >> 8) & 0x00400040)
    return (words << 6) & mask, (words << 2) & mask, rotated & mask, last


@kernel()
def join_pairs(  # type: ignore[no-untyped-def]
    p0, p1, p2, p3, SPLIT: tl.constexpr, TILES: tl.constexpr, EXACT: tl.constexpr
):
    """Pairs of SPLIT · TILES tiles to operands [SPLIT,] [TILES · 32, 32]; their rows are ordered (mt, tile, rh, g).

    The columns are those of `order_columns`: then no thread needs another thread's part.
    """
    both = _values(p0, p1, p2, p3, EXACT)
    if SPLIT > 1:
        both = tl.reshape(both, (SPLIT, TILES, 8, 4, 2, 2, 2, 2, 2))
        both = tl.reshape(tl.permute(both, (0, 4, 1, 5, 2, 6, 3, 7, 8)), (SPLIT, TILES * 32, 32))
    else:
        both = tl.reshape(tl.permute(both, (3, 0, 4, 1, 5, 2, 6, 7)), (TILES * 32, 32))
    return both


@kernel()
def join_wide(p0, p1, p2, p3, TILES: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for wgmma, [TILES · 32, 32] with columns in their natural order."""
    both = tl.permute(_values(p0, p1, p2, p3, EXACT), (3, 0, 4, 1, 6, 5, 2, 7))
    return tl.reshape(both, (TILES * 32, 32))


@kernel()
def _values(p0, p1, p2, p3, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """[tile, g, t, mt, rh, h, step, half] bfloat16, or float32 if EXACT."""
    pairs = tl.join(tl.join(p0, p1), tl.join(p2, p3))
    if EXACT:
        low, high = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
        both = tl.join(low, high)
    else:
        both = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(tl.bfloat16, bitcast=True)
    return both


@kernel()
def order_columns(low, high, SPLIT: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns 0-15 and 16-31 of x, [SPLIT,] [ROWS, 16] each, to [SPLIT,] [32, ROWS] in the order (h, t, step, half).

    Triton gives mma.sync operands of which a thread holds four columns in a row. Two loads of 16 columns become two
    ldmatrix whose registers are already neighbours; one of 32 costs a move for each register.
    """
    both = tl.join(tl.reshape(low, (SPLIT * ROWS, 2, 4, 2)), tl.reshape(high, (SPLIT * ROWS, 2, 4, 2)))
    if SPLIT > 1:
        both = tl.permute(tl.reshape(both, (SPLIT, ROWS, 2, 4, 2, 2)), (0, 2, 3, 5, 4, 1))
        both = tl.reshape(both, (SPLIT, 32, ROWS))
    else:
        both = tl.reshape(tl.permute(both, (1, 2, 4, 3, 0)), (32, ROWS))  # of row, h, t, half, step
    return both


@kernel()
def scales_of_rows(scales, SPLIT: tl.constexpr, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """scales [SPLIT · TILES, 8] int32 to float32 [SPLIT,] [TILES · 32], rows ordered (mt, tile, rh, g)."""
    mask: tl.constexpr = 0x7F800000
    first = tl.join((scales << 23) & mask, (scales << 15) & mask)
    second = tl.join((scales << 7) & mask, (scales >> 1) & mask)
    both = tl.join(first, second)
    if SPLIT > 1:
        both = tl.permute(tl.reshape(both, (SPLIT, TILES, 8, 2, 2)), (0, 4, 1, 3, 2))
        both = tl.reshape(both, (SPLIT, TILES * 32))
    else:
        both = tl.reshape(tl.permute(both, (3, 0, 2, 1)), (TILES * 32,))  # of tile, g, rh, mt
    return both.to(tl.float32, bitcast=True)


@kernel()
def scale_pairs(p0, p1, p2, p3, scales, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of bfloat16 times the scales [TILES, 8] of their rows, two at a time."""
    mask: tl.constexpr = 0x7F80
    first = tl.join((scales << 7) & mask, (scales >> 1) & mask)
    second = tl.join((scales >> 9) & mask, (scales >> 17) & mask)
    both = tl.permute(tl.join(first, second), (0, 1, 3, 2))
    both = tl.broadcast_to(tl.reshape(both | (both << 16), (TILES, 8, 1, 2, 2)), (TILES, 8, 4, 2, 2))
    return _times(p0, both), _times(p1, both), _times(p2, both), _times(p3, both)


@kernel()
def _times(a, b):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )
