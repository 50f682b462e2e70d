"""What the parts of `moe_kernels` share: a report of checks and times, checks of layers, the timing of a launch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import BANDWIDTH, OPERATIONS, Call, captured, measure
from benchmarks.gpu.moe_case import Layer, Step, error, layer_errors, route_error
from tests.kernels.gpu.shipped_moe import LayerPlan


class Report:
    """What was checked and measured, printed at the end: checks, times, and tables that parts made of times."""

    def __init__(self) -> None:
        self.checks: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.tables: list[str] = []

    def check(self, name: str, got: float, bound: float) -> bool:
        """What is not a number fails."""
        fine = got <= bound
        self.checks.append(f"{'ok  ' if fine else 'FAIL'} {name}: {got:.1e}")
        return fine

    def time(
        self, name: str, calls: Sequence[Call], moved: float, flops: float = 0.0, launches: int = 24,
        *, shown: bool = True,
    ) -> float:  # fmt: skip
        """`moved` bytes and `flops` operations of one call; its microseconds, infinite if it cannot run. `shown`: it
        is printed by itself, not only in a table."""
        floor = max(moved / BANDWIDTH, flops / OPERATIONS) * 1e6
        row: dict[str, Any] = {"name": name, "floor": round(floor, 2), "shown": shown}
        self.rows.append(row)
        try:
            row["us"], row["spread"] = (round(value, 2) for value in measure(calls, launches))
        except Exception as problem:  # noqa: BLE001  # a variant that needs too much of something
            return self._failed(row, problem)
        rate = f"{flops / row['us'] / 1e6:.0f} TFLOP/s" if flops else f"{moved / row['us'] / 1e6:.2f} TB/s"
        row["rate"] = rate
        return float(row["us"])

    def fail(self, name: str, problem: Exception) -> float:
        """A row for what could not even be prepared."""
        self.rows.append({"name": name})
        return self._failed(self.rows[-1], problem)

    def _failed(self, row: dict[str, Any], problem: Exception) -> float:
        row["error"] = f"{type(problem).__name__} {str(problem)[:60]}"
        return math.inf

    def finish(self, path: Path | None) -> int:
        """Print checks and tables; 1 if a check failed."""
        bad = [line for line in self.checks if line.startswith("FAIL")]
        print(f"{len(self.checks) - len(bad)} checks passed, {len(bad)} failed; some of them:")
        for line in bad[:30] or self.checks[:: max(len(self.checks) // 10, 1)]:
            print(" ", line)
        for row in self.rows:
            if "error" in row:
                print(f"{row['name']:52} {row['error']}")
            if "error" in row or not row["shown"]:
                continue
            floor = (
                f"{row['floor']:7.2f} {row['floor'] / row['us']:4.0%} {row['rate']}" if row["floor"] else ""
            )
            print(f"{row['name']:52} {row['us']:8.2f} us ±{row['spread']:2.0f}% {floor}")
        for line in self.tables:
            print(line)
        if path is not None:
            content = {"rows": self.rows, "tables": self.tables, "checks": self.checks}
            path.write_text(json.dumps(content, indent=1))
        return int(bool(bad))


def check_layer(report: Report, name: str, one: Layer, tokens: int, plan: LayerPlan) -> None:
    """Every launch of a layer against its reference."""
    for part, (got, bound) in layer_errors(one, tokens, plan).items():
        report.check(f"{name} T{tokens} rows{plan.rows} {part}", got, bound)


def check_replays(
    report: Report, name: str, layers: Sequence[Layer], tokens: int, plan: LayerPlan, times: int = 10
) -> bool:
    """A graph of layers with programmatic launches, which share workspaces as a model's do, against eager launches
    without: the same bits for other inputs each time."""
    eager, graphed = ([Step(one, tokens, plan, pdl=pdl) for one in layers] for pdl in (False, True))
    for steps in (eager, graphed):
        for step in steps[1:]:
            step.use(steps[0])
    graph = captured([step.all for step in graphed])
    same = True
    for _ in range(times):
        eager[0].x.normal_()
        graphed[0].x.copy_(eager[0].x)
        for mine, its in zip(eager, graphed, strict=True):
            mine.logits.normal_()
            its.logits.copy_(mine.logits)
        for step in (eager[0], graphed[0]):
            step.residual.zero_()
            workspaces = [update.z for update in step.updates if update is not None]
            for out in (step.a, step.y, step.norm.out, step.work.weight, *workspaces):
                out.fill_(torch.nan)
        for step in eager:
            step.all()
        graph.replay()
        torch.cuda.synchronize()
        same &= torch.equal(eager[0].norm.out, graphed[0].norm.out)
        same &= torch.equal(eager[0].residual, graphed[0].residual)
        same &= bool(torch.isfinite(eager[0].norm.out).all())
    return report.check(f"{name} T{tokens} graph replays equal eager", float(not same), 0.0)


def check_sizes(report: Report, name: str, one: Layer, plans: dict[int, LayerPlan]) -> None:
    """The first rows of a large step have the same bits in smaller ones."""
    largest = max(plans)
    large = Step(one, largest, plans[largest])
    large.all()
    for tokens, plan in plans.items():
        step = Step(one, tokens, plan)
        step.x.copy_(large.x[:tokens])
        step.logits.copy_(large.logits[:tokens])
        step.all()
        same = torch.equal(step.residual, large.residual[:tokens])
        report.check(f"{name} rows of T{tokens} as in T{largest}", float(not same), 0.0)


def steps_of(layers: Sequence[Layer], tokens: int, plan: LayerPlan, *, pdl: bool = False) -> list[Step]:
    """A step on every layer, run once, with the same inputs for any plan."""
    torch.manual_seed(0)
    steps = [Step(one, tokens, plan, pdl=pdl) for one in layers]
    for step in steps:
        step.all()
    torch.cuda.synchronize()
    return steps


def expected_of(layers: Sequence[Layer], tokens: int, plan: LayerPlan) -> dict[str, Tensor]:
    """What launches of a plan leave on the first layer."""
    return outputs(steps_of(layers, tokens, plan)[0])


def outputs(step: Step) -> dict[str, Tensor]:
    """What products and shrink left, by the launch."""
    update = step.updates[0]
    return {"up": step.a, "down": step.y} | ({} if update is None else {"shrink_up": update.z})


def time_part(
    report: Report, name: str, layers: Sequence[Layer], tokens: int, plan: LayerPlan, part: str,
    expected: dict[str, Tensor] | None = None,
) -> float:  # fmt: skip
    """Time one launch; with what launches are `expected` to leave on the first layer, it is checked first."""
    try:
        steps = steps_of(layers, tokens, plan)
    except Exception as problem:  # noqa: BLE001
        return report.fail(f"{name} {part}", problem)
    if expected is not None:
        got = route_error(steps[0]) if part == "route" else error(outputs(steps[0])[part], expected[part])
        if not report.check(f"{name} {part}", got, 1e-2):
            return math.inf
    moved = statistics.mean(step.moved(part) for step in steps)
    return report.time(f"{name} {part}", [getattr(step, part) for step in steps], moved)


def time_layer(
    report: Report, name: str, layers: Sequence[Layer], tokens: int, plan: LayerPlan, *, pdl: bool,
    shown: bool = True,
) -> float:  # fmt: skip
    """Time whole layers one after the other."""
    name = f"{name} layer{' pdl' if pdl else ''}"
    try:
        steps = steps_of(layers, tokens, plan, pdl=pdl)
    except Exception as problem:  # noqa: BLE001
        return report.fail(name, problem)
    moved = sum(statistics.mean(step.moved(part) for step in steps) for part in launches(layers))
    return report.time(name, [step.all for step in steps], moved, shown=shown)


def tag_of(name: str, layers: Sequence[Layer], tokens: int) -> str:
    return f"{name} T{tokens}{' lora' if layers[0].table else ''}".lstrip()


def launches(layers: Sequence[Layer]) -> tuple[str, ...]:
    """The launches of a layer by name."""
    shrinks = ("shrink_up", "shrink_down") if layers[0].table else ()
    return ("route", *shrinks, "up", "down", "combine")
