"""Kernels whose last program to arrive ends the job: ten thousand replays, with the device disturbed, the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from motet.kernels.attention import Heads
from motet.kernels.gpu.attention import DecodeBatch, DecodeWorkspace, decode_attention
from motet.types import FULL, KVGroup
from tests.kernels.gpu.test_kv_write import make_kv

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
