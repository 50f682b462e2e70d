"""Kernels whose last program to arrive ends the job: ten thousand replays, with the device disturbed, the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from motet.kernels.attention import Heads
from motet.kernels.gpu.attention import DecodeBatch, DecodeWorkspace, decode_attention
from motet.kernels.gpu.dense import DenseConfig, arrivals, dense_product
from motet.kernels.gpu.latent_attention import decode_workspace, latent_decode
from motet.kernels.gpu.norm_route import norm_route
from motet.kernels.latent_attention import LatentHeads
from motet.kernels.route import RoutingRule
from motet.types import FULL, KVGroup
from tests.kernels.gpu.test_dense import make_update, make_write, operands
from tests.kernels.gpu.test_kv_write import make_kv
from tests.kernels.gpu.test_latent_attention import make_batch
from tests.kernels.gpu.test_latent_attention import make_kv as make_latent_kv
from tests.kernels.gpu.test_lora import make_table
from tests.kernels.gpu.test_norm_route import EPS, Case, make_slots, make_work

REPLAYS = 10_000


def count_differences(call: Callable[[], Tensor]) -> int:
    """Replays of `call` whose result has other bits than its first, while another stream keeps the device busy."""
    first = call().clone()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
        different += (result.view(torch.uint8) != first.view(torch.uint8)).any()
    noise, beside = torch.randn(512, 512, device="cuda"), torch.cuda.Stream()
    for i in range(REPLAYS):
        graph.replay()
        if i % 7 == 0:
            with torch.cuda.stream(beside):
                for _ in range(i % 5):
                    noise @ noise
        if i % 1000 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return int(different)


@pytest.mark.parametrize("reach", [FULL, KVGroup((), window=50)], ids=str)
def test_splits_of_decode_attention_add_up_in_one_order(reach: KVGroup) -> None:
    kv = make_kv(2, 64, torch.bfloat16, "cuda")
    heads = Heads(8, 0.125, reach, torch.randn(8, device="cuda"))
    qkv = torch.randn(7, (8 + 4) * 64, device="cuda").bfloat16()
    lengths = torch.tensor([1, 60, 33, 0, 75, 64, 80], dtype=torch.int32, device="cuda")
    pages = torch.randint(0, 15, (7, 5), dtype=torch.int32, device="cuda")
    batch = DecodeBatch(torch.arange(7, dtype=torch.int32, device="cuda"), lengths, pages)
    workspace = DecodeWorkspace.empty(7, 8, 2, 64, "cuda")

    def attend() -> Tensor:
        out = torch.full((7, 8 * 64), torch.nan, dtype=torch.bfloat16, device="cuda")
        decode_attention(qkv, kv, 0, batch, heads, workspace, out, min_split=16)
        return out

    assert count_differences(attend) == 0


def test_splits_of_latent_attention_add_up_in_one_order() -> None:
    heads = LatentHeads(num=24, nope=16, rope=8, rank=64, value=16, scale=0.2)
    kv = make_latent_kv(heads, torch.bfloat16, "cuda")
    query, decode, _ = make_batch(kv, heads, "cuda")
    workspace = decode_workspace(5, heads.num, kv.head_dim, "cuda")

    def attend() -> Tensor:
        out = query.new_zeros(len(query), heads.num, heads.rank)
        latent_decode(query, kv, 1, decode, heads, workspace, out, min_split=16)
        return out

    assert count_differences(attend) == 0


@pytest.mark.parametrize("slots", [[-1] * 5, [-1, 0, 0, 3, 3, 3, 4]], ids=["base", "adapters"])
def test_parts_of_dense_sums_add_up_in_one_order(slots: list[int]) -> None:
    x, weight, bias = operands(len(slots), 130, 66, torch.bfloat16, "cuda")
    update = make_update(x, slots, (57, 9), make_table(130, (57, 9), torch.bfloat16, "cuda"))
    counters, config = arrivals("cuda"), DenseConfig(depth=16, splits=7)

    def multiply() -> Tensor:
        out = x.new_full((len(x), len(weight)), torch.nan)
        dense_product(x, weight, bias, out, counters, config, update=update)
        return out

    assert count_differences(multiply) == 0


@pytest.mark.parametrize("slots", [[-1] * 5, [-1, 0, 0, 3, 3, 3, 4]], ids=["base", "adapters"])
def test_heads_are_written_alike(slots: list[int]) -> None:
    write = make_write(4, 2, 64, len(slots), torch.bfloat16, "cuda")
    x, weight, bias = operands(len(slots), 130, sum(write.widths), torch.bfloat16, "cuda")
    update = make_update(x, slots, write.widths, make_table(130, write.widths, torch.bfloat16, "cuda"))
    counters, config, before = arrivals("cuda"), DenseConfig(depth=16, splits=7), write.kv.flat.clone()

    def multiply() -> Tensor:
        out = x.new_zeros(len(x), len(weight))
        write.kv.flat.copy_(before)
        dense_product(x, weight, bias, out, counters, config, update=update, write=write)
        return torch.cat([out.flatten(), write.kv.flat])

    assert count_differences(multiply) == 0


@pytest.mark.parametrize("rows", [1, 13, 64])
def test_the_last_of_the_router_sees_all_scores(rows: int) -> None:
    """It follows a product whose parts are counted by the same counters, and may start before that has ended."""
    rule, config = RoutingRule(4, normalise=True), DenseConfig(depth=16, splits=7)
    case, slots = Case(rows, 2880, 32, torch.bfloat16, "cuda", biased=True), make_slots(rows, 5, "cuda")
    x, weight, bias = operands(rows, 130, 2880, torch.bfloat16, "cuda")
    work = make_work(case, rule, slots)
    sorted_pairs = [part for part in vars(work).values() if isinstance(part, Tensor)]

    def route() -> Tensor:
        for part in sorted_pairs:
            part.fill_(-77)
        branch = torch.full_like(case.x, torch.nan)
        dense_product(x, weight, bias, branch, case.arrived, config, pdl=True)
        found = norm_route(
            branch, case.residual, case.weight, EPS, case.router, case.bias, rule, slots, work, None, case.arrived,
            pdl=True,
        )  # fmt: skip
        return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in (*found, *sorted_pairs)])

    assert count_differences(route) == 0
