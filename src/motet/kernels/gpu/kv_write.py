"""Per-head norms, rotary embedding of q and k, and the write of k and v into their pages, in one pass.

Semantics (reference: `motet.kernels.kv_write.rotary_kv_write_torch`), for row t at position p:
    q[t, h] and k[t, h] are normalised (`motet.kernels.norm.head_rms_norm_torch`) where norms are given,
    q[t, h] *= temperature[p] where one is given,
    q[t, h] and k[t, h] are rotated: (a, b) -> (a cos[p] - b sin[p], b cos[p] + a sin[p]) on the halves of the head, or
    on its even and odd elements with `interleaved`,
    kv[page, layer, 0, h, offset] = k[t, h];  kv[page, layer, 1, h, offset] = v[t, h];  slots[t] = page * page_tokens
    + offset.
    qkv: [T, (Hq + 2·Hkv)·D] bfloat16, of which q is left rotated in place and k and v as they were;
    positions, slots: [T] int32, rows with a negative slot (padding) are left alone; cos, sin: [max positions, D / 2],
    norm weights [D] and temperature [max positions] float32. The arithmetic is float32.

A program takes HEADS heads of one row. That is a launch of its own, so a product of few rows (`dense`) ends with the
same work where `KVWrite.fusible`: heads without norms and temperature, rotated by halves. Norms would need whole heads
in one program, and sums over them in one order. Both ways leave the same bits in q and in the pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from motet.kernels.gpu.jit import kernel, launch_options, tl, triton
from motet.kernels.kv_write import KVLayout

HEADS = 16


@dataclass(frozen=True)
class QueryKey:
    """What happens to queries and keys before they meet: rotation tables, norm weights, temperature."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0
    temperature: Tensor | None = None


@dataclass(frozen=True)
class KVWrite:
    """What becomes of a step's q k v in a layer; see the module's semantics. `layer` is its index in its KV group."""

    positions: Tensor
    slots: Tensor
    how: QueryKey
    kv: KVLayout
    layer: int
    num_heads: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        dim, kv_heads = self.kv.head_dim, self.kv.num_kv_heads
        return self.num_heads * dim, kv_heads * dim, kv_heads * dim

    @property
    def fusible(self) -> bool:
        """Whether the product that gives q k v can do it."""
        how = self.how
        return not how.interleaved and how.q_norm is None and how.temperature is None


