"""Layers of experts for `moe_kernels`: random weights and adapters, one step's launches, references, bytes moved."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from motet.kernels.gpu.combine import Normed, combine, combine_torch
from motet.kernels.gpu.lora import RankBlocks
from motet.kernels.gpu.moe import ExpertWeights, product, product_torch
from motet.kernels.gpu.moe_lora import ExpertUpdate, shrink, shrink_torch, shrunk
from motet.kernels.gpu.mxfp4 import Mxfp4
from motet.kernels.gpu.route import Sorted, route, route_torch
from motet.kernels.route import RoutingRule
from tests.kernels.gpu.shipped_moe import LayerPlan, Shape

ADAPTERS, RANK = 8, 32
DEVICE, KIND = "cuda", torch.bfloat16


class Layer:
    """Random weights and adapters of one layer on the device."""

    def __init__(self, shape: Shape, *, lora: bool) -> None:
        self.shape = shape
        self.gate_up = self._weights(2 * shape.width, shape.hidden)
        self.down = self._weights(shape.hidden, shape.width)
        self.table = self._table() if lora else None

    def _weights(self, features: int, depth: int) -> ExpertWeights:
        experts = self.shape.num_experts
        if not self.shape.packed:
            weight = torch.empty(experts, features, depth, dtype=KIND, device=DEVICE)
            return ExpertWeights(weight.normal_(0, depth**-0.5))
        tiles = experts, features // 32, depth // 32
        words = torch.randint(-(2**31), 2**31, (*tiles, 128), dtype=torch.int32, device=DEVICE)
        scales = torch.randint(116, 121, (*tiles, 8, 4), dtype=torch.uint8, device=DEVICE) + 126
        scales = scales.view(torch.int32).squeeze(-1)
        if self.shape.joined:
            both = torch.cat([words, scales], -1)
            words, scales = both[..., :128], both[..., 128:]
        bias = torch.empty(experts, features, dtype=KIND, device=DEVICE).normal_()
        return ExpertWeights(Mxfp4(words, scales), bias)

    def base(self) -> Layer:
        """The same weights without adapters."""
        other = copy.copy(self)
        other.table = None
        return other

    def _table(self) -> RankBlocks:
        """ADAPTERS adapters of rank RANK on every expert; gate and up share A where experts are fused (MXFP4)."""
        experts, hidden, width = self.shape.num_experts, self.shape.hidden, self.shape.width
        a_size, b_size = (hidden, hidden, width), (width, width, hidden)
        first = torch.zeros(3 * experts, ADAPTERS, dtype=torch.int32)
        a: list[int] = []
        b: list[int] = []
        at = 0
        for slot in range(ADAPTERS):
            for site in range(3 * experts):
                first[site, slot] = len(a)
                side = site % 3
                if side == 1 and self.shape.packed:
                    a += a[-(RANK // 16) :]
                else:
                    a += [at + 16 * j * a_size[side] for j in range(RANK // 16)]
                    at += RANK * a_size[side]
                b += [at + 16 * j * b_size[side] for j in range(RANK // 16)]
                at += RANK * b_size[side]
        return RankBlocks(
            first.to(DEVICE),
            torch.full_like(first, RANK // 16).to(DEVICE),
            torch.tensor(a).to(DEVICE),
            torch.tensor(b).to(DEVICE),
            torch.full((len(a),), 16, dtype=torch.int32, device=DEVICE),
            torch.full((len(a),), 2.0, device=DEVICE),
            torch.empty(at, dtype=KIND, device=DEVICE).normal_(0, hidden**-0.5),
        )


class Step:
    """One layer's launches on one batch of tokens, with its workspaces."""

    def __init__(self, one: Layer, tokens: int, plan: LayerPlan, *, pdl: bool = False) -> None:
        shape, self.layer, self.plan, self.pdl = one.shape, one, plan, pdl
        self.rule = RoutingRule(shape.top_k, True)
        self.x = torch.randn(tokens, shape.hidden, device=DEVICE).to(KIND)
        self.logits = torch.randn(tokens, shape.num_experts, device=DEVICE)
        self.slots = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % ADAPTERS if one.table else None
        self.real = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
        self.work = self.empty()
        pairs = tokens * shape.top_k
        self.a = torch.empty(pairs, shape.width, dtype=KIND, device=DEVICE)
        self.y = torch.empty(pairs, shape.hidden, device=DEVICE)
        self.residual = torch.zeros(tokens, shape.hidden, device=DEVICE)
        self.norm = Normed(torch.ones(shape.hidden, device=DEVICE), 1e-5, torch.empty_like(self.x))
        self.updates: list[ExpertUpdate | None] = [None, None]
        if one.table is not None:
            self.updates = [
                ExpertUpdate(one.table, 2 * i, shrunk(pairs, 2 - i, RANK, self.x)) for i in range(2)
            ]

    def use(self, other: Step) -> None:
        """Take the other's workspaces and residual, as the next layer of a model does."""
        self.work, self.a, self.y, self.residual, self.norm = (
            other.work, other.a, other.y, other.residual, other.norm,
        )  # fmt: skip
        self.x = other.norm.out
        for i, its in enumerate(other.updates):
            mine = self.updates[i]
            if mine is not None and its is not None:
                self.updates[i] = replace(mine, z=its.z)

    def empty(self) -> Sorted:
        """Lists for the batch, poisoned."""
        shape, adapters = self.layer.shape, ADAPTERS if self.layer.table else 0
        work = Sorted.empty(
            len(self.x), shape.top_k, shape.num_experts, self.plan.rows, adapters, torch.device(DEVICE)
        )
        for part in (work.order, work.inverse, work.counts, work.tiles, work.segments):
            part.fill_(-77)
        return work

    def route(self) -> None:
        route(self.logits, self.rule, self.slots, self.work, self.real, config=self.plan.route, pdl=self.pdl)

    def shrink_up(self) -> None:
        if self.updates[0] is not None:
            shrink(self.x, self.work, self.updates[0], gather=True, config=self.plan.shrink, pdl=self.pdl)

    def up(self) -> None:
        product(
            self.x, self.layer.gate_up, self.work, self.a, self.plan.up, gather=True,
            activation=self.layer.shape.activation, update=self.updates[0], pdl=self.pdl,
        )  # fmt: skip

    def shrink_down(self) -> None:
        if self.updates[1] is not None:
            shrink(self.a, self.work, self.updates[1], gather=False, config=self.plan.shrink, pdl=self.pdl)

    def down(self) -> None:
        product(
            self.a, self.layer.down, self.work, self.y, self.plan.down, gather=False, update=self.updates[1],
            pdl=self.pdl,
        )  # fmt: skip

    def combine(self) -> None:
        combine(self.y, self.work, self.residual, norm=self.norm, config=self.plan.combine, pdl=self.pdl)

    def all(self) -> None:
        """A whole layer."""
        self.route()
        self.shrink_up()
        self.up()
        self.shrink_down()
        self.down()
        self.combine()

    def expected(self, side: int) -> Tensor:
        """What up (side 0) or down (1) must give of what the launches before it left, float64."""
        out = torch.empty_like(self.y if side else self.a, dtype=torch.float64)
        x, weight = (self.a, self.layer.down) if side else (self.x, self.layer.gate_up)
        how = None if side else self.layer.shape.activation
        product_torch(x, weight, self.work, out, gather=not side, activation=how, update=self.updates[side])
        return out

    def weight_bytes(self, part: str) -> float:
        """Bytes of the weights of the experts touched by a product."""
        shape = self.layer.shape
        experts = len(set(self.work.tiles[: int(self.work.counts[0]), 0].tolist()))
        size = experts * shape.hidden * shape.width * (4.25 / 8 if shape.packed else 2.0)
        return {"up": 2 * size, "down": size}.get(part, 0.0)

    def moved(self, part: str) -> float:
        """Bytes that a part must read: experts touched, and factors of the (adapter, expert) pairs."""
        shape = self.layer.shape
        segments = self.work.segments[: int(self.work.counts[1]), :2].tolist()
        factor = 2 * RANK * len(set(map(tuple, segments)))
        return self.weight_bytes(part) + {
            "up": 2 * factor * shape.width,
            "down": factor * shape.hidden,
            "shrink_up": factor * shape.hidden * (1 if shape.packed else 2),
            "shrink_down": factor * shape.width,
        }.get(part, 0.0)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def route_error(step: Step) -> float:
    """Of the weights; 1 if any list differs."""
    reference = step.empty()
    route_torch(step.logits, step.rule, step.slots, reference, step.real)
    tiles, segments = reference.counts.tolist()
    lists = (
        (step.work.counts, reference.counts, 2),
        (step.work.order, reference.order, len(reference.order)),
        (step.work.inverse, reference.inverse, len(step.x)),
        (step.work.tiles, reference.tiles, tiles),
        (step.work.segments, reference.segments, segments),
    )
    if not all(torch.equal(mine[:n], theirs[:n]) for mine, theirs, n in lists):
        return 1.0
    return error(step.work.weight, reference.weight)


