"""What the parts of `moe_kernels` measure: configurations to try, and what to compile for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.gpu.moe_compile import SHAPES, Task
from benchmarks.gpu.moe_tune import candidate_tasks
from motet.kernels.gpu.moe import ProductConfig
from motet.kernels.gpu.moe_lora import PREFILL
from tests.kernels.gpu.shipped_moe import GPT_OSS, QWEN3, LayerPlan, Shape, default_plan

PARTS = ("decode", "tune", "base", "prefill", "bf16", "models")

P = ProductConfig
PLAIN = [
    P(64, 64, 4, 3, 32),
    P(64, 64, 4, 6, 32),
    P(32, 64, 4, 6, 32),
    P(64, 128, 4, 3, 32),
    P(128, 64, 4, 4, 32),
    P(128, 64, 8, 4, 32),
    P(32, 64, 2, 4, 64, split=2),
    P(32, 64, 4, 3, 64, split=4),
    P(64, 64, 4, 3, 64, split=4),
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

    def _choices(self, shape: Shape, pairs: Sequence[tuple[ProductConfig, ProductConfig]]) -> list[LayerPlan]:
        more = [] if self.quick else [LayerPlan(128, up, down, PREFILL) for up, down in pairs]
        return [default_plan(shape, 1600), *more]

    def tasks(self, parts: Sequence[str]) -> list[Task]:
        """Every layer that these parts launch: shape, tokens, plan, and whether with adapters."""
        return [task for part in parts for task in getattr(self, f"_{part}")()]

    def _decode(self) -> Iterator[Task]:
        for tokens in self.buckets:
            yield from both("gpt-oss", tokens, default_plan(GPT_OSS, tokens))
        for rows in self.other_rows:
            yield from both("gpt-oss", 64, default_plan(GPT_OSS, 64, rows))

    def _tune(self) -> Iterator[Task]:
        return iter(()) if self.quick else candidate_tasks()

    def _base(self) -> Iterator[Task]:
        for tokens in (1, 16):
            for pdl in (False, True):
                yield "gpt-oss", tokens, default_plan(GPT_OSS, tokens), False, pdl

    def _prefill_of(self, name: str, plans: Sequence[LayerPlan]) -> Iterator[Task]:
        for tokens in self.prompts:
            for plan in plans:
                yield name, tokens, plan, True, False

    def _prefill(self) -> Iterator[Task]:
        return self._prefill_of("gpt-oss", self.packed)

    def _bf16(self) -> Iterator[Task]:
        return self._prefill_of("gpt-oss bf16", self.plain)

    def _models(self) -> Iterator[Task]:
        for name in self.others:
            for tokens in (1, 16):
                yield from both(name, tokens, default_plan(SHAPES[name], tokens))
        for plan in self.decode_plain:
            for tokens in (1, 16):
                yield "qwen3", tokens, plan, True, False


def both(name: str, tokens: int, plan: LayerPlan) -> Iterator[Task]:
    """Layers with adapters, launched plainly and programmatically."""
    for pdl in (False, True):
        yield name, tokens, plan, True, pdl
