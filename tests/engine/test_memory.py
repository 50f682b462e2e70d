"""What the engine says of its memory, and when there is too little."""

from __future__ import annotations

import pytest
import torch

from motet.engine.device import fitting
from motet.errors import ConfigError
from motet.observe.metrics import memory_line
from motet.types import EngineStats


def test_lack_of_memory_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 20, 80 << 30))
    with pytest.raises(ConfigError, match=r"the pool needs more .*: 3 MiB of 81920 MiB are free; lower it"), fitting(
        "the pool", "lower it"
    ):  # fmt: skip
        raise torch.cuda.OutOfMemoryError("tried to allocate")


def test_the_memory_line_names_what_there_is() -> None:
    stats = EngineStats(weight_bytes=3 << 29, total_pages=1024, page_bytes=1 << 20)
    assert memory_line(stats) == "memory: weights 1.50 GiB, pool 1.00 GiB (1024 pages of 1024 KiB)"
