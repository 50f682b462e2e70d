"""Experts of tokens from their router scores, on the device: a part of the kernels of `route`, which says how."""

from __future__ import annotations

from motet.kernels.gpu.jit import kernel, tl


@kernel()
def choose(  # type: ignore[no-untyped-def]
    logits, bias, slots, tokens, t, rows, stride,
    BIAS: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SLOT_BITS: tl.constexpr, GP: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """Weights [TP, KP] and keys expert << SLOT_BITS | slot + 1 [TP, KP] of tokens t [TP]; padding has the last key."""
    real = t < rows
    if PADDED:
        real = real & (t < tl.load(tokens))
    column = tl.arange(0, EP)[None, :]
    inside = real[:, None] & (column < E)
    g = tl.load(logits + t[:, None].to(tl.int64) * stride + column, inside, other=-float("inf"))
    g = g.to(tl.float32)
    if SIGMOID:
        score = tl.where(inside, 1.0 / (1.0 + tl.exp(-g)), 0.0)
    else:
        score = tl.where(inside, tl.exp(g - tl.where(real, tl.max(g, 1), 0.0)[:, None]), 0.0)
        if BIAS or not NORMALISE:  # else it cancels; integers have the same sum in every order
            total = tl.sum((score * 2.0**40).to(tl.int64), 1).to(tl.float32) * 2.0**-40
            score = score / tl.where(real, total, 1.0)[:, None]
    choice = g
    if BIAS:
        choice = score + tl.load(bias + column, column < E, other=0.0)
    elif GROUPS > 1:
        choice = score
    choice = tl.where(choice == choice, choice, -3e38)  # a row of NaN still gets k different experts
    choice = tl.where(column < E, choice, -float("inf"))
    if GROUPS > 1:
        choice = _only_best_groups(choice, column, GROUPS, TOP_GROUPS, TOP2, E // GROUPS, GP, TP)

    place = tl.arange(0, KP)[None, :]
    weight = tl.zeros((TP, KP), tl.float32)
    expert = tl.zeros((TP, KP), tl.int32)
    total = tl.zeros((TP,), tl.float32)
    for j in range(K):
        best = tl.argmax(choice, 1)[:, None]
        chosen = column == best
        found = tl.sum(tl.where(chosen, score, 0.0), 1)
        total += found
        weight = tl.where(place == j, found[:, None], weight)
        expert = tl.where(place == j, best, expert)
        choice = tl.where(chosen, -float("inf"), choice)
    if NORMALISE:
        weight = weight / (total + 1e-20)[:, None]
    weight = tl.where(real[:, None], weight * SCALE, 0.0)
    key = expert << SLOT_BITS
    if SLOTS:
        key += (tl.load(slots + t, real, other=-1) + 1)[:, None]
    key = tl.where(real[:, None] & (place < K), key, 0x7FFFFFFF)
    return weight, key


@kernel()
def _only_best_groups(  # type: ignore[no-untyped-def]
    choice, column, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, SIZE: tl.constexpr,
    GP: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    group = tl.arange(0, GP)[None, :]
    best = tl.full((TP, GP), -float("inf"), tl.float32)
    for i in range(GROUPS):
        mine = tl.where(column // SIZE == i, choice, -float("inf"))
        top = tl.max(mine, 1)
        if TOP2:
            top += tl.max(tl.where(column == tl.argmax(mine, 1)[:, None], -float("inf"), mine), 1)
        best = tl.where(group == i, top[:, None], best)
    kept = tl.zeros(choice.shape, tl.int1)
    for _ in range(TOP_GROUPS):
        first = tl.argmax(best, 1)[:, None]
        kept = kept | (column // SIZE == first)
        best = tl.where(group == first, -float("inf"), best)
    return tl.where(kept, choice, -float("inf"))
