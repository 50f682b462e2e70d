"""Motet without a GPU: its own scheduler decides every step, a `StepCost` says what the step takes.

Who runs beside whom, prompts in chunks, adapters that have to be loaded and who is evicted for them, preemption: all of
it is the engine's, only the time is computed. With `ahead` the next step is planned while one runs, as on a GPU, so
that a request may have to wait for two.
"""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

from motet.plan.cost import StepCost
from motet.scheduler.scheduler import Scheduler, SchedulerConfig
from motet.types import BASE, Account, Plan, Request, Sampled, SamplingParams, SeqOutput


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, in seconds, for which fine-tune, and its lengths in tokens."""

    at: float
    adapter: str
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class AdapterCost:
    """What an adapter takes of the pool, its weight in a step, and how long it takes to load."""

    num_pages: int
    weight: float
    load_seconds: float


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine: the bounds of its scheduler, its pool and what its steps take."""

    config: SchedulerConfig
    num_pages: int
    cost: StepCost
    ahead: bool


@dataclass(frozen=True, slots=True)
class Served:
    """When a request came, when its first token and its last, in seconds."""

    arrival: Arrival
    first: float
    last: float

    @property
    def ttft(self) -> float:
        return self.first - self.arrival.at

    @property
    def otps(self) -> float:
        """Output tokens per second after the first; infinite for an answer of one token."""
        span = self.last - self.first
        return (self.arrival.output - 1) / span if span > 0 else math.inf


