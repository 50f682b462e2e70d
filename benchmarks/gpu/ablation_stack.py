"""What benchmarks/ablation.py measures: a random stack of gpt-oss-20b's shape, its clock, and how it is configured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import Call  # first: it finds Motet
from benchmarks.gpu.random_checkpoint import COMMON, CONFIGS
from motet.bench import stack
from motet.bench.stack import Work, few_layers
from motet.kernels.gpu import tuned
from motet.layers.attention import Attention
from motet.layers.batch import LinearMap
from motet.layers.gpu import GpuBatch

Clock = Callable[[list[Call], int], float]
"""Microseconds of a call, of graphs of about so many."""


@dataclass(frozen=True)
class Size:
    """The stack and its work. `lengths` are prompts for which compilations are counted."""

    config: Mapping[str, Any]
    rows: int = 16
    context: int = 1900
    prompt: int = 1600
    adapters: int = 8
    rank: int = 32
    page_tokens: int = 16
    lengths: tuple[int, ...] = (*range(1, 65), *range(65, 4096, 61), 4096)


def gpt_oss_20b(layers: int) -> Size:
    return Size(few_layers({**COMMON, **CONFIGS["gpt-oss-20b"]}, layers))


class Stack(stack.Stack):
    """What is measured, and the clock that measures it."""

    def __init__(
        self, size: Size, clock: Clock, device: str = "cuda", kind: torch.dtype = torch.bfloat16
    ) -> None:
        positions = max(size.context + 1, size.prompt, *size.lengths)
        work = Work(size.rows, size.context, positions, size.adapters, size.rank, size.page_tokens)
        super().__init__(size.config, work, device, kind)
        self.size, self.clock = size, clock
        self.folder: Path | None = None

    def prefill(
        self, length: int = 0, *, adapted: bool = True, idle: bool = True, pdl: bool = True
    ) -> GpuBatch:
        """A step with a prompt, of the size's if no length is given."""
        return super().prefill(length or self.size.prompt, adapted=adapted, idle=idle, pdl=pdl)

    def ms(self, batch: GpuBatch) -> float:
        """Milliseconds of a step."""
        with torch.inference_mode():
            return (
                self.clock([partial(self.decoder, batch)], 4 if len(batch.tokens) <= self.size.rows else 2)
                / 1e3
            )

    def us(self, calls: list[Call]) -> float:
        """Microseconds of a kernel or two."""
        with torch.inference_mode():
            return self.clock(calls, 48)

    @property
    def maps(self) -> list[tuple[LinearMap, LinearMap]]:
        """qkv and o of every layer."""
        found = [layer.attention for layer in self.decoder.layers]
        return [(one.qkv, one.out) for one in found if isinstance(one, Attention)]

    def defaults(self, operation: str, **changes: Any) -> list[tuple[tuned.Shape, Any]]:
        """What an operation is configured with at every shape that steps ask for, with these changes."""
        with torch.inference_mode():
            for batch in (self.decode(), self.prefill()):
                self.decoder(batch)
        return [(shape, replace(config, **changes)) for shape, config in tuned.asked(operation)]

    @contextmanager
    def configured(self, **operations: Mapping[str, Any]) -> Iterator[None]:
        """Within: these operations' configurations have these changes. They come from a folder, as a user's would."""
        with tempfile.TemporaryDirectory() as folder:
            for operation, changes in operations.items():
                text = tuned.dump(self.gpu, operation, self.defaults(operation, **changes))
                Path(folder, f"{operation}.json").write_text(text)
            tuned.load(Path(folder), self.gpu)
            try:
                yield
            finally:
                tuned.load(None, self.gpu)
