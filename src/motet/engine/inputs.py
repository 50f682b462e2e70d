"""Plan → Batch: the tensors of one step.

Rows are ordered by adapter slot, the base first, so that each adapter's rows are one run and the LoRA kernels see
segments instead of scattered rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from motet.adapters.table import AdapterTable
from motet.kernels.attention import AttentionBatch, PrefillChunk
from motet.kernels.lora import Segment, split_rows
from motet.layers.batch import Batch, LoraBatch
from motet.memory.pool import Pool
from motet.types import Chunk, Plan


@dataclass(frozen=True)
class StepInputs:
    """The device batch, and which sequence each row of logits belongs to."""

    batch: Batch
    sampled: tuple[int, ...]


def build_inputs(plan: Plan, pool: Pool, table: AdapterTable) -> StepInputs:
    """The batch of a plan that computes at least one token."""
    chunks = sorted(plan.chunks, key=lambda chunk: table.slot(chunk.adapter))
    starts = np.cumsum([0, *(len(chunk.tokens) for chunk in chunks)])
    rows = list(zip(starts[:-1].tolist(), chunks, strict=True))
    positions = np.concatenate([np.arange(c.start, c.start + len(c.tokens), dtype=np.int32) for c in chunks])
    batch = Batch(
        tokens=torch.tensor([token for chunk in chunks for token in chunk.tokens]),
        positions=torch.from_numpy(positions),
        kv_slots=torch.from_numpy(np.concatenate([_kv_slots(chunk, pool.page_tokens) for chunk in chunks])),
        attention=_attention(rows),
        kv=pool.kv,
        logit_rows=torch.tensor([row + len(c.tokens) - 1 for row, c in rows if c.sample], dtype=torch.int64),
        lora=_lora(rows, table),
    )
    return StepInputs(batch, tuple(chunk.seq for chunk in chunks if chunk.sample))


def _kv_slots(chunk: Chunk, page_tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    position = np.arange(chunk.start, chunk.start + len(chunk.tokens), dtype=np.int32)
    pages = np.asarray(chunk.pages, np.int32)
    return pages[position // page_tokens] * np.int32(page_tokens) + position % np.int32(page_tokens)


def _attention(rows: list[tuple[int, Chunk]]) -> AttentionBatch:
    decode = [(row, chunk) for row, chunk in rows if len(chunk.tokens) == 1]
    longest = max((len(chunk.pages) for _, chunk in decode), default=0)
    pages = np.zeros((len(decode), longest), np.int32)
    for i, (_, chunk) in enumerate(decode):
        pages[i, : len(chunk.pages)] = chunk.pages
    return AttentionBatch(
        decode_rows=torch.tensor([row for row, _ in decode], dtype=torch.int32),
        decode_lengths=torch.tensor([chunk.start + 1 for _, chunk in decode], dtype=torch.int32),
        decode_pages=torch.from_numpy(pages),
        prefill=[
            PrefillChunk(row, chunk.start, len(chunk.tokens), torch.tensor(chunk.pages))
            for row, chunk in rows
            if len(chunk.tokens) > 1
        ],
    )


def _lora(rows: list[tuple[int, Chunk]], table: AdapterTable) -> LoraBatch | None:
    """None when every row is the base's: then no LoRA kernel runs."""
    segments: list[Segment] = []
    slots = np.full(rows[-1][0] + len(rows[-1][1].tokens), -1, np.int32)
    for row, chunk in rows:
        slot, end = table.slot(chunk.adapter), row + len(chunk.tokens)
        slots[row:end] = slot
        if slot < 0:
            continue
        if segments and segments[-1].slot == slot:
            segments[-1] = Segment(segments[-1].start, end, slot)
        else:
            segments.append(Segment(row, end, slot))
    if not segments:
        return None
    return LoraBatch(table.current, split_rows(segments), torch.from_numpy(slots))
