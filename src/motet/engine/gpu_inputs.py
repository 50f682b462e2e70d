"""Plan → GpuBatch: the tensors of one step on a GPU.

Rows are ordered by adapter slot, the base first, so that each adapter's rows are one run. Graphs are captured on
tensors that never move and have room for any step up to some size (`gpu_shapes`): what a step leaves of it is padding.
A step for which no captured one has room gets tensors of its own. A token that the step before is still choosing is
looked up on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from motet.adapters.gpu_table import MAX_SITE_BLOCKS, GpuTable
from motet.engine.gpu_shapes import INT, MOST_PROMPTS, Step, StepShape, cut, fields
from motet.engine.inputs import kv_slots
from motet.engine.staging import Staging
from motet.kernels.gpu import dense, latent_attention, lora, moe_lora
from motet.kernels.gpu.attention import (
    DecodeBatch,
    DecodeWorkspace,
    PrefillBatch,
    prefill_rows,
    prefill_tiles,
)
from motet.kernels.gpu.embed import stand_in
from motet.kernels.gpu.lora import LoraTiles, row_tiles
from motet.kernels.gpu.tuned import TYPICAL_RANK, tuned
from motet.layers.gpu import GpuBatch, GpuKV, GpuLora
from motet.memory.pool import Pool
from motet.types import PENDING, Chunk, Plan


class _PageTable:
    """A sequence's pages, and the same as an array: to make one of 8,000 tokens takes 25 us, to compare 4."""

    def __init__(self, room: int) -> None:
        self.pages: tuple[int, ...] = ()
        self.row = np.zeros(room, np.int32)

    def put(self, pages: tuple[int, ...]) -> None:
        known = len(self.pages)
        if pages[:known] != self.pages:
            known = 0
        self.row[known : len(pages)] = pages[known:]
        self.pages = pages


