"""Graphs that wait for events recorded after they were captured: for what was recorded last when each was launched."""

from __future__ import annotations

import torch
from torch import Tensor

from motet.engine.gates import Gates
from motet.memory.pool import Copies

MILLISECOND = 2_000_000
"""In cycles, or a little more."""


class Gated:
    """A graph of two layers that copies what a slow load writes, and the gates it waits for."""

    def __init__(self) -> None:
        self.gates = Gates(2)
        self._copying = torch.cuda.Stream()
        self._target, self._seen = torch.zeros(2, device="cuda"), torch.zeros(2, device="cuda")
        self._step()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def _step(self) -> None:
        for layer, event in enumerate(self.gates.events):
            torch.cuda.current_stream().wait_event(event)
            self._seen[layer] = self._target[layer]

    def load(self, number: int, ms: int = 20) -> Copies:
        """Each layer's number comes so many milliseconds after the one before; nothing here waits for it."""
        events = [torch.cuda.Event(), torch.cuda.Event()]
        with torch.cuda.stream(self._copying):
            for layer, event in enumerate(events):
                torch.cuda._sleep(ms * MILLISECOND)
                self._target[layer].fill_(number + layer)
                event.record()
        return tuple(events)

    def hold(self, copies: Copies) -> None:
        self.gates.expect("a", copies)
        self.gates.hold_layers({"a"})

    def replay(self) -> Tensor:
        """Launch it; what it saw, once it is over."""
        self._graph.replay()
        return self._seen.clone()


def test_a_captured_gate_waits_for_what_it_was_recorded_for_last() -> None:
    """With its gates open, held, held anew, and open while something else is copied."""
    gated = Gated()
    gated.load(5)
    torch.cuda.synchronize()
    assert gated.replay().tolist() == [5, 6]
    early = 0
    for number in range(10, 30):
        copies = gated.load(number)
        gated.hold(copies)
        seen = gated.replay()
        early += not copies[0].query()  # not each time where others use the GPU too
        assert seen.tolist() == [number, number + 1]
    assert early
    others = gated.load(50)
    assert gated.replay().tolist() == [29, 30]
    assert not others[0].query()
    torch.cuda.synchronize()


def test_a_graph_under_way_does_not_wait_for_gates_recorded_after_its_launch() -> None:
    """As the next step's gates are, while this one still waits for its own."""
    gated = Gated()
    first = gated.load(10)
    gated.hold(first)
    seen = gated.replay()
    assert not first[0].query()
    later = gated.load(20, ms=200)
    gated.hold(later)
    assert seen.tolist() == [10, 11]
    assert not later[0].query()
    assert gated.replay().tolist() == [20, 21]
    assert later[-1].query()
