"""The queue of those who hold no pages.

Order is a preference, not a gate: a request that lacks pages, or whose adapter is not there yet, is passed by
the ones behind it. For lack of pages only PATIENCE times, so that a large request is not starved by a stream
of small ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import chain

from motet.adapters.residency import Residency
from motet.scheduler.fairness import Turn
from motet.scheduler.sequence import SequenceState

PATIENCE = 16  # schedule calls; at 20–50 ms a step, under a second

Seniority = tuple[int, float, int]


def by_seniority(seq: SequenceState) -> Seniority:
    return seq.seniority


def position(queue: list[SequenceState], seq: SequenceState) -> int:
    """Where `seq` is in a queue sorted by seniority."""
    return bisect_left(queue, seq.seniority, key=by_seniority)


class WaitingQueue:
    """Sequences that hold no pages: per adapter one queue for each tenant and class, each the oldest first.

    `turn` says who of two queues' heads comes first, `load_turn` for whom an adapter is loaded first.
    """

    def __init__(
        self, turn: Callable[[SequenceState], Turn], load_turn: Callable[[SequenceState], Turn]
    ) -> None:
        self._turn = turn
        self._load_turn = load_turn
        self._queues: dict[str, dict[tuple[int, str], list[SequenceState]]] = {}
        self._starving: list[SequenceState] = []
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[SequenceState]:
        for queues in self._queues.values():
            for queue in queues.values():
                yield from queue

    def push(self, seq: SequenceState) -> None:
        seq.passed = 0
        account = seq.request.account
        queues = self._queues.setdefault(seq.adapter, {})
        insort(queues.setdefault((account.priority, account.tenant), []), seq, key=by_seniority)
        self._len += 1

    def remove(self, seq: SequenceState) -> None:
        account = seq.request.account
        queues = self._queues[seq.adapter]
        queue = queues[account.priority, account.tenant]
        del queue[position(queue, seq)]
        if not queue:
            del queues[account.priority, account.tenant]
        if not queues:
            del self._queues[seq.adapter]
        if seq in self._starving:
            self._starving.remove(seq)
        self._len -= 1

    def group(self, adapter: str) -> tuple[SequenceState, ...]:
        """All that wait with this adapter."""
        return tuple(seq for queue in self._queues.get(adapter, {}).values() for seq in queue)

    def in_turn(
        self, residency: Residency, may_run: Callable[[SequenceState], bool], may_load: bool
    ) -> Generator[SequenceState, None, None]:
        """Who may ask for pages now, in turn; the queue may change meanwhile.

        Requests whose adapter is ready ask only if they `may_run`. Of those for an absent adapter the first asks for
        all, since they share one load; while it loads, or if nobody `may_load`, they ask for nothing. When it is the
        turn of one of these, the one asks that is first by what was loaded for its tenant. Nobody asks before a
        starving one.
        """
        starving = (s for s in self._starving if not residency.is_loading(s.adapter))
        limit = min(map(self._turn, starving), default=None)
        ready, absent = self._heads(residency)
        ready = [queue for queue in ready if may_run(queue[0])]
        absent = absent if may_load else []
        asking = [(self._turn(queue[0]), queue, 0) for queue in chain(ready, absent)]
        heapify(asking)
        loads = self._by_load_turn(absent)
        while asking:
            turn, queue, place = heappop(asking)
            if limit is not None and turn > limit:
                return
            if place == 0:
                queue = queue.copy()  # only of those that get their turn: others may be long
            seq = queue[place]
            if not residency.is_ready(seq.adapter):
                first = next((s for s in loads if residency.is_absent(s.adapter)), None)
                if first is not None:
                    yield first
            elif may_run(seq):
                yield seq
                if place + 1 < len(queue):
                    heappush(asking, (self._turn(queue[place + 1]), queue, place + 1))

    def _heads(self, residency: Residency) -> tuple[list[list[SequenceState]], list[list[SequenceState]]]:
        """The queues whose adapter is ready, and those whose adapter is absent."""
        ready: list[list[SequenceState]] = []
        absent: list[list[SequenceState]] = []
        for adapter, queues in self._queues.items():
            if residency.is_ready(adapter):
                ready += queues.values()
            elif residency.is_absent(adapter):
                absent += queues.values()
        return ready, absent

    def _by_load_turn(self, queues: list[list[SequenceState]]) -> Iterator[SequenceState]:
        """The first of the queues for each adapter, sorted when one is asked for."""
        seen = set()
        for seq in sorted((queue[0] for queue in queues if queue), key=self._load_turn):
            if seq.adapter not in seen:
                seen.add(seq.adapter)
                yield seq

    def pass_over(self, seq: SequenceState) -> None:
        """It asked and there were not enough pages."""
        seq.passed += 1
        if seq.passed == PATIENCE:
            self._starving.append(seq)

    def is_starving(self, seq: SequenceState) -> bool:
        """Has it been passed over so often that those behind it must wait?"""
        return seq.passed >= PATIENCE

    def oldest(self) -> SequenceState:
        """The oldest of the highest class, whoever's turn it is."""
        return min(self, key=by_seniority)

    def wanted_behind(self, taker: SequenceState, adapters: Iterable[str]) -> list[str]:
        """Those of the adapters that only requests behind `taker` wait for, the youngest one's first.

        These are younger ones, and if it runs also those whose turn is later. While it waits turns do not count: they
        change when a load is charged, so that two requests could take each other's adapter and neither ever run.
        """
        behind = []
        for adapter in adapters:
            heads = [queue[0] for queue in self._queues[adapter].values()]
            oldest = min(seq.seniority for seq in heads)
            is_later = taker.is_running and min(map(self._turn, heads)) > self._turn(taker)
            if oldest > taker.seniority or is_later:
                behind.append((oldest, adapter))
        return [adapter for _, adapter in sorted(behind, reverse=True)]