class StepBuilder:
    """Makes the batches of plans for one model, pool and table.

    `drawn` [2, rows] is where the sampler leaves the tokens of a step (and their logprobs), `places` says which
    sequence's token is where. `gates` are events that steps with prompts wait for, one in each layer.
    """

    def __init__(
        self,
        pool: Pool,
        table: GpuTable,
        max_model_len: int,
        num_heads: int,
        max_decode: int,
        gates: Sequence[torch.cuda.Event] = (),
    ) -> None:
        self.pool = pool
        self.table = table
        self.groups = pool.spec.kv_groups
        self.max_pages = -(-max_model_len // pool.page_tokens)
        self.max_decode = max_decode
        self.gates = gates
        self.device = pool.data.device
        spec = pool.spec
        if spec.kv_planes == 1:
            self.tile_rows = latent_attention.prefill_rows(num_heads)
            self.workspace = latent_attention.decode_workspace(
                max_decode, num_heads, spec.head_dim, self.device
            )
        else:
            self.tile_rows = prefill_rows(num_heads, spec.num_kv_heads)
            self.workspace = DecodeWorkspace.empty(
                max_decode, num_heads, spec.num_kv_heads, spec.head_dim, self.device
            )
        self.arrived = dense.arrivals(self.device)
        self._typical = {"hidden": spec.hidden_size, "rank": TYPICAL_RANK}
        self.drawn = torch.zeros(2, max_decode, dtype=INT, device=self.device)
        self.places: dict[int, int] = {}
        self._tables: dict[int, list[_PageTable]] = {}
        self.rare = frozenset(
            i for i, site in enumerate(spec.sites) if site.module in ("embed", "head", "router")
        )

    @cached_property
    def decode_lora(self) -> lora.LoraConfig:
        """How updates of single tokens are compiled; like the others, asked for by steps that have them."""
        return tuned("lora_decode", lora.DECODE, **self._typical)

    @cached_property
    def prefill_lora(self) -> lora.LoraConfig:
        """The same among prompts."""
        return tuned("lora_prefill", lora.PREFILL, **self._typical)

    @cached_property
    def decode_shrink(self) -> moe_lora.ShrinkConfig:
        """How experts' updates of single tokens are compiled."""
        return tuned("moe_shrink_decode", moe_lora.DECODE, **self._typical)

    @cached_property
    def prefill_shrink(self) -> moe_lora.ShrinkConfig:
        """The same among prompts."""
        return tuned("moe_shrink_prefill", moe_lora.PREFILL, **self._typical)

    def captured(self, rows: int) -> Staging:
        """The tensors of steps of at most `rows` single tokens."""
        shape = StepShape(rows, rows, rows, 0, 0, rows, rows, self.max_pages)
        return Staging(fields(shape, len(self.groups)), self.device, sides=2)

    def tokens(self, chunks: Sequence[Chunk]) -> NDArray[np.int32]:
        """The tokens of all rows, with stand-ins for those that are not known yet."""
        return np.array(
            [
                stand_in(self.places[chunk.seq]) if token == PENDING else token
                for chunk in chunks
                for token in chunk.tokens
            ],
            np.int32,
        )

    def ordered(self, plan: Plan) -> list[Chunk]:
        """The chunks by adapter slot; this is the order of rows."""
        return sorted(plan.chunks, key=lambda chunk: self.table.slot(chunk.adapter))

    def idle(self, chunks: Sequence[Chunk]) -> frozenset[int]:
        """The rarely adapted sites if no adapter of the step adapts any of them, else none: graphs are captured for
        these two."""
        slots = {self.table.slot(chunk.adapter) for chunk in chunks} - {-1}
        adapted = any(self.rare & self.table.adapted[slot] for slot in slots)
        return frozenset() if adapted else self.rare

    def fill_decode(self, staging: Staging, chunks: Sequence[Chunk]) -> None:
        """Write a step of single tokens into tensors that have room for it."""
        host, count = staging.host, len(chunks)
        size = len(host["tokens"])
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        slots = np.full(size, -1, np.int32)
        slots[:count] = [self.table.slot(chunk.adapter) for chunk in chunks]
        host["tokens"][:count] = self.tokens(chunks)
        host["tokens"][count:] = 0
        host["positions"][:count], host["positions"][count:] = starts, 0
        host["rows"][:] = host["logits"][:] = count
        host["logit_rows"][:] = host["decode_rows"][:] = np.arange(size)
        host["lengths"][:count], host["lengths"][count:] = starts + 1, 0
        host["slots"][:] = slots
        tiles = row_tiles(slots[:count], self.decode_lora.rows)
        for name in ("tiles", "head_tiles"):
            host[name][:, : tiles.shape[1]] = tiles
            host[name][2, tiles.shape[1] :] = 0
        page, offset = starts // self.pool.page_tokens, starts % self.pool.page_tokens
        rows = self._page_tables(chunks)
        for group in range(len(self.groups)):
            pages, targets = host[f"pages{group}"], host[f"kv_slots{group}"]
            for i, tables in enumerate(rows):
                table = tables[group].pages
                pages[i, : len(table)] = tables[group].row[: len(table)]
            of_row = np.asarray(pages[np.arange(count), page], np.int32)
            targets[:count] = of_row * np.int32(self.pool.page_tokens) + offset
            targets[count:] = -1

    def _page_tables(self, chunks: Sequence[Chunk]) -> list[list[_PageTable]]:
        """Each sequence's page tables as arrays; those of the sequences of the step before are extended."""
        before, self._tables = self._tables, {}
        for chunk in chunks:
            known = before.get(chunk.seq) or [_PageTable(self.max_pages) for _ in self.groups]
            for table, pages in zip(known, chunk.pages, strict=True):
                table.put(pages)
            self._tables[chunk.seq] = known
        return [self._tables[chunk.seq] for chunk in chunks]

    def decode_batch(self, staging: Staging, with_lora: bool, idle: frozenset[int], pdl: bool) -> GpuBatch:
        """The batch that reads a step of single tokens from its tensors, whatever is written to them later."""
        on = staging.device
        groups = [
            GpuKV(on[f"kv_slots{g}"], DecodeBatch(on["decode_rows"], on["lengths"], on[f"pages{g}"]), None)
            for g in range(len(self.groups))
        ]
        adapters = None
        if with_lora:
            adapters = GpuLora(
                self.table.current, on["slots"], LoraTiles(*on["tiles"]), LoraTiles(*on["head_tiles"]),
                self.decode_lora, self.decode_shrink, len(on["tokens"]), MAX_SITE_BLOCKS, idle,
            )  # fmt: skip
        return GpuBatch(
            on["tokens"], on["positions"], groups, self.pool.kv, on["logit_rows"], on["rows"], on["logits"],
            adapters, self.drawn[0], self.workspace, self.arrived, pdl, all_wanted=True,
        )  # fmt: skip

    def batch(self, chunks: Sequence[Chunk], pdl: bool) -> GpuBatch:
        """A batch of any chunks, in tensors of its own."""
        step = self.arrange(chunks)
        staging = Staging(fields(step.shape, len(self.groups)), self.device)
        self.fill(staging.host, step)
        staging.upload()
        adapters = None
        if step.runs.shape[1]:
            blocks = max(self.table.rank_blocks, 1)
            adapters = self._prompt_lora(staging.device, step.adapters, blocks, self.idle(chunks))
        return self._prompt_batch(staging.device, step.shape, adapters, pdl)

    def room(self, rows: int) -> StepShape:
        """What a captured step with prompts of so many rows has room for."""
        sequences = min(self.max_decode, MOST_PROMPTS)
        tiles = rows // self.prefill_lora.rows + min(self.max_decode, rows)
        prefill = rows // self.tile_rows + sequences
        most = min(self.max_decode, rows)
        return StepShape(rows, most, most, sequences, prefill, tiles, most, self.max_pages)

    def prompts(self, rows: int) -> Staging:
        """The tensors of all captured steps with prompts, up to so many rows."""
        return Staging(fields(self.room(rows), len(self.groups)), self.device, sides=2)

    def prompt_batch(
        self, staging: Staging, rows: int, with_lora: bool, idle: frozenset[int], pdl: bool
    ) -> GpuBatch:
        """The batch that reads a step with prompts of at most `rows` - 1 rows from its tensors."""
        room = self.room(rows)
        on = cut(staging.device, room, len(self.groups))
        adapters = None
        if with_lora:
            adapters = self._prompt_lora(on, min(self.max_decode, rows), MAX_SITE_BLOCKS, idle)
        return self._prompt_batch(on, room, adapters, pdl)

    def arrange(self, chunks: Sequence[Chunk]) -> Step:
        """What follows from the chunks of a step, in the order of their rows."""
        lengths = np.array([len(chunk.tokens) for chunk in chunks], np.int64)
        first = np.cumsum(lengths) - lengths
        single = [i for i, chunk in enumerate(chunks) if len(chunk.tokens) == 1]
        longer = [i for i, chunk in enumerate(chunks) if len(chunk.tokens) > 1]
        sampled = [i for i, chunk in enumerate(chunks) if chunk.sample]
        tiles = prefill_tiles(
            ((int(first[i]), chunks[i].start, int(lengths[i]), n) for n, i in enumerate(longer)),
            self.tile_rows,
        )
        slots = np.repeat([self.table.slot(chunk.adapter) for chunk in chunks], lengths).astype(np.int32)
        runs = row_tiles(slots, self.prefill_lora.rows)
        head = row_tiles(slots[(first + lengths - 1)[sampled]], self.prefill_lora.rows)
        return Step(chunks, first, slots, single, longer, sampled, tiles, runs, head)

    def fill(self, host: Mapping[str, NDArray[Any]], step: Step) -> None:
        """Write a step into arrays that have room for it."""
        chunks, count = step.chunks, len(step.slots)
        ends = [int(step.first[i]) + len(chunks[i].tokens) for i in step.sampled]
        positions = [np.arange(c.start, c.start + len(c.tokens)) for c in chunks]
        _put(host["tokens"], self.tokens(chunks), 0)
        _put(host["positions"], np.concatenate([*positions, np.empty(0, np.int64)]), 0)
        _put(host["logit_rows"], np.array(ends, np.int64) - 1, 0)
        _put(host["slots"], step.slots, -1)
        # What pads single tokens leaves zeros in the last row, which pads the step.
        _put(host["decode_rows"], step.first[step.single], len(host["tokens"]) - 1)
        _put(host["lengths"], [chunks[i].start + 1 for i in step.single], 0)
        _put(host["prefill"], step.prefill, 0)
        host["rows"][:], host["logits"][:] = count, len(ends)
        for name, tiles in (("tiles", step.runs), ("head_tiles", step.head)):
            host[name][:, : tiles.shape[1]] = tiles
            host[name][2, tiles.shape[1] :] = 0
        for g in range(len(self.groups)):
            for name, members in ((f"pages{g}", step.single), (f"prefill_pages{g}", step.longer)):
                for row, i in enumerate(members):
                    host[name][row, : len(chunks[i].pages[g])] = chunks[i].pages[g]
            targets = [kv_slots(c, g, self.pool.page_tokens) for c in chunks]
            _put(host[f"kv_slots{g}"], np.concatenate([*targets, np.empty(0, np.int32)]), -1)

    def _prompt_lora(
        self, on: Mapping[str, Tensor], adapters: int, rank_blocks: int, idle: frozenset[int]
    ) -> GpuLora:
        return GpuLora(
            self.table.current, on["slots"], LoraTiles(*on["tiles"]), LoraTiles(*on["head_tiles"]),
            self.prefill_lora, self.prefill_shrink, adapters, rank_blocks, idle, self.gates,
        )  # fmt: skip

    def _prompt_batch(
        self, on: Mapping[str, Tensor], shape: StepShape, adapters: GpuLora | None, pdl: bool
    ) -> GpuBatch:
        kv = [
            GpuKV(
                on[f"kv_slots{g}"],
                DecodeBatch(on["decode_rows"], on["lengths"], on[f"pages{g}"]) if shape.decode else None,
                PrefillBatch(on["prefill"], on[f"prefill_pages{g}"]) if shape.sequences else None,
            )
            for g in range(len(self.groups))
        ]
        return GpuBatch(
            on["tokens"], on["positions"], kv, self.pool.kv, on["logit_rows"], on["rows"], on["logits"], adapters,
            self.drawn[0], self.workspace, self.arrived, pdl,
        )  # fmt: skip


def _put(array: NDArray[Any], values: ArrayLike, padding: int) -> None:
    """Write values to the beginning of an array and padding to the rest."""
    count = len(values)  # type: ignore[arg-type]
    array[:count] = values
    array[count:] = padding
