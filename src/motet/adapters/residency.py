"""Which adapters are in the pool, which are on their way, and which could leave.

An adapter is absent, loading or ready; or *remaking*, if a load found its image gone from the disk or damaged: it has
no pages until the image is made again, and then is absent as before. One image is made at a time.

Requests that have not ended *claim* it, running ones also *pin* it. A forgotten adapter takes no new claims, drains,
and is gone with its last one. Only a ready adapter without pins can be evicted: nothing in use is taken, and pages
that a copy is being written to stay where they are. One without claims is *idle* and goes by cost; one that requests
wait for is *wanted*. What an operator *keeps* is never a victim.

Beside pages an adapter needs a slot in the table that kernels read, loading or ready, if that table has a fixed size.

On a GPU an adapter is ready as soon as its copies have been enqueued. Until they are over it is *arriving*: a step that
computes with it waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from math import log
from typing import Literal

from motet.adapters.ghosts import GhostList
from motet.memory.pages import PageAllocator
from motet.memory.reuse import NEVER, Reuse
from motet.memory.victims import Idle
from motet.types import BASE, Load

PAGE_COST = 0.5
"""Of copying a page back, in times of computing the KV that fills one. 0.6 with gpt-oss-20b on an H200: 0.71 GB took
0.2 s from the page cache, a token whose KV is 49 kB 22 µs; from pinned memory a copy takes less."""

MAX_REMAKES = 3
"""Times that an image is made again for a load. More than one only if the disk has room for very few."""

State = Literal["absent", "loading", "remaking", "ready", "draining"]


@dataclass(slots=True)
class _Adapter:
    num_pages: int
    work: float = 0.0
    state: Literal["absent", "loading", "remaking", "ready"] = "absent"
    pages: tuple[int, ...] = ()
    claims: int = 0
    pins: int = 0
    worth: float = NEVER
    forgotten: bool = False
    kept: bool = False
    remakes: int = 0
    load_began: int = 0
    load_steps: int = 0
    pinned_at: int = 0
    unpinned_at: int = -1


class Residency:
    """The adapters that may be asked for, by digest. The base is one of no pages that is always ready."""

    def __init__(self, pages: PageAllocator, reuse: Reuse, slots: int | None = None) -> None:
        """No more than `slots` adapters are in the pool or on their way there, if that is given."""
        self._pages = pages
        self._reuse = reuse
        self.slots = slots
        self._adapters = {BASE: _Adapter(num_pages=0, state="ready", pins=1)}
        self._idle: Idle[str] = Idle()
        self._wanted: dict[str, None] = {}
        self.idle_pages = 0
        self.num_kept = 0
        self.kept_pages = 0
        self.num_resident = 0  # loading or ready
        self.num_loading = 0
        self.loading_pages = 0
        self.being_remade: str | None = None
        self._remaking: dict[str, None] = {}
        self.ghosts = GhostList(pages.num_pages)
        self.clock = 0  # steps so far
        self.arriving: set[str] = set()
        self._dropped: list[str] = []
        self.loads = 0
        self.evictions = 0

    # What is known

    def accepts(self, digest: str) -> bool:
        """May a new request claim it?"""
        return digest in self._adapters and not self._adapters[digest].forgotten

    def num_pages(self, digest: str) -> int:
        return self._adapters[digest].num_pages

    def is_kept(self, digest: str) -> bool:
        return self._adapters[digest].kept

    def is_ready(self, digest: str) -> bool:
        return self._adapters[digest].state == "ready"

    def is_absent(self, digest: str) -> bool:
        return self._adapters[digest].state == "absent"

    def is_on_its_way(self, digest: str) -> bool:
        """Does it come without being asked for again, or fail?"""
        return self._adapters[digest].state in ("loading", "remaking")

    def is_remaking(self, digest: str) -> bool:
        return digest in self._remaking

    def to_remake(self) -> Set[str]:
        """Adapters whose image could be made again now: none while one is."""
        return self._remaking.keys() if self.being_remade is None else frozenset()

    @property
    def is_full(self) -> bool:
        """Must one leave before another can be loaded, however many pages are free?"""
        return self.slots is not None and self.num_resident >= self.slots

    @property
    def lacks_slot(self) -> bool:
        """Is there none for one more even with all evicted that nobody wants?"""
        return self.slots is not None and self.num_resident - len(self._idle) >= self.slots

    @property
    def any_loading(self) -> bool:
        return self.num_loading > 0

    @property
    def any_dropped(self) -> bool:
        """Are there adapters out of the pool that `take_dropped` has not reported yet?"""
        return bool(self._dropped)

    def steps_in_use(self, digest: str) -> int:
        """For how many steps it has been pinned, without a whole step between one pin and the next."""
        return self.clock - self._adapters[digest].pinned_at

    def load_steps(self, digest: str) -> int:
        """How many steps its last load took."""
        return self._adapters[digest].load_steps

    def cheapest(self) -> Iterator[tuple[str, float]]:
        """Idle adapters with the cost to lose them, the cheapest first."""
        return self._idle.cheapest()

    def wanted(self) -> tuple[str, ...]:
        """Adapters that could be evicted, but requests wait for them."""
        return tuple(self._wanted)

    def work(self, digest: str) -> float:
        """What it adds to the work of a token, as a share of the base model's."""
        return self._adapters[digest].work

    def states(self) -> dict[str, State]:
        """Digest → state, for statistics. A forgotten adapter is draining until its pages are back."""
        return {d: "draining" if a.forgotten else a.state for d, a in self._adapters.items() if d != BASE}

    # What happens

    def register(self, digest: str, num_pages: int, work: float = 0.0) -> None:
        """Requests may now ask for it; a draining one is taken back. One digest has one size, always."""
        adapter = self._adapters.setdefault(digest, _Adapter(num_pages, work))
        assert adapter.num_pages == num_pages, f"{digest} has {adapter.num_pages} pages, not {num_pages}"
        adapter.forgotten = False

    def forget(self, digest: str) -> None:
        """No new claims; it leaves with its last claim. Forgetting what is not known changes nothing."""
        if digest in self._adapters:
            assert digest != BASE
            self.keep(digest, False)
            self._adapters[digest].forgotten = True
            self._leave_if_drained(digest)

    def keep(self, digest: str, kept: bool) -> None:
        """Never evict it, whether it is in the pool already or not; or do so again."""
        adapter = self._adapters[digest]
        if adapter.kept != kept:
            adapter.kept = kept
            self.num_kept += 1 if kept else -1
            self.kept_pages += adapter.num_pages if kept else -adapter.num_pages
            self._sort(digest)

    def asked(self, digest: str) -> None:
        """A request for it came, to be counted among those that a larger or smaller pool would have served at once."""
        if digest != BASE:
            self.ghosts.ask(digest, self._adapters[digest].num_pages)

    def claim(self, digest: str) -> None:
        """One more request that has not ended needs it."""
        self._adapters[digest].claims += 1
        self._sort(digest)

    def unclaim(self, digest: str) -> None:
        self._adapters[digest].claims -= 1
        self._sort(digest)
        self._leave_if_drained(digest)

    def pin(self, digest: str) -> None:
        """One more running sequence computes with it."""
        assert self.is_ready(digest), f"{digest} is not ready"
        adapter = self._adapters[digest]
        if not adapter.pins and adapter.unpinned_at != self.clock:
            adapter.pinned_at = self.clock
        adapter.pins += 1
        self._sort(digest)

    def unpin(self, digest: str) -> None:
        adapter = self._adapters[digest]
        adapter.pins -= 1
        if not adapter.pins:
            adapter.unpinned_at = self.clock
        adapter.worth = self._reuse.used(adapter.worth, adapter.num_pages)
        self._sort(digest)

    def begin_load(self, digest: str) -> Load:
        """Take its pages and a slot, which the caller has made sure are free; they stay put until the load ends."""
        adapter = self._adapters[digest]
        assert adapter.state == "absent", f"{digest} is {adapter.state}"
        assert not self.is_full, f"{self.slots} adapters are resident"
        adapter.state = "loading"
        adapter.load_began = self.clock
        adapter.pages = self._pages.alloc(adapter.num_pages, "adapter")
        self.num_resident += 1
        self.num_loading += 1
        self.loading_pages += adapter.num_pages
        return Load(digest, adapter.pages)

    def loaded(self, digest: str, is_over: bool = True) -> None:
        """The copy is complete, or else enqueued: then `arrived` is to tell when it is over.

        Having been wanted counts as a use, if nobody is left who will use it.
        """
        adapter = self._end_load(digest)
        adapter.state = "ready"
        adapter.remakes = 0
        adapter.unpinned_at = -1  # it begins anew
        adapter.load_steps = self.clock - adapter.load_began
        if not is_over:
            self.arriving.add(digest)
        if not adapter.claims:
            adapter.worth = self._reuse.used(adapter.worth, adapter.num_pages)
        self.loads += 1
        self._sort(digest)
        self._leave_if_drained(digest)

    def arrived(self, digest: str) -> None:
        """The copy is over, or whoever uses it from now on is behind a step that waits for it."""
        if digest in self.arriving:
            self.arriving.remove(digest)
            adapter = self._adapters[digest]
            adapter.load_steps = self.clock - adapter.load_began

    def all_arrived(self) -> None:
        """Nobody waits for a copy any more but the step that needs it."""
        for digest in tuple(self.arriving):
            self.arrived(digest)

    def failed(self, digest: str) -> None:
        """The copy failed and writes no more, or the image cannot be made again: the next request may try anew."""
        if self.is_remaking(digest):
            self.remade(digest)
        else:
            self._end_load(digest)
            self._give_up_pages(digest)
        self._adapters[digest].remakes = 0
        self._leave_if_drained(digest)

    def may_remake(self, digest: str) -> bool:
        """Is it worth while to make its image again, so often as that was done for this load already?"""
        return self._adapters[digest].remakes < MAX_REMAKES

    def missed(self, digest: str) -> None:
        """The load found no image, and wrote nothing: its pages are free until the image is made again."""
        adapter = self._end_load(digest)
        self._give_up_pages(digest)
        adapter.remakes += 1
        adapter.state = "remaking"
        self._remaking[digest] = None
        self._leave_if_drained(digest)

    def begin_remake(self, digest: str) -> None:
        """Its image is being made again."""
        assert digest in self.to_remake(), f"{digest} must wait"
        self.being_remade = digest

    def remade(self, digest: str) -> None:
        """Its image is there again, or never will be. It may have been forgotten meanwhile."""
        if self.being_remade == digest:
            self.being_remade = None
        if self.is_remaking(digest):
            del self._remaking[digest]
            self._adapters[digest].state = "absent"

    def evict(self, digest: str) -> None:
        """Take the pages of an idle or wanted adapter; it stays known."""
        self.evictions += 1
        self._drop(digest)

    def take_dropped(self) -> tuple[str, ...]:
        """Digests that have lost their pages since the last call; a table of adapters must lose them too."""
        dropped, self._dropped = tuple(self._dropped), []
        return dropped

    def _sort(self, digest: str) -> None:
        """Put it where it belongs: among the idle, among the wanted, or neither."""
        adapter = self._adapters[digest]
        evictable = adapter.state == "ready" and not adapter.pins and not adapter.kept
        if digest in self._idle:
            if evictable and not adapter.claims:
                return
            self._idle.remove(digest)
            self.idle_pages -= adapter.num_pages
        elif evictable and not adapter.claims:
            self._idle.add(digest, adapter.worth + log(PAGE_COST))
            self.idle_pages += adapter.num_pages
        self._wanted.pop(digest, None)
        if evictable and adapter.claims:
            self._wanted[digest] = None

    def _end_load(self, digest: str) -> _Adapter:
        adapter = self._adapters[digest]
        assert adapter.state == "loading", f"{digest} is {adapter.state}"
        self.num_loading -= 1
        self.loading_pages -= adapter.num_pages
        return adapter

    def _drop(self, digest: str) -> None:
        assert digest in self._idle or digest in self._wanted, f"{digest} is in use"
        self._give_up_pages(digest)
        self._dropped.append(digest)

    def _give_up_pages(self, digest: str) -> None:
        adapter = self._adapters[digest]
        self._pages.release(adapter.pages)
        self.num_resident -= 1
        self.arriving.discard(digest)
        adapter.pages = ()
        adapter.state = "absent"
        self._sort(digest)

    def _leave_if_drained(self, digest: str) -> None:
        adapter = self._adapters[digest]
        if not adapter.forgotten or adapter.claims or adapter.state == "loading":
            return
        if adapter.state == "ready":
            self._drop(digest)
        self._remaking.pop(digest, None)
        del self._adapters[digest]

    def check_counts(self, pins: Mapping[str, int], claims: Mapping[str, int]) -> None:
        """Every pin and claim is one that the caller knows of."""
        for digest, adapter in self._adapters.items():
            held = adapter.pins - (digest == BASE), adapter.claims
            assert held == (pins.get(digest, 0), claims.get(digest, 0)), f"{digest}: {adapter}"

    def check_integrity(self) -> None:
        """Pages belong to loading and ready adapters only, once each; pinned adapters are not idle."""
        pages = [page for adapter in self._adapters.values() for page in adapter.pages]
        assert len(set(pages)) == len(pages) == self._pages.held("adapter")
        assert all(self._pages.references(page) == 1 for page in pages)
        kept = [a.num_pages for a in self._adapters.values() if a.kept]
        assert (self.num_kept, self.kept_pages) == (len(kept), sum(kept))
        assert self.idle_pages == sum(self._adapters[digest].num_pages for digest in self._idle)
        loading = [a.num_pages for a in self._adapters.values() if a.state == "loading"]
        assert (self.num_loading, self.loading_pages) == (len(loading), sum(loading))
        ready = sum(a.state == "ready" for d, a in self._adapters.items() if d != BASE)
        assert self.num_resident == ready + len(loading)
        assert self.slots is None or self.num_resident <= self.slots
        assert all(self.is_ready(digest) for digest in self.arriving)
        assert set(self._remaking) == {d for d, a in self._adapters.items() if a.state == "remaking"}
        for digest, adapter in self._adapters.items():
            held = adapter.num_pages if adapter.state in ("loading", "ready") else 0
            assert len(adapter.pages) == held, digest
            assert adapter.pins <= adapter.claims + (digest == BASE), f"{digest}: {adapter}"
            assert adapter.pins == 0 or adapter.state == "ready", f"{digest}: {adapter}"
            evictable = adapter.state == "ready" and adapter.pins == 0 and not adapter.kept
            assert (digest in self._idle) == (evictable and not adapter.claims), f"{digest}: {adapter}"
            assert (digest in self._wanted) == (evictable and adapter.claims > 0), f"{digest}: {adapter}"
            assert not adapter.forgotten or adapter.claims or adapter.state == "loading", (
                f"{digest}: {adapter}"
            )
