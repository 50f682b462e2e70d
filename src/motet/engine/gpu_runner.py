"""Executes plans on a GPU, as graphs captured for steps of single tokens and for steps with prompts.

Nothing here waits for the device: a step's inputs are prepared while the one before runs, and its tokens go from one to
the other on the device. Launch by launch, a prompt of 100 tokens took 29 ms of the host's time and 6 of the device's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from motet.adapters.gpu_table import GpuTable
from motet.adapters.image import ChunkTable
from motet.engine.gates import Gates, wait_for
from motet.engine.gpu_inputs import StepBuilder
from motet.engine.gpu_sampler import GpuSampler
from motet.engine.gpu_shapes import BUCKETS, Step, bucket, cut, prompt_sizes
from motet.engine.sampler import Draw, Drawn, SamplingRow
from motet.engine.staging import Staging
from motet.errors import MotetError
from motet.kernels.gpu.jit import compile_only
from motet.layers.decoder import Decoder
from motet.layers.gpu import GpuBatch
from motet.memory.pool import Copies, Pool
from motet.types import BASE, Chunk, Load, Plan, SamplingParams

Key = tuple[bool, int, bool, frozenset[int]]
"""What graphs are captured for: steps with prompts or of single tokens; rows; with adapters; all or none of
the rare sites left out."""

LAYERS = 4
"""Layers among which there is one of each kind: of what the others launch, hardly anything is compiled for the first
time. The last of them computes the wanted rows only, as the model's last one does."""


