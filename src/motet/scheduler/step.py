"""A plan in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from motet.types import Chunk, Load, Plan


@dataclass(slots=True)
class Step:
    """`budget` is how many tokens may still be added, `lacking` how many requests asked for pages in vain.

    `headroom` is how many pages those who run may soon ask for, `top` the lowest class of them and the largest share of
    a tenant; None if that has to be counted anew. `no_way` are the tenants of each class that found nobody who must
    give way to them.
    """

    budget: int
    headroom: int | None = None
    top: tuple[int, float] | None = None
    lacking: int = 0
    no_way: set[tuple[int, str]] = field(default_factory=set)
    loads: list[Load] = field(default_factory=list)
    _chunks: dict[int, Chunk] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        self.budget -= len(chunk.tokens)
        self._chunks[chunk.seq] = chunk

    def drop(self, seq: int) -> None:
        """This sequence has lost its pages: what was to be computed of it no longer is."""
        self.headroom = self.top = None
        if chunk := self._chunks.pop(seq, None):
            self.budget += len(chunk.tokens)

    def plan(self, evictions: tuple[str, ...]) -> Plan:
        return Plan(evictions, tuple(self.loads), tuple(self._chunks.values()))
