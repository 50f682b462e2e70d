"""Fairness when adapters have to be loaded: thousands of steps with loads that take their time."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable

import pytest

from motet.scheduler.cost import load_cost, progress_cost
from motet.scheduler.waiting import PATIENCE
from motet.types import ANYBODY, BASE, Account, Plan
from tests.scheduler.driver import Driver

PAGES = 4
LOAD_STEPS = 3


class Traffic:
    """A driver whose loads take some steps, one after the other, and whose requests are waited for by step."""

    def __init__(self, num_pages: int, max_running: int) -> None:
        self.driver = Driver(num_pages, max_step_tokens=32, max_running=max_running)
        self.loading: list[tuple[int, str]] = []
        self.came: dict[str, int] = {}
        self.waits: dict[str, int] = {}
        self.live: dict[str, int] = defaultdict(int)
        self.step = 0
        self.count = 0

    def register(self, digests: list[str]) -> None:
        for digest in digests:
            self.driver.scheduler.register_adapter(digest, PAGES)

    def send(self, kind: str, prompt: int, answer: int, adapter: str, account: Account = ANYBODY) -> None:
        id = f"{kind}/{self.count}"
        self.driver.add(id, prompt, answer, adapter, account=account)
        self.came[id] = self.step
        self.live[kind] += 1
        self.count += 1

    def run(self, steps: int, arrive: Callable[[int], None], on_plan: Callable[[Plan], None]) -> None:
        scheduler = self.driver.scheduler
        for step in range(steps):
            self.step = step
            arrive(step)
            while self.loading and self.loading[0][0] <= self.step:
                scheduler.adapter_loaded(self.loading.pop(0)[1])
            plan = scheduler.schedule()
            for load in plan.loads:
                free = max(self.step, self.loading[-1][0] if self.loading else 0)
                self.loading.append((free + LOAD_STEPS, load.digest))
            on_plan(plan)
            for output in self.driver.commit(plan):
                self.waits.setdefault(output.request_id, self.step - self.came[output.request_id])
                self.live[output.request_id.split("/")[0]] -= output.finish is not None


@pytest.mark.parametrize("tenants", [False, True])
def test_a_rare_adapter_is_not_starved_by_a_hot_set_that_fills_the_pool(tenants: bool) -> None:
    rng = random.Random(5)
    hot, rare = [f"hot {i}" for i in range(12)], [f"rare {i}" for i in range(40)]
    traffic = Traffic(num_pages=64, max_running=8)
    traffic.register(hot + rare)
    hot_account, rare_account = (Account("hot"), Account("rare")) if tenants else (ANYBODY, ANYBODY)

    def arrive(step: int) -> None:
        while traffic.live["hot"] < 24:
            traffic.send("hot", rng.randint(1, 12), 8, rng.choice(hot), hot_account)
        if step % 50 == 0:
            traffic.send("rare", 6, 4, rare[step // 50 % len(rare)], rare_account)

    traffic.run(4000, arrive, lambda _: None)
    waits = [wait for id, wait in traffic.waits.items() if id.startswith("rare")]
    assert len(waits) >= 79
    ahead = 24 * 8 // 8  # steps in which all who came before it are answered
    assert max(waits) <= PATIENCE + ahead + 3 * LOAD_STEPS
    assert traffic.driver.scheduler.stats().loads > 80


def test_who_cycles_cold_adapters_pays_for_the_bytes_and_does_not_starve_others() -> None:
    rng = random.Random(6)
    cold = [f"cold {i}" for i in range(60)]
    traffic = Traffic(num_pages=80, max_running=8)
    traffic.register([*cold, "own"])
    thrash, steady = Account("thrash"), Account("steady")
    served: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)

    def arrive(_: int) -> None:
        while traffic.live["thrash"] < 40:
            traffic.send("thrash", 4, 2, cold[traffic.count % len(cold)], thrash)
        while traffic.live["steady"] < 12:
            traffic.send("steady", rng.randint(1, 24), 6, "own" if rng.random() < 0.5 else BASE, steady)

    def count(plan: Plan) -> None:
        for chunk in plan.chunks:
            tenant = traffic.driver.scheduler.sequence(chunk.seq).request.account.tenant
            served[tenant] += progress_cost(len(chunk.tokens), chunk.sample, 0.0)
            tokens[tenant] += len(chunk.tokens)
        for load in plan.loads:
            served["thrash" if load.digest != "own" else "steady"] += load_cost(PAGES, 4)

    traffic.run(3000, arrive, count)
    waits = sorted(wait for id, wait in traffic.waits.items() if id.startswith("steady"))
    assert waits[-1] <= 30  # steps, most of them behind the eleven others of its own
    assert tokens["steady"] > 2 * tokens["thrash"] > 0
    assert served["steady"] > served["thrash"], "a load holds the thrasher up, but nobody else"
    assert traffic.driver.scheduler.stats().loads > 500
    assert traffic.driver.state("own") == "ready"
