"""Compiles what `moe_kernels` will launch, side by side, before anything is timed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tests.kernels.gpu.shipped_moe import DEEPSEEK, GPT_OSS, MIXTRAL, QWEN3, LayerPlan, layer

SHAPES = {
    "gpt-oss": GPT_OSS,
    "gpt-oss bf16": replace(GPT_OSS, packed=False),
    "gpt-oss joined": replace(GPT_OSS, joined=True),
    "qwen3": QWEN3,
    "mixtral": MIXTRAL,
    "deepseek": DEEPSEEK,
}
Task = tuple[str, int, LayerPlan, bool, bool]
"""A layer's launches: of which shape, for how many tokens, how, with adapters or not, programmatic or not."""


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
    name, tokens, plan, lora, pdl = task
    try:
        layer(SHAPES[name], tokens, plan, lora=lora, pdl=pdl)
    except Exception as problem:  # noqa: BLE001  # reported here, and again where it is used
        return f"{task}: {str(problem)[-300:]}"
    return ""


def compile_all(tasks: Sequence[Task]) -> None:
    """Compile all tasks side by side and say which could not be."""
    start, tasks = time.monotonic(), list(dict.fromkeys(tasks))
    with multiprocessing.get_context("spawn").Pool(max((os.cpu_count() or 2) - 2, 1)) as pool:
        problems = [one for one in pool.map(compile_one, tasks, chunksize=1) if one]
    print(
        f"compiled {len(tasks)} plans in {time.monotonic() - start:.0f} s, {len(problems)} failed",
        flush=True,
    )
    for one in problems:
        print("   ", one)
