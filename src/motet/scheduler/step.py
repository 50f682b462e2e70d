"""A plan in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from motet.types import Chunk, Load, Plan


@dataclass(slots=True)
class Step:
    """`budget` is how many tokens may still be added, `headroom` how many pages those who run may soon ask for."""

    budget: int
    headroom: int = 0
    loads: list[Load] = field(default_factory=list)
    _chunks: dict[int, Chunk] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        self.budget -= len(chunk.tokens)
        self._chunks[chunk.seq] = chunk

    def drop(self, seq: int) -> None:
        """This sequence has lost its pages: what was to be computed of it no longer is."""
        if chunk := self._chunks.pop(seq, None):
            self.budget += len(chunk.tokens)

    def plan(self, evictions: tuple[str, ...]) -> Plan:
        return Plan(evictions, tuple(self.loads), tuple(self._chunks.values()))
