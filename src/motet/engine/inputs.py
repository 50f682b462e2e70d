"""Plan → Batch: the tensors of one step.

Rows are ordered by adapter slot, the base first, so that each adapter's rows are one run and the LoRA kernels see
segments instead of scattered rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from motet.adapters.table import AdapterTable
from motet.kernels.attention import AttentionBatch, PrefillChunk
from motet.kernels.lora import Segment, split_rows
from motet.layers.cpu import CpuBatch, KVBatch, LoraBatch
from motet.memory.pool import Pool
from motet.types import Chunk, Plan


@dataclass(frozen=True)
class StepInputs:
    """The device batch, and which sequence each row of logits belongs to."""

    batch: CpuBatch
    sampled: tuple[int, ...]


def build_inputs(plan: Plan, pool: Pool, table: AdapterTable) -> StepInputs:
    """The batch of a plan that computes at least one token."""
    chunks = sorted(plan.chunks, key=lambda chunk: table.slot(chunk.adapter))
    starts = np.cumsum([0, *(len(chunk.tokens) for chunk in chunks)])
    rows = list(zip(starts[:-1].tolist(), chunks, strict=True))
    positions = np.concatenate([np.arange(c.start, c.start + len(c.tokens), dtype=np.int32) for c in chunks])
    batch = CpuBatch(
        tokens=torch.tensor([token for chunk in chunks for token in chunk.tokens]),
        positions=torch.from_numpy(positions),
        groups=[_kv(rows, group, pool.page_tokens) for group in range(len(pool.spec.kv_groups))],
        kv=pool.kv,
        logit_rows=torch.tensor([row + len(c.tokens) - 1 for row, c in rows if c.sample], dtype=torch.int64),
        lora=_lora(rows, table),
    )
    return StepInputs(batch, tuple(chunk.seq for chunk in chunks if chunk.sample))


def _kv(rows: list[tuple[int, Chunk]], group: int, page_tokens: int) -> KVBatch:
    """One KV group's part of the batch; rows are (first row, chunk)."""
    decode = [(row, chunk) for row, chunk in rows if len(chunk.tokens) == 1]
    longest = max((len(chunk.pages[group]) for _, chunk in decode), default=0)
    pages = np.zeros((len(decode), longest), np.int32)
    for i, (_, chunk) in enumerate(decode):
        pages[i, : len(chunk.pages[group])] = chunk.pages[group]
    attention = AttentionBatch(
        decode_rows=torch.tensor([row for row, _ in decode], dtype=torch.int32),
        decode_lengths=torch.tensor([chunk.start + 1 for _, chunk in decode], dtype=torch.int32),
        decode_pages=torch.from_numpy(pages),
        prefill=[
            PrefillChunk(row, chunk.start, len(chunk.tokens), torch.tensor(chunk.pages[group]))
            for row, chunk in rows
            if len(chunk.tokens) > 1
        ],
    )
    slots = np.concatenate([kv_slots(chunk, group, page_tokens) for _, chunk in rows])
    return KVBatch(torch.from_numpy(slots), attention)


def kv_slots(chunk: Chunk, group: int, page_tokens: int) -> NDArray[np.int32]:
    """Where the KV of a chunk's tokens goes: page · page tokens + offset."""
    position = np.arange(chunk.start, chunk.start + len(chunk.tokens), dtype=np.int32)
    pages = np.asarray(chunk.pages[group], np.int32)
    return pages[position // page_tokens] * np.int32(page_tokens) + position % np.int32(page_tokens)


def _lora(rows: list[tuple[int, Chunk]], table: AdapterTable) -> LoraBatch | None:
    """None when every row is the base's: then no LoRA kernel runs."""
    runs = [(row, row + len(chunk.tokens), table.slot(chunk.adapter)) for row, chunk in rows]
    segments = _segments(runs)
    if not segments:
        return None
    slots = np.concatenate([np.full(end - start, slot, np.int32) for start, end, slot in runs])
    sampled = [table.slot(chunk.adapter) for _, chunk in rows if chunk.sample]
    head = _segments([(i, i + 1, slot) for i, slot in enumerate(sampled)])
    return LoraBatch(table.current, segments, split_rows(segments), split_rows(head), torch.from_numpy(slots))


def _segments(runs: list[tuple[int, int, int]]) -> list[Segment]:
    """Runs (start, end, slot) of rows, neighbours of one slot joined, the base's left out."""
    segments: list[Segment] = []
    for start, end, slot in runs:
        if slot < 0:
            continue
        if segments and (segments[-1].slot, segments[-1].end) == (slot, start):
            segments[-1] = Segment(segments[-1].start, end, slot)
        else:
            segments.append(Segment(start, end, slot))
    return segments
