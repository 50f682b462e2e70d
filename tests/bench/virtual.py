"""An event loop whose clock leaps to the next timer instead of waiting, so that delays are exact on any machine.

Sockets are real: before the clock leaps, what was written to them gets a moment to arrive.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
ARRIVAL = 0.003  # seconds of real time


class _Leaping(selectors.DefaultSelector):
    """Waits for sockets in real time, for timers not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout if not timeout else ARRIVAL)
        if not ready and timeout:
            self.now += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, selector: _Leaping) -> None:
        super().__init__(selector)
        self._leaping = selector

    def time(self) -> float:
        return self._leaping.now


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a clock of its own, which `time.perf_counter` tells too."""
    selector = _Leaping()
    with (
        pytest.MonkeyPatch.context() as patch,
        asyncio.Runner(loop_factory=lambda: _Loop(selector)) as runner,
    ):
        patch.setattr(time, "perf_counter", lambda: selector.now)
        return runner.run(work)
