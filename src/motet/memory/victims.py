"""What nobody uses, in the order in which it goes: a heap, so that tens of thousands cost a microsecond each.

The cost to lose a thing is fixed when it falls idle, so nothing has to be sorted anew as time passes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
_SLACK = 64  # dead entries that are not worth a clean-up


class Idle(Generic[T]):
    """Things with their cost, the cheapest first; of equally dear ones the first that was added.

    A thing that is removed leaves its entry in the heap behind; dead entries never outnumber live ones by more than
    a constant.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._entries: dict[T, tuple[float, int, T]] = {}
        self._added = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[T]:
        """All of them, in no order."""
        return iter(self._entries)

    def add(self, item: T, cost: float) -> None:
        assert item not in self._entries, f"{item} is idle already"
        entry = (cost, self._added, item)
        self._added += 1
        self._entries[item] = entry
        heappush(self._heap, entry)

    def remove(self, item: T) -> None:
        del self._entries[item]
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def cheapest(self) -> Iterator[tuple[T, float]]:
        """Things with their cost, the cheapest first: O(k log k) for the first k. It must not change meanwhile."""
        heap = self._heap
        while heap and not self._is_live(heap[0]):
            heappop(heap)
        frontier = [(heap[0], 0)] if heap else []
        while frontier:
            entry, place = heappop(frontier)
            if self._is_live(entry):
                yield entry[2], entry[0]
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child], child))

    def _is_live(self, entry: tuple[float, int, T]) -> bool:
        return self._entries.get(entry[2]) is entry
