"""Decides what the next step computes: continuous batching over one pool of pages for KV cache and adapters.

`schedule` decides and reserves, the engine executes the plan, `commit` takes its results; nothing here
touches a tensor, so that thousands of steps can be simulated on a CPU.

Seniority, the order of arrival, settles every conflict over pages:

- What nobody uses goes first: cached prefix pages and idle adapters that no request waits for, by
  `cost_to_lose`.
- Then idle adapters that only younger requests wait for; a running sequence may take these, a waiting one
  only if it is starving or nothing else goes on.
- Then the youngest running sequence is preempted: it loses its pages, keeps its tokens, and computes them
  again. A prompt that can have pages for some of its tokens computes these rather than preempt anyone.

So the oldest request always makes progress, and `add` has made sure that it fits alone.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge

from motet.adapters.residency import Residency, Victim, cost_to_lose
from motet.errors import AdapterLoadFailed, InvalidRequest
from motet.memory.pages import PageAllocator
from motet.memory.prefix import PrefixIndex, extend_keys
from motet.scheduler.admission import check_capacity, check_length, choose_victims
from motet.scheduler.blocks import GONE, BlockTables, KVLayout, Tables
from motet.scheduler.fairness import WaitingQueue, by_seniority, position
from motet.scheduler.sequence import SequenceState
from motet.scheduler.step import Step
from motet.types import BASE, Chunk, EngineStats, KVGroup, Plan, Request, Sampled, SeqOutput

LOOKAHEAD = 32  # requests that may lack pages before `schedule` stops asking; bounds its time in a long queue


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of a step and of a sequence. A page holds the KV of `page_tokens` tokens of one of `kv_groups`."""

    kv_groups: tuple[KVGroup, ...]
    page_tokens: int
    max_step_tokens: int
    max_running: int
    max_model_len: int
    prefix_caching: bool
    eos_token_ids: tuple[int, ...]


