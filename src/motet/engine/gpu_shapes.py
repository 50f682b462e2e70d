"""Sizes of steps on a GPU: the arrays that a step has, how long they are, and which sizes graphs are captured for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from motet.engine.staging import Field
from motet.types import Chunk

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of captured steps of single tokens."""
PROMPT_STEPS = ((2048, 1024), (256, 256), (128, 128), (0, 64))
"""Rows of captured steps with prompts: from the first number on, multiples of the second."""
MOST_PROMPTS = 32
"""Prompts of a captured step."""
INT = torch.int32


class _Array(Protocol):
    def __getitem__(self, key: tuple[slice, ...]) -> Self: ...


A = TypeVar("A", bound=_Array)


def bucket(rows: int) -> int:
    """The captured row count that holds so many single tokens; 0 if none does."""
    return next((size for size in BUCKETS if size >= rows), 0)


def prompt_sizes(max_step_tokens: int) -> list[int]:
    """Row counts of captured steps with prompts. The last row of each is padding, so the largest has one to spare."""
    largest = (max_step_tokens // 64 + 1) * 64
    sizes = [0]
    while sizes[-1] < largest:
        step = next(step for begin, step in PROMPT_STEPS if sizes[-1] >= begin)
        sizes.append(min(sizes[-1] + step, largest))
    return sizes[1:]


@dataclass(frozen=True)
class StepShape:
    """What the arrays of a step are made for."""

    rows: int
    sampled: int
    decode: int
    sequences: int
    prefill_tiles: int
    tiles: int
    head_tiles: int
    max_pages: int

    def has_room_for(self, step: StepShape) -> bool:
        """Whether a step fits, with a row to spare."""
        return step.rows < self.rows and all(
            getattr(step, name) <= getattr(self, name) for name in self.__dataclass_fields__
        )


def fields(shape: StepShape, groups: int) -> dict[str, Field]:
    """The arrays of a step of this shape."""
    rows = shape.rows
    found = {
        "tokens": Field(INT, (rows,)),
        "positions": Field(INT, (rows,)),
        "rows": Field(INT, (1,)),
        "logits": Field(INT, (1,)),
        "logit_rows": Field(torch.int64, (shape.sampled,)),
        "slots": Field(INT, (rows,)),
        "tiles": Field(INT, (3, shape.tiles)),
        "head_tiles": Field(INT, (3, shape.head_tiles)),
        "decode_rows": Field(INT, (shape.decode,)),
        "lengths": Field(INT, (shape.decode,)),
        "prefill": Field(INT, (shape.prefill_tiles, 4)),
    }
    for group in range(groups):
        found[f"kv_slots{group}"] = Field(INT, (rows,))
        found[f"pages{group}"] = Field(INT, (shape.decode, shape.max_pages))
        found[f"prefill_pages{group}"] = Field(INT, (shape.sequences, shape.max_pages))
    return found


def cut(arrays: Mapping[str, A], shape: StepShape, groups: int) -> dict[str, A]:
    """The parts of larger arrays that a step of this shape uses."""
    return {
        name: arrays[name][tuple(slice(0, size) for size in field.shape)]
        for name, field in fields(shape, groups).items()
    }


@dataclass(frozen=True)
class Step:
    """Chunks in the order of their rows, with what follows from it.

    `first` is each chunk's first row; `slots` [rows] each row's adapter slot; `single`, `longer` and `sampled` are
    indices of chunks; `prefill` [N, 4], `runs` and `head` [3, N] are tiles of queries, of rows and of rows with logits.
    """

    chunks: Sequence[Chunk]
    first: NDArray[np.int64]
    slots: NDArray[np.int32]
    single: Sequence[int]
    longer: Sequence[int]
    sampled: Sequence[int]
    prefill: NDArray[np.int32]
    runs: NDArray[np.int32]
    head: NDArray[np.int32]

    @property
    def shape(self) -> StepShape:
        """The least that has room for it."""
        used = max((len(table) for chunk in self.chunks for table in chunk.pages), default=0)
        return StepShape(
            len(self.slots), len(self.sampled), len(self.single), len(self.longer), len(self.prefill),
            self.runs.shape[1], self.head.shape[1], used,
        )  # fmt: skip

    @property
    def adapters(self) -> int:
        """How many different adapters it has."""
        return len({chunk.adapter for chunk in self.chunks} - {""})