StepTaken = tuple[float, int, int, int, int, float, int]
"""When a step ended, and what was in it: rows and prompt tokens, of each those with an adapter, adapters by weight,
context."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the arrivals. `seconds` is when the last request ended, `busy` the share of it in steps.

    `rows` is the mean number of sequences in a step, pages are the most at a time; loads are those after the warm-up.
    """

    served: tuple[Served, ...]
    seconds: float
    busy: float
    rows: float
    kv_pages: int
    adapter_pages: int
    loads: int
    preemptions: int
    steps: tuple[StepTaken, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return sum(one.arrival.output for one in self.served) / self.seconds if self.served else 0.0


Next = Callable[[float], Arrival | None]


def simulate(
    replica: Replica,
    adapters: Mapping[str, AdapterCost],
    arrivals: Sequence[Arrival],
    after: Next = lambda _now: None,
) -> Outcome:
    """Serve `arrivals`, which are in order, to the end. `after(now)` may add a request whenever an answer ends.

    Each fine-tune is a tenant, so that the scheduler is fair between them. An arrival whose adapter is not in
    `adapters` is computed by the base alone. Each adapter is used once before the first arrival comes, as on a server
    that has been up for a while. InvalidRequest or CapacityExceeded for what the engine would refuse.
    """
    with _no_collection():
        run = _Run(replica, adapters, list(arrivals), after)
        run.warm(adapters)
        return run.serve()


@dataclass(slots=True)
class _Tally:
    """Of all steps."""

    busy: float = 0.0
    rows: int = 0
    steps: list[StepTaken] = field(default_factory=list)
    kv_pages: int = 0
    adapter_pages: int = 0


@dataclass(slots=True)
class _Clock:
    first: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class _Run:
    """One simulation; `come` of the arrivals have been taken in by the time that the simulation has come to."""

    replica: Replica
    adapters: Mapping[str, AdapterCost]
    arrivals: list[Arrival]
    after: Next
    come: int = 0
    scheduler: Scheduler = field(init=False)
    weights: dict[str, float] = field(init=False)
    loading: deque[tuple[float, str]] = field(default_factory=deque)
    loader_free: float = 0.0
    clocks: dict[str, _Clock] = field(default_factory=dict)
    tally: _Tally = field(default_factory=_Tally)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.replica.config, self.replica.num_pages)
        self.weights = {BASE: 0.0}
        for name, adapter in self.adapters.items():
            self.scheduler.register_adapter(name, adapter.num_pages)
            self.weights[name] = adapter.weight

    def warm(self, names: Iterable[str]) -> None:
        """One token for each of these, their loads done at once, at a time before all arrivals."""
        for name in names:
            self.scheduler.add(Request(f"warm {name}", (0,), SamplingParams(max_tokens=1), name, -1.0))
            while self.scheduler.has_work:
                plan = self.scheduler.schedule()
                for load in plan.loads:
                    self.scheduler.adapter_loaded(load.digest)
                self.scheduler.commit(plan, _samples(plan))

    def serve(self) -> Outcome:
        before = self.scheduler.stats()
        step = self._overlapped if self.replica.ahead else self._one_by_one
        now = step()
        after = self.scheduler.stats()
        clocks = (self.clocks[str(i)] for i in range(len(self.arrivals)))
        served = tuple(Served(a, c.first, c.last) for a, c in zip(self.arrivals, clocks, strict=True))
        tally, span = self.tally, max(now, 1e-9)
        return Outcome(
            served,
            now,
            tally.busy / span,
            tally.rows / max(len(tally.steps), 1),
            tally.kv_pages,
            max(tally.adapter_pages, after.adapter_pages),
            after.loads - before.loads,
            after.preemptions - before.preemptions,
            tuple(tally.steps),
        )

    def _one_by_one(self) -> float:
        now = 0.0
        while self._more or self.scheduler.has_work:
            self._take_in(now)
            plan = self._plan(now)
            if not plan.chunks:
                now = self._next_event(now)
                continue
            now = self._execute(plan, now)
            self._commit(plan, now)
        return now

    def _overlapped(self) -> float:
        """The engine's own order: schedule, launch, land the step before."""
        now = 0.0
        flight: Plan | None = None
        lands = 0.0  # when the step under way ends
        while self._more or self.scheduler.has_work or flight is not None:
            self._take_in(now)
            plan = self._plan(now)
            before, ended = flight, lands
            flight = plan if plan.chunks else None
            if flight is not None:
                lands = self._execute(plan, max(now, lands))
            if before is not None:
                now = ended
                self._commit(before, now)
            elif flight is None:
                now = self._next_event(now)
        return now

    @property
    def _more(self) -> bool:
        return self.come < len(self.arrivals)

    def _take_in(self, now: float) -> None:
        """What has happened until `now`: loads that have ended, requests that have come."""
        while self.loading and self.loading[0][0] <= now:
            self.scheduler.adapter_loaded(self.loading.popleft()[1])
        while self._more and self.arrivals[self.come].at <= now:
            arrival, id = self.arrivals[self.come], str(self.come)
            digest = arrival.adapter if arrival.adapter in self.adapters else BASE
            params = SamplingParams(max_tokens=arrival.output, ignore_eos=True)
            account = Account(tenant=arrival.adapter)
            self.scheduler.add(Request(id, _prompt(arrival.prompt), params, digest, arrival.at, account))
            self.clocks[id] = _Clock()
            self.come += 1

    def _plan(self, now: float) -> Plan:
        plan = self.scheduler.schedule()
        for load in plan.loads:  # one copy at a time, as the pager makes them
            self.loader_free = max(self.loader_free, now) + self.adapters[load.digest].load_seconds
            self.loading.append((self.loader_free, load.digest))
        return plan

    def _next_event(self, now: float) -> float:
        """When there is something to do again, after a plan with nothing in it."""
        events = [self.loading[0][0]] if self.loading else []
        if self._more:
            events.append(self.arrivals[self.come].at)
        assert events or not self.scheduler.has_work, "the scheduler waits for nothing"
        return min(events, default=now)

    def _execute(self, plan: Plan, start: float) -> float:
        """When the step ends."""
        rows = row_lora = prompt = lora = context = 0
        used = set()
        for chunk in plan.chunks:
            size = len(chunk.tokens)
            used.add(chunk.adapter)
            context += chunk.start + size
            if size == 1:
                rows += 1
                row_lora += chunk.adapter != BASE
            else:
                prompt += size
                lora += size if chunk.adapter != BASE else 0
        tally, weight = self.tally, sum(self.weights[adapter] for adapter in used)
        if len(tally.steps) % 16 == 0:  # asking at every step would double the time
            stats = self.scheduler.stats()
            tally.kv_pages = max(tally.kv_pages, stats.kv_pages)
            tally.adapter_pages = max(tally.adapter_pages, stats.adapter_pages)
        seconds = self.replica.cost.seconds(rows, row_lora, prompt, lora, weight, context)
        tally.steps.append((start + seconds, rows, row_lora, prompt, lora, weight, context))
        tally.rows += len(plan.chunks)
        tally.busy += seconds
        return start + seconds

    def _commit(self, plan: Plan, now: float) -> None:
        for output in self.scheduler.commit(plan, _samples(plan)):
            self._note(output, now)

    def _note(self, output: SeqOutput, now: float) -> None:
        clock = self.clocks[output.request_id]
        if not clock.first:
            clock.first = now
        clock.last = now
        if output.finish is not None and (arrival := self.after(now)) is not None:
            self.arrivals.append(arrival)


def _samples(plan: Plan) -> list[Sampled]:
    return [Sampled(chunk.seq, 1) for chunk in plan.chunks if chunk.sample]


@cache
def _prompt(length: int) -> tuple[int, ...]:
    """Tokens that nobody looks at: without a prefix cache all prompts are alike."""
    return (0,) * length


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the collector of cycles, of which there are none here: 6 µs a row instead of 9."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0
