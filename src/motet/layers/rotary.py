"""Rotary position embedding tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every position, [max positions, rotated dim / 2] float32.

    `interleaved` says that the pairs of a head that rotate together are neighbours, not its two halves.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


def rotary_table(
    inverse_frequencies: Tensor, max_positions: int, scale: float, interleaved: bool = False
) -> Rotary:
    """Angles are position × inverse frequency ([head dim / 2]); `scale` multiplies both (YaRN's attention factor)."""
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies.float())
    return Rotary((angles.cos() * scale).contiguous(), (angles.sin() * scale).contiguous(), interleaved)
