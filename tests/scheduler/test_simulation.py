"""Thousands of random steps against a pool that remembers what was written to it.

The pool is a list of slots. Computing a chunk first reads, through its block table, every earlier position,
and then writes its own; loading an adapter writes its pages. A slot remembers the whole history of its token
(adapter, then every token up to it, as a node of a trie), so that one wrong page anywhere fails the next
read. The sampled token is a function of that history: every output must equal the one that the request gets
alone.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from motet.errors import CapacityExceeded, InvalidRequest
from motet.scheduler import fairness
from motet.scheduler.scheduler import Scheduler, SchedulerConfig
from motet.scheduler.sequence import SequenceState
from motet.types import BASE, Chunk, Plan, Request, Sampled, SamplingParams, SeqOutput

VOCAB = 61
EOS = 0
STOP = 1


class History:
    """A trie of (adapter, tokens): equal nodes mean equal histories."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, str | int], int] = {}

    def node(self, parent: int, step: str | int) -> int:
        return self._nodes.setdefault((parent, step), len(self._nodes) + 1)

    @staticmethod
    def next_token(node: int) -> int:
        return (node * 2654435761 >> 9) % VOCAB


class Told:
    """What the simulation knows of one request: all its tokens with their nodes, and how it ended."""

    def __init__(self, request: Request, history: History) -> None:
        self.request = request
        self.history = history
        self.last = history.node(0, request.adapter)
        self.tokens: list[int] = []
        self.nodes: list[int] = []
        for token in request.prompt:
            self.extend(token)
        self.finish: str | None = None
        self.started = False

    def extend(self, token: int) -> None:
        self.last = self.history.node(self.last, token)
        self.tokens.append(token)
        self.nodes.append(self.last)

    @property
    def expected_finish(self) -> str | None:
        """Why the request should have ended with its last token."""
        params = self.request.params
        if self.tokens[-1] in params.stop_token_ids or (self.tokens[-1] == EOS and not params.ignore_eos):
            return "stop"
        return "length" if len(self.tokens) - len(self.request.prompt) == params.max_tokens else None


