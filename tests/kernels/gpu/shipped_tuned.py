"""What kernels launch with the configurations in files of Motet's own, at the shapes that these name, for `hopper`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from motet.kernels.activation import Activation
from motet.kernels.gpu import lora, tuned
from motet.kernels.gpu.dense import DenseConfig, DenseUpdate, arrivals, dense_product
from motet.kernels.gpu.moe import ProductConfig, product, tile_rows
from motet.kernels.gpu.moe_lora import ExpertUpdate, ShrinkConfig, shrink, shrunk
from motet.kernels.gpu.route import Sorted
from tests.kernels.gpu.shipped_dense import HEAD_DIMS, kv_write, meta, rank_blocks, tiles
from tests.kernels.gpu.shipped_moe import Shape, weights

TOP_K, EXPERTS = 4, 32


def dense(shape: Mapping[str, int], config: DenseConfig) -> None:
    features, depth = shape["features"], shape["depth"]
    z = lora.shrunk(16, depth, 64, lora.DECODE, "meta")
    widths = next((widths for widths in HEAD_DIMS if sum(widths) == features), (features,))
    for update in (None, DenseUpdate(rank_blocks(), 5, widths, tiles(16), z)):
        dense_product(
            meta(16, depth), meta(features, depth), meta(features), meta(16, features), arrivals("meta"), config,
            update=update, write=kv_write(16, widths), pdl=True,
        )  # fmt: skip


def adapters(shape: Mapping[str, int], config: lora.LoraConfig) -> None:
    hidden = shape["hidden"]
    z = lora.shrunk(16, hidden, 2 * shape["rank"], config, "meta")
    lora.lora_add(
        meta(16, hidden), meta(16, hidden), rank_blocks(), 5, (hidden,), tiles(16), z, config, pdl=True
    )


def experts(shape: Mapping[str, int], config: ProductConfig) -> None:
    sides, width, depth = shape["sides"], shape["features"], shape["depth"]
    of = Shape(depth, width, EXPERTS, TOP_K, Activation(), bool(shape["packed"]))
    tokens = shape["rows"] * EXPERTS // TOP_K
    work = Sorted.empty(tokens, TOP_K, EXPERTS, shape["rows"], 8, "meta")
    x = meta(tokens if sides == 2 else tokens * TOP_K, depth)
    out = meta(tokens * TOP_K, width, dtype=torch.bfloat16 if sides == 2 else torch.float32)
    update = ExpertUpdate(rank_blocks(), 0, shrunk(tokens * TOP_K, sides, 64, x))
    for one in (None, update):
        product(
            x, weights(of, sides * width, depth), work, out, config, gather=sides == 2,
            activation=Activation() if sides == 2 else None, update=one, pdl=True,
        )  # fmt: skip


def shrinks(shape: Mapping[str, int], config: ShrinkConfig, tokens: int = 1600, rows: int = 128) -> None:
    hidden = shape["hidden"]
    for gather in (True, False):
        work = Sorted.empty(tokens, TOP_K, EXPERTS, rows, 8, "meta")
        x = meta(tokens if gather else tokens * TOP_K, hidden)
        update = ExpertUpdate(rank_blocks(), 0, shrunk(tokens * TOP_K, 2 if gather else 1, 64, x))
        shrink(x, work, update, gather=gather, config=config, pdl=True)


def decode_shrinks(shape: Mapping[str, int], config: ShrinkConfig) -> None:
    """Up to 128 rows: 256 would keep 128 bytes of a thread in memory, for the sake of steps a fifth as long."""
    for tokens in (16, 64, 128):
        shrinks(shape, config, tokens, tile_rows(tokens, TOP_K, EXPERTS))


LAUNCH: dict[str, Callable[[Mapping[str, int], Any], None]] = {
    "dense_product": dense, "lora_decode": adapters, "lora_prefill": adapters, "moe_product": experts,
    "moe_shrink_decode": decode_shrinks, "moe_shrink_prefill": shrinks,
}  # fmt: skip


def launches() -> None:
    """Every entry of every file."""
    devices = {json.loads(file.read_text())["device"] for file in tuned.SHIPPED.glob("*.json")}
    for device in devices:
        for operation, shape, config in tuned.shipped(device):
            LAUNCH[operation](shape, config)
