"""Which adapters are in the pool, which are on their way, and which could leave.

An adapter is absent, loading or ready. Requests that have not ended *claim* it, running ones also *pin* it. A
forgotten adapter takes no new claims, drains, and is gone with its last one. Only a ready adapter without
pins can be evicted: nothing in use is taken, and pages that a copy is being written to stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from motet.memory.pages import PageAllocator
from motet.types import BASE, Load

State = Literal["absent", "loading", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class Victim:
    """Something in the pool that nobody uses and that can be brought back.

    `adapter` is a digest, or BASE for a cached prefix page.
    """

    adapter: str
    num_pages: int
    last_use: float


def cost_to_lose(victim: Victim) -> float:
    """What the system loses with this victim; the cheapest goes first.

    For now recency alone, so cached prefixes and adapters form one least-recently-used order. The place to
    weigh in pages freed, the cost to bring them back (a copy for an adapter, a prefill for KV) and how likely
    reuse is.
    """
    return victim.last_use


@dataclass(slots=True)
class _Adapter:
    num_pages: int
    state: Literal["absent", "loading", "ready"] = "absent"
    pages: tuple[int, ...] = ()
    claims: int = 0
    pins: int = 0
    last_use: float = 0.0
    forgotten: bool = False


class Residency:
    """The adapters that may be asked for, by digest. The base is one of no pages that is always ready."""

    def __init__(self, pages: PageAllocator) -> None:
        self._pages = pages
        self._adapters = {BASE: _Adapter(num_pages=0, state="ready", pins=1)}
        self._idle: dict[str, _Adapter] = {}  # ready and unpinned, the least recently used first
        self._num_loading = 0
        self._dropped: list[str] = []
        self.loads = 0
        self.evictions = 0

    # What is known

    def accepts(self, digest: str) -> bool:
        """May a new request claim it?"""
        return digest in self._adapters and not self._adapters[digest].forgotten

    def num_pages(self, digest: str) -> int:
        return self._adapters[digest].num_pages

    def is_ready(self, digest: str) -> bool:
        return self._adapters[digest].state == "ready"

    def is_loading(self, digest: str) -> bool:
        return self._adapters[digest].state == "loading"

    @property
    def any_loading(self) -> bool:
        return self._num_loading > 0

    @property
    def any_dropped(self) -> bool:
        """Are there adapters out of the pool that `take_dropped` has not reported yet?"""
        return bool(self._dropped)

    def idle(self) -> Iterator[Victim]:
        """Adapters that could be evicted, the least recently used first."""
        for digest, adapter in self._idle.items():
            yield Victim(digest, adapter.num_pages, adapter.last_use)

    def states(self) -> dict[str, State]:
        """Digest → state, for statistics. A forgotten adapter is draining until its pages are back."""
        return {d: "draining" if a.forgotten else a.state for d, a in self._adapters.items() if d != BASE}

    # What happens

    def register(self, digest: str, num_pages: int) -> None:
        """Requests may now ask for it; a draining one is taken back. One digest has one size, always."""
        adapter = self._adapters.setdefault(digest, _Adapter(num_pages))
        assert adapter.num_pages == num_pages, f"{digest} has {adapter.num_pages} pages, not {num_pages}"
        adapter.forgotten = False

    def forget(self, digest: str) -> None:
        """No new claims; it leaves with its last claim. Forgetting what is not known changes nothing."""
        if digest in self._adapters:
            assert digest != BASE
            self._adapters[digest].forgotten = True
            self._leave_if_drained(digest)

    def claim(self, digest: str) -> None:
        """One more request that has not ended needs it."""
        self._adapters[digest].claims += 1

    def unclaim(self, digest: str) -> None:
        self._adapters[digest].claims -= 1
        self._leave_if_drained(digest)

    def pin(self, digest: str) -> None:
        """One more running sequence computes with it."""
        assert self.is_ready(digest), f"{digest} is not ready"
        self._adapters[digest].pins += 1
        self._idle.pop(digest, None)

    def unpin(self, digest: str, now: float) -> None:
        adapter = self._adapters[digest]
        adapter.pins -= 1
        if adapter.pins == 0:
            self._rest(digest, now)

    def begin_load(self, digest: str) -> Load:
        """Take its pages, which the caller has made sure are free; they stay put until the load ends."""
        adapter = self._adapters[digest]
        assert adapter.state == "absent", f"{digest} is {adapter.state}"
        adapter.state = "loading"
        adapter.pages = self._pages.alloc(adapter.num_pages, "adapter")
        self._num_loading += 1
        return Load(digest, adapter.pages)

    def loaded(self, digest: str, now: float) -> None:
        """The copy is complete."""
        self._end_load(digest).state = "ready"
        self.loads += 1
        self._rest(digest, now)
        self._leave_if_drained(digest)

    def failed(self, digest: str) -> None:
        """The copy failed and writes no more: absent again, and the next request may try anew."""
        self._give_up_pages(self._end_load(digest))
        self._leave_if_drained(digest)

    def evict(self, digest: str) -> None:
        """Take the pages of an idle adapter; it stays known."""
        self.evictions += 1
        self._drop(digest)

    def take_dropped(self) -> tuple[str, ...]:
        """Digests that have lost their pages since the last call; a table of adapters must lose them too."""
        dropped, self._dropped = tuple(self._dropped), []
        return dropped

    def _rest(self, digest: str, now: float) -> None:
        self._adapters[digest].last_use = now
        self._idle[digest] = self._adapters[digest]

    def _end_load(self, digest: str) -> _Adapter:
        adapter = self._adapters[digest]
        assert adapter.state == "loading", f"{digest} is {adapter.state}"
        self._num_loading -= 1
        return adapter

    def _drop(self, digest: str) -> None:
        self._give_up_pages(self._idle.pop(digest))
        self._dropped.append(digest)

    def _give_up_pages(self, adapter: _Adapter) -> None:
        self._pages.release(adapter.pages)
        adapter.pages = ()
        adapter.state = "absent"

    def _leave_if_drained(self, digest: str) -> None:
        adapter = self._adapters[digest]
        if not adapter.forgotten or adapter.claims or adapter.state == "loading":
            return
        if adapter.state == "ready":
            self._drop(digest)
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
        assert self._num_loading == sum(a.state == "loading" for a in self._adapters.values())
        for digest, adapter in self._adapters.items():
            assert len(adapter.pages) == (0 if adapter.state == "absent" else adapter.num_pages), digest
            assert adapter.pins <= adapter.claims + (digest == BASE), f"{digest}: {adapter}"
            assert adapter.pins == 0 or adapter.state == "ready", f"{digest}: {adapter}"
            assert (digest in self._idle) == (adapter.state == "ready" and adapter.pins == 0), (
                f"{digest}: {adapter}"
            )
            assert not adapter.forgotten or adapter.claims or adapter.state == "loading", (
                f"{digest}: {adapter}"
            )
