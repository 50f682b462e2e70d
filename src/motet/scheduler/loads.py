"""Which adapters are copied into the pool, and which images are made again."""

from __future__ import annotations

from motet.scheduler.cost import load_cost
from motet.scheduler.sequence import SequenceState
from motet.scheduler.stage import Stage
from motet.scheduler.step import Step

LOADS = 2  # copies that may always be under way, so that one can follow on the other between two steps


class Loads:
    """Copies begin for requests in their turn, then for hints if nobody lacks room."""

    def __init__(self, stage: Stage, page_tokens: int, max_step_tokens: int) -> None:
        self._stage = stage
        self._residency = stage.room.residency
        self._page_tokens = page_tokens
        self._max_step_tokens = max_step_tokens
        self._hints: dict[str, None] = {}

    @property
    def has_work(self) -> bool:
        """Is there something that the next plan could begin for nobody's request?"""
        return bool(self._hints or self._residency.to_remake())

    @property
    def is_busy(self) -> bool:
        """Are there copies under way for the time of a full step?

        More would only wait in the order in which they were begun, and whose turn comes next could not overtake them.
        """
        cost = load_cost(self._residency.loading_pages, self._page_tokens)
        return self._residency.num_loading >= LOADS and cost >= self._max_step_tokens

    def hint(self, digest: str) -> None:
        """Load it with the next plan, if there is room by then that nobody wants."""
        if self._residency.is_absent(digest):
            self._hints[digest] = None

    def begin(self, seq: SequenceState, step: Step) -> bool:
        """Start to load the adapter that `seq` waits for, if there is room for both."""
        pages = self._residency.num_pages(seq.adapter)
        headroom = self._stage.headroom(step) + self._stage.layout.most_pages(len(seq.tokens))
        wanted = self._stage.find_room(pages, seq, headroom, to_load=True)
        if wanted is None:
            if self._residency.lacks_slot:  # who gives way gives back pages, but its adapter is waited for
                return False
            return self._stage.make_way(seq, step, pages, headroom) and self.begin(seq, step)
        self._stage.room.make_for_adapter(pages, wanted)
        step.loads.append(self._residency.begin_load(seq.adapter))
        for ledger in (self._stage.ledger, self._stage.copies):
            ledger.charge(seq, load_cost(pages, self._page_tokens))
        return True

    def serve_hints(self, step: Step) -> None:
        """Load what is only expected to be wanted, if nobody else lacks room."""
        for digest in self._hints:
            if not self._residency.accepts(digest) or not self._residency.is_absent(digest):
                continue
            pages = self._residency.num_pages(digest)
            missing = self._stage.room.missing(pages + self._stage.headroom(step))
            if step.lacking or self.is_busy or missing > 0 or self._residency.lacks_slot:
                break
            self._stage.room.make_for_adapter(pages)
            step.loads.append(self._residency.begin_load(digest))
        self._hints.clear()

    def begin_remake(self) -> tuple[str, ...]:
        """The image to make again now, in the order in which adapters are loaded; one at a time, those that nobody
        waits for last."""
        missing = self._residency.to_remake()
        if not missing:
            return ()
        first = self._stage.waiting.first_to_load(missing)
        digest = next(iter(missing)) if first is None else first.adapter
        self._residency.begin_remake(digest)
        return (digest,)
