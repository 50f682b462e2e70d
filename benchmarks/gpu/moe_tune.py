"""Which configurations are best for decode steps of gpt-oss with MXFP4 experts: `moe_kernels --only tune`.

1. Every candidate of a product alone, for steps of 1, 16 and 64 rows with adapters; a few of route and shrink; packed
   weights with their scales among the words; and how fast the weights can be read at all in the order of the products.
2. Whole layers of 1, 4, 16 and 64 rows with and without adapters: for each number of parts that a sum may have, which
   must be the same for steps of all sizes, with the candidates that were best; plain and programmatic launches.
3. The same with other places for the launch of the next kernel, with the number of parts that was best for 16 rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks.gpu.moe_case import Layer
from benchmarks.gpu.moe_compile import Task, compile_all
from benchmarks.gpu.moe_report import (
    Report,
    check_layer,
    check_replays,
    expected_of,
    tag_of,
    time_layer,
    time_part,
)
from benchmarks.gpu.moe_stream import time_streams
from motet.kernels.gpu.moe import ProductConfig
from motet.kernels.gpu.moe_lora import ShrinkConfig
from motet.kernels.gpu.route import RouteConfig
from tests.kernels.gpu.shipped_moe import GPT_OSS, LayerPlan, default_plan

SIZES = (1, 4, 16, 64)
TUNED = {1: 1, 4: 1, 16: 16, 64: 64}
"""The size whose best candidates a size takes."""
PARTS = (1, 2, 4)
"""Parts of a sum."""


def one(
    features: int, warps: int, stages: int = 3, ranks: int = 64, *, depth: int = 96, split: int = 1,
    ahead: bool = False, registers: int = 0,
) -> ProductConfig:  # fmt: skip
    return ProductConfig(features, depth, warps, stages, ranks, split=split, ahead=ahead, registers=registers)


two = partial(one, warps=2, split=2, ahead=True)
four = partial(one, warps=4, split=4, ahead=True)

OLD = one(64, 2, ranks=32)
"""What was the default before."""
UP = {
    64: [
        OLD, one(64, 2), one(128, 2), two(32), two(32, ranks=32), two(64), two(64, ranks=32),
        four(32), four(32, warps=2),
    ],
    1: [
        OLD, one(32, 1, 4), one(32, 1, 4, ahead=True), one(32, 1, 6),
        two(32), two(32, ahead=False), two(32, stages=4), two(32, stages=5), two(32, warps=1, stages=4),
        four(32), four(32, ahead=False), four(32, stages=4), four(32, warps=2), one(32, 8, split=8, ahead=True),
    ],
    16: [
        OLD, one(64, 2), one(64, 2, ahead=True), one(128, 2), one(128, 2, ahead=True), one(32, 1, 4),
        two(32), two(32, ahead=False), two(32, stages=4), two(32, registers=80), two(32, ranks=32), two(32, depth=160),
        two(64), two(64, ahead=False), two(64, ranks=32), two(64, stages=4),
        four(32), four(32, ranks=32), four(32, warps=2), four(32, registers=80), four(64), four(64, warps=2),
    ],
}  # fmt: skip
DOWN = {
    64: [OLD, one(64, 2), one(128, 2), two(64), two(64, ranks=32), two(32), two(128), four(64), four(32)],
    1: [
        OLD, one(32, 1, 6), one(32, 1, 6, ahead=True), two(32), two(32, ahead=False), two(32, stages=4),
        two(32, stages=5), four(32), four(32, ahead=False), four(32, stages=4), one(32, 8, split=8, ahead=True),
    ],
    16: [
        OLD, one(64, 2), one(64, 2, ahead=True), one(64, 2, 5), one(128, 2), one(128, 2, ahead=True), one(32, 1, 6),
        two(32), two(32, stages=4), two(64), two(64, ahead=False), two(64, stages=4), two(64, registers=80),
        two(64, ranks=32), two(64, depth=160), two(128), two(128, ranks=32),
        four(32), four(64), four(64, ranks=32), four(64, warps=2), four(128),
    ],
}  # fmt: skip
SHRINK = [
    ShrinkConfig(), ShrinkConfig(stages=7), ShrinkConfig(depth=128), ShrinkConfig(warps=4, depth=128),
    ShrinkConfig(warps=4), ShrinkConfig(ranks=32, lanes=1, stages=3),
]  # fmt: skip
ROUTE = [RouteConfig(), RouteConfig(scores=2), RouteConfig(scores=8), RouteConfig(scores=16)]
PLACES = {
    "start": (1, 2, 1, 1), "wait": (2, 2, 2, 2), "loop": (2, 2, 3, 2), "never": (2, 2, 0, 2),
    "no shrink": (2, 0, 3, 2), "ends start": (1, 2, 3, 1),
}  # fmt: skip
"""When route, shrink, products and combine let the next kernel start."""


def label(config: object) -> str:
    if isinstance(config, RouteConfig):
        return f"scores{config.scores}"
    if isinstance(config, ShrinkConfig):
        return f"w{config.warps} K{config.depth} r{config.ranks} lanes{config.lanes} s{config.stages}"
    assert isinstance(config, ProductConfig)
    more = f" g{config.group}" * (config.group > 1) + " wgmma" * config.wgmma
    more += f" S{config.split}" * (config.split > 1) + " ahead" * config.ahead
    more += f" regs{config.registers}" * (config.registers > 0)
    return f"F{config.features} K{config.depth} w{config.warps} s{config.stages} r{config.ranks}{more}"


def launched(plan: LayerPlan, place: str) -> LayerPlan:
    """The plan with other places for the launch of the next kernel."""
    route, shrink, product, combine = PLACES[place]
    return replace(
        plan,
        route=replace(plan.route, launch=route),
        shrink=replace(plan.shrink, launch=shrink),
        up=replace(plan.up, launch=product),
        down=replace(plan.down, launch=product),
        combine=replace(plan.combine, launch=combine),
    )


def candidates(tokens: int) -> Iterator[tuple[str, LayerPlan]]:
    """The part that differs from the default, and the plan."""
    base = default_plan(GPT_OSS, tokens)
    for up in UP[tokens]:
        yield "up", replace(base, up=up)
    for down in DOWN[tokens]:
        yield "down", replace(base, down=down)
    for shrink in SHRINK:
        yield "shrink_up", replace(base, shrink=shrink)
    for route in ROUTE:
        yield "route", replace(base, route=route)


def candidate_tasks() -> Iterator[Task]:
    """What to compile for the first part; a plan takes a candidate of each product."""
    for tokens in UP:
        base = default_plan(GPT_OSS, tokens)
        yield "gpt-oss", tokens, base, False, False
        for up, down in itertools.zip_longest(UP[tokens], DOWN[tokens]):
            yield "gpt-oss", tokens, replace(base, up=up or base.up, down=down or base.down), True, False
        for shrink, route in itertools.zip_longest(SHRINK, ROUTE):
            plan = replace(base, shrink=shrink or base.shrink, route=route or base.route)
            yield "gpt-oss", tokens, plan, True, False
    yield "gpt-oss joined", 16, default_plan(GPT_OSS, 16), True, False


@dataclass
class _Best:
    """The best candidate of each part, number of parts of a sum, and size, and its time."""

    found: dict[tuple[str, int, int], tuple[float, ProductConfig]] = field(default_factory=dict)

    def see(self, part: str, tokens: int, config: ProductConfig, took: float) -> None:
        if config.depth == 96 and took < self.took(part, config.split, tokens):
            self.found[part, config.split, tokens] = took, config

    def took(self, part: str, parts: int, tokens: int) -> float:
        return self.found[part, parts, tokens][0] if (part, parts, tokens) in self.found else math.inf

    def plan(self, parts: int, tokens: int) -> LayerPlan:
        plan = default_plan(GPT_OSS, tokens)
        up, down = (self.found.get((part, parts, TUNED[tokens]), (0.0, OLD))[1] for part in ("up", "down"))
        return replace(
            plan, up=replace(up, launch=plan.up.launch), down=replace(down, launch=plan.down.launch)
        )


def tune(report: Report) -> None:
    layers = [Layer(GPT_OSS, lora=True) for _ in range(3)]
    best = _time_candidates(report, layers)
    time_streams(report, layers)
    _time_joined(report)
    favourite = min(PARTS, key=lambda parts: best.took("up", parts, 16) + best.took("down", parts, 16))
    old = {
        tokens: launched(replace(default_plan(GPT_OSS, tokens), up=OLD, down=OLD), "start")
        for tokens in SIZES
    }
    families = {"before": old} | {
        f"S{parts}": {tokens: best.plan(parts, tokens) for tokens in SIZES} for parts in PARTS
    }
    places = {
        place: {tokens: launched(best.plan(favourite, tokens), place) for tokens in SIZES} for place in PLACES
    }
    cases = [(tokens, lora) for lora in (True, False) for tokens in SIZES]
    kinds: list[tuple[dict[int, LayerPlan], tuple[bool, ...]]] = []
    kinds += [(plans, (False, True)) for plans in families.values()]
    kinds += [(plans, (True,)) for plans in places.values()]
    compile_all(
        [
            ("gpt-oss", tokens, plans[tokens], lora, pdl)
            for plans, launches in kinds
            for tokens, lora in cases
            for pdl in launches
        ]
    )
    for name, plans in families.items():
        report.tables += [
            f"{name:6} T{tokens}: {label(plan.up)} | {label(plan.down)}" for tokens, plan in plans.items()
        ]
    report.tables.append("layers, us: plain and programmatic launches")
    _time_table(report, layers, cases, families, (False, True))
    report.tables.append(f"layers with S{favourite}, us: programmatic launches at")
    _time_table(report, layers, cases, places, (True,))


def _time_candidates(report: Report, layers: Sequence[Layer]) -> _Best:
    best = _Best()
    for tokens in UP:
        base, tag = default_plan(GPT_OSS, tokens), tag_of("", layers, tokens)
        check_layer(report, "gpt-oss", layers[0], tokens, base)
        check_layer(report, "gpt-oss base", layers[0].base(), tokens, base)
        expected = expected_of(layers, tokens, base)
        for part, plan in candidates(tokens):
            config = {"up": plan.up, "down": plan.down, "route": plan.route}.get(part, plan.shrink)
            took = time_part(report, f"{tag} [{label(config)}]", layers, tokens, plan, part, expected)
            if isinstance(config, ProductConfig):
                best.see(part, tokens, config, took)
    return best


def _time_joined(report: Report) -> None:
    shape, plan = replace(GPT_OSS, joined=True), default_plan(GPT_OSS, 16)
    layers = [Layer(shape, lora=True) for _ in range(3)]
    check_layer(report, "gpt-oss joined", layers[0], 16, plan)
    for part in ("up", "down"):
        time_part(
            report, f"{tag_of('joined', layers, 16)} [{label(getattr(plan, part))}]", layers, 16, plan, part
        )


def _time_table(
    report: Report, layers: Sequence[Layer], cases: Sequence[tuple[int, bool]],
    columns: dict[str, dict[int, LayerPlan]], kinds: Sequence[bool],
) -> None:  # fmt: skip
    """A line for each case, a column for each plan."""
    report.tables.append(" " * 10 + "".join(f"{name:>16}" for name in columns))
    for tokens, lora in cases:
        mine = layers if lora else [layer.base() for layer in layers]
        line = f"T{tokens} {'lora' if lora else 'base':6}".ljust(10)
        for name, plans in columns.items():
            tag, plan = f"{tag_of('gpt-oss', mine, tokens)} {name}", plans[tokens]
            same = check_replays(report, tag, mine, tokens, plan, 4)
            took = [
                time_layer(report, tag, mine, tokens, plan, pdl=pdl, shown=False) if same else math.inf
                for pdl in kinds
            ]
            line += " / ".join(f"{us:.1f}" for us in took).rjust(16)
        report.tables.append(f"{line}   floor {report.rows[-1].get('floor', 0.0):.1f}")