class Simulation:
    """An engine around a scheduler: executes plans against the remembering pool and checks all it sees."""

    def __init__(self, config: SchedulerConfig, num_pages: int) -> None:
        self.config = config
        self.scheduler = Scheduler(config, num_pages)
        self.history = History()
        self.memory: list[list[object]] = [[None] * config.page_tokens for _ in range(num_pages)]
        self.table: dict[str, tuple[int, ...]] = {}
        self.loading: dict[str, tuple[int, ...]] = {}
        self.told: dict[str, Told] = {}
        self.by_seq: dict[int, Told] = {}
        self.passes: Counter[int] = Counter()
        self.now = 0.0

    # What happens between steps

    @property
    def live(self) -> list[Told]:
        return [told for told in self.told.values() if told.finish is None]

    def arrive(self, prompt: tuple[int, ...], adapter: str, params: SamplingParams) -> None:
        request = Request(f"r{len(self.told)}", prompt, params, adapter, self.now)
        try:
            seq = self.scheduler.add(request)
        except (InvalidRequest, CapacityExceeded):
            return
        self.by_seq[seq] = self.told[request.id] = Told(request, self.history)

    def abort(self, told: Told) -> None:
        output = self.scheduler.abort(told.request.id)
        assert output is not None
        self.take(output)
        assert told.finish == "abort"
        assert self.scheduler.abort(told.request.id) is None

    def end_load(self, digest: str, ok: bool) -> None:
        pages = self.loading.pop(digest)
        if ok:
            self.write_adapter(digest, pages)
            self.table[digest] = pages
            self.scheduler.adapter_loaded(digest)
            return
        for output in self.scheduler.adapter_failed(digest, "disk on fire"):
            assert (output.finish, output.error) == ("error", "disk on fire")
            assert self.told[output.request_id].request.adapter == digest
            self.take(output)
        assert not any(told.request.adapter == digest for told in self.live)

    def take(self, output: SeqOutput) -> None:
        told = self.told[output.request_id]
        assert told.finish is None, "an output after the terminal one"
        assert not output.cached_tokens or not told.started
        assert output.cached_tokens < len(told.request.prompt)
        for token in output.token_ids:
            assert token == History.next_token(told.last), "not what the request gets alone"
            told.extend(token)
            told.started = True
        if output.token_ids:
            assert output.finish == told.expected_finish
        told.finish = output.finish

    # The step

    def step(self) -> Plan:
        self.now += 0.02
        before = set(self.scheduler._waiting)
        loading = set(self.loading)
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check_integrity()
        self.check_passes(before, loading, plan)
        for digest in plan.evictions:
            del self.table[digest]
        for load in plan.loads:
            assert load.digest not in self.table
            assert load.digest not in self.loading
            self.loading[load.digest] = load.pages
            self.write_adapter(load.digest, load.pages[: len(load.pages) // 2])
        self.check_disjoint(plan)
        sampled = [
            Sampled(chunk.seq, token) for chunk in plan.chunks if (token := self.compute(chunk)) is not None
        ]
        for output in self.scheduler.commit(plan, sampled, self.now):
            self.take(output)
        self.check_after(plan)
        return plan

    def write_adapter(self, digest: str, pages: tuple[int, ...]) -> None:
        for index, page in enumerate(pages):
            self.memory[page] = [(digest, index)] * self.config.page_tokens

    def compute(self, chunk: Chunk) -> int | None:
        told = self.by_seq[chunk.seq]
        end = chunk.start + len(chunk.tokens)
        assert told.finish is None
        assert chunk.adapter == told.request.adapter
        assert list(chunk.tokens) == told.tokens[chunk.start : end]
        assert chunk.sample == (end == len(told.tokens))
        if chunk.adapter != BASE:
            for index, page in enumerate(self.table[chunk.adapter]):
                assert set(self.memory[page]) == {(chunk.adapter, index)}, "an adapter in use was overwritten"
        size = self.config.page_tokens
        for position in range(chunk.start):
            assert self.memory[chunk.pages[position // size]][position % size] == told.nodes[position]
        for position in range(chunk.start, end):
            self.memory[chunk.pages[position // size]][position % size] = told.nodes[position]
        return History.next_token(told.nodes[-1]) if chunk.sample else None

    def check_disjoint(self, plan: Plan) -> None:
        """Nobody writes where another reads, and adapters share their pages with nobody."""
        assert 0 <= plan.num_tokens <= self.config.max_step_tokens
        assert len({chunk.seq for chunk in plan.chunks}) == len(plan.chunks)
        weights = Counter(page for pages in (*self.table.values(), *self.loading.values()) for page in pages)
        assert not weights or max(weights.values()) == 1
        readers = Counter(page for chunk in plan.chunks for page in chunk.pages)
        assert not readers.keys() & weights.keys()
        for chunk in plan.chunks:
            assert chunk.tokens
            assert len(set(chunk.pages)) == len(chunk.pages)
            own = chunk.pages[chunk.start // self.config.page_tokens :]
            assert all(readers[page] == 1 for page in own), "a page is written by one and held by another"

    def check_passes(self, before: set[SequenceState], loading: set[str], plan: Plan) -> None:
        """Count for each waiting request how often a younger one was given pages while it lacked them."""
        waiting = set(self.scheduler._waiting)
        started = {load.digest for load in plan.loads}
        resident = {BASE, *self.table}  # before this plan's evictions
        running = self.scheduler.stats().running
        full = running == self.config.max_running or plan.num_tokens == self.config.max_step_tokens
        admitted = [seq.seniority for seq in before if seq not in waiting]
        loads = [min(s.seniority for s in before | waiting if s.adapter == digest) for digest in started]
        for seq in before:
            if seq not in waiting:
                del self.passes[seq.id]
                continue
            if seq.adapter in loading | started:
                continue
            ready = seq.adapter in resident
            if not ready and any(s.seniority < seq.seniority for s in before if s.adapter == seq.adapter):
                continue
            given = admitted if ready and full else admitted + loads
            self.passes[seq.id] += any(seniority > seq.seniority for seniority in given)
            assert self.passes[seq.id] < fairness.PATIENCE

    def check_after(self, plan: Plan) -> None:
        self.scheduler.check_integrity()
        stats = self.scheduler.stats()
        assert stats.total_pages == (
            stats.free_pages + stats.kv_pages + stats.cached_pages + stats.adapter_pages
        )
        assert stats.running + stats.waiting == len(self.live)
        if self.live and not plan.chunks:
            assert self.loading, "nothing to compute, nothing under way, and yet requests wait"

    def drain(self) -> None:
        """With no more arrivals everyone ends, and everything returns."""
        work = sum(len(told.tokens) + told.request.params.max_tokens for told in self.live)
        for _ in range(10 * work + 100):
            if not self.live and not self.loading:
                break
            self.step()
            for digest in list(self.loading):
                self.end_load(digest, ok=True)
        assert not self.live
        if self.scheduler.has_work:
            assert not self.step().chunks
        assert not self.scheduler.has_work
        stats = self.scheduler.stats()
        assert stats.kv_pages == 0
        assert stats.adapter_pages == sum(map(len, self.table.values()))
        assert all(told.finish for told in self.told.values())


def draw_config(rng: random.Random) -> tuple[SchedulerConfig, int]:
    config = SchedulerConfig(
        page_tokens=rng.choice([1, 2, 3, 4]),
        max_step_tokens=rng.choice([2, 8, 17, 64]),
        max_running=rng.choice([2, 5, 9]),
        max_model_len=rng.choice([20, 40, 61]),
        prefix_caching=rng.random() < 0.8,
        eos_token_ids=(EOS,),
    )
    return config, rng.choice([13, 21, 34, 60])


def draw_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.choice([1, 2, 5, 12, 20, 30]),
        ignore_eos=rng.random() < 0.3,
        stop_token_ids=(STOP,) if rng.random() < 0.3 else (),
    )


def draw_prompt(rng: random.Random, stems: list[tuple[int, ...]]) -> tuple[int, ...]:
    stem = rng.choice(stems)
    return stem[: rng.randint(0, len(stem))] + tuple(
        rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 1, 3, 9]))
    )


def disturb(sim: Simulation, rng: random.Random, sizes: dict[str, int]) -> None:
    """One random event that is no arrival."""
    event = rng.random()
    if event < 0.04 and sim.live:
        sim.abort(rng.choice(sim.live))
    elif event < 0.40 and sim.loading:
        sim.end_load(rng.choice(sorted(sim.loading)), ok=rng.random() < 0.8)
    elif event < 0.43:
        sim.scheduler.forget_adapter(rng.choice(sorted(sizes)))
    elif event < 0.50:
        digest = rng.choice(sorted(sizes))
        sim.scheduler.register_adapter(digest, sizes[digest])
    sim.scheduler.check_integrity()


@pytest.mark.parametrize("seed", range(200))
def test_random_traffic_is_served_correctly_to_the_end(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(fairness, "PATIENCE", rng.choice([1, 2, 4, fairness.PATIENCE]))
    config, num_pages = draw_config(rng)
    sim = Simulation(config, num_pages)
    sizes = {f"adapter-{i}": rng.choice([1, 2, 3, 5, 8]) for i in range(rng.choice([1, 4, 12]))}
    for digest, size in sizes.items():
        sim.scheduler.register_adapter(digest, size)
    stems = [tuple(rng.randrange(VOCAB) for _ in range(rng.choice([5, 16, 30]))) for _ in range(3)]
    load = rng.choice([0.2, 0.5, 1.0, 2.0])
    tiny = rng.choice([0.0, 0.5, 0.9])
    for _ in range(250):
        while rng.random() < load / (1 + load) and len(sim.live) < 40:
            adapter = BASE if rng.random() < 0.3 else rng.choice(sorted(sizes))
            if rng.random() < tiny:
                sim.arrive((rng.randrange(VOCAB),), adapter, SamplingParams(max_tokens=rng.randint(1, 4)))
            else:
                sim.arrive(draw_prompt(rng, stems), adapter, draw_params(rng))
        disturb(sim, rng, sizes)
        sim.step()
    sim.drain()


class Machine(RuleBasedStateMachine):
    """The same simulation with hypothesis choosing (and, when something fails, shrinking) the events."""

    sizes: ClassVar[dict[str, int]] = {"a": 1, "b": 3, "c": 4, "d": 7}

    @initialize(
        page_tokens=st.sampled_from([1, 2, 4]),
        num_pages=st.integers(4, 16),
        max_step_tokens=st.sampled_from([1, 4, 16]),
        max_running=st.integers(1, 5),
        prefix_caching=st.booleans(),
    )
    def begin(
        self, page_tokens: int, num_pages: int, max_step_tokens: int, max_running: int, prefix_caching: bool
    ) -> None:
        config = SchedulerConfig(
            page_tokens=page_tokens,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_model_len=24,
            prefix_caching=prefix_caching,
            eos_token_ids=(EOS,),
        )
        self.sim = Simulation(config, num_pages)
        for digest, size in self.sizes.items():
            self.sim.scheduler.register_adapter(digest, size)

    @rule(
        length=st.integers(1, 12),
        stem=st.integers(2, 4),
        adapter=st.sampled_from([BASE, *sizes]),
        max_tokens=st.integers(1, 12),
    )
    def arrive(self, length: int, stem: int, adapter: str, max_tokens: int) -> None:
        self.sim.arrive((stem,) * length, adapter, SamplingParams(max_tokens=max_tokens))

    @precondition(lambda self: self.sim.live)
    @rule(index=st.integers(0, 99))
    def abort(self, index: int) -> None:
        self.sim.abort(self.sim.live[index % len(self.sim.live)])

    @precondition(lambda self: self.sim.loading)
    @rule(ok=st.booleans(), index=st.integers(0, 9))
    def end_load(self, ok: bool, index: int) -> None:
        loading = sorted(self.sim.loading)
        self.sim.end_load(loading[index % len(loading)], ok)

    @rule(digest=st.sampled_from(sorted(sizes)))
    def forget(self, digest: str) -> None:
        self.sim.scheduler.forget_adapter(digest)

    @rule(digest=st.sampled_from(sorted(sizes)))
    def register(self, digest: str) -> None:
        self.sim.scheduler.register_adapter(digest, self.sizes[digest])

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.sim.step()

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "sim"):
            self.sim.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