def rotary_kv_write(qkv: Tensor, write: KVWrite, *, pdl: bool = False) -> None:
    """In place; see the module's semantics."""
    how, kv = write.how, write.kv
    rows, dim = qkv.shape[0], kv.head_dim
    heads = write.num_heads + 2 * kv.num_kv_heads
    assert qkv.shape[1] == heads * dim
    assert qkv.is_contiguous()
    assert how.cos.shape[1] * 2 == dim
    assert kv.planes == 2
    assert (how.q_norm is None) == (how.k_norm is None)
    if not rows:
        return
    weights = how.cos if how.q_norm is None else how.q_norm, how.cos if how.k_norm is None else how.k_norm
    temperature = how.cos if how.temperature is None else how.temperature
    _rotary_kv_write_kernel[(rows, -(-heads // HEADS))](
        qkv, write.positions, write.slots, how.cos, how.sin, *weights, temperature, kv.flat, write.layer,
        kv.page_stride, how.eps, NUM_HEADS=write.num_heads, NUM_KV_HEADS=kv.num_kv_heads, DIM=dim,
        PAGE_TOKENS=kv.page_tokens, INTERLEAVED=how.interleaved, NORMS=how.q_norm is not None,
        TEMPERATURE=how.temperature is not None, HEADS=HEADS, HALF=triton.next_power_of_2(dim // 2), num_warps=4,
        **launch_options(pdl),
    )  # fmt: skip


@kernel(do_not_specialize=["layer"])
def _rotary_kv_write_kernel(  # type: ignore[no-untyped-def]
    qkv, positions, slots, cos, sin, q_norm, k_norm, temperature, flat, layer, page_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORMS: tl.constexpr, TEMPERATURE: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    TOTAL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.maximum(tl.load(positions + row), 0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < TOTAL) & (pair < DIM // 2) & (slot >= 0)
    c = tl.load(cos + position.to(tl.int64) * (DIM // 2) + pair, pair < DIM // 2, other=0.0)
    s = tl.load(sin + position.to(tl.int64) * (DIM // 2) + pair, pair < DIM // 2, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    source = qkv + row * (TOTAL * DIM) + head * DIM
    if INTERLEAVED:
        element = tl.arange(0, 2 * HALF)[None, :]
        whole = (head < TOTAL) & (element < DIM) & (slot >= 0)
        both = tl.load(source + element, whole, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [HEADS, HALF, 2]))
        at_a, at_b = 2 * pair, 2 * pair + 1
    else:
        a = tl.load(source + pair, inside, other=0.0).to(tl.float32)
        b = tl.load(source + DIM // 2 + pair, inside, other=0.0).to(tl.float32)
        at_a, at_b = pair, pair + DIM // 2

    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    ra, rb = a, b
    if NORMS:
        norm = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / DIM + eps)
        there = pair < DIM // 2
        qa, qb = tl.load(q_norm + at_a, there, other=0.0), tl.load(q_norm + at_b, there, other=0.0)
        ka, kb = tl.load(k_norm + at_a, there, other=0.0), tl.load(k_norm + at_b, there, other=0.0)
        ra, rb = a * norm * tl.where(is_query, qa, ka), b * norm * tl.where(is_query, qb, kb)
    if TEMPERATURE:
        factor = tl.where(is_query, tl.load(temperature + position), 1.0)
        ra, rb = ra * factor, rb * factor
    ra, rb = _rotate(ra, rb, c, s)
    a, b = tl.where(is_value, a, ra), tl.where(is_value, b, rb)

    HEAD_STRIDE: tl.constexpr = PAGE_TOKENS * DIM
    place = (slot // PAGE_TOKENS).to(tl.int64) * page_stride + (slot % PAGE_TOKENS) * DIM
    place += layer.to(tl.int64) * (2 * NUM_KV_HEADS * HEAD_STRIDE)
    # The heads of v follow those of k, as their planes do.
    target = flat + place + (head - NUM_HEADS).to(tl.int64) * HEAD_STRIDE
    target = tl.where(is_query, source, target)
    if INTERLEAVED:
        both = tl.reshape(tl.join(a, b), [HEADS, 2 * HALF]).to(qkv.dtype.element_ty)
        tl.store(target + element, both, whole)
    else:
        tl.store(target + pair, a.to(qkv.dtype.element_ty), inside)
        tl.store(target + DIM // 2 + pair, b.to(qkv.dtype.element_ty), inside)


@kernel()
def _rotate(a, b, c, s):  # type: ignore[no-untyped-def]
    """Multiply-adds are spelled out, so that no compiler rounds one kernel's otherwise than another's."""
    return tl.fma(a, c, -(b * s)), tl.fma(b, c, a * s)


@kernel()
def paired_columns(left, F: tl.constexpr, DIM: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which columns of q, k or v a block of F is, as `write_heads` takes it: the first elements of F / 2 pairs that
    rotate, then the second. They begin where the first `left` columns have theirs, and come in runs of RUN."""
    pair, side = _pairs(left, F) + tl.arange(0, F) % (F // 2), tl.arange(0, F) // (F // 2)
    column = pair // (DIM // 2) * DIM + pair % (DIM // 2) + side * (DIM // 2)
    return tl.max_contiguous(tl.multiple_of(column, RUN), RUN)


@kernel()
def rotary_places(left, position, F: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where cos and sin of such a block's pairs are, [F / 2, ROWS], for rows at `position`."""
    pair = _pairs(left, F) + tl.arange(0, F // 2)
    return tl.maximum(position, 0).to(tl.int64)[None, :] * (DIM // 2) + (pair % (DIM // 2))[:, None]


@kernel()
def write_heads(  # type: ignore[no-untyped-def]
    acc, c, s, y, flat, member, left, width, n, rows, slot, layer, page_stride,
    N: tl.constexpr, DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """The end of a product: its sums acc [F, ROWS] of `paired_columns` of q, k or v (`member` 0, 1, 2), rotated by
    c, s [F / 2, ROWS], to the rows n of y or to their slots. They are rounded first, as when y is between the two."""
    F: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = DIM // 2
    HEAD_STRIDE: tl.constexpr = PAGE_TOKENS * DIM
    PLANE: tl.constexpr = KV_HEADS * HEAD_STRIDE
    x = acc.to(y.dtype.element_ty).to(tl.float32)
    a, b = tl.split(tl.permute(tl.reshape(x, (2, F // 2, acc.shape[1])), (1, 2, 0)))
    ra, rb = _rotate(a, b, c, s)
    is_query, there = member == 0, slot >= 0
    rotates = (member < 2) & there[None, :]
    a, b = tl.where(rotates, ra, a), tl.where(rotates, rb, b)

    place = (slot // PAGE_TOKENS).to(tl.int64) * page_stride + (slot % PAGE_TOKENS) * DIM
    place += layer.to(tl.int64) * (2 * PLANE) + (member - 1) * PLANE
    pair = _pairs(left, F) + tl.arange(0, F // 2)
    row = tl.where(is_query, n.to(tl.int64) * N, place)
    column = pair // HALF * tl.where(is_query, DIM, HEAD_STRIDE) + pair % HALF
    to = tl.where(is_query, y, flat) + row[None, :] + column[:, None]
    inside = ((n < rows) & (is_query | there))[None, :] & (pair < width // 2)[:, None]
    tl.store(to, a.to(y.dtype.element_ty), inside)
    tl.store(to + HALF, b.to(y.dtype.element_ty), inside)


@kernel()
def _pairs(left, F: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many pairs the columns before `left`, a multiple of F, have."""
    return tl.multiple_of(left // 2, F // 2)
