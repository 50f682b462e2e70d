"""Who waits, who runs, what they hold, and what they could take from whom."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from motet.errors import CapacityExceeded
from motet.memory.prefix import extend_keys
from motet.scheduler.blocks import GONE, BlockTables, KVLayout, Tables
from motet.scheduler.cost import progress_cost
from motet.scheduler.fairness import Ledger, Space, Standings, Want, who_gives_way
from motet.scheduler.room import Room
from motet.scheduler.sequence import SequenceState
from motet.scheduler.step import Step
from motet.scheduler.turns import Turns
from motet.scheduler.waiting import WaitingQueue, by_seniority, position
from motet.types import Chunk

WAYS = 8  # tenants for which a step looks in vain who must give way: a search takes 0.2 ms
MAX_PINNED_SHARE = 0.5  # of the pool's pages: the rest must do for KV cache and all other adapters


CREDIT_STEPS = 16
"""The cost of so many steps of prompts a tenant may be ahead of others when it comes back."""


class Stage:
    """The sequences in flight and the pool that they share.

    A sequence enters to wait, starts, perhaps is paused or stops and waits again, and leaves. `ledger` counts all that
    tenants are served, `copies` only the loads: who waits for copies most of the time is served little, and would come
    first for every copy.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        max_running: int,
        prefix_caching: bool,
        slots: int | None = None,
    ) -> None:
        self.layout = layout
        self.space = Space(max_running, num_pages)
        self.room = Room(num_pages, layout.groups, layout.page_tokens, slots)
        self.ledger = Ledger(CREDIT_STEPS * layout.max_step_tokens)
        self.copies = Ledger()
        self.waiting = WaitingQueue(self.ledger.turn, self.copies.turn)
        self.running: list[SequenceState] = []  # by seniority
        self.turns = Turns(self.running, self.room.residency, self.ledger.turn)
        self.preemptions = 0
        self.prefix_hits = 0
        self.prefix_queries = 0
        self._prefix_caching = prefix_caching

    @property
    def has_place(self) -> bool:
        return len(self.running) < self.space.places

    @property
    def is_stuck(self) -> bool:
        """Will nothing change unless the next request gets what it needs? An image that is remade may take minutes."""
        return not self.room.residency.any_loading and all(seq.paused for seq in self.running)

    def oldest(self) -> SequenceState | None:
        """The oldest of the highest class that waits or is paused, but not for what is on its way."""
        on_its_way = self.room.residency.is_on_its_way
        waiting = self.waiting.oldest(on_its_way)
        paused = next((seq for seq in self.running if seq.paused and not on_its_way(seq.adapter)), None)
        return min(filter(None, (waiting, paused)), key=by_seniority, default=None)

    def check_pin(self, digest: str) -> None:
        """Raise CapacityExceeded if with this one pinned adapters would take more than their share.

        Of the pool or of the adapters that may be resident; or if they would leave too little for a request in flight.
        """
        residency = self.room.residency
        if residency.is_kept(digest):
            return
        slots = residency.slots
        if slots is not None and residency.num_kept + 1 > MAX_PINNED_SHARE * slots:
            raise CapacityExceeded(
                f"{residency.num_kept} adapters are pinned; of {slots} that may be resident, "
                f"{int(MAX_PINNED_SHARE * slots)} may be"
            )
        pages = residency.kept_pages + residency.num_pages(digest)
        limit = int(MAX_PINNED_SHARE * self.space.pages)
        largest = max(
            (self._unpinned_pages(seq, digest) for seq in chain(self.running, self.waiting)), default=0
        )
        if pages > min(limit, self.space.pages - largest):
            raise CapacityExceeded(
                f"pinned adapters would take {pages} pages; they may take {limit}, and a request in flight "
                f"needs up to {largest} of {self.space.pages} besides"
            )

    def _unpinned_pages(self, seq: SequenceState, digest: str) -> int:
        """Pages that it may need besides pinned adapters, `digest` one of them."""
        pinned = seq.adapter == digest or self.room.residency.is_kept(seq.adapter)
        return seq.max_pages + (0 if pinned else self.room.residency.num_pages(seq.adapter))

    # A sequence's way

    def enter(self, seq: SequenceState) -> None:
        """It waits from now on."""
        self.room.residency.claim(seq.adapter)
        self.ledger.enter(seq)
        self.copies.enter(seq)
        self.waiting.push(seq)

    def start(self, seq: SequenceState, prefix: BlockTables) -> None:
        """It runs, with a prefix that is known already."""
        self.room.prefix.share(prefix.pages())
        self.waiting.remove(seq)
        insort(self.running, seq, key=by_seniority)
        self.room.residency.pin(seq.adapter)
        self.room.residency.arrived(seq.adapter)  # for all behind this one, whose step waits
        seq.blocks = prefix
        seq.computed = prefix.num_tokens
        seq.indexed = seq.computed // self.layout.page_tokens
        if not seq.admitted:
            seq.admitted = True
            seq.cached_tokens = seq.computed
            self.prefix_hits += seq.computed
            self.prefix_queries += len(seq.tokens) if self._prefix_caching else 0

    def preempt(self, seq: SequenceState, step: Step) -> None:
        """It gives way, and waits again."""
        self.preemptions += 1
        self._stop(seq)
        self.waiting.push(seq)
        step.drop(seq.id)

    def pause(self, digest: str, step: Step) -> None:
        """Those that run with this adapter stop for a while, and it leaves the pool."""
        for seq in self.turns.pause(digest):
            step.drop(seq.id)
        self.room.residency.evict(digest)

    def leave(self, seq: SequenceState) -> None:
        """It has ended."""
        if seq.is_running:
            self._stop(seq)
        else:
            self.waiting.remove(seq)
        self.ledger.leave(seq)
        self.copies.leave(seq)
        self.room.residency.unclaim(seq.adapter)

    def _stop(self, seq: SequenceState) -> None:
        """Give back what a running sequence holds."""
        del self.running[position(self.running, seq)]
        self.room.prefix.release(seq.blocks.pages())
        self.turns.stop(seq)
        seq.blocks = BlockTables(self.layout, self.layout.no_blocks)
        seq.computed = 0

    def advance(self, seq: SequenceState, chunk: Chunk) -> None:
        """Count a planned chunk as computed."""
        seq.computed = chunk.start + len(chunk.tokens)
        seq.pending += chunk.sample
        self.index_full_blocks(seq)
        self.drop_unread(seq)

    def charge(self, planned: Iterable[tuple[SequenceState, Chunk]]) -> None:
        """Charge for a plan's chunks: once for each flow, as most steps have many rows of few."""
        flows: dict[tuple[int, str, str], tuple[SequenceState, int, int]] = {}
        for seq, chunk in planned:
            _, tokens, chosen = flows.get(seq.flow, (seq, 0, 0))
            flows[seq.flow] = seq, tokens + len(chunk.tokens), chosen + chunk.sample
        for seq, tokens, chosen in flows.values():
            self.ledger.charge(seq, progress_cost(tokens, chosen, self.room.residency.work(seq.adapter)))

    # Its KV

    def match(self, seq: SequenceState) -> Tables:
        """Pages that already hold a prefix of `seq`, always leaving it a token to compute."""
        if not self._prefix_caching:
            return self.layout.no_blocks
        self._extend_keys(seq)
        return self.room.prefix.match(seq.keys[: (len(seq.tokens) - 1) // self.layout.page_tokens])

    def extend(self, seq: SequenceState, count: int, known: int, end: int) -> None:
        """Give it the `count` pages that it lacks to compute its tokens before `end`; they are free."""
        seq.blocks.extend(self.room.pages.alloc(count, "kv"), known, end)

    def drop_unread(self, seq: SequenceState) -> None:
        """Take back the pages that its windows have left behind."""
        if unread := seq.blocks.drop_unread(seq.computed):
            self.room.prefix.release(unread)

    def index_full_blocks(self, seq: SequenceState) -> None:
        """Let others find the blocks whose tokens are known and computed."""
        full = min(seq.computed, len(seq.tokens)) // self.layout.page_tokens
        if full <= seq.indexed or not self._prefix_caching:
            return
        self._extend_keys(seq)
        for group, table in enumerate(seq.blocks.tables):
            for block in range(seq.indexed, full):
                if table[block] != GONE:  # given back before its last token was known
                    self.room.prefix.insert(seq.keys[block], group, table[block])
        seq.indexed = full

    def _extend_keys(self, seq: SequenceState) -> None:
        salt = seq.request.account.salt
        extend_keys(seq.keys, seq.adapter, salt, seq.tokens, self.layout.page_tokens)

    # What it could take

    def find_room(
        self,
        needed: int,
        seq: SequenceState,
        headroom: int = 0,
        spare: Iterable[int] = (),
        to_load: bool = False,
    ) -> tuple[str, ...] | None:
        """The adapters, waited for by others, that must go so that `seq` can take `needed` pages, and a slot `to_load`.

        None if it cannot, or not without leaving `headroom` more that are free or could be freed: to admit without it
        is to preempt soon after. (Simulated with 500 requests and room for about 30: 20 preemptions instead of 440,
        24 % fewer tokens computed.) `spare` pages must stay.
        """
        missing = self.room.missing(needed, spare)
        lacks_slot = to_load and self.room.residency.lacks_slot
        if missing + headroom <= 0 and not lacks_slot:
            return ()
        chosen: list[str] = []
        freed = 0
        for digest in self._takeable(seq):
            if freed < missing or (lacks_slot and not chosen):
                chosen.append(digest)
            freed += self.room.residency.num_pages(digest)
            if freed >= missing + headroom:
                return tuple(chosen)
        return None

    def affordable_end(self, seq: SequenceState, end: int) -> int:
        """The last block boundary before `end` up to which a running `seq` can take pages."""
        known, size = seq.length, self.layout.page_tokens
        available = sum(map(self.room.residency.num_pages, self._takeable(seq))) - self.room.missing(0)
        while end > seq.computed and seq.blocks.lacking(known, end) > available:
            end = (end - 1) // size * size
        return end

    def headroom(self, step: Step) -> int:
        """Pages that those who run may soon ask for."""
        if step.headroom is None:
            step.headroom = sum(seq.headroom for seq in self.running)
        return step.headroom

    def has_way(self, seq: SequenceState, step: Step) -> bool:
        """Might somebody have to give way to `seq` if it lacks a place?"""
        if not self.ledger.has_rivals or seq.flow[:2] in step.no_way:
            return False
        return self._might_give_way(self._want(seq, step, 1, 0, ()), step)

    def make_way(
        self, seq: SequenceState, step: Step, pages: int, headroom: int, hit: Sequence[int] = ()
    ) -> bool:
        """Preempt those who must give way, if then `seq` has what it needs next.

        That is a place, if its adapter is ready, and `pages` besides those that it shares (`hit`), with headroom.
        """
        if not self.ledger.has_rivals or seq.flow[:2] in step.no_way:
            return False
        places = int(self.room.residency.is_ready(seq.adapter) and not self.has_place)
        missing = self.room.missing(pages, hit) + headroom
        want = self._want(seq, step, places, missing, hit, pages)
        yielding = []
        if self._might_give_way(want, step):
            yielding = self._who_gives_way(seq, places, missing, pages, hit)
            if not yielding:  # what it shares would not come back to it, but may to the next one
                step.vain.append(replace(want, pages=want.pages + len(hit)) if want.pages else want)
        if not yielding:
            step.no_way.add(seq.flow[:2])
        for other in yielding:
            self.preempt(other, step)
        return bool(yielding)

    def _want(
        self, seq: SequenceState, step: Step, places: int, missing: int, hit: Sequence[int], pages: int = 0
    ) -> Want:
        if step.standings is None:
            step.standings = Standings(self.running, self.space, self.ledger.turn)
        share = step.standings.share(seq.request.account, pages + len(hit))
        return Want(self.ledger.turn(seq)[:2], share, places, max(0, missing))

    def _might_give_way(self, want: Want, step: Step) -> bool:
        """Without a search: might one be worth while?"""
        if len(step.vain) == WAYS or any(map(want.is_no_easier, step.vain)):
            return False
        assert step.standings is not None
        return step.standings.might_give_way(want.turn, want.share)

    def _who_gives_way(
        self, seq: SequenceState, places: int, missing: int, pages: int, hit: Sequence[int]
    ) -> list[SequenceState]:
        """Whom to preempt so that a waiting `seq` gets the `places` and pages that are `missing`; nobody if it cannot.

        Only those whose turn is later than its own give way, and never the oldest of the highest class that runs: with
        that one sequence always goes on to its end, whatever the others take from each other.
        """
        account, turn = seq.request.account, self.ledger.turn(seq)[:2]
        shared = set(hit)

        def counts(other: SequenceState) -> bool:
            if other.request.account.tenant == account.tenant:
                return True
            safe = other is self.running[0] and other.request.account.priority >= account.priority
            return not safe and self.ledger.turn(other)[:2] > turn

        return who_gives_way(
            seq,
            filter(counts, self.running),
            self.space,
            pages=pages + len(hit),
            missing_places=places,
            missing_pages=missing,
            freed=lambda other: sum(
                self.room.pages.references(page) == 1 and page not in shared for page in other.blocks.pages()
            ),
        )

    def _takeable(self, taker: SequenceState) -> list[str]:
        """Adapters that only those behind `taker` wait for, if it may take them."""
        may_take = taker.is_running or self.waiting.is_starving(taker)
        if self.is_stuck or (may_take and not taker.paused):
            return self.waiting.wanted_behind(taker, self.room.residency.wanted())
        return []

    def check_integrity(self) -> None:
        """Assert the invariants of the pool and of the queues, and that they agree."""
        self.room.check_integrity()
        assert self.running == sorted(self.running, key=by_seniority)
        assert len(self.running) <= self.space.places
        references = Counter(page for seq in self.running for page in seq.blocks.pages())
        assert len(references) == self.room.pages.held("kv")
        assert all(self.room.pages.references(page) == count for page, count in references.items())
        pins = Counter(seq.adapter for seq in self.running if not seq.paused)
        claims = Counter(seq.adapter for seq in chain(self.running, self.waiting))
        self.room.residency.check_counts(pins, claims)
        self.turns.check_integrity()
        for seq in self.running:
            assert seq.computed < seq.length
            seq.blocks.check_integrity(seq.computed, seq.length, seq.max_blocks)
            assert len(seq.blocks.pages()) == seq.blocks.num_pages <= seq.max_pages
        assert len(self.waiting) == len(list(self.waiting))
        assert not any(seq.is_running or seq.computed or seq.paused for seq in self.waiting)
