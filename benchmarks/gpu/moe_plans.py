"""What `moe_kernels` measures: configurations to try, and their compilation side by side before anything is timed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.gpu.moe_case import Plan, default_plan
from motet.kernels.gpu.moe import ProductConfig
from motet.kernels.gpu.moe_lora import PREFILL, ShrinkConfig
from tests.kernels.gpu.shipped_moe import DEEPSEEK, GPT_OSS, MIXTRAL, QWEN3, Shape, layer

SHAPES = {
    "gpt-oss": GPT_OSS,
    "gpt-oss bf16": replace(GPT_OSS, packed=False),
    "qwen3": QWEN3,
    "mixtral": MIXTRAL,
    "deepseek": DEEPSEEK,
}
PARTS = ("decode", "variants", "base", "prefill", "bf16", "models")
Task = tuple[str, int, Plan, bool]

P = ProductConfig
UP = {
    16: [P(64, 96, 2, 4), P(64, 96, 2, 5), P(64, 64, 2, 4), P(64, 160, 2, 3), P(64, 192, 2, 2), P(64, 96, 4, 3),
         P(32, 96, 1, 4), P(32, 96, 1, 6), P(128, 96, 4, 3), P(128, 96, 2, 3), P(64, 96, 2, 3, ranks=16),
         P(64, 96, 2, 3, ranks=64)],
    1: [P(64, 96, 2, 5), P(32, 96, 1, 4), P(32, 96, 1, 6), P(32, 192, 1, 4), P(32, 288, 1, 3)],
}  # fmt: skip
DOWN = {
    16: [P(64, 96, 2, 4), P(64, 96, 2, 5), P(64, 160, 2, 3), P(128, 96, 2, 3), P(128, 96, 2, 4), P(128, 96, 4, 3),
         P(32, 96, 1, 4), P(32, 96, 1, 6), P(32, 192, 1, 4), P(64, 96, 2, 3, ranks=16), P(64, 96, 2, 3, ranks=64)],
    1: [P(32, 96, 1, 4), P(32, 96, 1, 6), P(32, 192, 1, 4), P(32, 288, 1, 3)],
}  # fmt: skip
SHRINK = [
    ShrinkConfig(warps=4), ShrinkConfig(warps=4, depth=128), ShrinkConfig(ranks=32, lanes=1, stages=3),
    ShrinkConfig(depth=32, stages=5), ShrinkConfig(stages=3),
]  # fmt: skip
PLAIN = [
    P(64, 64, 4, 3),
    P(64, 64, 4, 6),
    P(32, 64, 4, 6),
    P(64, 128, 4, 3),
    P(128, 64, 4, 4),
    P(128, 64, 8, 4),
]
PREFILL_PACKED = [
    (P(64, 64, 4, 4, 16, 4, True), P(128, 64, 4, 4, 16, 4, True)),
    (P(128, 64, 8, 3, 16, 4, True), P(256, 64, 8, 3, 16, 4, True)),
    (P(64, 96, 4, 3, 16, 4, True), P(128, 96, 4, 3, 16, 4, True)),
    (P(64, 64, 4, 3, 16, 1, True), P(128, 64, 4, 3, 16, 1, True)),
]
PREFILL_PLAIN = [
    (P(128, 64, 8, 3, 16, 4), P(256, 64, 8, 3, 16, 4)),
    (P(64, 64, 4, 4, 16, 4), P(128, 64, 4, 4, 16, 4)),
    (P(128, 64, 8, 4, 16, 8), P(256, 64, 8, 4, 16, 8)),
]


def label(config: ProductConfig | ShrinkConfig) -> str:
    if isinstance(config, ShrinkConfig):
        return f"w{config.warps} K{config.depth} r{config.ranks} lanes{config.lanes} s{config.stages}"
    extra = f" g{config.group}" * (config.group > 1) + " wgmma" * config.wgmma
    return f"F{config.features} K{config.depth} w{config.warps} s{config.stages} r{config.ranks}{extra}"


def variants(tokens: int, base: Plan) -> Iterator[tuple[str, Plan, ProductConfig | ShrinkConfig]]:
    """Other ways of the packed decode kernels: the part that differs, the plan, what is different."""
    for up in UP.get(tokens, ()):
        yield "up", replace(base, up=up), up
    for down in DOWN.get(tokens, ()):
        yield "down", replace(base, down=down), down
    for how in SHRINK if tokens == 16 else ():
        yield "shrink_up", replace(base, shrink=how), how


class Plans:
    """The configurations of a run; with `quick` only what the launchers choose by themselves."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.buckets = (1, 16, 64) if quick else (1, 2, 4, 8, 16, 32, 64)
        self.other_rows = () if quick else (8, 32)
        self.prompts = (1600,) if quick else (1600, 8192)
        self.others = ("qwen3",) if quick else ("qwen3", "deepseek", "mixtral")
        self.packed = self._choices(GPT_OSS, PREFILL_PACKED)
        self.plain = self._choices(SHAPES["gpt-oss bf16"], PREFILL_PLAIN)
        if not quick:
            self.packed.append(replace(self.packed[0], rows=64))
        base = default_plan(QWEN3, 16)
        self.decode_plain = [] if quick else [replace(base, up=one, down=one) for one in PLAIN]

    def _choices(self, shape: Shape, pairs: Sequence[tuple[ProductConfig, ProductConfig]]) -> list[Plan]:
        more = [] if self.quick else [Plan(128, up, down, PREFILL) for up, down in pairs]
        return [default_plan(shape, 1600), *more]

    def tasks(self, parts: Sequence[str]) -> list[Task]:
        """Every layer that these parts launch: shape, tokens, plan, and whether with adapters."""
        return list(dict.fromkeys(task for part in parts for task in getattr(self, f"_{part}")()))

    def _decode(self) -> Iterator[Task]:
        for tokens in self.buckets:
            yield "gpt-oss", tokens, default_plan(GPT_OSS, tokens), True
        for rows in self.other_rows:
            yield "gpt-oss", 64, default_plan(GPT_OSS, 64, rows), True

    def _variants(self) -> Iterator[Task]:
        for tokens in () if self.quick else (1, 16):
            yield "gpt-oss", tokens, default_plan(GPT_OSS, tokens), True
            for _, plan, _ in variants(tokens, default_plan(GPT_OSS, tokens)):
                yield "gpt-oss", tokens, plan, True

    def _base(self) -> Iterator[Task]:
        for tokens in (1, 16):
            yield "gpt-oss", tokens, default_plan(GPT_OSS, tokens), False

    def _prefill_of(self, name: str, plans: Sequence[Plan]) -> Iterator[Task]:
        for tokens in self.prompts:
            for plan in plans:
                yield name, tokens, plan, True

    def _prefill(self) -> Iterator[Task]:
        return self._prefill_of("gpt-oss", self.packed)

    def _bf16(self) -> Iterator[Task]:
        return self._prefill_of("gpt-oss bf16", self.plain)

    def _models(self) -> Iterator[Task]:
        for name in self.others:
            for tokens in (1, 16):
                yield name, tokens, default_plan(SHAPES[name], tokens), True
        for plan in self.decode_plain:
            yield "qwen3", 16, plan, True


def compile_one(task: Task) -> str:
    """Compile a layer's launches into Triton's cache, with no data and no launch."""
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.runtime import driver  # type: ignore[import-untyped]
    from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

    class Hopper:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

    if not hasattr(JITFunction, "launch"):
        JITFunction.launch = JITFunction.run
        JITFunction.run = lambda self, *args, **how: self.launch(*args, **(how | {"warmup": True}))
        driver.set_active(Hopper())
    name, tokens, plan, lora = task
    try:
        layer(SHAPES[name], tokens, plan.rows, plan.up, plan.down, plan.shrink, lora=lora)
    except Exception as problem:  # noqa: BLE001  # reported here, and again where it is used
        return f"{task}: {str(problem)[-300:]}"
    return ""


def compile_all(tasks: Sequence[Task]) -> None:
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(max((os.cpu_count() or 2) - 2, 1)) as pool:
        problems = [one for one in pool.map(compile_one, tasks, chunksize=1) if one]
    print(
        f"compiled {len(tasks)} plans in {time.monotonic() - start:.0f} s, {len(problems)} failed",
        flush=True,
    )
    for one in problems:
        print("   ", one)