def layer_errors(one: Layer, tokens: int, plan: LayerPlan) -> dict[str, tuple[float, float]]:
    """Error and bound of every launch, each on what the launch before it left, with poisoned outputs."""
    step = Step(one, tokens, plan)
    step.route()
    errors = {"route": (route_error(step), 1e-5)}
    parts = ((step.shrink_up, step.up, step.a, 5e-3), (step.shrink_down, step.down, step.y, 1e-4))
    for side, (shrink_part, product_part, out, bound) in enumerate(parts):
        update, x, name = step.updates[side], step.a if side else step.x, "down" if side else "up"
        if update is not None:
            update.z.fill_(torch.nan)
            shrink_part()
            expected = replace(update, z=torch.zeros_like(update.z))
            shrink_torch(x, step.work, expected, gather=not side)
            errors[f"shrink {name}"] = error(update.z.nan_to_num(), expected.z), 5e-3
        out.fill_(torch.nan)
        product_part()
        errors[name] = error(out, step.expected(side)), bound
    residual, norm = step.residual.clone(), replace(step.norm, out=torch.empty_like(step.norm.out))
    combine_torch(step.y, step.work, residual, norm=norm)
    step.combine()
    errors["combine"] = error(step.residual, residual), 1e-5
    errors["norm"] = error(step.norm.out, norm.out), 5e-3
    return errors
