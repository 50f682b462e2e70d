"""Launches of one bucket of rows whose steps differ in all that must not matter to the compiler, for `hopper`."""

from __future__ import annotations

import torch

from motet.kernels.gpu.dense import DenseUpdate, arrivals, dense_config, dense_product
from motet.kernels.gpu.lora import DECODE, LoraTiles, lora_expand, lora_shrink, shrunk
from tests.kernels.gpu.shipped_dense import meta, rank_blocks


def launches() -> None:
    """Rows, sites, adapters, tiles (of which two rows of a matrix may begin anywhere), and what shrink left."""
    widths, depth, table = (96, 32), 1600, rank_blocks()
    for rows, count, site, blocks in (
        (17, 1, 0, 1),
        (32, 16, 16, 2),
        (18, 2, 1, 32),
        (31, 15, 7, 3),
        (20, 4, 5, 4),
    ):
        tiles = LoraTiles(*torch.zeros(3, count, dtype=torch.int32))
        x, y, weight = meta(rows, depth), meta(rows, sum(widths)), meta(sum(widths), depth)
        z = shrunk(rows + site, depth, 32 * blocks, DECODE, "meta")
        lora_shrink(x, table, site, 2, tiles, z, DECODE, pdl=True)
        lora_expand(y, table, site, widths, tiles, z, DECODE, pdl=True)
        for update in (None, DenseUpdate(table, site, widths, tiles, z)):
            dense_product(
                x, weight, None, y, arrivals("meta"), dense_config(128, depth), update=update, pdl=True
            )
