"""Plan → GpuBatch: the tensors of one step on a GPU.

Rows are ordered by adapter slot, the base first, so that each adapter's rows are one run. A step of single tokens has a
row count from BUCKETS, the rest is padding, and lives in tensors that never move: that is what graphs are captured on.
Any other step gets tensors of its own. A token that the step before is still choosing is looked up on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from motet.adapters.gpu_table import GpuTable
from motet.engine.inputs import kv_slots
from motet.engine.staging import Field, Staging
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

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MAX_RANK_BLOCKS = 512 // lora.RANKS
"""Rank blocks at one site that a captured step has room for."""
INT = torch.int32


@dataclass(frozen=True)
class StepShape:
    """What the tensors of a step are made for."""

    rows: int
    sampled: int
    decode: int
    sequences: int
    prefill_tiles: int
    tiles: int
    max_pages: int


def bucket(rows: int) -> int:
    """The captured row count that holds so many rows; 0 if none does."""
    return next((size for size in BUCKETS if size >= rows), 0)


def fields(shape: StepShape, groups: int) -> dict[str, Field]:
    """The arrays of a step of this shape."""
    rows, tiles = shape.rows, shape.tiles
    found = {
        "tokens": Field(INT, (rows,)),
        "positions": Field(INT, (rows,)),
        "rows": Field(INT, (1,)),
        "logit_rows": Field(torch.int64, (shape.sampled,)),
        "slots": Field(INT, (rows,)),
        "tiles": Field(INT, (3, tiles)),
        "head_tiles": Field(INT, (3, shape.sampled)),
        "decode_rows": Field(INT, (shape.decode,)),
        "lengths": Field(INT, (shape.decode,)),
        "prefill": Field(INT, (shape.prefill_tiles, 4)),
    }
    for group in range(groups):
        found[f"kv_slots{group}"] = Field(INT, (rows,))
        found[f"pages{group}"] = Field(INT, (shape.decode, shape.max_pages))
        found[f"prefill_pages{group}"] = Field(INT, (shape.sequences, shape.max_pages))
    return found


class StepBuilder:
    """Makes the batches of plans for one model, pool and table.

    `drawn` [2, rows] is where the sampler leaves the tokens of a step (and their logprobs), `places` says which
    sequence's token is where.
    """

    def __init__(
        self, pool: Pool, table: GpuTable, max_model_len: int, num_heads: int, max_decode: int
    ) -> None:
        self.pool = pool
        self.table = table
        self.groups = pool.spec.kv_groups
        self.max_pages = -(-max_model_len // pool.page_tokens)
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
        typical = {"hidden": spec.hidden_size, "rank": TYPICAL_RANK}
        self.decode_lora = tuned("lora_decode", lora.DECODE, **typical)
        self.prefill_lora = tuned("lora_prefill", lora.PREFILL, **typical)
        self.decode_shrink = tuned("moe_shrink_decode", moe_lora.DECODE, **typical)
        self.prefill_shrink = tuned("moe_shrink_prefill", moe_lora.PREFILL, **typical)
        self.drawn = torch.zeros(2, max_decode, dtype=INT, device=self.device)
        self.places: dict[int, int] = {}
        self.rare = frozenset(
            i for i, site in enumerate(spec.sites) if site.module in ("embed", "head", "router")
        )

    def captured(self, rows: int) -> Staging:
        """The tensors of steps of at most `rows` single tokens."""
        shape = StepShape(rows, rows, rows, 0, 0, rows, self.max_pages)
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
        """Rarely adapted sites that no adapter of the step adapts."""
        slots = {self.table.slot(chunk.adapter) for chunk in chunks} - {-1}
        return self.rare.difference(*(self.table.adapted[slot] for slot in slots))

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
        host["rows"][:] = count
        host["logit_rows"][:] = host["decode_rows"][:] = np.arange(size)
        host["lengths"][:count], host["lengths"][count:] = starts + 1, 0
        host["slots"][:] = slots
        tiles = row_tiles(slots[:count], self.decode_lora.rows)
        for name in ("tiles", "head_tiles"):
            host[name][:, : tiles.shape[1]] = tiles
            host[name][2, tiles.shape[1] :] = 0
        page, offset = starts // self.pool.page_tokens, starts % self.pool.page_tokens
        for group in range(len(self.groups)):
            pages, targets = host[f"pages{group}"], host[f"kv_slots{group}"]
            for i, chunk in enumerate(chunks):
                table = chunk.pages[group]
                pages[i, : len(table)] = table
            of_row = np.asarray(pages[np.arange(count), page], np.int32)
            targets[:count] = of_row * np.int32(self.pool.page_tokens) + offset
            targets[count:] = -1

    def decode_batch(self, staging: Staging, with_lora: bool, idle: frozenset[int], pdl: bool) -> GpuBatch:
        """The batch that reads a step of single tokens from its tensors, whatever is written to them later."""
        on = staging.device
        groups = [
            GpuKV(on[f"kv_slots{g}"], DecodeBatch(on["decode_rows"], on["lengths"], on[f"pages{g}"]), None)
            for g in range(len(self.groups))
        ]
        adapters = GpuLora(
            self.table.current, on["slots"], LoraTiles(*on["tiles"]), LoraTiles(*on["head_tiles"]),
            self.decode_lora, self.decode_shrink, len(on["tokens"]), MAX_RANK_BLOCKS, idle,
        )  # fmt: skip
        return GpuBatch(
            on["tokens"], on["positions"], groups, self.pool.kv, on["logit_rows"], on["rows"],
            adapters if with_lora else None, self.drawn[0], self.workspace, self.arrived, pdl,
        )  # fmt: skip

    def batch(self, chunks: Sequence[Chunk], pdl: bool) -> GpuBatch:
        """A batch of any chunks, in tensors of its own."""
        lengths = np.array([len(chunk.tokens) for chunk in chunks])
        first = np.cumsum(lengths) - lengths
        total, ends = int(lengths.sum()), first + lengths
        single = [i for i, chunk in enumerate(chunks) if len(chunk.tokens) == 1]
        longer = [i for i, chunk in enumerate(chunks) if len(chunk.tokens) > 1]
        tiles = prefill_tiles(
            ((int(first[i]), chunks[i].start, int(lengths[i]), n) for n, i in enumerate(longer)),
            self.tile_rows,
        )
        slots = np.repeat([self.table.slot(chunk.adapter) for chunk in chunks], lengths).astype(np.int32)
        sampled = [i for i, chunk in enumerate(chunks) if chunk.sample]
        how = self.prefill_lora
        runs, head = row_tiles(slots, how.rows), row_tiles(slots[ends[sampled] - 1], how.rows)
        groups = range(len(self.groups))
        used = max(len(table) for chunk in chunks for table in chunk.pages)
        shape = StepShape(total, len(sampled), len(single), len(longer), len(tiles), runs.shape[1], used)
        layout = fields(shape, len(groups)) | {"head_tiles": Field(INT, (3, head.shape[1]))}
        staging = Staging(layout, self.device)
        host, on = staging.host, staging.device
        positions = np.concatenate(
            [np.arange(c.start, c.start + len(c.tokens), dtype=np.int32) for c in chunks]
        )
        host["tokens"][:] = self.tokens(chunks)
        host["positions"][:] = positions
        host["rows"][:] = total
        host["logit_rows"][:] = ends[sampled] - 1
        host["slots"][:] = slots
        host["tiles"][:], host["head_tiles"][:] = runs, head
        host["decode_rows"][:] = first[single]
        host["lengths"][:] = [chunks[i].start + 1 for i in single]
        host["prefill"][:] = tiles
        for g in groups:
            for name, members in ((f"pages{g}", single), (f"prefill_pages{g}", longer)):
                for row, i in enumerate(members):
                    host[name][row, : len(chunks[i].pages[g])] = chunks[i].pages[g]
            host[f"kv_slots{g}"][:] = np.concatenate([kv_slots(c, g, self.pool.page_tokens) for c in chunks])
        staging.upload()
        kv = [
            GpuKV(
                on[f"kv_slots{g}"],
                DecodeBatch(on["decode_rows"], on["lengths"], on[f"pages{g}"]) if single else None,
                PrefillBatch(on["prefill"], on[f"prefill_pages{g}"]) if longer else None,
            )
            for g in groups
        ]
        adapters = None
        if runs.shape[1]:
            adapters = GpuLora(
                self.table.current, on["slots"], LoraTiles(*on["tiles"]), LoraTiles(*on["head_tiles"]), how,
                self.prefill_shrink, len({chunk.adapter for chunk in chunks} - {""}), max(self.table.rank_blocks, 1),
                self.idle(chunks),
            )  # fmt: skip
        return GpuBatch(
            on["tokens"],
            on["positions"],
            kv,
            self.pool.kv,
            on["logit_rows"],
            on["rows"],
            adapters,
            self.drawn[0],
            self.workspace,
            self.arrived,
            pdl,
        )
