"""What a base model, its KV cache and its adapters take of a GPU's memory, from config.json alone.

Counted as the engine counts: the sites of the model's spec, pages of `memory.pool`, and the engine's rules for the
workspace and for copies of four-bit experts. Norms, biases and sinks are left out (0.02 % of gpt-oss-20b).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.engine.device import WORKSPACE
from motet.errors import ConfigError, ModelRefused
from motet.memory.pool import KV_DTYPE, page_bytes
from motet.models.config import read_config
from motet.models.registry import ARCHITECTURES
from motet.plan.gpus import Gpu
from motet.types import ModelSpec, Site

PAGE_TOKENS = 16
MEMORY_FRACTION = 0.9
"""Those of an engine that is told nothing else."""
WEIGHT_BYTES = 2.0
FOUR_BIT_BYTES = 17 / 32
"""MXFP4: 32 values in 16 bytes and one of scale."""
PARTS = {
    "attention": ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "kv_b"),
    "mlp": ("gate", "up", "down", "shared_gate", "shared_up", "shared_down"),
    "router": ("router",),
}
"""What `targets` may name, beside the single modules; mlp stands for experts too."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights and of the copies of four-bit experts; the rest is computed from the spec."""

    spec: ModelSpec
    weights: int
    copies: int

    @property
    def page(self) -> int:
        return page_bytes(self.spec, PAGE_TOKENS, KV_DTYPE["cuda"])

    def adapter(self, rank: int, targets: Sequence[str]) -> int:
        """Bytes of an adapter of this rank in bfloat16; fused experts share A between gate and up."""
        modules = {module for target in targets for module in PARTS.get(target, (target,))}
        found = [site for site in self.spec.sites if site.module in modules]
        for target in targets:
            if not any(site.module in PARTS.get(target, (target,)) for site in found):
                there = sorted({site.module for site in self.spec.sites})
                raise ConfigError(
                    f"{self.spec.name} has no {target!r} that an adapter could change; it has "
                    f"{', '.join([*PARTS, *there])}"
                )
        fused = bool(self.spec.fused)
        numbers = sum(
            site.out_features
            + (0 if fused and site.module == "up" and site.expert >= 0 else site.in_features)
            for site in found
        )
        return 2 * rank * numbers

    def adapter_pages(self, rank: int, targets: Sequence[str]) -> int:
        return -(-self.adapter(rank, targets) // self.page)

    def held(self, gpu: Gpu) -> int:
        """What weights take on this GPU: with the copies if these leave the pool at least as much as they take."""
        left = self._left(gpu)
        return self.weights + (self.copies if self.copies <= left // 2 else 0)

    def pool_pages(self, gpu: Gpu) -> int:
        """Pages for KV cache and adapters; ConfigError if the weights leave none."""
        pages = (self._left(gpu) - (self.held(gpu) - self.weights)) // self.page
        if pages < 16:
            raise ConfigError(
                f"{self.spec.name} takes {self.weights / 2**30:.1f} GiB and does not fit on one {gpu.name} of "
                f"{gpu.memory / 2**30:.0f} GiB"
            )
        return pages

    def _left(self, gpu: Gpu) -> int:
        return int(MEMORY_FRACTION * gpu.memory) - self.weights - WORKSPACE


def sizes_of(config: Mapping[str, Any], name: str) -> Sizes:
    """The sizes of the model with these values in its config.json; ModelRefused if Motet does not serve it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        read = read_config(Path(folder))
    known = next((kind for kind in read.architectures or () if kind in ARCHITECTURES), None)
    if known is None:
        raise ModelRefused(f"architecture {read.architectures} is not supported")
    spec: ModelSpec = ARCHITECTURES[known].spec(read, name, "")
    four_bit = (getattr(read, "quantization_config", None) or {}).get("quant_method") == "mxfp4"
    tied = bool(getattr(read, "tie_word_embeddings", False))
    weights = copies = 0.0
    for site in spec.sites:
        numbers = site.in_features * site.out_features
        if site.module == "head" and tied:
            continue
        if four_bit and _is_expert(site):
            weights += numbers * FOUR_BIT_BYTES
            copies += numbers * WEIGHT_BYTES
        else:
            weights += numbers * WEIGHT_BYTES
    return Sizes(spec, int(weights), int(copies))


def _is_expert(site: Site) -> bool:
    return site.expert >= 0
