"""Thousands of random steps: what the simulation checks of each holds under any traffic and any mix of KV groups."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from motet.errors import CapacityExceeded, InvalidRequest
from motet.scheduler import waiting
from motet.scheduler.blocks import BlockTables, KVLayout
from motet.scheduler.scheduler import SchedulerConfig
from motet.scheduler.sequence import SequenceState
from motet.types import BASE, Account, KVGroup, SamplingParams
from tests.scheduler.simulation import EOS, VOCAB, Simulation

STOP = 1
FULL = KVGroup(layers=(0,))


def draw_groups(rng: random.Random) -> tuple[KVGroup, ...]:
    """The mixes of real models (full; full with windows or chunks), and any other."""
    window = KVGroup(layers=(1,), window=rng.choice([1, 2, 5, 7, 10, 16, 30]))
    chunk = KVGroup(layers=(2,), chunk=rng.choice([1, 3, 4, 8, 13]))
    both = KVGroup(layers=(3,), window=rng.choice([3, 6, 11]), chunk=rng.choice([5, 9]))
    mixes = [
        (FULL,),
        (FULL, window),
        (FULL, chunk),
        (window,),
        (window, chunk),
        (window, FULL, both),
        (both,),
    ]
    return rng.choice(mixes)


def draw_config(rng: random.Random) -> tuple[SchedulerConfig, int]:
    config = SchedulerConfig(
        kv_groups=draw_groups(rng),
        page_tokens=rng.choice([1, 2, 3, 4]),
        max_step_tokens=rng.choice([2, 8, 17, 64]),
        max_running=rng.choice([2, 5, 9]),
        max_model_len=rng.choice([20, 40, 61]),
        prefix_caching=rng.random() < 0.8,
        eos_token_ids=(EOS,),
        max_resident=rng.choice([None, None, 1, 2, 5]),
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
    elif event < 0.33 and sim.loading:
        sim.end_load(rng.choice(sorted(sim.loading)), ok=rng.random() < 0.8)
    elif event < 0.37 and sim.loading:
        sim.miss(rng.choice(sorted(sim.loading)))
    elif event < 0.40 and sim.remaking:
        sim.remade(ok=rng.random() < 0.8)
    elif event < 0.43:
        sim.scheduler.forget_adapter(rng.choice(sorted(sizes)))
    elif event < 0.50:
        digest = rng.choice(sorted(sizes))
        sim.scheduler.register_adapter(digest, sizes[digest])
    sim.scheduler.check_integrity()


def hint(sim: Simulation, rng: random.Random, sizes: dict[str, int]) -> None:
    """Somebody prefetches or pins an adapter now and then."""
    with suppress(InvalidRequest, CapacityExceeded):
        if rng.random() < 0.05:
            sim.scheduler.prefetch(rng.choice(sorted(sizes)))
        if rng.random() < 0.05:
            sim.scheduler.pin_adapter(rng.choice(sorted(sizes)), rng.random() < 0.5)
    sim.scheduler.check_integrity()


def admit_without_headroom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headroom makes preemption rare. Nothing else may depend on it."""
    monkeypatch.setattr(SequenceState, "headroom", 0)
    monkeypatch.setattr(BlockTables, "to_come", lambda *_: 0)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(200))
