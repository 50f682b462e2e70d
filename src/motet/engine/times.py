"""Where the time goes: how long requests waited for their first step, and what the steps took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from motet.types import Plan, Request, SeqOutput


@dataclass(frozen=True)
class _Begun:
    """A request's first step began `at` that time, after it had `waited`."""

    waited: float
    at: float


class StepTimes:
    """Follows the loop. A step is of prompts if any row of it computes a prompt, else it decodes.

    `prefill_seconds` and `decode_seconds` are the loop's own time, from one landed step to the next; idle time is in
    neither.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is that of `Request.arrival`."""
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._clock = clock
        self._begun: dict[str, _Begun | None] = {}  # by request: None once it was told

    def launched(self, plan: Plan, request_of: Callable[[int], Request], now: float) -> None:
        """A step begins; `now` is on the clock of `Request.arrival`."""
        for chunk in plan.chunks:
            request = request_of(chunk.seq)
            if request.id not in self._begun:
                self._begun[request.id] = _Begun(max(0.0, now - request.arrival), now)

    def landed(self, plan: Plan, seconds: float) -> None:
        """A step is over."""
        if any(len(chunk.tokens) > 1 or not chunk.sample for chunk in plan.chunks):
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds

    def told(self, outputs: list[SeqOutput]) -> list[SeqOutput]:
        """The outputs with the time that they come at, the first of each request with what came before."""
        now = self._clock()
        return [self._told(output, now) for output in outputs]

    def _told(self, output: SeqOutput, now: float) -> SeqOutput:
        begun = self._begun.get(output.request_id)
        if output.finish is not None:
            self._begun.pop(output.request_id, None)
        elif begun is not None:
            self._begun[output.request_id] = None
        at = now if output.token_ids else None
        if begun is None:
            return output if at is None else msgspec.structs.replace(output, at=at)
        prefill = now - begun.at if output.token_ids else None
        return msgspec.structs.replace(output, queue_seconds=begun.waited, prefill_seconds=prefill, at=at)
