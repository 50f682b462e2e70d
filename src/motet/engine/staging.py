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

    Write to `host[name]`, then `upload`; what a step reads is `device[name]`. With two sides the host writes to one
    while the copy of the other may still be under way; each begins with what was written to it two uploads ago.
    """

    def __init__(self, fields: Mapping[str, Field], device: torch.device, sides: int = 1) -> None:
        places, size = {}, 0
        for name, field in fields.items():
            places[name] = size
            size += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        pinned = device.type == "cuda"

        def views(memory: Tensor) -> dict[str, Tensor]:
            return {
                name: memory[at : at + fields[name].nbytes].view(fields[name].dtype).view(fields[name].shape)
                for name, at in places.items()
            }

        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._memory = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(sides)]
        self._views = [{name: view.numpy() for name, view in views(m).items()} for m in self._memory]
        self._copied = [torch.cuda.Event() if pinned else None for _ in range(sides)]
        self._side = 0
        self.device = views(self._device)

    @property
    def host(self) -> dict[str, NDArray[np.generic]]:
        """The arrays to write to."""
        return self._views[self._side]

    def upload(self) -> None:
        """Copy everything to the device, behind what its stream has to do; then it is the other side's turn."""
        self._device.copy_(self._memory[self._side], non_blocking=True)
        if (event := self._copied[self._side]) is not None:
            event.record()
        self._side = (self._side + 1) % len(self._memory)
        if len(self._memory) > 1 and (event := self._copied[self._side]) is not None:
            event.synchronize()  # of the upload before the last: long done
