"""One step's work as the model sees it: complete, immutable, passed as an argument all the way down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from motet.kernels.attention import AttentionBatch
from motet.kernels.kv_write import KVLayout
from motet.kernels.lora import LoraRows, LoraTable, Segment


@dataclass(frozen=True)
class LoraBatch:
    """The adapters of a step: the pointer table, the rows that carry one, and each row's slot ([T] int32, -1 base).

    `segments` are the runs of rows of one adapter, `rows` the same as the kernels take them, `head_rows` the same
    among the rows of logits.
    """

    table: LoraTable
    segments: Sequence[Segment]
    rows: LoraRows
    head_rows: LoraRows
    slots: Tensor


@dataclass(frozen=True)
class KVBatch:
    """A step in one KV group: slots [T] int32 (page · page tokens + offset) where each row's KV goes, and attention."""

    slots: Tensor
    attention: AttentionBatch


@dataclass(frozen=True)
class Batch:
    """tokens [T] int64, positions [T] int32, a KVBatch for each of the model's KV groups, logit_rows [S] int64.

    `lora` is None when no row carries an adapter: then no LoRA kernel is launched at all.
    """

    tokens: Tensor
    positions: Tensor
    groups: Sequence[KVBatch]
    kv: KVLayout
    logit_rows: Tensor
    lora: LoraBatch | None
