"""A pointer table for tests of experts: adapters that differ in rank and scale, lack experts, and share A or do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motet.kernels.gpu.lora import RankBlocks


def expert_table(
    num_experts: int, hidden: int, width: int, ranks: Sequence[int], dtype: torch.dtype, device: str
) -> RankBlocks:
    """Sites 2 + 3·e: expert e's gate, up, down. Slot s has rank `ranks[s]`, and none for experts with e % 5 == s.

    Odd slots share A between gate and up; slot 2 has a gate of half its up's rank.
    """
    sites = 2 + 3 * num_experts
    first = torch.zeros(sites, len(ranks), dtype=torch.int32)
    count = torch.zeros(sites, len(ranks), dtype=torch.int32)
    parts: list[Tensor] = [torch.full((64,), float("nan"))]
    table: dict[str, list[float]] = {"a": [], "b": [], "rank": [], "scale": []}
    at = 64

    def put(part: Tensor) -> int:
        nonlocal at
        padded = torch.full((-(-part.numel() // 32) * 32,), float("nan"))  # what lies between must not matter
        padded[: part.numel()] = part.flatten()
        parts.append(padded)
        at += len(padded)
        return at - len(padded)

    for slot, rank in enumerate(ranks):
        for expert in range(num_experts):
            if expert % 5 == slot:
                continue
            shared: list[int] = []
            for side, (depth, out) in enumerate(((hidden, width), (hidden, width), (width, hidden))):
                site = 2 + 3 * expert + side
                mine = max(rank // 2, 1) if (slot, side) == (2, 0) else rank
                first[site, slot], count[site, slot] = len(table["rank"]), -(-mine // 16)
                for j, start in enumerate(range(0, mine, 16)):
                    r = min(16, mine - start)
                    again = side == 1 and slot % 2 == 1
                    table["a"].append(shared[j] if again else put(torch.randn(r, depth) / depth**0.5))
                    if side == 0:
                        shared.append(int(table["a"][-1]))
                    table["b"].append(put(torch.randn(r, out) / rank**0.5))
                    table["rank"].append(r)
                    table["scale"].append(0.5 + (slot + side) / 4)

    def on_device(name: str, kind: torch.dtype) -> Tensor:
        return torch.tensor(table[name], dtype=kind, device=device)

    return RankBlocks(
        first.to(device), count.to(device), on_device("a", torch.int64), on_device("b", torch.int64),
        on_device("rank", torch.int32), on_device("scale", torch.float32), torch.cat(parts).to(device, dtype),
    )  # fmt: skip
