"""The queue of those who hold no pages.

Order is a preference, not a gate: a request that lacks pages, or whose adapter is not there yet, is passed by
the ones behind it. For lack of pages only PATIENCE times, so that a large request is not starved by a stream
of small ones.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import groupby
from operator import itemgetter

from motet.adapters.residency import Residency
from motet.scheduler.fairness import Turn
from motet.scheduler.sequence import SequenceState

PATIENCE = 16  # schedule calls; at 20–50 ms a step, under a second

Seniority = tuple[int, float, int]
LAST: Turn = (sys.maxsize, 0.0, 0.0, 0.0, 0)
Key = tuple[int, str]
"""Class and tenant."""


def by_seniority(seq: SequenceState) -> Seniority:
    return seq.seniority


def _key(seq: SequenceState) -> Key:
    return seq.request.account.priority, seq.request.account.tenant


def position(queue: list[SequenceState], seq: SequenceState) -> int:
    """Where `seq` is in a queue sorted by seniority."""
    return bisect_left(queue, seq.seniority, key=by_seniority)


class WaitingQueue:
    """Sequences that hold no pages: per adapter one queue for each tenant and class, each the oldest first.

    `turn` says who of two queues' heads comes first, `load_turn` for whom an adapter is loaded first. Both sort by the
    class and the tenant's counter before all else, so the queues of a tenant are looked at when it is its turn: most
    steps have nothing left to give long before the last tenant.
    """

    def __init__(
        self, turn: Callable[[SequenceState], Turn], load_turn: Callable[[SequenceState], Turn]
    ) -> None:
        self._turn = turn
        self._load_turn = load_turn
        self._by_adapter: dict[str, dict[Key, list[SequenceState]]] = {}
        self._by_tenant: dict[Key, dict[str, list[SequenceState]]] = {}  # the same queues
        self._starving: list[SequenceState] = []
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[SequenceState]:
        for queues in self._by_adapter.values():
            for queue in queues.values():
                yield from queue

    def push(self, seq: SequenceState) -> None:
        seq.passed = 0
        key = _key(seq)
        queue = self._by_adapter.setdefault(seq.adapter, {}).setdefault(key, [])
        self._by_tenant.setdefault(key, {})[seq.adapter] = queue
        insort(queue, seq, key=by_seniority)
        self._len += 1

    def remove(self, seq: SequenceState) -> None:
        key = _key(seq)
        queues, of_tenant = self._by_adapter[seq.adapter], self._by_tenant[key]
        queue = queues[key]
        del queue[position(queue, seq)]
        if not queue:
            del queues[key], of_tenant[seq.adapter]
        if not queues:
            del self._by_adapter[seq.adapter]
        if not of_tenant:
            del self._by_tenant[key]
        if seq in self._starving:
            self._starving.remove(seq)
        self._len -= 1

    def has_more_of(self, seq: SequenceState) -> bool:
        """Does somebody else of its tenant wait?"""
        return _key(seq) in self._by_tenant

    def group(self, adapter: str) -> tuple[SequenceState, ...]:
        """All that wait with this adapter."""
        return tuple(seq for queue in self._by_adapter.get(adapter, {}).values() for seq in queue)

    def count(self, adapter: str) -> int:
        """How many wait with this adapter."""
        return sum(map(len, self._by_adapter.get(adapter, {}).values()))

    def count_adapters(self, residency: Residency) -> int:
        """How many adapters are on their way to those who wait."""
        return sum(map(residency.is_on_its_way, self._by_adapter))

    def in_turn(
        self,
        residency: Residency,
        may_run: Callable[[SequenceState], bool],
        may_load: Callable[[], bool],
        late: SequenceState | None = None,
    ) -> Generator[SequenceState, None, None]:
        """Who may ask for pages now, in turn; the queue may change meanwhile.

        Requests whose adapter is ready ask only if they `may_run`. Of those for an absent adapter the first asks for
        all, since they share one load; while it is on its way, or if nobody `may_load`, they ask for nothing. When it
        is the turn of one of these, the one asks that is first by what was loaded for its tenant. Nobody asks before a
        starving one, or the `late` one; but an older one whose adapter is there does not wait for one whose adapter is
        not: its own would only lie there, charged for, and that other one could not take it.
        """
        absent = frozenset(filter(residency.is_absent, self._by_adapter))
        starving = [*self.starving(residency)]
        first = [seq for seq in starving if seq.adapter not in absent] + ([late] if late is not None else [])
        limit = min(map(self._turn, first), default=LAST)
        cold = [seq for seq in starving if seq.adapter in absent]
        cold_limit = min(map(self._turn, cold), default=LAST)
        oldest_cold = min(map(by_seniority, cold), default=(0, 0.0, 0))
        loads = self._by_load_turn(absent)
        for tenants in self._tenants_in_turn(self._turn):
            asking = [
                entry for key in tenants for entry in self._heads(key, absent, residency, may_run, may_load)
            ]
            heapify(asking)
            while asking:
                turn, queue, place = heappop(asking)
                if turn > limit:
                    return
                seq = queue[place]
                if turn > cold_limit and (seq.adapter in absent or seq.seniority > oldest_cold):
                    continue
                if place == 0:
                    queue = queue.copy()  # only of those that get their turn: others may be long
                if not residency.is_ready(seq.adapter):
                    asker = (
                        next((s for s in loads if residency.is_absent(s.adapter)), None)
                        if may_load()
                        else None
                    )
                    if asker is not None:
                        yield asker
                elif may_run(seq):
                    yield seq
                    if place + 1 < len(queue):
                        heappush(asking, (self._turn(queue[place + 1]), queue, place + 1))

    def first_to_load(self, adapters: Container[str]) -> SequenceState | None:
        """Of those who wait with one of these adapters, the one for whom it is loaded first."""
        return next(self._by_load_turn(adapters), None)

    def _tenants_in_turn(self, turn: Callable[[SequenceState], Turn]) -> Iterator[list[Key]]:
        """Those together whose turn is the same."""
        turns = sorted((turn(next(iter(q.values()))[0])[:2], key) for key, q in self._by_tenant.items())
        for _, tied in groupby(turns, key=itemgetter(0)):
            yield [key for _, key in tied]

    def _heads(
        self,
        key: Key,
        absent: Container[str],
        residency: Residency,
        may_run: Callable[[SequenceState], bool],
        may_load: Callable[[], bool],
    ) -> Iterator[tuple[Turn, list[SequenceState], int]]:
        """The queues of a tenant that have something to ask for, with the turn of their first."""
        queues = self._by_tenant.get(key)
        if queues is None:  # all have been admitted since
            return
        runs, loads = may_run(next(iter(queues.values()))[0]), may_load()
        if not runs and not loads:
            return
        for adapter, queue in queues.items():
            if (runs and residency.is_ready(adapter)) or (loads and adapter in absent):
                yield self._turn(queue[0]), queue, 0

    def _by_load_turn(self, adapters: Container[str]) -> Iterator[SequenceState]:
        """The first for each of the adapters, a tenant's sorted when it is its turn."""
        seen = set()
        for tenants in self._tenants_in_turn(self._load_turn):
            queues = [item for key in tenants for item in self._by_tenant.get(key, {}).items()]
            for seq in sorted(
                (queue[0] for adapter, queue in queues if adapter in adapters), key=self._load_turn
            ):
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

    def starving(self, residency: Residency) -> Iterator[SequenceState]:
        """Those that were passed over so often, but for those who wait for what is on its way."""
        return (seq for seq in self._starving if not residency.is_on_its_way(seq.adapter))

    def oldest(self, is_on_its_way: Callable[[str], bool]) -> SequenceState | None:
        """The oldest of the highest class, whoever's turn it is, of those whose adapter is not on its way."""
        queues = (each for adapter, each in self._by_adapter.items() if not is_on_its_way(adapter))
        heads = (queue[0] for each in queues for queue in each.values())
        return min(heads, key=by_seniority, default=None)

    def wanted_behind(self, taker: SequenceState, adapters: Iterable[str]) -> list[str]:
        """Those of the adapters that only requests behind `taker` wait for, the youngest one's first.

        These are younger ones, and if it runs also those whose turn is later. While it waits turns do not count: they
        change when a load is charged, so that two requests could take each other's adapter and neither ever run.
        """
        behind = []
        for adapter in adapters:
            heads = [queue[0] for queue in self._by_adapter[adapter].values()]
            oldest = min(seq.seniority for seq in heads)
            is_later = taker.is_running and min(map(self._turn, heads)) > self._turn(taker)
            if oldest > taker.seniority or is_later:
                behind.append((oldest, adapter))
        return [adapter for _, adapter in sorted(behind, reverse=True)]
