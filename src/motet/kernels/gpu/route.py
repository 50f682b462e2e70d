"""From router logits to sorted work: experts of each token, pairs by (expert, adapter), tiles and segments.

Semantics (experts and weights: `motet.kernels.route`): token t and its j-th expert are pair t·k + j. Pairs are sorted
by (expert, adapter slot, pair); those of padding tokens (t >= tokens[0]) come last and belong to nothing. In that order
    tiles    are up to `rows` consecutive pairs of one expert, the work of the expert products;
    segments are the runs of one adapter in a tile, the work of the updates; base pairs (slot -1) are in none.
    logits: [T, E] of any floating type; slots: [T] int32 or None; tokens: [1] int32 or None (all T are real).
All results have a fixed capacity, `Sorted.empty` says which; nothing is read back to the host. Of equal scores the
lower expert wins.

Up to MAX_PAIRS pairs of up to MAX_SCORES scores take one launch of one program, which also sorts, or the last program
of `norm_route`. More take three launches of many programs: choose finds the experts of some tokens, rank the places of
some pairs, layout what begins or ends at some places. A pair's place is the number of pairs before it, and a program of
rank compares its pairs with all: it needs nothing from another. The ends of experts are ranked alike. From them layout
knows the tiles before any place; the segments before it are counted, only its own are scanned. Torch would sort in a
dozen launches, but rank's work grows with the square of the pairs: above MAX_RANKED of them torch does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from motet.kernels.gpu.choose import choose
from motet.kernels.gpu.jit import begin, kernel, launch_options, tl, triton
from motet.kernels.route import RoutingRule, choose_experts

MAX_PAIRS = 512
"""Pairs that one program sorts, tokens and experts per token each counted to the next power of two."""
PAIR_BITS = 9
MAX_SCORES = 8192
"""Scores that one program holds, counted the same way: with twice as many its registers spill."""
MAX_RANKED = 24576
"""Pairs that are ranked: comparing so many with each other, two instructions a comparison, takes 71,000 cycles if each
of 132 multiprocessors does 128 instructions in one."""


@dataclass(frozen=True)
class RouteConfig:
    """How the kernels are compiled: scores per thread of the one program (fewer are more barriers, more are more code,
    which a kernel this short waits for), and when the next kernel may start (`launch`, see `moe.ProductConfig`: 0, 1
    or 2)."""

    scores: int = 4
    launch: int = 2


ROUTE = RouteConfig()


@dataclass(frozen=True)
class Sorted:
    """A batch's pairs in sorted order; all int32 but `weight`, float32. P = T · k pairs.

    order [P]: the pair at each place; inverse [T, k]: the place of each pair, -1 for padding; weight [T, k];
    counts [2]: tiles and segments in use; tiles [NT, 5]: expert, first place, rows (0: not in use), first segment, end
    of segments; segments [NS, 4]: expert, slot, first place, rows.
    """

    order: Tensor
    inverse: Tensor
    weight: Tensor
    counts: Tensor
    tiles: Tensor
    segments: Tensor
    rows: int

    @classmethod
    def empty(
        cls, tokens: int, top_k: int, num_experts: int, rows: int, adapters: int, device: torch.device | str
    ) -> Self:
        """Room for `tokens` tokens in tiles of `rows` pairs with at most `adapters` adapters among them."""
        pairs = tokens * top_k
        tiles = min(pairs, num_experts + pairs // rows)
        segments = min(pairs, tiles + num_experts * max(adapters - 1, 0)) if adapters else 0

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            ints(pairs), ints(tokens, top_k), torch.empty(tokens, top_k, device=device), ints(2),
            ints(tiles, 5), ints(segments, 4), rows,
        )  # fmt: skip

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return int(self.inverse.shape[1])


def route_torch(
    logits: Tensor, rule: RoutingRule, slots: Tensor | None, out: Sorted, tokens: Tensor | None = None
) -> None:
    """Reference on the host."""
    real = len(logits) if tokens is None else int(tokens)
    weight, expert = choose_experts(logits, rule)
    out.weight.copy_(weight).masked_fill_(torch.arange(len(logits), device=logits.device)[:, None] >= real, 0)
    of_token = [-1] * len(logits) if slots is None else slots.tolist()
    k = rule.top_k
    keys = [(int(e), of_token[t], t * k + j) for t in range(real) for j, e in enumerate(expert[t].tolist())]
    keys.sort()
    out.inverse.fill_(-1)
    tiles: list[list[int]] = []
    segments: list[list[int]] = []
    for place, (e, slot, pair) in enumerate(keys):
        out.order[place] = pair
        out.inverse.view(-1)[pair] = place
        new = not tiles or tiles[-1][0] != e or tiles[-1][2] == out.rows
        if new:
            tiles.append([e, place, 0, len(segments), len(segments)])
        tiles[-1][2] += 1
        if slot >= 0:
            if new or tiles[-1][3] == len(segments) or segments[-1][1] != slot:
                segments.append([e, slot, place, 0])
            segments[-1][3] += 1
            tiles[-1][4] = len(segments)
    out.tiles.zero_()
    out.tiles[: len(tiles)] = torch.tensor(tiles, dtype=torch.int32).view(-1, 5)
    out.segments[: len(segments)] = torch.tensor(segments, dtype=torch.int32).view(-1, 4)
    out.counts.copy_(torch.tensor([len(tiles), len(segments)]))


def route(
    logits: Tensor,
    rule: RoutingRule,
    slots: Tensor | None,
    out: Sorted,
    tokens: Tensor | None = None,
    *,
    config: RouteConfig = ROUTE,
    pdl: bool = False,
) -> None:
    """Fill `out`; see the module's semantics. A slot is below 2^(22 - bits of E) - 1."""
    rows, num_experts = logits.shape
    assert out.inverse.shape == (rows, rule.top_k)
    assert logits.stride(1) == 1
    if not rows:
        out.counts.zero_()
        return
    given, how = rule_arguments(rule, slots, tokens, num_experts, out)
    start = {"LAUNCH": config.launch if pdl else 0, **launch_options(pdl)}
    if one_program(rows, rule, num_experts):
        warps = min(max(triton.next_power_of_2(rows) * how["EP"] // (32 * config.scores), 1), 16)
        route_kernel[(1,)](
            logits, *given, out.weight, out.order, out.inverse, out.counts, out.tiles, out.segments,
            rows, logits.stride(0), len(out.tiles), TP=triton.next_power_of_2(rows), ROWS=out.rows,
            PAIR_BITS=PAIR_BITS, num_warps=warps, **how, **start,
        )  # fmt: skip
    else:
        _route_many(logits, given, out, how, start)


def one_program(rows: int, rule: RoutingRule, num_experts: int) -> bool:
    """Whether `route_kernel` has room for so many rows."""
    padded = triton.next_power_of_2(rows)
    pairs = padded * triton.next_power_of_2(rule.top_k)
    return bool(pairs <= MAX_PAIRS and padded * triton.next_power_of_2(max(num_experts, 2)) <= MAX_SCORES)


def rule_arguments(
    rule: RoutingRule, slots: Tensor | None, tokens: Tensor | None, num_experts: int, out: Sorted
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What kernels take of a rule, slots and tokens: tensors (`out` stands in for None) and constants."""
    given = tuple(out.weight if one is None else one for one in (rule.bias, slots, tokens))
    return given, {
        "BIAS": rule.bias is not None, "SLOTS": slots is not None, "PADDED": tokens is not None,
        "SIGMOID": rule.scoring == "sigmoid", "NORMALISE": rule.normalise, "SCALE": rule.scale,
        "GROUPS": rule.groups, "TOP_GROUPS": rule.top_groups, "TOP2": rule.group_score == "top2",
        "E": num_experts, "EP": triton.next_power_of_2(max(num_experts, 2)),
        "K": rule.top_k, "KP": triton.next_power_of_2(rule.top_k),
        "SLOT_BITS": 31 - PAIR_BITS - (num_experts - 1).bit_length(),
        "GP": triton.next_power_of_2(rule.groups),
    }  # fmt: skip


def _route_many(
    logits: Tensor, given: tuple[Tensor, ...], out: Sorted, how: dict[str, Any], start: dict[str, Any]
) -> None:
    rows, num_experts, slot_bits = len(logits), how["E"], how["SLOT_BITS"]
    pairs = rows * how["K"]
    keys = torch.empty(pairs, dtype=torch.int32, device=logits.device)
    tokens = min(4096 // how["EP"], 16)
    _choose_kernel[(triton.cdiv(rows, tokens),)](
        logits, *given, out.weight, keys, rows, logits.stride(0), TP=tokens, num_warps=4, **how, **start
    )
    if pairs <= MAX_RANKED:
        ordered, ends = torch.empty_like(keys), keys.new_empty(num_experts)
        block = 16
        _rank_kernel[(triton.cdiv(pairs + num_experts, block),)](
            keys, ordered, ends, out.order, out.inverse, pairs, E=num_experts, SLOT_BITS=slot_bits, BLOCK=block,
            CHUNK=512, num_warps=4, **start,
        )  # fmt: skip
    else:
        ordered, ends = _sort(keys, out, num_experts, slot_bits)
    chunk = 512
    _layout_kernel[(triton.cdiv(pairs, chunk),)](
        ordered, ends, out.counts, out.tiles, out.segments, len(out.tiles), E=num_experts, EP=how["EP"],
        SLOTS=how["SLOTS"], SLOT_BITS=slot_bits, ROWS=out.rows, CHUNK=chunk, EARLIER=2048, num_warps=4, **start,
    )  # fmt: skip


def _sort(keys: Tensor, out: Sorted, num_experts: int, slot_bits: int) -> tuple[Tensor, Tensor]:
    """What `_rank_kernel` does, by torch: the sorted keys and where each expert's end."""
    ordered, order = keys.sort(stable=True)
    out.order.copy_(order)
    place = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
    out.inverse.view(-1).scatter_(0, order, place.masked_fill_(ordered == 0x7FFFFFFF, -1))
    beyond = torch.arange(1, num_experts + 1, dtype=torch.int32, device=keys.device) << slot_bits
    return ordered, torch.searchsorted(ordered, beyond, out_int32=True)


@kernel()
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b)


@kernel()
def _write_lists(  # type: ignore[no-untyped-def]
    place, key, before, after, valid, num_tiles, num_segments, expert_start, segment_start, tiles, segments,
    SLOT_BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles and segments that begin or end in places [N] of the sorted keys; `before` and `after` are the neighbours'.

    Given what earlier places have: tiles, segments, and where the last expert and segment of them begin. Returns how
    many tiles and segments there are with these.
    """
    expert, slot = key >> SLOT_BITS, (key & ((1 << SLOT_BITS) - 1)) - 1
    new_expert = valid & ((place == 0) | (before >> SLOT_BITS != expert))
    start = tl.associative_scan(tl.where(new_expert, place, 0), 0, _larger)
    start = tl.maximum(start, expert_start)
    row = (place - start) % ROWS
    first, last = valid & (row == 0), valid & ((row == ROWS - 1) | (after >> SLOT_BITS != expert))
    adapted = valid & (slot >= 0)
    opens = adapted & (first | (before != key))
    closes = adapted & (last | (after != key))
    tile = num_tiles + tl.cumsum(first.to(tl.int32), 0) - 1
    segment = num_segments + tl.cumsum(opens.to(tl.int32), 0) - 1
    begin = tl.associative_scan(tl.where(opens, place, 0), 0, _larger)
    begin = tl.maximum(begin, segment_start)

    tl.store(tiles + tile * 5, expert, first)
    tl.store(tiles + tile * 5 + 1, place, first)
    tl.store(tiles + tile * 5 + 2, row + 1, last)
    tl.store(tiles + tile * 5 + 3, segment + 1 - opens.to(tl.int32), first)
    tl.store(tiles + tile * 5 + 4, segment + 1, last)
    tl.store(segments + segment * 4, expert, opens)
    tl.store(segments + segment * 4 + 1, slot, opens)
    tl.store(segments + segment * 4 + 2, place, opens)
    tl.store(segments + segment * 4 + 3, place - begin + 1, closes)
    return tl.max(tile, 0) + 1, tl.max(segment, 0) + 1


@kernel()
def route_kernel(  # type: ignore[no-untyped-def]
    logits, bias, slots, tokens, weight, order, inverse, counts, tiles, segments, rows, stride, capacity,
    BIAS: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SLOT_BITS: tl.constexpr, GP: tl.constexpr, TP: tl.constexpr,
    PAIR_BITS: tl.constexpr, ROWS: tl.constexpr, LAUNCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = TP * KP
    begin(LAUNCH, PDL)
    t = tl.arange(0, TP)
    w, key = choose(
        logits, bias, slots, tokens, t, rows, stride, BIAS, SLOTS, PADDED, SIGMOID, NORMALISE, SCALE, GROUPS,
        TOP_GROUPS, TOP2, E, EP, K, KP, SLOT_BITS, GP, TP,
    )  # fmt: skip
    j = tl.arange(0, KP)[None, :]
    real = (t < rows)[:, None] & (j < K)
    pair = t[:, None] * K + j
    tl.store(weight + pair, w, real)
    tl.store(inverse + pair, -1, real & (key == 0x7FFFFFFF))

    place = tl.arange(0, P)
    index = t[:, None] * KP + j
    ordered = tl.sort(tl.reshape(tl.where(key == 0x7FFFFFFF, key, (key << PAIR_BITS) | index), (P,)))
    valid = ordered != 0x7FFFFFFF
    index = ordered & ((1 << PAIR_BITS) - 1)
    pair = index // KP * K + index % KP
    tl.store(order + place, pair, valid)
    tl.store(inverse + pair, place, valid)
    key = tl.where(valid, ordered >> PAIR_BITS, 0x7FFFFFFF)
    before = tl.gather(key, tl.maximum(place - 1, 0), 0)
    after = tl.where(place == P - 1, 0x7FFFFFFF, tl.gather(key, tl.minimum(place + 1, P - 1), 0))
    num_tiles, num_segments = _write_lists(
        place, key, before, after, valid, 0, 0, 0, 0, tiles, segments, SLOT_BITS, ROWS
    )
    tl.store(counts, num_tiles)
    tl.store(counts + 1, num_segments)
    tl.store(tiles + place * 5 + 2, 0, (place >= num_tiles) & (place < capacity))


@kernel(do_not_specialize=["rows", "stride"])
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits, bias, slots, tokens, weight, keys, rows, stride,
    BIAS: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SLOT_BITS: tl.constexpr, GP: tl.constexpr, TP: tl.constexpr,
    LAUNCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(LAUNCH, PDL)
    t = tl.program_id(0) * TP + tl.arange(0, TP)
    w, key = choose(
        logits, bias, slots, tokens, t, rows, stride, BIAS, SLOTS, PADDED, SIGMOID, NORMALISE, SCALE, GROUPS,
        TOP_GROUPS, TOP2, E, EP, K, KP, SLOT_BITS, GP, TP,
    )  # fmt: skip
    j = tl.arange(0, KP)[None, :]
    real = (t < rows)[:, None] & (j < K)
    pair = t[:, None] * K + j
    tl.store(weight + pair, w, real)
    tl.store(keys + pair, key, real)


@kernel(do_not_specialize=["pairs"])
def _rank_kernel(  # type: ignore[no-untyped-def]
    keys, ordered, ends, order, inverse, pairs,
    E: tl.constexpr, SLOT_BITS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, LAUNCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Places of BLOCK pairs, or after all pairs of the ends of experts: how many keys are less, or equal and before."""
    begin(LAUNCH, PDL)
    block = tl.program_id(0) * BLOCK
    i = block + tl.arange(0, BLOCK)
    is_pair = i < pairs
    key = tl.load(keys + i, is_pair, other=0)
    key = tl.where(is_pair, key, ((i - pairs + 1) << SLOT_BITS) - 1)
    less = tl.zeros((BLOCK, CHUNK), tl.int32)
    for chunk in range(0, pairs, CHUNK):
        j = chunk + tl.arange(0, CHUNK)[None, :]
        other = tl.load(keys + j, j < pairs, other=0x7FFFFFFF) - (j < block).to(tl.int32)
        less -= (other - key[:, None]) >> 31  # a comparison would take twice the instructions
    j = block + tl.arange(0, BLOCK)[None, :]
    equal = tl.load(keys + j, j < pairs, other=0x7FFFFFFF) == key[:, None]
    place = tl.sum(less, 1) + tl.sum((equal & (j < i[:, None])).to(tl.int32), 1)

    real = is_pair & (key != 0x7FFFFFFF)
    tl.store(ordered + place, key, real)
    tl.store(order + place, i, real)
    tl.store(inverse + i, tl.where(real, place, -1), is_pair)
    tl.store(ends + i - pairs, place, (i >= pairs) & (i < pairs + E))


@kernel(do_not_specialize=["capacity"])
def _layout_kernel(  # type: ignore[no-untyped-def]
    ordered, ends, counts, tiles, segments, capacity,
    E: tl.constexpr, EP: tl.constexpr, SLOTS: tl.constexpr, SLOT_BITS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, EARLIER: tl.constexpr, LAUNCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What begins or ends at CHUNK places, and as many of the unused tiles. Places from ends[E - 1] on are nobody's."""
    begin(LAUNCH, PDL)
    chunk = tl.program_id(0) * CHUNK
    used = tl.load(ends + E - 1)
    place = chunk + tl.arange(0, CHUNK)
    valid = place < used
    key = tl.load(ordered + place, valid, other=0x7FFFFFFF)
    before = tl.load(ordered + place - 1, valid & (place > 0), other=0)
    after = tl.load(ordered + place + 1, place + 1 < used, other=0x7FFFFFFF)

    expert = tl.arange(0, EP)
    start = tl.load(ends + expert - 1, (expert > 0) & (expert < E), other=0)
    count = tl.load(ends + expert, expert < E, other=0) - start
    num_tiles = tl.sum((count + ROWS - 1) // ROWS, 0)
    tiles_before = tl.sum((tl.minimum(tl.maximum(chunk - start, 0), count) + ROWS - 1) // ROWS, 0)
    expert_start = tl.max(tl.where(start <= chunk, start, 0), 0)
    opened, latest = tl.zeros((EARLIER,), tl.int32), tl.zeros((EARLIER,), tl.int32)
    if SLOTS:
        end = tl.minimum(chunk, used)
        for first in range(0, end, EARLIER):
            p = first + tl.arange(0, EARLIER)
            k = tl.load(ordered + p, p < end, other=0)
            differs = k != tl.load(ordered + p - 1, (p > 0) & (p < end), other=0)
            row = (p - tl.load(ends + (k >> SLOT_BITS) - 1, k >> SLOT_BITS > 0, other=0)) % ROWS
            opens = ((k & ((1 << SLOT_BITS) - 1)) > 0) & (differs | (row == 0))
            opened += opens.to(tl.int32)
            latest = tl.where(opens, p, latest)

    _, num_segments = _write_lists(
        place, key, before, after, valid, tiles_before, tl.sum(opened, 0), expert_start, tl.max(latest, 0), tiles,
        segments, SLOT_BITS, ROWS,
    )  # fmt: skip
    tl.store(tiles + place * 5 + 2, 0, (place >= num_tiles) & (place < capacity))
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(counts, num_tiles)
        tl.store(counts + 1, num_segments)
