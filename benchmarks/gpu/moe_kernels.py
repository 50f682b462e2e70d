"""The GPU kernels of mixtures of experts: right first, then fast: `python benchmarks/gpu/moe_kernels.py [--quick]`.

Checks route, shrink, expert products and combine against references in float64 on fresh random inputs with poisoned
outputs, every configuration before it is timed, and that a CUDA graph of a whole layer (with programmatic launches)
repeats the eager bits. Then times them, the median of graph replays that rotate over layers much larger than the L2
cache, beside the floor: bytes that must move at 4.3 TB/s, or operations at 790 TFLOP/s. The kernels are compiled first,
side by side. --quick checks and times the default configurations only.

--only NAME … runs some parts: decode variants base (about 85 lines), prefill bf16 models (as many). The table comes
last, also after a failure; --json FILE writes it too. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.measure import BANDWIDTH, OPERATIONS, Call, captured, measure
from benchmarks.gpu.moe_case import Layer, Plan, Step, default_plan, error, layer_errors
from benchmarks.gpu.moe_plans import PARTS, SHAPES, Plans, compile_all, label, variants
from motet.kernels.gpu import route
from motet.kernels.gpu.mxfp4 import Mxfp4
from tests.kernels.gpu.shipped_moe import GPT_OSS


class Report:
    """What was checked and measured, printed at the end."""

    def __init__(self) -> None:
        self.checks: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def check(self, name: str, got: float, bound: float) -> bool:
        """What is not a number fails."""
        fine = got <= bound
        self.checks.append(f"{'ok  ' if fine else 'FAIL'} {name}: {got:.1e}")
        return fine

    def time(
        self, name: str, calls: Sequence[Call], moved: float, flops: float = 0.0, launches: int = 24
    ) -> None:
        """`moved` bytes and `flops` operations of one call."""
        floor = max(moved / BANDWIDTH, flops / OPERATIONS) * 1e6
        row: dict[str, Any] = {"name": name, "floor": round(floor, 2)}
        try:
            row["us"], row["spread"] = (round(value, 2) for value in measure(calls, launches))
        except Exception as problem:  # noqa: BLE001  # a variant that needs too much of something
            row["error"] = f"{type(problem).__name__} {str(problem)[:60]}"
        else:
            rate = (
                f"{flops / row['us'] / 1e6:.0f} TFLOP/s" if flops else f"{moved / row['us'] / 1e6:.2f} TB/s"
            )
            row["rate"] = rate
        self.rows.append(row)

    def finish(self, path: Path | None) -> int:
        """Print checks and table; 1 if a check failed."""
        bad = [line for line in self.checks if line.startswith("FAIL")]
        print(f"{len(self.checks) - len(bad)} checks passed, {len(bad)} failed; some of them:")
        for line in bad[:30] or self.checks[:: max(len(self.checks) // 10, 1)]:
            print(" ", line)
        for row in self.rows:
            if "error" in row:
                print(f"{row['name']:62} {row['error']}")
                continue
            floor = (
                f"floor {row['floor']:7.2f} {row['floor'] / row['us']:4.0%} {row['rate']}"
                if row["floor"]
                else ""
            )
            print(f"{row['name']:62} {row['us']:8.2f} us ±{row['spread']:3.0f}%  {floor}")
        if path is not None:
            path.write_text(json.dumps({"rows": self.rows, "checks": self.checks}, indent=1))
        return int(bool(bad))


def check_layer(report: Report, name: str, one: Layer, tokens: int, plan: Plan) -> None:
    for part, (got, bound) in layer_errors(one, tokens, plan).items():
        report.check(f"{name} T{tokens} rows{plan.rows} {part}", got, bound)


def check_replays(report: Report, name: str, one: Layer, tokens: int, plan: Plan) -> None:
    """A graph with programmatic launches, with other inputs each time, against eager launches without."""
    eager, graphed = Step(one, tokens, plan), Step(one, tokens, plan, pdl=True)
    graph = captured([graphed.all])
    same = True
    for _ in range(10):
        eager.x.normal_()
        eager.logits.normal_()
        graphed.x.copy_(eager.x)
        graphed.logits.copy_(eager.logits)
        for step in (eager, graphed):
            step.residual.zero_()
            workspaces = [update.z for update in step.updates if update is not None]
            for out in (step.a, step.y, step.norm.out, step.work.weight, *workspaces):
                out.fill_(torch.nan)
        eager.all()
        graph.replay()
        torch.cuda.synchronize()
        same &= torch.equal(eager.norm.out, graphed.norm.out) and torch.equal(
            eager.residual, graphed.residual
        )
        same &= bool(torch.isfinite(eager.norm.out).all())
    report.check(f"{name} T{tokens} graph replays equal eager", float(not same), 0.0)


def check_packing(report: Report) -> None:
    codes = torch.randint(0, 256, (2, 64, 48), dtype=torch.uint8, device="cuda")
    scales = torch.randint(100, 129, (2, 64, 3), dtype=torch.uint8, device="cuda")
    again = Mxfp4.pack(codes, scales).unpack()
    same = torch.equal(again[0], codes) and torch.equal(again[1], scales)
    report.check("packing round trip", float(not same), 0.0)


def steps_of(layers: Sequence[Layer], tokens: int, plan: Plan, *, pdl: bool = False) -> list[Step]:
    """A step on every layer, run once, with the same inputs for any plan."""
    torch.manual_seed(0)
    steps = [Step(one, tokens, plan, pdl=pdl) for one in layers]
    for step in steps:
        step.all()
    torch.cuda.synchronize()
    return steps


def time_part(
    report: Report, name: str, layers: Sequence[Layer], tokens: int, plan: Plan, part: str,
    expected: Tensor | None = None,
) -> None:  # fmt: skip
    """Time one launch; where `expected` is given, what it left on the first layer is checked first."""
    try:
        steps = steps_of(layers, tokens, plan)
    except Exception as problem:  # noqa: BLE001
        report.rows.append(
            {"name": f"{name} {part}", "error": f"{type(problem).__name__} {str(problem)[:60]}"}
        )
        return
    if expected is not None:
        report.check(f"{name} {part}", error(steps[0].a if part == "up" else steps[0].y, expected), 1e-2)
    moved = statistics.mean(step.moved(part) for step in steps)
    report.time(f"{name} {part}", [getattr(step, part) for step in steps], moved)


def tag_of(name: str, layers: Sequence[Layer], tokens: int) -> str:
    return f"{name} T{tokens}{' lora' if layers[0].table else ''}"


def launches(layers: Sequence[Layer]) -> tuple[str, ...]:
    shrinks = ("shrink_up", "shrink_down") if layers[0].table else ()
    return ("route", *shrinks, "up", "down", "combine")


def time_decode(report: Report, name: str, layers: Sequence[Layer], tokens: int, *, parts: bool) -> None:
    base, tag = default_plan(layers[0].shape, tokens), tag_of(name, layers, tokens)
    for pdl in (False, True):
        steps = steps_of(layers, tokens, base, pdl=pdl)
        moved = sum(statistics.mean(s.moved(p) for s in steps) for p in launches(layers))
        report.time(f"{tag} layer{' pdl' if pdl else ''}", [step.all for step in steps], moved)
    for part in launches(layers) if parts else ():
        time_part(report, tag, layers, tokens, base, part)


def time_variants(report: Report, name: str, layers: Sequence[Layer], tokens: int) -> None:
    base, tag = default_plan(layers[0].shape, tokens), tag_of(name, layers, tokens)
    reference = steps_of(layers, tokens, base)[0]
    expected = {"up": reference.a.clone(), "down": reference.y.clone()}
    for part, plan, different in variants(tokens, base):
        time_part(report, f"{tag} [{label(different)}]", layers, tokens, plan, part, expected.get(part))
    default = route.SCORES_PER_THREAD
    for route.SCORES_PER_THREAD in (2, 8, 16):
        time_part(
            report, f"{tag} [{route.SCORES_PER_THREAD} scores per thread]", layers, tokens, base, "route"
        )
    route.SCORES_PER_THREAD = default


def time_prefill(
    report: Report, name: str, layers: Sequence[Layer], tokens: int, plans: Sequence[Plan]
) -> None:
    shape = layers[0].shape
    size = 2.0 * tokens * shape.top_k * shape.hidden * shape.width
    for plan in plans:
        tag = f"{tag_of(name, layers, tokens)} rows{plan.rows}"
        try:
            steps = steps_of(layers, tokens, plan)
        except Exception as problem:  # noqa: BLE001
            report.rows.append({"name": tag, "error": f"{type(problem).__name__} {str(problem)[:60]}"})
            continue
        report.time(f"{tag} up [{label(plan.up)}]", [s.up for s in steps], 0, 2 * size, 8)
        report.time(f"{tag} down [{label(plan.down)}]", [s.down for s in steps], 0, size, 8)
    for part in launches(layers):
        if part not in ("up", "down"):
            report.time(f"{tag} {part}", [getattr(s, part) for s in steps], steps[0].moved(part), 0, 8)


class Run:
    """What to do, in parts, and what to compile for it."""

    def __init__(self, quick: bool, parts: Sequence[str]) -> None:
        self.quick, self.parts = quick, parts
        self.plans = Plans(quick)
        self.report = Report()

    def everything(self) -> None:
        """Check and time the parts asked for; each frees its layers."""
        check_packing(self.report)
        for part in self.parts:
            getattr(self, part)()
            torch.cuda.empty_cache()
            print(part, "done", flush=True)

    def decode(self) -> None:
        layers = [Layer(GPT_OSS, lora=True) for _ in range(3)]
        for tokens in self.plans.buckets:
            plan = default_plan(GPT_OSS, tokens)
            check_layer(self.report, "gpt-oss", layers[0], tokens, plan)
            check_replays(self.report, "gpt-oss", layers[1], tokens, plan)
            time_decode(self.report, "gpt-oss", layers, tokens, parts=tokens in (1, 16, 64))
        for rows in self.plans.other_rows:
            plan = default_plan(GPT_OSS, 64, rows)
            check_layer(self.report, "gpt-oss", layers[0], 64, plan)
            for part in ("up", "down"):
                time_part(self.report, f"gpt-oss T64 lora rows{rows}", layers, 64, plan, part)

    def variants(self) -> None:
        layers = [Layer(GPT_OSS, lora=True) for _ in range(0 if self.quick else 3)]
        for tokens in (1, 16) if layers else ():
            time_variants(self.report, "gpt-oss", layers, tokens)

    def base(self) -> None:
        layers = [Layer(GPT_OSS, lora=False) for _ in range(4)]
        for tokens in (1, 16):
            check_layer(self.report, "gpt-oss base", layers[0], tokens, default_plan(GPT_OSS, tokens))
            time_decode(self.report, "gpt-oss", layers, tokens, parts=True)

    def prefill(self) -> None:
        layers = [Layer(GPT_OSS, lora=True) for _ in range(2)]
        for plan in self.plans.packed:
            check_layer(self.report, "gpt-oss", layers[0], 700, plan)
        for tokens in self.plans.prompts:
            time_prefill(self.report, "gpt-oss", layers, tokens, self.plans.packed)

    def bf16(self) -> None:
        layers = [Layer(SHAPES["gpt-oss bf16"], lora=True) for _ in range(2)]
        for plan in self.plans.plain:
            check_layer(self.report, "gpt-oss bf16", layers[0], 700, plan)
        for tokens in self.plans.prompts:
            time_prefill(self.report, "gpt-oss bf16", layers, tokens, self.plans.plain)

    def models(self) -> None:
        for name in self.plans.others:
            layers = [Layer(SHAPES[name], lora=True) for _ in range(2)]
            for tokens in (1, 16):
                plan = default_plan(SHAPES[name], tokens)
                check_layer(self.report, name, layers[0], tokens, plan)
                check_replays(self.report, name, layers[1], tokens, plan)
                time_decode(self.report, name, layers, tokens, parts=tokens == 16 and name == "qwen3")
            for plan in self.plans.decode_plain if name == "qwen3" else ():
                for part in ("up", "down"):
                    time_part(self.report, f"{name} T16 lora [{label(plan.up)}]", layers, 16, plan, part)
            del layers
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    run = Run(args.quick, args.only)
    compile_all(run.plans.tasks(args.only))
    try:
        run.everything()
    except Exception:  # noqa: BLE001  # what was measured before is worth a table
        traceback.print_exc()
        run.report.check("ran to the end", 1.0, 0.0)
    return run.report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