class Scheduler:
    """Requests in, plans out, results in, outputs out: `schedule`, execute, `commit`, each plan in its turn.

    The next plan may be asked for while the last one is being executed, before its commit: its tokens chosen there
    are PENDING. So a plan counts as executed once it is given out, and those who execute must do so in order: what a
    plan frees may be given away by the next. A sequence that turns out to have ended has a row in that plan in vain.

    An empty plan while requests wait, with nothing to commit, means that an adapter is being loaded: only its end, or
    a new request, gives something to do.
    """

    def __init__(self, config: SchedulerConfig, num_pages: int) -> None:
        self._config = config
        self._layout = KVLayout(config.kv_groups, config.page_tokens, config.max_step_tokens)
        self._pages = PageAllocator(num_pages)
        self._prefix = PrefixIndex(self._pages, config.kv_groups, config.page_tokens)
        self._residency = Residency(self._pages)
        self._waiting = WaitingQueue()
        self._running: list[SequenceState] = []  # the oldest first
        self._by_request: dict[str, SequenceState] = {}
        self._by_id: dict[int, SequenceState] = {}
        self._next_id = 0
        self._now = 0.0
        self._steps = 0
        self._preemptions = 0
        self._prefix_hits = 0
        self._prefix_queries = 0

    # Adapters

    def register_adapter(self, digest: str, num_pages: int) -> None:
        """Accept requests for this digest from now on; loaded it takes `num_pages` pages."""
        self._residency.register(digest, num_pages)

    def forget_adapter(self, digest: str) -> None:
        """Refuse new requests for it. Those accepted finish first, then its pages return.

        Its packed image must stay loadable until `stats().residency` lists it no more: a waiting request may
        still need it.
        """
        self._residency.forget(digest)

    def adapter_loaded(self, digest: str) -> None:
        """The copy that a plan's load began is complete."""
        self._residency.loaded(digest, self._now)

    def adapter_failed(self, digest: str, reason: str) -> list[SeqOutput]:
        """The copy failed and writes no more: end the requests that wait for it. Later ones try again."""
        group = self._waiting.group(digest)
        for seq in group:
            self._leave(seq)
        self._residency.failed(digest)
        code = AdapterLoadFailed.code
        return [SeqOutput(seq.request.id, finish="error", error=reason, code=code) for seq in group]

    # Requests

    def add(self, request: Request) -> int:
        """Accept a request, to be ended by exactly one output with `finish`; the id is its chunks' `seq`.

        Raises InvalidRequest if it can never be served, CapacityExceeded if the pool is too small for it even
        alone.
        """
        check_length(request, self._config.max_model_len)
        if request.id in self._by_request:
            raise InvalidRequest(f"a request with the id {request.id!r} is in flight", param="id")
        if not self._residency.accepts(request.adapter):
            raise InvalidRequest(
                f"no adapter with the digest {request.adapter!r} is registered", param="model"
            )
        seq = SequenceState.of(self._next_id, request, self._layout)
        check_capacity(seq.max_pages, self._residency.num_pages(request.adapter), self._pages.num_pages)
        self._next_id += 1
        self._by_request[request.id] = seq
        self._by_id[seq.id] = seq
        self._residency.claim(request.adapter)
        self._waiting.push(seq)
        return seq.id

    def abort(self, request_id: str) -> SeqOutput | None:
        """End a request now and free its pages; None if there is no such request (any more)."""
        seq = self._by_request.get(request_id)
        if seq is None:
            return None
        self._leave(seq)
        return SeqOutput(request_id, finish="abort")

    @property
    def has_work(self) -> bool:
        """Does anyone wait or run, or has the next plan evictions to report?"""
        return bool(self._by_request) or self._residency.any_dropped

    def sequence(self, seq: int) -> SequenceState:
        """The state of a sequence in flight, to be read only."""
        return self._by_id[seq]

    # The step

    def schedule(self, now: float) -> Plan:
        """Decide the next step: decode rows, then prefill of running sequences, then who waits.

        Bound on waiting: a request that lacks pages is passed over by younger ones in fewer than PATIENCE
        calls. From then on nobody younger is given pages before it, so that it gets in at the latest when the
        at most `max_running` sequences running at that time, and the older requests, have ended and the loads
        under way are done: in each call the oldest of these computes a token or gives way to an older one.
        """
        self._now = now
        step = Step(self._config.max_step_tokens)
        self._serve_running(step)
        self._serve_waiting(step)
        plan = step.plan(evictions=self._residency.take_dropped())
        for chunk in plan.chunks:
            self._advance(self._by_id[chunk.seq], chunk)
        return plan

    def commit(self, plan: Plan, sampled: Sequence[Sampled], now: float) -> list[SeqOutput]:
        """Take the results of an executed plan: one sampled token for each of its chunks with `sample`."""
        self._now = now
        self._steps += bool(plan.chunks)
        outputs: list[SeqOutput] = []
        for sample in sampled:
            seq = self._by_id.get(sample.seq)
            if seq is None:
                continue
            outputs.append(seq.append(sample, self._config.eos_token_ids))
            self._index_full_blocks(seq)
            if outputs[-1].finish is not None:
                self._leave(seq)
        return outputs

    def _advance(self, seq: SequenceState, chunk: Chunk) -> None:
        """Count a planned chunk as computed."""
        seq.computed = chunk.start + len(chunk.tokens)
        seq.pending += chunk.sample
        self._index_full_blocks(seq)
        if unread := seq.blocks.drop_unread(seq.computed):
            self._prefix.release(unread, self._now)

    def _serve_running(self, step: Step) -> None:
        """A row for each sequence past its prompt, then what rows are left to prompts; the oldest first."""
        for prefill in (False, True):
            for seq in tuple(self._running):
                if (
                    step.budget > 0
                    and seq.is_running
                    and (seq.remaining > 1) == prefill
                    and not seq.is_complete
                ):
                    self._continue(seq, step)

    def _serve_waiting(self, step: Step) -> None:
        """Give each in turn what it needs next, its adapter or its place; pass it over for lack of pages."""
        if not self._waiting:
            return
        step.headroom = sum(seq.headroom for seq in self._running)
        lacking = 0
        for seq in self._waiting.in_turn(self._residency, admitting=self._has_place(step)):
            if seq.pending:  # preempted a moment ago; its last token is not known yet
                continue
            if not self._residency.is_ready(seq.adapter):
                served = self._begin_load(seq, step)
            elif self._has_place(step):
                served = self._admit(seq, step)
            else:
                return
            if not served:
                self._waiting.pass_over(seq)
                lacking += 1
                if self._waiting.is_starving(seq) or lacking == LOOKAHEAD:
                    return

    def _has_place(self, step: Step) -> bool:
        return step.budget > 0 and len(self._running) < self._config.max_running

    def _begin_load(self, seq: SequenceState, step: Step) -> bool:
        """Start to load the adapter that `seq` waits for, if there is room for both."""
        kv_pages = self._layout.most_pages(len(seq.tokens))
        victims = self._find_room(self._residency.num_pages(seq.adapter), seq, step.headroom + kv_pages)
        if victims is None:
            return False
        self._evict(victims)
        step.loads.append(self._residency.begin_load(seq.adapter))
        return True

    def _admit(self, seq: SequenceState, step: Step) -> bool:
        """Let `seq` run if there is room for all its known tokens; known prefixes are shared."""
        blocks = BlockTables(self._layout, self._match(seq))
        hit, known = blocks.pages(), len(seq.tokens)
        end = min(known, blocks.num_tokens + step.budget)
        needed, later = blocks.lacking(known, end), blocks.to_come(known, end)
        victims = self._find_room(needed, seq, step.headroom + later, spare=frozenset(hit))
        if victims is None:
            return False
        self._prefix.share(hit)
        self._evict(victims)
        self._start(seq, blocks)
        blocks.extend(self._pages.alloc(needed, "kv"), known, end)
        step.headroom += seq.headroom
        step.add(seq.chunk(end))
        return True

    def _match(self, seq: SequenceState) -> Tables:
        """Pages that already hold a prefix of `seq`, always leaving it a token to compute."""
        if not self._config.prefix_caching:
            return self._layout.no_blocks
        extend_keys(seq.keys, seq.adapter, seq.tokens, self._config.page_tokens)
        return self._prefix.match(seq.keys[: (len(seq.tokens) - 1) // self._config.page_tokens])

    def _start(self, seq: SequenceState, prefix: BlockTables) -> None:
        self._waiting.remove(seq)
        insort(self._running, seq, key=by_seniority)
        self._residency.pin(seq.adapter)
        seq.blocks = prefix
        seq.computed = prefix.num_tokens
        seq.indexed = seq.computed // self._config.page_tokens
        if not seq.admitted:
            seq.admitted = True
            seq.cached_tokens = seq.computed
            self._prefix_hits += seq.computed
            self._prefix_queries += len(seq.tokens) if self._config.prefix_caching else 0

    def _continue(self, seq: SequenceState, step: Step) -> None:
        """Compute the next tokens of a running sequence, as many as rows and pages are left for.

        If there is no page for even one, the youngest give way until there is, or until that is `seq` itself.
        """
        known = seq.length
        end = min(known, seq.computed + step.budget)
        while lacking := seq.blocks.lacking(known, end):
            victims = self._find_room(lacking, seq)
            if victims is not None:
                self._evict(victims)
                seq.blocks.extend(self._pages.alloc(lacking, "kv"), known, end)
                break
            end = self._affordable_end(seq, end)
            if end <= seq.computed:
                youngest = self._running[-1]
                self._preempt(youngest)
                step.drop(youngest.id)
                if youngest is seq:
                    return
                end = min(known, seq.computed + step.budget)
        step.add(seq.chunk(end))

    # Room

    def _find_room(
        self, needed: int, seq: SequenceState, headroom: int = 0, spare: Container[int] = ()
    ) -> tuple[Victim, ...] | None:
        """What to evict so that `seq` can take `needed` pages; None if it cannot. `spare` pages must stay."""
        return choose_victims(self._victims(seq, spare), needed - self._pages.free, headroom)

    def _affordable_end(self, seq: SequenceState, end: int) -> int:
        """The last block boundary before `end` up to which `seq` can take pages."""
        known, size = seq.length, self._config.page_tokens
        available = self._pages.free + sum(victim.num_pages for victim in self._victims(seq, ()))
        while end > seq.computed and seq.blocks.lacking(known, end) > available:
            end = (end - 1) // size * size
        return end

    def _victims(self, taker: SequenceState, spare: Container[int]) -> Iterator[Victim]:
        """What may be evicted for `taker`: what nobody waits for by cost, then what the young wait for."""
        cached = (Victim(BASE, 1, last_use) for page, last_use in self._prefix.idle() if page not in spare)
        unwanted = (v for v in self._residency.idle() if self._waiting.oldest(v.adapter) is None)
        yield from merge(cached, unwanted, key=cost_to_lose)
        if taker.is_running or self._is_stuck() or self._waiting.is_starving(taker):
            yield from self._waiting.of_younger(taker, self._residency.idle())

    def _is_stuck(self) -> bool:
        """Will nothing change unless the next request gets what it needs?"""
        return not self._running and not self._residency.any_loading

    def _evict(self, victims: Sequence[Victim]) -> None:
        self._prefix.evict(sum(victim.adapter == BASE for victim in victims))
        for victim in victims:
            if victim.adapter != BASE:
                self._residency.evict(victim.adapter)

    def _preempt(self, seq: SequenceState) -> None:
        self._preemptions += 1
        self._stop(seq)
        self._waiting.push(seq)

    def _stop(self, seq: SequenceState) -> None:
        """Give back what a running sequence holds."""
        del self._running[position(self._running, seq)]
        self._prefix.release(seq.blocks.pages(), self._now)
        self._residency.unpin(seq.adapter, self._now)
        seq.blocks = BlockTables(self._layout, self._layout.no_blocks)
        seq.computed = 0

    def _leave(self, seq: SequenceState) -> None:
        """Forget a sequence that has ended."""
        if seq.is_running:
            self._stop(seq)
        else:
            self._waiting.remove(seq)
        del self._by_request[seq.request.id]
        del self._by_id[seq.id]
        self._residency.unclaim(seq.adapter)

    # Results

    def _index_full_blocks(self, seq: SequenceState) -> None:
        page_tokens = self._config.page_tokens
        full = min(seq.computed, len(seq.tokens)) // page_tokens
        if full <= seq.indexed or not self._config.prefix_caching:
            return
        extend_keys(seq.keys, seq.adapter, seq.tokens, page_tokens)
        for group, table in enumerate(seq.blocks.tables):
            for block in range(seq.indexed, full):
                if table[block] != GONE:  # given back before its last token was known
                    self._prefix.insert(seq.keys[block], group, table[block])
        seq.indexed = full

    # What an observer sees

    def stats(self) -> EngineStats:
        """A snapshot: counts of requests and pages, the scheduler's counters, and who is in the pool."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            total_pages=self._pages.num_pages,
            free_pages=self._pages.free,
            kv_pages=self._pages.held("kv"),
            cached_pages=self._pages.held("cached"),
            adapter_pages=self._pages.held("adapter"),
            steps=self._steps,
            preemptions=self._preemptions,
            prefix_hit_tokens=self._prefix_hits,
            prefix_query_tokens=self._prefix_queries,
            evictions=self._residency.evictions,
            loads=self._residency.loads,
            residency=dict(self._residency.states()),
            running_by_adapter=Counter(seq.adapter for seq in self._running),
            waiting_by_adapter=Counter(seq.adapter for seq in self._waiting),
        )

    def check_integrity(self) -> None:
        """Assert the invariants of the pool and of the queues, and that they agree."""
        self._pages.check_integrity()
        self._prefix.check_integrity()
        self._residency.check_integrity()
        assert self._running == sorted(self._running, key=by_seniority)
        assert {*self._running, *self._waiting} == set(self._by_request.values()) == set(self._by_id.values())
        assert len(self._running) + len(self._waiting) == len(self._by_request)
        assert len(self._running) <= self._config.max_running
        references = Counter(page for seq in self._running for page in seq.blocks.pages())
        assert len(references) == self._pages.held("kv")
        assert all(self._pages.references(page) == count for page, count in references.items())
        pins = Counter(seq.adapter for seq in self._running)
        claims = Counter(seq.adapter for seq in self._by_request.values())
        self._residency.check_counts(pins, claims)
        for seq in self._running:
            assert seq.computed < seq.length
            seq.blocks.check_integrity(seq.computed, seq.length, seq.max_blocks)
            assert len(seq.blocks.pages()) <= seq.max_pages
        assert not any(seq.is_running or seq.computed for seq in self._waiting)
