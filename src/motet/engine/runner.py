"""Executes a plan: adapters leave and enter the table, one forward pass, one sampling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from motet.adapters.image import ChunkTable
from motet.adapters.table import AdapterTable
from motet.engine.inputs import build_inputs
from motet.engine.sampler import Drawn, SamplingRow, sample
from motet.kernels import bfloat16
from motet.kernels.attention import AttentionBatch
from motet.kernels.lora import BFLOAT16, FLOAT32, LONG_SEGMENT, LoraTable, Segment, split_rows
from motet.layers.cpu import CpuBatch, KVBatch, LoraBatch
from motet.layers.decoder import Decoder
from motet.memory.pool import Copies, Pool
from motet.types import Chunk, Load, Plan


class Runner:
    """The model, the pool and the adapter table of one device."""

    graph_replays = graph_captures = 0  # a CPU has no graphs

    def __init__(self, decoder: Decoder, pool: Pool) -> None:
        self.decoder = decoder
        self.pool = pool
        self.table = AdapterTable(len(pool.spec.sites), pool.flat, pool.page_bytes)

    def add_adapter(self, load: Load, chunks: ChunkTable, copies: Copies) -> None:
        """Let steps find an adapter that has come. MotetError if the table has no room for it."""
        assert not copies
        self.table.add(load.digest, chunks, load.pages)

    def arrived(self) -> list[str]:
        """Adapters are there as soon as they are added."""
        return []

    @torch.inference_mode()
    def launch(self, plan: Plan, row: Callable[[int], SamplingRow]) -> Drawn:
        """Compute the plan's chunks and sample for those that ask; `row(seq)` gives a sequence's sampling state."""
        for digest in plan.evictions:
            if digest in self.table:
                self.table.remove(digest)
        if not plan.chunks:
            return Drawn([])
        inputs = build_inputs(plan, self.pool, self.table)
        logits = self.decoder(inputs.batch)
        return Drawn(sample(logits, [row(seq) for seq in inputs.sampled]))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every kernel once, so that the first request meets no compiler. Uses page 0, before it is anyone's."""
        length = LONG_SEGMENT + 1
        groups = len(self.pool.spec.kv_groups)
        prompt = Chunk(0, (1,) * length, 0, ((0,) * length,) * groups, "", True)
        token = Chunk(1, (1,), 0, ((0,),) * groups, "", True)
        batch = build_inputs(Plan(chunks=(prompt, token)), self.pool, self.table).batch
        self.decoder(batch)
        self.decoder(_with_adapters(batch, self.pool))
        bfloat16.warm_up()


def _with_adapters(batch: CpuBatch, pool: Pool) -> CpuBatch:
    """The batch again with two adapters of rank 5 on every site, one of each dtype, that read page 0."""
    sites = len(pool.spec.sites)
    chunk = np.arange(2, dtype=np.int32)
    table = LoraTable(
        first=np.tile(chunk, (sites, 1)),
        count=np.ones((sites, 2), np.int32),
        a=np.zeros(2, np.int64),
        b=np.zeros(2, np.int64),
        rank=np.full(2, 5, np.int32),
        dtype=np.array([BFLOAT16, FLOAT32], np.int32),
        scale=np.ones(2, np.float32),
        pool=pool.flat,
    )
    rows = len(batch.tokens)
    slots = torch.zeros(rows, dtype=torch.int32)
    slots[-1] = 1
    segments = [Segment(0, rows - 1, 0), Segment(rows - 1, rows, 1)]
    attention = AttentionBatch(
        decode_rows=torch.arange(rows, dtype=torch.int32),
        decode_lengths=torch.ones(rows, dtype=torch.int32),
        decode_pages=torch.zeros(rows, 1, dtype=torch.int32),
        prefill=(),
    )
    head = [Segment(0, len(batch.logit_rows), 0)]
    lora = LoraBatch(table, segments, split_rows(segments), split_rows(head), slots)
    groups = [KVBatch(group.slots, attention) for group in batch.groups]
    return CpuBatch(batch.tokens, batch.positions, groups, batch.kv, batch.logit_rows, lora)
