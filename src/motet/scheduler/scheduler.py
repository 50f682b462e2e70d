"""Decides what the next step computes: continuous batching over one pool of pages for KV cache and adapters.

`schedule` decides and reserves, the engine executes the plan, `commit` takes its results; nothing here
touches a tensor, so that thousands of steps can be simulated on a CPU.

Whose turn it is to ask for rows, a place or pages is decided by `fairness`: with one tenant, by the order of arrival.
Conflicts over pages are settled thus:

- What nobody uses goes first: cached prefix pages and idle adapters that no request waits for, by
  what it costs to lose them.
- Then idle adapters that only requests whose turn is later wait for; a running sequence may take these, a
  waiting one only if it is starving or nothing else goes on.
- For an adapter that has to be loaded, one leaves whose turn is over; who runs with it is paused, and keeps its KV
  (`turns`).
- Then a running sequence is preempted: it loses its pages, keeps its tokens, and computes them again. For one that
  runs, the youngest of the tenant that holds most gives way; for one that waits, only who holds more than its share
  or is of a lower class. A prompt that can have pages for some of its tokens computes these rather than preempt anyone.

So the oldest request of the highest class makes progress, and `add` has made sure that it fits alone: while it waits,
whoever is served before it is charged, also for what is computed or loaded again, until it is its turn; once it runs
it is not preempted, and may take what the younger wait for; if nothing else goes on, it comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from motet.errors import AdapterLoadFailed, InvalidRequest
from motet.scheduler.admission import check_capacity, check_length
from motet.scheduler.blocks import BlockTables, KVLayout
from motet.scheduler.fairness import Rest, youngest
from motet.scheduler.loads import Loads
from motet.scheduler.sequence import SequenceState
from motet.scheduler.snapshot import snapshot
from motet.scheduler.stage import Stage
from motet.scheduler.step import Step
from motet.types import EngineStats, KVGroup, Plan, Request, Sampled, SeqOutput

LOOKAHEAD = 32  # requests that may lack pages before `schedule` stops asking; bounds its time in a long queue


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of a step and of a sequence. A page holds the KV of `page_tokens` tokens of one of `kv_groups`.

    `max_resident` bounds the adapters that are in the pool at a time, if something besides its pages does.
    """

    kv_groups: tuple[KVGroup, ...]
    page_tokens: int
    max_step_tokens: int
    max_running: int
    max_model_len: int
    prefix_caching: bool
    eos_token_ids: tuple[int, ...]
    max_resident: int | None = None


