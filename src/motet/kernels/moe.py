"""Mixture of experts: routing, one sort by (expert, adapter), expert products, weighted combine.

Semantics, for token t with router logits g[t] = x[t] @ router.T:
    p = softmax(g[t]); E_t = the k experts of largest p; w_e = p_e, with `normalise` p_e / sum_{E_t} p
    out[t] = sum_{e in E_t} w_e · down_e(silu(gate_e x[t]) * up_e x[t])
    where gate_e, up_e and down_e include the update of token t's adapter for expert e.
    x: [T, H] float32; gate_up: per expert [2·I, H]; down: per expert [H, I].

The pairs (token, expert) are sorted once by (expert, adapter slot); the base products, the updates and the combine all
use that order, so cost follows the pairs that exist and not how many adapters are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from motet.kernels.activation import silu_mul
from motet.kernels.linear import PackedWeight, linear
from motet.kernels.lora import LoraRows, LoraTable, Segment, lora_add, lora_add_torch, split_rows


@dataclass(frozen=True)
class Routing:
    """Pairs in sorted order: `token` [P] their token, `inverse` [T, k] where a token's pairs are, `weight` [T, k],
    `bounds` the rows [start, end) of each expert, `lora` the rows that carry an adapter (None: none does)."""

    token: Tensor
    inverse: Tensor
    weight: Tensor
    bounds: Sequence[tuple[int, int]]
    lora: LoraRows | None


@dataclass(frozen=True)
class ExpertLora:
    """Adapters of one layer's experts: expert e's gate, up and down are sites `site + 3·e`, `+ 1`, `+ 2`.

    `slots` [T] is each token's adapter slot, -1 for the base.
    """

    table: LoraTable
    site: int
    slots: Tensor


def moe_torch(
    x: Tensor, router: Tensor, gate_up: Sequence[Tensor], down: Sequence[Tensor], top_k: int,
    normalise: bool, lora: ExpertLora | None = None,
) -> Tensor:  # fmt: skip
    """Reference: token by token, expert by expert."""
    out = torch.zeros_like(x)
    probabilities = torch.softmax(x @ router.T, dim=-1)
    for t in range(x.shape[0]):
        weights, experts = probabilities[t].topk(top_k)
        weights = weights / weights.sum() if normalise else weights
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            row = x[t : t + 1]
            slot = -1 if lora is None else int(lora.slots[t])
            one = [Segment(0, 1, slot, 3 * expert)] if slot >= 0 else []
            h = row @ gate_up[expert].T
            if lora is not None:
                half = h.shape[1] // 2
                lora_add_torch(h, row, lora.table, lora.site, (half, half), one)
            a = silu_mul(h)
            o = a @ down[expert].T
            if lora is not None:
                lora_add_torch(o, a, lora.table, lora.site + 2, (o.shape[1],), one)
            out[t] += weight * o[0]
    return out


def moe(
    x: Tensor, router: PackedWeight, gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], top_k: int,
    normalise: bool, lora: ExpertLora | None = None,
) -> Tensor:  # fmt: skip
    """x [T, H] to [T, H]; see the module's semantics."""
    routing = route(linear(x, router), top_k, normalise, lora)
    rows = x[routing.token]
    h = _grouped(rows, gate_up, routing)
    if lora is not None and routing.lora is not None:
        half = h.shape[1] // 2
        lora_add(h, rows, lora.table, lora.site, (half, half), routing.lora)
    a = silu_mul(h)
    o = _grouped(a, down, routing)
    if lora is not None and routing.lora is not None:
        lora_add(o, a, lora.table, lora.site + 2, (o.shape[1],), routing.lora)
    return (o[routing.inverse] * routing.weight[..., None]).sum(1)


def route(logits: Tensor, top_k: int, normalise: bool, lora: ExpertLora | None) -> Routing:
    """logits [T, E] float32 to the sorted pairs of each token's top-k experts."""
    tokens, num_experts = logits.shape
    weight, expert = torch.softmax(logits, dim=-1).topk(top_k, dim=-1)
    if normalise:
        weight = weight / weight.sum(-1, keepdim=True)
    key = expert.numpy().astype(np.int64)
    slots = None if lora is None else lora.slots.numpy()
    stride = 1
    if slots is not None:
        stride = int(slots.max()) + 2
        key = key * stride + (slots[:, None] + 1)
    flat = key.reshape(-1)
    order = np.argsort(flat, kind="stable")
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.arange(len(order))
    ordered = flat[order]
    edges = np.searchsorted(ordered, np.arange(num_experts + 1) * stride)
    return Routing(
        token=torch.from_numpy(order // top_k),
        inverse=torch.from_numpy(inverse.reshape(tokens, top_k)),
        weight=weight,
        bounds=[(int(a), int(b)) for a, b in pairwise(edges)],
        lora=None if slots is None else split_rows(_segments(ordered, stride)),
    )


def _segments(ordered: np.ndarray[tuple[int], np.dtype[np.int64]], stride: int) -> list[Segment]:
    """Runs of equal (expert, slot) in sorted pairs, the base's runs left out."""
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    ends = np.append(starts[1:], len(ordered))
    experts, slots = ordered[starts] // stride, ordered[starts] % stride - 1
    return [
        Segment(int(start), int(end), int(slot), 3 * int(expert))
        for start, end, slot, expert in zip(starts, ends, slots, experts, strict=True)
        if slot >= 0
    ]


def _grouped(rows: Tensor, weights: Sequence[PackedWeight], routing: Routing) -> Tensor:
    """Each expert's weight applied to its run of rows."""
    out = rows.new_empty(rows.shape[0], weights[0].out_features)
    for (start, end), weight in zip(routing.bounds, weights, strict=True):
        if end > start:
            out[start:end] = linear(rows[start:end], weight)
    return out
