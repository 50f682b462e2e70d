"""A plan in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from motet.scheduler.fairness import Standings, Want
from motet.scheduler.sequence import SequenceState
from motet.scheduler.turns import InUse
from motet.types import Chunk, Load, Plan


@dataclass(slots=True)
class Step:
    """`budget` is how many tokens may still be added, `lacking` how many requests asked for pages in vain.

    `ending` is the sequence whose prompt was the last to end with it, `rest` how many tokens are left empty for it.
    `headroom` is how many pages those who run may soon ask for, `standings` what each tenant holds; None if that has
    to be counted anew. `vain` are the wants for which nobody was found who must give way, `no_way` the class and tenant
    of each that found nobody: what it lacks is not given to its next one instead. `no_turn` are those that found no
    adapter to take whose turn is over, `over` such adapters, if they were looked for; `late` is a paused sequence that
    nobody whose turn is not before its own may overtake with a load.
    """

    budget: int
    ending: int | None = None
    rest: int = 0
    headroom: int | None = None
    standings: Standings | None = None
    lacking: int = 0
    vain: list[Want] = field(default_factory=list)
    no_way: set[tuple[int, str]] = field(default_factory=set)
    no_turn: set[tuple[int, str]] = field(default_factory=set)
    over: list[InUse] | None = None
    late: SequenceState | None = None
    loads: list[Load] = field(default_factory=list)
    _chunks: dict[int, Chunk] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        self.budget -= len(chunk.tokens)
        self._chunks[chunk.seq] = chunk
        if chunk.sample and len(chunk.tokens) > 1:
            self.ending = chunk.seq

    @property
    def is_empty(self) -> bool:
        return not self._chunks

    def leave_rest(self) -> None:
        """No prompt gets more of it."""
        self.rest, self.budget = self.budget, 0

    def drop(self, seq: int) -> None:
        """This sequence has lost its pages: what was to be computed of it no longer is."""
        self.headroom = self.standings = None
        if chunk := self._chunks.pop(seq, None):
            self.budget += len(chunk.tokens)
        if self.ending == seq:
            self.ending = None

    def plan(self, evictions: tuple[str, ...], remakes: tuple[str, ...]) -> Plan:
        return Plan(evictions, tuple(self.loads), tuple(self._chunks.values()), remakes)