class Scheduler:
    """Requests in, plans out, results in, outputs out: `schedule`, execute, `commit`, each plan in its turn.

    The next plan may be asked for while the last one is being executed, before its commit: its tokens chosen there
    are PENDING. So a plan counts as executed once it is given out, and those who execute must do so in order: what a
    plan frees may be given away by the next. A sequence that turns out to have ended has a row in that plan in vain.

    An empty plan while requests wait, with nothing to commit, means that an adapter is being loaded or its image made
    again: only the end of this, or a new request, gives something to do.
    """

    def __init__(self, config: SchedulerConfig, num_pages: int) -> None:
        self._config = config
        self._layout = KVLayout(config.kv_groups, config.page_tokens, config.max_step_tokens)
        self._stage = Stage(
            self._layout, num_pages, config.max_running, config.prefix_caching, config.max_resident
        )
        self._loads = Loads(self._stage, config.page_tokens, config.max_step_tokens)
        self._rest = Rest(config.max_step_tokens)
        self._residency = self._stage.room.residency
        self._waiting = self._stage.waiting
        self._by_request: dict[str, SequenceState] = {}
        self._by_id: dict[int, SequenceState] = {}
        self._next_id = 0
        self._steps = 0

    # Adapters

    def register_adapter(self, digest: str, num_pages: int, work: float = 0.0) -> None:
        """Accept requests for this digest from now on; loaded it takes `num_pages` pages.

        `work` is what it adds to a token's work, as a share of the base model's: see `cost.progress_cost`.
        """
        self._residency.register(digest, num_pages, work)

    def forget_adapter(self, digest: str) -> None:
        """Refuse new requests for it. Those accepted finish first, then its pages return.

        Its packed image must stay loadable until `stats().residency` lists it no more: a waiting request may
        still need it.
        """
        self._residency.forget(digest)

    def pin_adapter(self, digest: str, pinned: bool) -> None:
        """Never evict it, whether it is in the pool already or not; or do so again.

        Raises InvalidRequest if it is not registered, CapacityExceeded if pinned adapters would take too much.
        """
        self._require(digest)
        if pinned:
            self._stage.check_pin(digest)
        self._residency.keep(digest, pinned)

    def prefetch(self, digest: str) -> None:
        """Load it with the next plan, if there is room by then that nobody wants. It is tried once.

        Raises InvalidRequest if it is not registered.
        """
        self._require(digest)
        self._loads.hint(digest)

    def adapter_loaded(self, digest: str, is_over: bool = True) -> None:
        """The copy that a plan's load began is complete.

        Or only enqueued, so that a step which needs it waits on the device: `adapter_arrived` then tells its end.
        """
        self._residency.loaded(digest, is_over)
        self._stage.turns.resume(digest)

    def adapter_arrived(self, digest: str) -> None:
        """The copy of a loaded adapter is over. It may have left again."""
        self._residency.arrived(digest)

    def adapter_failed(self, digest: str, reason: str) -> list[SeqOutput]:
        """It cannot be loaded, and the copy writes no more: end the requests that wait for it. Later ones try again."""
        group = self._awaiting(digest)
        self._residency.failed(digest)
        for seq in group:
            self._leave(seq)
        code = AdapterLoadFailed.code
        return [SeqOutput(seq.request.id, finish="error", error=reason, code=code) for seq in group]

    def adapter_missing(self, digest: str, reason: str) -> list[SeqOutput]:
        """The copy that a plan's load began found no image, or a damaged one, and writes no more.

        A plan will ask for it in `remakes`; `image_remade` answers that. Meanwhile the requests wait, without pages.
        If it was made again too often already they end.
        """
        if not self._residency.may_remake(digest):
            return self.adapter_failed(digest, reason)
        self._residency.missed(digest)
        return []

    def image_remade(self, digest: str, error: str | None = None) -> list[SeqOutput]:
        """The image that a plan asked for is there again, and its adapter loaded in its turn; or why it cannot be."""
        is_awaited = self._residency.is_remaking(digest)
        if is_awaited and error is not None:
            return self.adapter_failed(digest, error)
        self._residency.remade(digest)
        if is_awaited and not self._awaiting(digest):  # as a load goes on whose requests are gone
            self._loads.hint(digest)
        return []

    def _awaiting(self, digest: str) -> list[SequenceState]:
        """Who waits for this adapter, or was paused with it."""
        return [*self._waiting.group(digest), *self._stage.turns.paused(digest)]

    @property
    def is_remaking(self) -> bool:
        """Is there an image that `image_remade` has not told the end of?"""
        return self._residency.being_remade is not None

    # Requests

    def add(self, request: Request) -> int:
        """Accept a request, to be ended by exactly one output with `finish`; the id is its chunks' `seq`.

        Raises InvalidRequest if it can never be served, CapacityExceeded if the pool is too small for it even
        alone.
        """
        check_length(request, self._config.max_model_len)
        if request.id in self._by_request:
            raise InvalidRequest(f"a request with the id {request.id!r} is in flight", param="id")
        self._require(request.adapter)
        seq = SequenceState.of(self._next_id, request, self._layout)
        adapter_pages = self._residency.num_pages(request.adapter)
        pinned_pages = self._residency.kept_pages - adapter_pages * self._residency.is_kept(request.adapter)
        check_capacity(seq.max_pages, adapter_pages, self._stage.space.pages, pinned_pages)
        self._residency.asked(request.adapter)
        self._next_id += 1
        self._by_request[request.id] = seq
        self._by_id[seq.id] = seq
        self._stage.enter(seq)
        return seq.id

    def _require(self, digest: str) -> None:
        if not self._residency.accepts(digest):
            raise InvalidRequest(f"no adapter with the digest {digest!r} is registered", param="model")

    def abort(self, request_id: str) -> SeqOutput | None:
        """End a request now and free its pages; None if there is no such request (any more)."""
        seq = self._by_request.get(request_id)
        if seq is None:
            return None
        self._leave(seq)
        return SeqOutput(request_id, finish="abort")

    @property
    def has_work(self) -> bool:
        """Does anyone wait or run, or has the next plan evictions, a prefetch to try or an image to ask for?"""
        return bool(self._by_request) or self._loads.has_work or self._residency.any_dropped

    def sequence(self, seq: int) -> SequenceState:
        """The state of a sequence in flight, to be read only."""
        return self._by_id[seq]

    # The step

    def schedule(self) -> Plan:
        """Decide the next step: decode rows, then prompts in turn, of running sequences and of who waits.

        Bound on waiting: a request that lacks pages is passed over by those behind it in fewer than PATIENCE
        calls. From then on nobody behind it is given pages before it, so that it gets in at the latest when
        those before it and the at most `max_running` sequences running at that time have ended or given way, and
        the loads under way are done. Each row and each load is charged, so that those before it become
        those behind it: a tenant's oldest request waits for no more than the service gap of `fairness`.
        """
        self._stage.ledger.settle()
        self._stage.copies.settle()
        step = Step(self._config.max_step_tokens)
        self._serve_running(step)
        self._loads.bring_back(step, late=True)
        self._serve_prompts(step)
        self._loads.bring_back(step, late=False)
        self._serve_oldest(step)
        self._loads.serve_hints(step)
        if step.is_empty and self._residency.arriving:
            self._residency.all_arrived()  # nobody else is made to wait
            self._serve_running(step, with_prompts=True)
        plan = step.plan(evictions=self._residency.take_dropped(), remakes=self._loads.begin_remake())
        for chunk in plan.chunks:
            self._stage.advance(self._by_id[chunk.seq], chunk)
        self._stage.charge((self._by_id[chunk.seq], chunk) for chunk in plan.chunks)
        self._rest.count(plan.num_tokens, step.rest)
        self._residency.clock += not step.is_empty
        return plan

    def commit(self, plan: Plan, sampled: Sequence[Sampled]) -> list[SeqOutput]:
        """Take the results of an executed plan: one sampled token for each of its chunks with `sample`."""
        self._steps += bool(plan.chunks)
        outputs: list[SeqOutput] = []
        for sample in sampled:
            seq = self._by_id.get(sample.seq)
            if seq is None:
                continue
            outputs.append(seq.append(sample, self._config.eos_token_ids))
            self._stage.index_full_blocks(seq)
            if outputs[-1].finish is not None:
                self._leave(seq)
        return outputs

    def _serve_running(self, step: Step, with_prompts: bool = False) -> None:
        """A row for each sequence past its prompt, by seniority."""
        for seq in tuple(self._stage.running):
            if step.budget > 0 and (with_prompts or seq.remaining == 1) and self._goes_on(seq):
                self._continue(seq, step)

    def _goes_on(self, seq: SequenceState) -> bool:
        """Does it run, with its adapter there and something to compute?"""
        if not seq.is_running or seq.paused or seq.is_complete:
            return False
        return seq.adapter not in self._residency.arriving

    def _serve_prompts(self, step: Step) -> None:
        """The rows that are left, in turn; of one flow those that run come first."""
        turn = self._stage.ledger.turn
        prompts = [seq for seq in self._stage.running if seq.remaining > 1 and self._goes_on(seq)]
        first = step.late if step.late in self._stage.running[:1] else None
        asking = self._waiting.in_turn(
            self._residency, lambda seq: self._may_run(seq, step), lambda: not self._loads.is_busy, first
        )
        asker = None
        if self._stage.ledger.has_rivals:
            prompts.sort(key=turn)
            asker = next(asking, None)
        for prompt in prompts:
            while asker is not None and turn(asker)[:3] < turn(prompt)[:3]:
                if not self._serve_waiting(asker, step):
                    asking.close()
                asker = next(asking, None)
            if step.budget > 0 and self._goes_on(prompt) and not self._leave_rest(prompt, step):
                self._continue(prompt, step)
        for seq in asking if asker is None else chain((asker,), asking):
            if not self._serve_waiting(seq, step):
                return

    def _serve_waiting(self, seq: SequenceState, step: Step) -> bool:
        """Give it what it needs next, its adapter or its place. False if nobody more may ask."""
        if seq.pending:  # preempted a moment ago; its last token is not known yet
            return True
        if not self._residency.is_ready(seq.adapter):
            served = self._loads.is_busy or self._loads.begin(seq, step)
        elif self._may_run(seq, step) and not self._leave_rest(seq, step):
            served = self._admit(seq, step) or not self._stage.has_place
        else:
            return True
        if served:
            return True
        self._waiting.pass_over(seq)
        step.lacking += 1
        return not self._waiting.is_starving(seq) and step.lacking < LOOKAHEAD

    def _serve_oldest(self, step: Step) -> None:
        """If nothing goes on the oldest does, if need be in the pages of those who are paused."""
        step.late = None
        while self._stage.is_stuck and (oldest := self._stage.oldest()) and not oldest.pending:
            if oldest.paused:
                self._loads.bring_back_oldest(oldest, step)
            else:
                self._serve_waiting(oldest, step)
            others = [seq for seq in self._stage.running if seq is not oldest]
            if not self._stage.is_stuck or not others:
                return
            self._stage.preempt(others[-1], step)

    def _leave_rest(self, seq: SequenceState, step: Step) -> bool:
        """Leave the rest of the step to nobody, if whose prompt ends with it should have that rather than `seq`."""
        if step.ending is None:
            return False
        ending = self._by_id[step.ending]
        lead = self._stage.ledger.lead(ending, seq)
        if self._waiting.has_more_of(ending) or not self._rest.may_be_left(step.budget, lead):
            return False
        step.leave_rest()
        return True

    def _may_run(self, seq: SequenceState, step: Step) -> bool:
        """Are there rows left, and a place or somebody who might give way?"""
        if step.budget <= 0:
            return False
        return self._stage.has_place or self._stage.has_way(seq, step)

    def _admit(self, seq: SequenceState, step: Step) -> bool:
        """Let `seq` run if there is a place, and room for all its known tokens; known prefixes are shared."""
        blocks = BlockTables(self._layout, self._stage.match(seq))
        hit, known = blocks.pages(), len(seq.tokens)
        end = min(known, blocks.num_tokens + step.budget)
        needed, headroom = blocks.lacking(known, end), self._stage.headroom(step) + blocks.to_come(known, end)
        wanted = self._stage.find_room(needed, seq, headroom, hit)
        if wanted is None or not self._stage.has_place:
            return self._stage.make_way(seq, step, needed, headroom, hit) and self._admit(seq, step)
        self._stage.start(seq, blocks)
        self._stage.room.make(needed, wanted)
        self._stage.extend(seq, needed, known, end)
        step.headroom = self._stage.headroom(step) + seq.headroom
        step.add(seq.chunk(end))
        return True

    def _continue(self, seq: SequenceState, step: Step) -> None:
        """Compute the next tokens of a running sequence, as many as rows and pages are left for.

        If there is no page for even one, others give way until there is, or until that is `seq` itself.
        """
        step.headroom = None
        known = seq.length
        end = min(known, seq.computed + step.budget)
        while lacking := seq.blocks.lacking(known, end):
            wanted = self._stage.find_room(lacking, seq)
            if wanted is not None:
                self._stage.room.make(lacking, wanted)
                self._stage.extend(seq, lacking, known, end)
                break
            end = self._stage.affordable_end(seq, end)
            if end <= seq.computed:
                yielding = youngest(self._stage.running[1:] or [seq], self._stage.space)
                self._stage.preempt(yielding, step)
                if yielding is seq:
                    return
                end = min(known, seq.computed + step.budget)
        step.add(seq.chunk(end))

    def _leave(self, seq: SequenceState) -> None:
        """Forget a sequence that has ended."""
        self._stage.leave(seq)
        del self._by_request[seq.request.id]
        del self._by_id[seq.id]

    # What an observer sees

    def stats(self) -> EngineStats:
        """A snapshot: counts of requests and pages, the scheduler's counters, and who is in the pool."""
        return snapshot(self._stage, self._steps)

    def check_integrity(self) -> None:
        """Assert the invariants of the pool and of the queues, and that they agree."""
        self._stage.check_integrity()
        flying = {*self._stage.running, *self._waiting}
        assert flying == set(self._by_request.values()) == set(self._by_id.values())
        assert len(self._stage.running) + len(self._waiting) == len(self._by_request)