def test_random_traffic_is_served_correctly_to_the_end(
    seed: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(waiting, "PATIENCE", rng.choice([1, 2, 4, waiting.PATIENCE]))
    if rng.random() < 0.3:
        admit_without_headroom(monkeypatch)
    config, num_pages = draw_config(rng)
    sim = Simulation(config, num_pages, ahead)
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


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(100))
def test_tenants_are_served_correctly_to_the_end_and_share_nothing(
    seed: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(waiting, "PATIENCE", rng.choice([1, 4, waiting.PATIENCE]))
    if rng.random() < 0.3:
        admit_without_headroom(monkeypatch)
    config, num_pages = draw_config(rng)
    sim = Simulation(config, num_pages, ahead)
    accounts = [
        Account(f"t{i}", rng.choice([0.5, 1.0, 3.0]), rng.choice([0, 0, 0, 1]), f"salt {i}")
        for i in range(rng.choice([2, 3, 7]))
    ]
    sizes = {f"adapter-{i}": rng.choice([1, 2, 3, 5, 8]) for i in range(rng.choice([1, 4, 12]))}
    for digest, size in sizes.items():
        sim.scheduler.register_adapter(digest, size, rng.choice([0.0, 0.01]))
    stems = [tuple(rng.randrange(VOCAB) for _ in range(rng.choice([5, 16, 30]))) for _ in range(2)]
    load = rng.choice([0.5, 1.0, 2.0])
    for _ in range(250):
        while rng.random() < load / (1 + load) and len(sim.live) < 40:
            adapter = BASE if rng.random() < 0.5 else rng.choice(sorted(sizes))
            account = accounts[min(rng.randrange(2 * len(accounts)), len(accounts) - 1)]
            sim.arrive(draw_prompt(rng, stems), adapter, draw_params(rng), account)
        disturb(sim, rng, sizes)
        hint(sim, rng, sizes)
        sim.step()
    sim.drain()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(70))
def test_long_prompts_get_through_a_pool_for_hardly_more_than_one(
    seed: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    admit_without_headroom(monkeypatch)
    config = SchedulerConfig(
        kv_groups=draw_groups(rng),
        page_tokens=rng.choice([1, 2, 3]),
        max_step_tokens=rng.choice([3, 6, 11, 20]),
        max_running=6,
        max_model_len=71,
        prefix_caching=rng.random() < 0.8,
        eos_token_ids=(EOS,),
    )
    layout = KVLayout(config.kv_groups, config.page_tokens, config.max_step_tokens)
    sim = Simulation(config, layout.most_pages(70) + rng.choice([0, 1, 5]), ahead)
    stems = [tuple(rng.randrange(VOCAB) for _ in range(50)) for _ in range(2)]
    for _ in range(150):
        if rng.random() < 0.3 and len(sim.live) < 12:
            sim.arrive(draw_prompt(rng, stems), BASE, SamplingParams(max_tokens=rng.choice([1, 4, 12])))
        if rng.random() < 0.02 and sim.live:
            sim.abort(rng.choice(sim.live))
        sim.step()
    sim.drain()


class Machine(RuleBasedStateMachine):
    """The same simulation with hypothesis choosing (and, when something fails, shrinking) the events."""

    sizes: ClassVar[dict[str, int]] = {"a": 1, "b": 3, "c": 4, "d": 7}

    @initialize(
        groups=st.lists(
            st.builds(KVGroup, st.just(()), st.sampled_from([0, 2, 5, 9]), st.sampled_from([0, 0, 3, 8])),
            min_size=1,
            max_size=3,
        ),
        page_tokens=st.sampled_from([1, 2, 4]),
        num_pages=st.integers(4, 16),
        max_step_tokens=st.sampled_from([1, 4, 16]),
        max_running=st.integers(1, 5),
        prefix_caching=st.booleans(),
        max_resident=st.sampled_from([None, 1, 2]),
        ahead=st.booleans(),
    )
    def begin(
        self,
        groups: list[KVGroup],
        page_tokens: int,
        num_pages: int,
        max_step_tokens: int,
        max_running: int,
        prefix_caching: bool,
        max_resident: int | None,
        ahead: bool,
    ) -> None:
        config = SchedulerConfig(
            kv_groups=tuple(groups),
            page_tokens=page_tokens,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_model_len=24,
            prefix_caching=prefix_caching,
            eos_token_ids=(EOS,),
            max_resident=max_resident,
        )
        self.sim = Simulation(config, num_pages, ahead)
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

    @precondition(lambda self: self.sim.loading)
    @rule(index=st.integers(0, 9))
    def miss(self, index: int) -> None:
        loading = sorted(self.sim.loading)
        self.sim.miss(loading[index % len(loading)])

    @precondition(lambda self: self.sim.remaking)
    @rule(ok=st.booleans())
    def remade(self, ok: bool) -> None:
        self.sim.remade(ok)

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
