"""Mixture of experts: one sort by (expert, adapter), expert products, weighted combine.

Semantics, for token t whose router chose the experts E_t with weights w_e (`kernels.route`):
    out[t] = sum_{e in E_t} w_e · down_e(act(gate_up_e x[t] + gate_up_bias_e)) + down_bias_e
    where gate_up_e and down_e include the update of token t's adapter for expert e; with `on_input` w_e multiplies
    x[t] instead.
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

from motet.kernels.activation import SILU, Activation, activate
from motet.kernels.linear import Weight, linear
from motet.kernels.lora import LoraRows, LoraTable, Segment, lora_add, lora_add_torch, split_rows
from motet.kernels.route import RoutingRule, choose_experts


@dataclass(frozen=True)
class Experts:
    """The experts of a layer: weights per expert, biases [E, 2·I] and [E, H], the activation."""

    gate_up: Sequence[Weight]
    down: Sequence[Weight]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation = SILU


@dataclass(frozen=True)
class Routing:
    """Pairs in sorted order: `token` [P] and `expert` [P] of each, `inverse` [T, k] where a token's pairs are,
    `weight` [T, k], `bounds` the rows [start, end) of each expert, `lora` the rows that carry an adapter or None."""

    token: Tensor
    expert: Tensor
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
    x: Tensor, logits: Tensor, rule: RoutingRule, gate_up: Sequence[Tensor], down: Sequence[Tensor],
    experts: Experts, lora: ExpertLora | None = None,
) -> Tensor:  # fmt: skip
    """Reference: token by token, expert by expert, with plain weights; biases and activation from `experts`."""
    out = torch.zeros_like(x)
    all_weights, all_experts = choose_experts(logits, rule)
    for t in range(x.shape[0]):
        for weight, expert in zip(all_weights[t], all_experts[t].tolist(), strict=True):
            row = x[t : t + 1] * weight if rule.on_input else x[t : t + 1]
            slot = -1 if lora is None else int(lora.slots[t])
            one = [Segment(0, 1, slot, 3 * expert)] if slot >= 0 else []
            h = row @ gate_up[expert].T
            if experts.gate_up_bias is not None:
                h += experts.gate_up_bias[expert]
            if lora is not None:
                half = h.shape[1] // 2
                lora_add_torch(h, row, lora.table, lora.site, (half, half), one)
            a = activate(h, experts.activation)
            o = a @ down[expert].T
            if experts.down_bias is not None:
                o += experts.down_bias[expert]
            if lora is not None:
                lora_add_torch(o, a, lora.table, lora.site + 2, (o.shape[1],), one)
            out[t] += o[0] if rule.on_input else weight * o[0]
    return out


def moe(
    x: Tensor, logits: Tensor, rule: RoutingRule, experts: Experts, lora: ExpertLora | None = None
) -> Tensor:
    """x [T, H] and router logits [T, E] to [T, H]; see the module's semantics."""
    if len(x) == 0:  # a step that wants no logits has no rows in the last layer
        return torch.empty_like(x)
    routing = route(logits, rule, lora)
    rows = x[routing.token]
    if rule.on_input:
        sorted_weight = torch.empty(len(routing.token)).scatter_(
            0, routing.inverse.view(-1), routing.weight.view(-1)
        )
        rows *= sorted_weight[:, None]
    h = _grouped(rows, experts.gate_up, experts.gate_up_bias, routing)
    if lora is not None and routing.lora is not None:
        half = h.shape[1] // 2
        lora_add(h, rows, lora.table, lora.site, (half, half), routing.lora)
    a = activate(h, experts.activation)
    o = _grouped(a, experts.down, experts.down_bias, routing)
    if lora is not None and routing.lora is not None:
        lora_add(o, a, lora.table, lora.site + 2, (o.shape[1],), routing.lora)
    pairs = o[routing.inverse]
    return (pairs if rule.on_input else pairs * routing.weight[..., None]).sum(1)


def route(logits: Tensor, rule: RoutingRule, lora: ExpertLora | None) -> Routing:
    """logits [T, E] float32 to the sorted pairs of each token's experts."""
    tokens, num_experts = logits.shape
    weight, expert = choose_experts(logits, rule)
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
        token=torch.from_numpy(order // rule.top_k),
        expert=torch.from_numpy(ordered // stride),
        inverse=torch.from_numpy(inverse.reshape(tokens, rule.top_k)),
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


def _grouped(rows: Tensor, weights: Sequence[Weight], bias: Tensor | None, routing: Routing) -> Tensor:
    """Each expert's weight applied to its run of rows, and its bias [E, N] added."""
    out = rows.new_empty(rows.shape[0], weights[0].out_features)
    for (start, end), weight in zip(routing.bounds, weights, strict=True):
        if end > start:
            out[start:end] = linear(rows[start:end], weight)
    return out if bias is None else out.add_(bias[routing.expert])
