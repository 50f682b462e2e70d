"""One step's work as the model sees it: complete, immutable, passed as an argument all the way down."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from motet.kernels.attention import AttentionBatch
from motet.kernels.kv_write import KVLayout
from motet.kernels.lora import LoraRows, LoraTable


@dataclass(frozen=True)
class LoraBatch:
    """The adapters of a step: the pointer table, the rows that carry one, and each row's slot ([T] int32, -1 base)."""

    table: LoraTable
    rows: LoraRows
    slots: Tensor


@dataclass(frozen=True)
class Batch:
    """tokens [T] int64, positions [T] int32, kv_slots [T] int32 (page · page tokens + offset), logit_rows [S] int64.

    `lora` is None when no row carries an adapter: then no LoRA kernel is launched at all.
    """

    tokens: Tensor
    positions: Tensor
    kv_slots: Tensor
    attention: AttentionBatch
    kv: KVLayout
    logit_rows: Tensor
    lora: LoraBatch | None