class GpuRunner:
    """The model, the pool and the adapter table of one GPU."""

    def __init__(
        self,
        decoder: Decoder,
        pool: Pool,
        max_model_len: int,
        max_running: int,
        max_step_tokens: int,
        pdl: bool = True,
    ) -> None:
        self.decoder = decoder
        self.pool = pool
        self.table = GpuTable(len(pool.spec.sites), pool.flat, pool.page_bytes, pool.kv_dtype)
        self._largest = next((size for size in BUCKETS if size >= max_running), BUCKETS[-1])
        decode_rows = max(max_running, self._largest)
        self._gates = Gates(pool.spec.num_layers)
        self._builder = StepBuilder(
            pool, self.table, max_model_len, pool.spec.num_heads, decode_rows, self._gates.events
        )
        self._staging: dict[int, Staging] = {}
        self._sizes = prompt_sizes(max_step_tokens)
        self._prompts = self._builder.prompts(self._sizes[-1])
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.graph_replays = 0
        self.graph_captures = 0
        self._memory: Any = None  # shared by all graphs: one runs at a time
        dtype = decoder.embedding.dtype
        self._logits = torch.zeros(
            decode_rows, decoder.head.weight.shape[0], dtype=dtype, device=pool.data.device
        )
        self._sampler = GpuSampler(self._builder.drawn)
        self._pdl = pdl

    def add_adapter(self, load: Load, chunks: ChunkTable, copies: Copies) -> None:
        """Let steps find an adapter whose copies have been enqueued. MotetError if the table has no room for it; steps
        that get its pages write to them after the copies."""
        try:
            self.table.add(load.digest, chunks, load.pages)
        except MotetError:
            wait_for(copies)
            raise
        self._gates.expect(load.digest, copies)

    def arrived(self) -> list[str]:
        """The adapters whose copies have ended since the last call."""
        return self._gates.arrived()

    @torch.inference_mode()
    def launch(self, plan: Plan, row: Callable[[int], SamplingRow]) -> Draw:
        """Begin to compute the plan's chunks, behind what the device has to do, and to sample for those that ask.

        `row(seq)` gives a sequence's sampling state. Plans must come in the order in which they were made.
        """
        self._gates.hold_steps(set(plan.evictions))  # their pages may be others' in this plan
        for digest in plan.evictions:
            if digest in self.table:
                self.table.remove(digest)
        if not plan.chunks:
            return Drawn([])
        chunks = self._builder.ordered(plan)
        logits = self._compute(chunks)
        rows = [row(chunk.seq) for chunk in chunks if chunk.sample]
        self._builder.places = {row.seq: place for place, row in enumerate(rows)}
        return self._sampler.draw(logits[: len(rows)], rows)

    def _compute(self, chunks: Sequence[Chunk]) -> Tensor:
        """The logits of those rows that ask for them, and maybe more rows."""
        adapters = {chunk.adapter for chunk in chunks} - {BASE}
        with_lora = bool(adapters)
        idle = self._builder.idle(chunks) if with_lora else frozenset()
        size = bucket(len(chunks))
        if 0 < size <= self._largest and all(len(c.tokens) == 1 and c.sample for c in chunks):
            graph = self._captured((False, size, with_lora, idle))
            self._fill_single(size, chunks)
            self._gates.hold_steps(adapters)
        else:
            step = self._builder.arrange(chunks)
            size = self._size_for(step)
            if not size:
                self._gates.hold_layers(adapters)
                return self.decoder(self._builder.batch(chunks, self._pdl))
            graph = self._captured((True, size, with_lora, idle))
            self._fill_prompts(size, step)
            self._gates.hold_layers(adapters)
        graph.replay()
        self.graph_replays += 1
        return self._logits

    def _size_for(self, step: Step) -> int:
        """The captured size that has room for a step with prompts; 0 if none has."""
        return next((s for s in self._sizes if self._builder.room(s).has_room_for(step.shape)), 0)

    def _fill_single(self, size: int, chunks: Sequence[Chunk]) -> None:
        if size not in self._staging:
            self._staging[size] = self._builder.captured(size)
        self._builder.fill_decode(self._staging[size], chunks)
        self._staging[size].upload()

    def _fill_prompts(self, size: int, step: Step) -> None:
        groups = len(self.pool.spec.kv_groups)
        self._builder.fill(cut(self._prompts.host, self._builder.room(size), groups), step)
        self._prompts.upload()

    def _captured(self, key: Key) -> torch.cuda.CUDAGraph:
        """The graph for such steps, captured when it is first wanted."""
        if key not in self._graphs:
            batch = self._padding(key)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run(batch)  # compiles what is not compiled yet, which a capture must not
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._run(batch)
            self._memory = graph.pool()
            self._graphs[key] = graph
            self.graph_captures += 1
        return self._graphs[key]

    def _padding(self, key: Key) -> GpuBatch:
        """Such a step with nothing in it: what runs for its graph's sake must not write to anybody's pages."""
        prompts, size, with_lora, idle = key
        if prompts:
            self._fill_prompts(size, self._builder.arrange([]))
            return self._builder.prompt_batch(self._prompts, size, with_lora, idle, self._pdl)
        self._fill_single(size, [])
        return self._builder.decode_batch(self._staging[size], with_lora, idle, self._pdl)

    def _run(self, batch: GpuBatch) -> None:
        """Compute a step and leave its logits where all graphs do."""
        self._logits[: len(batch.logit_rows)] = self.decoder(batch)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture every size without adapters, with them, and with some that adapt rare sites; the largest first, so
        that the others fit in its memory.

        Then sample with and without truncation: from now on nothing is compiled.
        """
        single = [size for size in BUCKETS if size <= self._largest]
        keys: list[Key] = [
            (prompts, size, with_lora, idle)
            for prompts, sizes in ((True, self._sizes), (False, single))
            for size in reversed(sizes)
            for with_lora, idle in ((True, frozenset()), (True, self._builder.rare), (False, frozenset()))
        ]
        with compile_only():
            kinds = replace(self.decoder, layers=self.decoder.layers[:LAYERS])
            for key in keys:
                kinds(self._padding(key))
            self._sample_once()
        for key in keys:
            self._captured(key)
        self._sample_once()
        torch.cuda.synchronize()

    def _sample_once(self) -> None:
        for params in (SamplingParams(), SamplingParams(top_k=2)):
            self._sampler.draw(self._logits[:1], [SamplingRow(0, params, (), 0, 0, ())]).result()
