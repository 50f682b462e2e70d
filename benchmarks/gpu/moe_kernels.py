"""The GPU kernels of mixtures of experts: right first, then fast: `python benchmarks/gpu/moe_kernels.py [--quick]`.

Checks route, shrink, expert products and combine against references in float64 on fresh random inputs with poisoned
outputs, every configuration before it is timed, that a CUDA graph of layers (with programmatic launches) repeats the
eager bits, and that a row's bits do not depend on a decode step's size. Then times them, the median of graph replays
that rotate over layers much larger than the L2 cache, beside the floor: bytes that must move at 4.3 TB/s, or operations
at 790 TFLOP/s. The kernels are compiled first, side by side. --quick checks and times the default configurations only.

--only NAME … runs some parts: decode base tune (`moe_tune`), prefill bf16 models. The tables come last, also after a
failure; --json FILE writes them too. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.moe_case import Layer
from benchmarks.gpu.moe_compile import SHAPES, compile_all
from benchmarks.gpu.moe_plans import PARTS, Plans
from benchmarks.gpu.moe_report import (
    Report,
    check_layer,
    check_replays,
    check_sizes,
    expected_of,
    launches,
    steps_of,
    tag_of,
    time_layer,
    time_part,
)
from benchmarks.gpu.moe_tune import label, tune
from motet.kernels.gpu.mxfp4 import Mxfp4
from tests.kernels.gpu.shipped_moe import GPT_OSS, LayerPlan, default_plan


def check_packing(report: Report) -> None:
    codes = torch.randint(0, 256, (2, 64, 48), dtype=torch.uint8, device="cuda")
    scales = torch.randint(100, 129, (2, 64, 3), dtype=torch.uint8, device="cuda")
    again = Mxfp4.pack(codes, scales).unpack()
    same = torch.equal(again[0], codes) and torch.equal(again[1], scales)
    report.check("packing round trip", float(not same), 0.0)


def time_decode(report: Report, name: str, layers: Sequence[Layer], tokens: int, *, parts: bool) -> None:
    plan, tag = default_plan(layers[0].shape, tokens), tag_of(name, layers, tokens)
    for pdl in (False, True):
        time_layer(report, tag, layers, tokens, plan, pdl=pdl)
    for part in launches(layers) if parts else ():
        time_part(report, tag, layers, tokens, plan, part)


def time_prefill(
    report: Report, name: str, layers: Sequence[Layer], tokens: int, plans: Sequence[LayerPlan]
) -> None:
    shape = layers[0].shape
    size = 2.0 * tokens * shape.top_k * shape.hidden * shape.width
    for plan in plans:
        tag = f"{tag_of(name, layers, tokens)} rows{plan.rows}"
        try:
            steps = steps_of(layers, tokens, plan)
        except Exception as problem:  # noqa: BLE001
            report.fail(tag, problem)
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
        plans = {tokens: default_plan(GPT_OSS, tokens) for tokens in self.plans.buckets}
        check_sizes(self.report, "gpt-oss", layers[0], plans)
        check_sizes(self.report, "gpt-oss base", layers[0].base(), plans)
        for tokens, plan in plans.items():
            check_layer(self.report, "gpt-oss", layers[0], tokens, plan)
            check_replays(self.report, "gpt-oss", layers, tokens, plan)
            time_decode(self.report, "gpt-oss", layers, tokens, parts=tokens in (1, 16, 64))
        for rows in self.plans.other_rows:
            plan = default_plan(GPT_OSS, 64, rows)
            check_layer(self.report, "gpt-oss", layers[0], 64, plan)
            for part in ("up", "down"):
                time_part(self.report, f"gpt-oss T64 lora rows{rows}", layers, 64, plan, part)

    def tune(self) -> None:
        if not self.quick:
            tune(self.report)

    def base(self) -> None:
        layers = [Layer(GPT_OSS, lora=False) for _ in range(4)]
        for tokens in (1, 16):
            plan = default_plan(GPT_OSS, tokens)
            check_layer(self.report, "gpt-oss base", layers[0], tokens, plan)
            check_replays(self.report, "gpt-oss base", layers, tokens, plan)
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
                check_replays(self.report, name, layers, tokens, plan)
                time_decode(self.report, name, layers, tokens, parts=name == "qwen3")
            for tokens in (1, 16) if name == "qwen3" else ():
                expected = expected_of(layers, tokens, default_plan(SHAPES[name], tokens))
                for plan in self.plans.decode_plain:
                    tag = f"{tag_of(name, layers, tokens)} [{label(plan.up)}]"
                    for part in ("up", "down"):
                        time_part(self.report, tag, layers, tokens, plan, part, expected)
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
