"""Taking turns: whose adapter leaves for a while, and in which order it comes back.

More adapters may be asked for at a time than the pool has room for. Were each held until the last request that runs
with it has ended, the others would wait a whole answer for their first token. A copy from the host takes a few steps,
so running sequences can be *paused* instead: such a one keeps its KV and its place, but not its adapter, and goes on
where it was when that has been loaded again. Nothing is computed twice.

Who takes. A request that waits for an absent adapter for which there is no room otherwise, if it could run then; and
paused sequences, once no copy is under way: a copy that waits for another keeps pages from those who could use them.

Who is paused. All that run with an adapter, if its turn is over: TURN_STEPS steps, and TURN_LOADS times what its last
load took. What an operator pinned stays, and the adapter of the oldest of the highest class, so that one always goes on
to its end. Nobody stops for a lower class, or for a tenant whose turn comes later: who asks for one cold adapter after
the other is charged for the loads, and then takes turns with itself. No more sequences stop than go on instead. Of
several adapters that one leaves which has been used longest.

Who comes first. Requests that wait, in their turn; then paused sequences, who was paused first. A paused one is *late*
after LATE_TURNS turns, or if it has become the oldest: then it comes first, more may stop for it than go on, and nobody
whose turn is not before its own begins a load before it. A load for a late one is followed by one for a request that
waits, if there is any: a stream of new adapters gets half of the loads, and no more. While the oldest of all is late
and finds no room, those behind it are not admitted either.

So a request for an adapter that is not there waits, with room for n like it, about a turn divided by n and a load; and
who is paused comes back after at most two loads for each one that was paused before, once it is late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from motet.adapters.residency import Residency
from motet.scheduler.fairness import Turn
from motet.scheduler.sequence import SequenceState
from motet.types import BASE

TURN_STEPS = 32
TURN_LOADS = 4
LATE_TURNS = 4
RETURN_TURNS = 2


def turn_steps(load_steps: int) -> int:
    """How many steps a turn lasts at least, of an adapter whose load took so many."""
    return max(TURN_STEPS, TURN_LOADS * load_steps)


@dataclass(frozen=True, slots=True)
class InUse:
    """An adapter that `sequences` run with, for so many `turns`."""

    adapter: str
    pages: int
    turns: float
    sequences: int


def who_leaves(adapters: Sequence[InUse], going: int, missing: int, is_late: bool) -> list[str]:
    """Those of the adapters that leave so that `going` sequences can go on, for which `missing` pages are missing.

    One at least, for its slot. None of them if they do not suffice. For who is late more sequences may stop.
    """
    chosen: list[str] = []
    freed = stopped = 0
    for each in sorted(adapters, key=lambda each: (each.sequences > going, -each.turns)):
        if each.pages >= missing and (is_late or each.sequences <= going):
            return [each.adapter]
        if is_late or stopped + each.sequences <= going:
            chosen.append(each.adapter)
            freed += each.pages
            stopped += each.sequences
            if freed >= missing:
                break
    return chosen if freed >= missing else []


class Turns:
    """Who of those that run is paused, and whose turn is over.

    `left` are the adapters of paused sequences in the order in which they left, with the step when they did. All that
    run with one are paused together.
    """

    def __init__(
        self, running: list[SequenceState], residency: Residency, turn: Callable[[SequenceState], Turn]
    ) -> None:
        self._running = running
        self._residency = residency
        self._turn = turn
        self.left: dict[str, int] = {}
        self.pauses = 0
        self.late_had_it = False  # the last load was for a late one

    def paused(self, adapter: str) -> list[SequenceState]:
        """Those that were paused with this adapter."""
        if adapter not in self.left:
            return []
        return [seq for seq in self._running if seq.adapter == adapter]

    def pause(self, adapter: str) -> list[SequenceState]:
        """Those that run with this adapter go on when it has left and come again."""
        self.left[adapter] = self._residency.clock
        self.pauses += 1
        for seq in self.paused(adapter):
            seq.paused = True
            self._residency.unpin(adapter)
        return self.paused(adapter)

    def resume(self, adapter: str) -> None:
        """It is there again."""
        for seq in self.paused(adapter):
            seq.paused = False
            self._residency.pin(adapter)
        self.left.pop(adapter, None)

    def stop(self, seq: SequenceState) -> None:
        """It does not run any more."""
        if not seq.paused:
            self._residency.unpin(seq.adapter)
        elif not self.paused(seq.adapter):
            del self.left[seq.adapter]
        seq.paused = False

    def in_order(self) -> list[tuple[SequenceState, int]]:
        """The oldest that is paused with each absent adapter, in the order of coming back, and how many are."""
        groups: dict[str, list[SequenceState]] = {
            adapter: [] for adapter in self.left if self._residency.is_absent(adapter)
        }
        for seq in self._running if groups else ():
            if seq.adapter in groups and not seq.is_complete:
                groups[seq.adapter].append(seq)
        heads = [(group[0], len(group)) for group in groups.values() if group]
        return sorted(heads, key=lambda head: -head[0].request.account.priority)

    def is_late(self, seq: SequenceState) -> bool:
        """Has a paused sequence waited for so long, or become the oldest, that it comes first?"""
        turn = turn_steps(self._residency.load_steps(seq.adapter))
        return seq is self._running[0] or self._residency.clock - self.left[seq.adapter] >= LATE_TURNS * turn

    def over(self) -> list[InUse]:
        """The adapters whose turn is over for those who wait."""
        residency = self._residency
        counts = Counter(seq.adapter for seq in self._running if not seq.paused)
        for stays in (BASE, *(seq.adapter for seq in self._running[:1])):
            counts.pop(stays, None)
        in_use = (
            InUse(adapter, residency.num_pages(adapter), self._turns(adapter), count)
            for adapter, count in counts.items()
            if not residency.is_kept(adapter)
        )
        return [each for each in in_use if each.turns >= 1]

    def _turns(self, adapter: str) -> float:
        """For how many turns it has been used."""
        return self._residency.steps_in_use(adapter) / turn_steps(self._residency.load_steps(adapter))

    def may_leave(self, over: Sequence[InUse], taker: SequenceState) -> list[InUse]:
        """Those of them that have had enough turns, and with which nobody runs who does not stop for `taker`."""
        enough = RETURN_TURNS if taker.paused and not self.is_late(taker) else 1
        over = [each for each in over if each.turns >= enough]
        account, turn = taker.request.account, self._turn(taker)[:2]

        def stays(other: SequenceState) -> bool:
            its = other.request.account
            if its.tenant == account.tenant:
                return its.priority > account.priority
            return self._turn(other)[:2] < turn

        adapters = {each.adapter for each in over}
        adapters -= {seq.adapter for seq in self._running if seq.adapter in adapters and stays(seq)}
        return [each for each in over if each.adapter in adapters]

    def check_integrity(self) -> None:
        """Who is paused runs, with an adapter that is not there."""
        assert {seq.adapter for seq in self._running if seq.paused} == self.left.keys()
        assert all(seq.paused for seq in self._running if seq.adapter in self.left)
        assert not any(map(self._residency.is_ready, self.left))
