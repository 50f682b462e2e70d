"""Where the time goes: how long requests waited for their first step, and what the steps took."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from motet.types import Plan, Request, SeqOutput


class StepTimes:
    """Follows the loop. A step is of prompts if any row of it computes a prompt, else it decodes.

    `prefill_seconds` and `decode_seconds` are the loop's own time, from one landed step to the next; idle time is in
    neither.
    """

    def __init__(self) -> None:
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._waited: dict[str, float | None] = {}  # by request: None once it was told

    def launched(self, plan: Plan, request_of: Callable[[int], Request], now: float) -> None:
        """A step begins; `now` is on the clock of `Request.arrival`."""
        for chunk in plan.chunks:
            request = request_of(chunk.seq)
            if request.id not in self._waited:
                self._waited[request.id] = max(0.0, now - request.arrival)

    def landed(self, plan: Plan, seconds: float) -> None:
        """A step is over."""
        if any(len(chunk.tokens) > 1 or not chunk.sample for chunk in plan.chunks):
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds

    def told(self, outputs: list[SeqOutput]) -> list[SeqOutput]:
        """The outputs, the first of each request with its wait."""
        return [self._told(output) for output in outputs]

    def _told(self, output: SeqOutput) -> SeqOutput:
        waited = self._waited.get(output.request_id)
        if output.finish is not None:
            self._waited.pop(output.request_id, None)
        elif waited is not None:
            self._waited[output.request_id] = None
        return output if waited is None else msgspec.structs.replace(output, queue_seconds=waited)
