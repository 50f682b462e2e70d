"""The small numbers of a step on their way to a GPU: one pinned buffer, one copy, views on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 256


@dataclass(frozen=True)
class Field:
    """An array of a step: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Staging:
    """Named arrays that lie side by side on the host and on the device; the device's never move.

    Write to `host[name]`, then `upload`; what a step reads is `device[name]`.
    """

    def __init__(self, fields: Mapping[str, Field], device: torch.device) -> None:
        places, size = {}, 0
        for name, field in fields.items():
            places[name] = size
            size += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        pinned = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)

        def view(memory: Tensor, name: str) -> Tensor:
            field, at = fields[name], places[name]
            return memory[at : at + field.nbytes].view(field.dtype).view(field.shape)

        self.host: dict[str, NDArray[np.generic]] = {name: view(self._host, name).numpy() for name in fields}
        self.device: dict[str, Tensor] = {name: view(self._device, name) for name in fields}

    def upload(self) -> None:
        """Copy everything to the device, behind what its stream has to do; the host's side must stay until then."""
        self._device.copy_(self._host, non_blocking=True)
