from __future__ import annotations

import pytest
import torch

from motet.kernels.gpu.embed import embed, embed_torch, lora_embed, stand_in
from motet.kernels.gpu.lora import RankBlocks
from tests.close import assert_close


def test_embedding_updates_match_plain_mathematics(device: str) -> None:
    vocabulary, width, ranks = 77, 530, [5, 16, 3]
    pool = torch.randn(64 * 1024, device=device)
    a, b, at = [], [], 64
    for rank in ranks:
        a.append(at)
        b.append(at + rank * vocabulary)
        at += rank * (vocabulary + width)
    table = RankBlocks(
        first=torch.tensor([[9, 9], [0, 2]], dtype=torch.int32, device=device),
        count=torch.tensor([[0, 0], [2, 1]], dtype=torch.int32, device=device),
        a=torch.tensor(a, device=device),
        b=torch.tensor(b, device=device),
        rank=torch.tensor(ranks, dtype=torch.int32, device=device),
        scale=torch.tensor([0.5, 2.0, -1.0], device=device),
        pool=pool,
    )
    tokens = torch.tensor([3, 76, 0, 9], dtype=torch.int32, device=device)
    slots = torch.tensor([-1, 0, 1, 0], dtype=torch.int32, device=device)
    x = torch.randn(4, width, device=device)
    expected = x.clone()
    for row, blocks in ((1, (0, 1)), (2, (2,)), (3, (0, 1))):
        for i in blocks:
            left = pool[a[i] : a[i] + ranks[i] * vocabulary].view(ranks[i], -1)[:, tokens[row]]
            right = pool[b[i] : b[i] + ranks[i] * width].view(ranks[i], -1)
            expected[row] += (left @ right) * table.scale[i]
    base = x[0].clone()
    lora_embed(x, tokens, vocabulary, table, 1, slots)
    assert_close(x, expected, relative=1e-4)
    assert torch.equal(x[0], base)


@pytest.mark.parametrize("count", [1, 5, 70])
def test_tokens_that_the_step_before_chose_are_looked_up(count: int, device: str) -> None:
    table = torch.randn(1000, 530, device=device)
    tokens = torch.randint(0, 1000, (count,), dtype=torch.int32, device=device)
    chosen = torch.randint(0, 1000, (64,), dtype=torch.int32, device=device)
    tokens[::2] = torch.tensor(
        [stand_in(i % 64) for i in range(0, count, 2)], dtype=torch.int32, device=device
    )
    x, known = embed(tokens, chosen, table)
    expected, tokens_known = embed_torch(tokens, chosen, table)
    assert torch.equal(x, expected)
    assert torch.equal(known, tokens_known)
    assert int(known[0]) == int(chosen[0])
