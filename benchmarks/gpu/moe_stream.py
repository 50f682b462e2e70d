"""How fast the weights of experts can be read in the order in which products read them, with next to no arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.gpu.moe_case import Layer, Step
from benchmarks.gpu.moe_report import Report, steps_of
from motet.kernels.gpu.jit import kernel, tl
from motet.kernels.gpu.moe import ProductConfig
from motet.kernels.gpu.mxfp4 import Mxfp4, first_group
from tests.kernels.gpu.shipped_moe import default_plan


def time_streams(report: Report, layers: Sequence[Layer]) -> None:
    """Reads of up and down for 16 rows: the default's, with more stages, and without the scales."""
    plan = default_plan(layers[0].shape, 16)
    steps = steps_of(layers, 16, plan)
    for part, config in (("up", plan.up), ("down", plan.down)):
        moved = statistics.mean(step.weight_bytes(part) for step in steps)
        for stages, with_scales in ((3, True), (5, True), (3, False)):
            calls = [partial(_stream, step, part, config, stages, with_scales) for step in steps]
            name = f"T16 read {part} s{stages}{'' if with_scales else ' words only'}"
            report.time(name, calls, moved * (1 if with_scales else 16 / 17))


def _stream(step: Step, part: str, config: ProductConfig, stages: int, with_scales: bool) -> None:
    weight = (step.layer.gate_up if part == "up" else step.layer.down).weight
    assert isinstance(weight, Mxfp4)
    sides = 2 if part == "up" else 1
    _, tiles, groups, _ = weight.words.shape
    width, out = tiles * 32 // sides, step.y.view(torch.int32)
    blocks = -(-width // config.features)
    _stream_kernel[(len(step.work.tiles) * blocks,)](
        out, weight.words, weight.scales, step.work.tiles, BLOCKS=blocks, N=width, K=groups * 32, SIDES=sides,
        F=config.features, SPLIT=config.split, DEPTH=config.depth, STAGES=stages, WITH_SCALES=with_scales,
        num_warps=config.warps,
    )  # fmt: skip


@kernel()
def _stream_kernel(  # type: ignore[no-untyped-def]
    out, words, scales, tiles, BLOCKS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr,
    F: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, WITH_SCALES: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    expert, rows = tl.load(tiles + tile * 5).to(tl.int64), tl.load(tiles + tile * 5 + 2)
    if rows == 0:
        return
    TILES: tl.constexpr = SIDES * F // 32
    i = tl.arange(0, SPLIT * TILES)
    group = first_group(i % TILES, expert, block, N, K, SIDES, F // 32) + i // TILES * (DEPTH // 32)
    at = words + group[:, None] * 128 + tl.arange(0, 128)[None, :]
    at_scale = scales + group[:, None] * 8 + tl.arange(0, 8)[None, :]
    seen = tl.zeros((SPLIT * TILES, 128), tl.int32)
    seen_scales = tl.zeros((SPLIT * TILES, 8), tl.int32)
    for _ in tl.range(0, K, SPLIT * DEPTH, num_stages=STAGES):
        for g in tl.static_range(DEPTH // 32):
            seen ^= tl.load(at + g * 128)
            if WITH_SCALES:
                seen_scales ^= tl.load(at_scale + g * 8)
        at += SPLIT * DEPTH * 4
        at_scale += SPLIT * DEPTH // 4
    tl.store(out + tl.program_id(0), tl.max(tl.max(seen, 1), 0) + tl.max(tl.max(seen_scales, 1), 0))
