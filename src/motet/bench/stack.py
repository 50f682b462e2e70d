"""A decoder of a model's shape with random weights and few layers, in a GPU's memory, and steps for it.

What a kernel takes depends on shapes, not on what the weights mean. So configurations are tuned, and devices switched
on and off, on a stack that is made in seconds and needs no checkpoint; only its number of layers is not the model's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motet.adapters.gpu_table import GpuTable
from motet.adapters.image import ChunkTable
from motet.engine.gpu_inputs import StepBuilder
from motet.errors import ModelRefused
from motet.kernels.lora import BFLOAT16, FLOAT32
from motet.layers.decoder import Decoder
from motet.layers.gpu import GpuBatch, GpuDevice, copies_bytes, with_copies
from motet.memory.pool import Pool, page_bytes
from motet.models.config import read_config
from motet.models.registry import ARCHITECTURES
from motet.models.weights import Weights
from motet.types import BASE, Chunk, ModelSpec, Plan, Site


@dataclass(frozen=True)
class Work:
    """What a stack has room for: decode steps of `rows` rows at `context` tokens, prompts of up to `positions` tokens,
    with so many adapters of this rank on all projections."""

    rows: int = 16
    context: int = 1900
    positions: int = 4096
    adapters: int = 8
    rank: int = 32
    page_tokens: int = 16


class Stack:
    """A decoder, a pool with adapters and KV in it, and the steps that are measured."""

    def __init__(
        self, values: Mapping[str, Any], work: Work, device: str = "cuda", kind: torch.dtype = torch.bfloat16
    ) -> None:
        """`values` are those of a model's config.json, see `few_layers`. ModelRefused as for the model itself."""
        self.pool: Pool
        self.table: GpuTable
        self.gpu = torch.cuda.get_device_name() if device == "cuda" else device
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(values))
            config = read_config(Path(folder))
        name = next((name for name in config.architectures or () if name in ARCHITECTURES), None)
        if name is None:
            raise ModelRefused(f"architecture {config.architectures} is not supported")
        self.spec: ModelSpec = ARCHITECTURES[name].spec(config, "random", "")
        weights = RandomWeights(GpuDevice(torch.device(device), kind))
        decoder: Decoder = ARCHITECTURES[name].build(config, self.spec, weights, work.positions)
        self.decoder = with_copies(decoder) if copies_bytes(decoder) else decoder
        self._place, self._positions = device, work.positions
        self.take(work)

    def take(self, work: Work) -> None:
        """Other room, other adapters and KV, for the same weights; positions not beyond those that it was made for."""
        assert work.positions <= self._positions
        self.work, kind = work, self.decoder.embedding.dtype
        for name in ("pool", "table"):
            self.__dict__.pop(name, None)  # before there is memory for others
        each = page_bytes(self.spec, work.page_tokens, kind)
        self.adapter_pages = -(-_adapter_bytes(self.spec, work.rank, kind) // each)
        groups = len(self.spec.kv_groups)
        self.pages, longest = (-(-size // work.page_tokens) for size in (work.context + 1, work.positions))
        total = work.adapters * self.adapter_pages + max(work.rows * self.pages, longest) * groups
        self.pool = Pool(self.spec, total * each, work.page_tokens, kind, self._place)
        self.pool.flat.view(kind).normal_(0, 0.02)
        self.table = GpuTable(len(self.spec.sites), self.pool.flat, self.pool.page_bytes, kind)
        self.digests = [f"adapter {i}" for i in range(work.adapters)]
        for i, digest in enumerate(self.digests):
            self.table.add(digest, _chunks(self.spec, work.rank, kind), (i * self.adapter_pages,))

    def builder(self) -> StepBuilder:
        """One that has asked for the configurations of now."""
        rows = max(self.work.rows, 2)
        return StepBuilder(self.pool, self.table, self.work.positions, self.spec.num_heads, rows)

    def chunk(self, seq: int, start: int, length: int, adapter: str) -> Chunk:
        """Tokens of sequence `seq`, all kinds of them, in pages of its own; a prompt has all pages."""
        groups = len(self.spec.kv_groups)
        used = -(-(start + length) // self.work.page_tokens)
        each = max(self.pages, used)
        first = self.work.adapters * self.adapter_pages + seq * self.pages * groups
        pages = tuple(tuple(range(first + g * each, first + g * each + used)) for g in range(groups))
        tokens = tuple((1 + seq * 7919 + i * 104729) % self.spec.vocab_size for i in range(length))
        return Chunk(seq, tokens, start, pages, adapter, True)

    def decode(
        self,
        rows: int | None = None,
        *,
        adapted: bool = True,
        launch_lora: bool = True,
        idle: bool = True,
        pdl: bool = True,
    ) -> GpuBatch:
        """A step of single tokens: with adapters, with LoRA kernels, not launching those that have nothing to do."""
        builder, context = self.builder(), self.work.context
        count = self.work.rows if rows is None else rows
        digests = [self.digests[i % len(self.digests)] if adapted else BASE for i in range(count)]
        chunks = [self.chunk(i, context, 1, digest) for i, digest in enumerate(digests)]
        chunks = builder.ordered(Plan(chunks=tuple(chunks)))
        staging = builder.captured(len(chunks))
        builder.fill_decode(staging, chunks)
        staging.upload()
        idle_sites = builder.idle(chunks) if idle else frozenset[int]()
        return builder.decode_batch(staging, launch_lora, idle_sites, pdl)

    def prefill(self, length: int, *, adapted: bool = True, idle: bool = True, pdl: bool = True) -> GpuBatch:
        """A step with a prompt."""
        builder = self.builder()
        if not idle:
            builder.rare = frozenset()
        digest = self.digests[0] if adapted else BASE
        return builder.batch([self.chunk(0, 0, length, digest)], pdl)


def few_layers(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A config.json's values for so many layers: what it lists layer by layer is cut too."""
    found = {
        name: few_layers(part, layers) if isinstance(part, dict) else part for name, part in values.items()
    }
    count = values.get("num_hidden_layers")
    if count is None:
        return found
    cut = {
        name: part[:layers] for name, part in found.items() if isinstance(part, list) and len(part) == count
    }
    return {**found, **cut, "num_hidden_layers": min(layers, count)}


class RandomWeights(Weights):
    """Weights of any name and shape, made where they are used; norms do not change the size of what they get.

    Embeddings are large: a token must not look like its neighbours, or a prompt's tokens would share few experts.
    """

    def __init__(self, device: GpuDevice) -> None:
        super().__init__({}, device, lambda _fraction: None)
        self._place = device.device

    def __contains__(self, name: str) -> bool:
        return True

    def _open(self, name: str, *shape: int, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
        if torch.uint8 in dtypes:
            low, high = (116, 121) if name.endswith("_scales") else (0, 256)
            return torch.randint(low, high, shape, dtype=torch.uint8, device=self._place)
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16, device=self._place)
        spread = 1.0 if "embed" in name else 0.02
        return torch.empty(shape, dtype=torch.bfloat16, device=self._place).normal_(0, spread)

    def _taken(self, name: str, tensor: Tensor) -> Tensor:
        del name
        return tensor


def _adapter_bytes(spec: ModelSpec, rank: int, kind: torch.dtype) -> int:
    return sum(
        rank * (site.in_features + site.out_features) * kind.itemsize for site in _adapted(spec).values()
    )


def _adapted(spec: ModelSpec) -> dict[int, Site]:
    return {i: site for i, site in enumerate(spec.sites) if site.module not in ("embed", "head", "router")}


def _chunks(spec: ModelSpec, rank: int, kind: torch.dtype) -> ChunkTable:
    """An adapter of all projections that lies in one run of pages; gate and up of an expert share A."""
    rows, at, shared = [], 0, 0
    code = BFLOAT16 if kind == torch.bfloat16 else FLOAT32
    for i, site in _adapted(spec).items():
        a = shared if site.module == "up" else at
        shared, at = a, at + rank * site.in_features * kind.itemsize
        rows.append((i, rank, code, 2.0, site.in_features, site.out_features, 0, a, 0, at))
        at += rank * site.out_features * kind.itemsize
    kinds = [np.int32] * 3 + [np.float32] + [np.int32] * 2 + [np.int64] * 4
    columns: Any = [
        np.array(values, kind) for values, kind in zip(zip(*rows, strict=True), kinds, strict=True)
    ]
    return ChunkTable(*columns)
