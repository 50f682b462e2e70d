"""The pool as the scheduler sees it: what is free, what could be made free, and at what cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from itertools import chain

from motet.adapters.residency import Residency
from motet.memory.pages import PageAllocator
from motet.memory.prefix import PrefixIndex
from motet.memory.reuse import Reuse
from motet.scheduler.admission import Victim, choose_victims
from motet.types import KVGroup


class Room:
    """One pool of pages: the KV of sequences, cached prefixes and adapters.

    Whether there is room is a matter of counts, so that asking in vain costs no search.
    """

    def __init__(
        self, num_pages: int, groups: tuple[KVGroup, ...], page_tokens: int, slots: int | None = None
    ) -> None:
        self.pages = PageAllocator(num_pages)
        reuse = Reuse(num_pages)
        self.prefix = PrefixIndex(self.pages, groups, page_tokens, reuse)
        self.residency = Residency(self.pages, reuse, slots)

    def missing(self, needed: int, spare: Iterable[int] = ()) -> int:
        """How many of `needed` pages there would not be with all evicted that nobody wants; 0 or less if there are.

        `spare` pages must stay.
        """
        spared = sum(map(self.prefix.is_idle, spare))
        return needed - self.pages.free - self.prefix.num_idle - self.residency.idle_pages + spared

    def make(self, needed: int, wanted: Sequence[str] = ()) -> None:
        """Free pages until `needed` are: of what nobody wants the cheapest first, then adapters `wanted` by some."""
        last = (Victim(self.residency.num_pages(digest), adapter=digest) for digest in wanted)
        victims = choose_victims(chain(self._cheapest(), last), needed - self.pages.free)
        self.prefix.evict(victim.page for victim in victims if victim.page >= 0)
        for victim in victims:
            if victim.page < 0:
                self.residency.evict(victim.adapter)

    def make_for_adapter(self, pages: int, wanted: Sequence[str] = ()) -> None:
        """Free pages for an adapter, and a slot: the cheapest idle adapter leaves, or the first `wanted` one."""
        if self.residency.is_full:
            idle = next((digest for digest, _ in self.residency.cheapest()), None)
            self.residency.evict(wanted[0] if idle is None else idle)
            wanted = wanted[1:] if idle is None else wanted
        self.make(pages, wanted)

    def _cheapest(self) -> Iterator[Victim]:
        cached = ((cost, Victim(1, page=page)) for page, cost in self.prefix.cheapest())
        idle = (
            (cost, Victim(self.residency.num_pages(digest), adapter=digest))
            for digest, cost in self.residency.cheapest()
        )
        for _, victim in merge(cached, idle, key=lambda pair: pair[0]):
            yield victim

    def check_integrity(self) -> None:
        """Assert the invariants of the pool."""
        self.pages.check_integrity()
        self.prefix.check_integrity()
        self.residency.check_integrity()
