"""Which adapters are copied into the pool, and which images are made again."""

from __future__ import annotations

from motet.scheduler.cost import load_cost
from motet.scheduler.sequence import SequenceState
from motet.scheduler.stage import Stage
from motet.scheduler.step import Step
from motet.scheduler.turns import who_leaves

LOADS = 2  # copies that may always be under way, so that one can follow on the other between two steps


class Loads:
    """Copies begin for requests in their turn, then for who is paused, then for hints if nobody lacks room."""

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
        stage = self._stage
        if step.late is not None and stage.ledger.turn(step.late)[:2] <= stage.ledger.turn(seq)[:2]:
            return False
        pages = self._residency.num_pages(seq.adapter)
        headroom = stage.headroom(step) + stage.layout.most_pages(len(seq.tokens))
        wanted = stage.find_room(pages, seq, headroom, to_load=True)
        if wanted is None:
            # who gives way gives back pages, but its adapter is waited for
            if not self._residency.lacks_slot and stage.make_way(seq, step, pages, headroom):
                return self.begin(seq, step)
            places = stage.space.places - len(stage.running) - stage.waiting.count_adapters(self._residency)
            going = min(stage.waiting.count(seq.adapter), places)
            if not self._end_turns(seq, step, going, pages, headroom):
                return False
        self._load(seq, step, wanted or ())
        stage.turns.late_had_it = False
        return True

    def bring_back(self, step: Step, late: bool) -> None:
        """Start to load the adapters of those who are paused, of the late ones only or of all.

        The first of the late ones that finds no room becomes the one that nobody overtakes.
        """
        stage = self._stage
        if not stage.turns.left or self.is_busy:
            return
        starving = [
            seq for seq in stage.waiting.starving(self._residency) if self._residency.is_absent(seq.adapter)
        ]
        limit = min(map(stage.ledger.turn, starving), default=None)
        for first, going in stage.turns.in_order():
            is_late, is_oldest = stage.turns.is_late(first), first is stage.running[0]
            if is_late < late or (late and stage.turns.late_had_it and not is_oldest):
                continue
            if limit is not None and stage.ledger.turn(first) > limit and not is_oldest:
                continue
            if self.is_busy:
                return
            if self._bring_back(first, step, going, is_late):
                stage.turns.late_had_it = is_late
                continue
            step.lacking += not late
            if is_late and step.late is None:
                step.late = first

    def bring_back_oldest(self, seq: SequenceState, step: Step) -> None:
        """Nobody else goes on: load its adapter, if there is room."""
        self._bring_back(seq, step, 0, is_late=True)

    def _bring_back(self, seq: SequenceState, step: Step, going: int, is_late: bool) -> bool:
        pages = self._residency.num_pages(seq.adapter)
        headroom = 0 if is_late else self._stage.headroom(step)
        wanted = self._stage.find_room(pages, seq, headroom, to_load=True)
        if wanted is None:
            if self._residency.any_loading or self._residency.arriving:
                return False
            if not self._end_turns(seq, step, going, pages, headroom, is_late):
                return False
        self._load(seq, step, wanted or ())
        return True

    def _end_turns(
        self, taker: SequenceState, step: Step, going: int, pages: int, headroom: int, is_late: bool = False
    ) -> bool:
        """Pause those whose turn is over, if then the adapter of `taker` can be loaded, with which so many go on."""
        if going < 1 or taker.flow[:2] in step.no_turn:
            return False
        stage = self._stage
        missing = stage.room.missing(pages) + headroom
        if step.over is None:
            step.over = stage.turns.over()
        candidates = stage.turns.may_leave(step.over, taker) if step.over else []
        leaving = who_leaves(candidates, going, missing, is_late)
        if not leaving:
            step.no_turn.add(taker.flow[:2])
        for digest in leaving:
            stage.pause(digest, step)
            step.over = None
        return bool(leaving)

    def _load(self, seq: SequenceState, step: Step, wanted: tuple[str, ...]) -> None:
        pages = self._residency.num_pages(seq.adapter)
        self._stage.room.make_for_adapter(pages, wanted)
        step.loads.append(self._residency.begin_load(seq.adapter))
        for ledger in (self._stage.ledger, self._stage.copies):
            ledger.charge(seq, load_cost(pages, self._page_tokens))

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
        paused = (digest for digest in self._stage.turns.left if digest in missing)
        digest = next(paused, next(iter(missing))) if first is None else first.adapter
        self._residency.begin_remake(digest)
        return (digest,)
