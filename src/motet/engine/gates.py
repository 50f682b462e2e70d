"""Steps that begin while their adapters are still on the way: what waits, and for what.

A load has an event for each layer, which tells when its copies are over. Graphs of steps with prompts and adapters are
captured long before it, so they wait for events that stay the same, the gates, one for each layer of the model. Before
a step of adapters that no step has waited for yet, `hold_layers` records the gates anew, behind the events of their
loads; a graph waits for what was recorded last when it is launched. So a step waits for no adapters but its own, and
all steps after it are behind it, and need not wait again.

Graphs of single tokens have no gates, for all that they could wait for is a prompt of one token. It is the whole step
that waits then, and so does a step whose plan gives away pages to which copies are still on their way.
"""

from __future__ import annotations

from collections.abc import Set

import torch

from motet.memory.pool import Copies


class Gates:
    """One event for each layer, the copies of adapters that no step has waited for, and those that are not over.

    For the thread of steps.
    """

    def __init__(self, num_layers: int) -> None:
        self.events = [torch.cuda.Event(external=True) for _ in range(num_layers)]
        self._stream = torch.cuda.Stream()
        self._coming: dict[str, Copies] = {}
        self._under_way: dict[str, Copies] = {}
        for event in self.events:
            event.record(self._stream)  # a graph does not wait for one that stands for nothing

    def expect(self, digest: str, copies: Copies) -> None:
        """The adapter may be used from now on by steps that wait for its copies."""
        self._coming[digest] = self._under_way[digest] = copies

    def arrived(self) -> list[str]:
        """The adapters whose copies have ended since the last call."""
        over = [digest for digest, copies in self._under_way.items() if all(c.query() for c in copies[-1:])]
        for digest in over:
            del self._under_way[digest]
        return over

    def hold_layers(self, digests: Set[str]) -> None:
        """The next step is one with gates: it waits in each layer for what it needs of these adapters."""
        loads = [self._coming.pop(digest) for digest in digests & self._coming.keys()]
        for layer, event in enumerate(self.events if loads else ()):
            for copies in loads:
                self._stream.wait_event(copies[layer])
            event.record(self._stream)

    def hold_steps(self, digests: Set[str]) -> None:
        """All of the next step waits until these adapters are there."""
        for digest in digests & self._coming.keys():
            wait_for(self._coming.pop(digest))


def wait_for(copies: Copies) -> None:
    """What the device is given from now on waits until the copies are over."""
    for last in copies[-1:]:
        torch.cuda.current_stream().wait_event(last)
