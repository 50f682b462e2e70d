"""Who is next? The oldest, for now; served cost per tenant (a virtual token counter) will change `in_turn`.

Order is a preference, not a gate: a request that lacks pages, or whose adapter is not there yet, is passed by
the ones behind it. For lack of pages only PATIENCE times, so that a large request is not starved by a stream
of small ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from heapq import merge

from motet.adapters.residency import Residency, Victim
from motet.scheduler.sequence import SequenceState

PATIENCE = 16  # schedule calls; at 20–50 ms a step, under a second


def by_seniority(seq: SequenceState) -> tuple[float, int]:
    return seq.seniority


def position(queue: list[SequenceState], seq: SequenceState) -> int:
    """Where `seq` is in a queue sorted by seniority."""
    return bisect_left(queue, seq.seniority, key=by_seniority)


class WaitingQueue:
    """Sequences that hold no pages, grouped by adapter, each group the oldest first."""

    def __init__(self) -> None:
        self._groups: dict[str, list[SequenceState]] = {}
        self._starving: list[SequenceState] = []

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def __iter__(self) -> Iterator[SequenceState]:
        for group in self._groups.values():
            yield from group

    def push(self, seq: SequenceState) -> None:
        seq.passed = 0
        insort(self._groups.setdefault(seq.adapter, []), seq, key=by_seniority)

    def remove(self, seq: SequenceState) -> None:
        group = self._groups[seq.adapter]
        del group[position(group, seq)]
        if not group:
            del self._groups[seq.adapter]
        if seq in self._starving:
            self._starving.remove(seq)

    def group(self, adapter: str) -> tuple[SequenceState, ...]:
        return tuple(self._groups.get(adapter, ()))

    def oldest(self, adapter: str) -> SequenceState | None:
        group = self._groups.get(adapter)
        return group[0] if group else None

    def in_turn(self, residency: Residency, admitting: bool) -> Iterator[SequenceState]:
        """Who may ask for pages now, in turn; the queue may change meanwhile.

        Of the requests for an absent adapter the first asks for all, since they share one load; while it
        loads, they ask for nothing. Requests whose adapter is ready ask only if `admitting`. Nobody asks
        before a starving one.
        """
        asking = []
        for adapter, group in self._groups.items():
            if residency.is_ready(adapter):
                if admitting:
                    asking.append(group.copy())
            else:
                asking.append(group[:1])
        limit = min(
            (s.seniority for s in self._starving if not residency.is_loading(s.adapter)), default=None
        )
        for seq in merge(*asking, key=by_seniority):
            if limit is not None and seq.seniority > limit:
                return
            if not residency.is_loading(seq.adapter):
                yield seq

    def pass_over(self, seq: SequenceState) -> None:
        """It asked and there were not enough pages."""
        seq.passed += 1
        if seq.passed == PATIENCE:
            self._starving.append(seq)

    def is_starving(self, seq: SequenceState) -> bool:
        """Has it been passed over so often that those behind it must wait?"""
        return seq.passed >= PATIENCE

    def of_younger(self, taker: SequenceState, adapters: Iterable[Victim]) -> list[Victim]:
        """Those of the adapters for which only requests younger than `taker` wait, the youngest's first."""
        waiters = ((victim, self.oldest(victim.adapter)) for victim in adapters)
        younger = [(v, w.seniority) for v, w in waiters if w is not None and w.seniority > taker.seniority]
        return [victim for victim, _ in sorted(younger, key=lambda pair: pair[1], reverse=True)]
