"""Executes plans on a GPU: graphs for steps of single tokens, anything else launch by launch.

Nothing here waits for the device: a step's inputs are prepared while the one before runs, and its tokens go from one to
the other on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from motet.adapters.gpu_table import GpuTable
from motet.adapters.image import ChunkTable
from motet.engine.gpu_inputs import BUCKETS, StepBuilder, bucket
from motet.engine.gpu_sampler import GpuSampler
from motet.engine.sampler import Draw, Drawn, SamplingRow
from motet.engine.staging import Staging
from motet.layers.decoder import Decoder
from motet.memory.pool import Pool
from motet.types import Chunk, Plan

WARM_UP = "warm-up"
"""The digest of an adapter without weights."""
PROMPTS = (20, 60, 150, 400, 1500)
"""Lengths of prompts for which kernels are compiled differently: tiles of experts grow with them."""


@dataclass(frozen=True)
class _Graph:
    """A captured step: what to replay, and where it leaves the logits [T, V]."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


class GpuRunner:
    """The model, the pool and the adapter table of one GPU."""

    def __init__(
        self, decoder: Decoder, pool: Pool, max_model_len: int, max_running: int, pdl: bool = True
    ) -> None:
        self.decoder = decoder
        self.pool = pool
        self.table = GpuTable(len(pool.spec.sites), pool.flat, pool.page_bytes, pool.kv_dtype)
        self._largest = next((size for size in BUCKETS if size >= max_running), BUCKETS[-1])
        decode_rows = max(max_running, self._largest)
        self._builder = StepBuilder(pool, self.table, max_model_len, pool.spec.num_heads, decode_rows)
        self._staging: dict[int, Staging] = {}
        self._graphs: dict[tuple[int, bool, frozenset[int]], _Graph] = {}
        self._memory: Any = None  # shared by all graphs: one runs at a time
        self._sampler = GpuSampler(self._builder.drawn)
        self._pdl = pdl

    @torch.inference_mode()
    def launch(self, plan: Plan, row: Callable[[int], SamplingRow]) -> Draw:
        """Begin to compute the plan's chunks, behind what the device has to do, and to sample for those that ask.

        `row(seq)` gives a sequence's sampling state. Plans must come in the order in which they were made.
        """
        for digest in plan.evictions:
            if digest in self.table:
                self.table.remove(digest)
        if not plan.chunks:
            return Drawn([])
        chunks = self._builder.ordered(plan)
        logits = self._logits(chunks)
        rows = [row(chunk.seq) for chunk in chunks if chunk.sample]
        self._builder.places = {row.seq: place for place, row in enumerate(rows)}
        return self._sampler.draw(logits[: len(rows)], rows)

    def _logits(self, chunks: Sequence[Chunk]) -> Tensor:
        size = bucket(len(chunks))
        if (
            any(len(chunk.tokens) > 1 or not chunk.sample for chunk in chunks)
            or not 0 < size <= self._largest
        ):
            return self.decoder(self._builder.batch(chunks, self._pdl))
        with_lora = any(chunk.adapter for chunk in chunks)
        idle = self._builder.idle(chunks) if with_lora else frozenset()
        graph = self._captured(size, with_lora, idle)
        staging = self._staging[size]
        self._builder.fill_decode(staging, chunks)
        staging.upload()
        graph.graph.replay()
        return graph.logits

    def _captured(self, size: int, with_lora: bool, idle: frozenset[int]) -> _Graph:
        """The graph of this many rows, with or without adapters, captured when it is first wanted."""
        key = size, with_lora, idle
        if key not in self._graphs:
            if size not in self._staging:
                self._staging[size] = self._builder.captured(size)
            staging = self._staging[size]
            # All padding: what runs here must not write to anybody's pages.
            self._builder.fill_decode(staging, [])
            staging.upload()
            batch = self._builder.decode_batch(staging, with_lora, idle, self._pdl)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.decoder(batch)  # compiles what is not compiled yet, which a capture must not
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                logits = self.decoder(batch)
            self._memory = graph.pool()
            self._graphs[key] = _Graph(graph, logits)
        return self._graphs[key]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture every bucket with and without adapters, and compile what prompts need; page 0 is nobody's yet."""
        for size in reversed([size for size in BUCKETS if size <= self._largest]):
            for with_lora in (False, True):
                self._captured(size, with_lora, self._builder.rare if with_lora else frozenset())
        self.table.add(WARM_UP, ChunkTable.empty(), ())
        for length in PROMPTS:
            for adapter in ("", WARM_UP):
                self.decoder(self._builder.batch(self._prompt(length, adapter), self._pdl))
        self.table.remove(WARM_UP)
        torch.cuda.synchronize()

    def _prompt(self, length: int, adapter: str) -> list[Chunk]:
        """A prompt of this length and a single token, whose keys all go to page 0."""
        groups = len(self.pool.spec.kv_groups)
        pages = (0,) * -(-length // self.pool.page_tokens)
        return [
            Chunk(0, (1,) * length, 0, (pages,) * groups, adapter, True),
            Chunk(1, (1,), 0, ((0,),) * groups, "", True),
        ]
