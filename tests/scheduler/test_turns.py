"""Adapters that take turns: who is paused for whom, when it comes back, and what that costs."""

from __future__ import annotations

from statistics import mean

import pytest

from motet.scheduler import turns
from motet.scheduler.turns import LATE_TURNS, TURN_STEPS
from motet.types import ANYBODY, Account, KVGroup, SeqOutput
from tests.scheduler.driver import Driver

FULL = KVGroup(layers=(0,))
LOAD = 4
"""Steps that a copy takes."""


class Bench(Driver):
    """Adapters of 100 pages, room for `resident` of them besides KV; copies one after the other, of LOAD steps each."""

    def __init__(self, adapters: int, resident: int, max_running: int = 16, kv_pages: int = 1000) -> None:
        super().__init__(
            100 * resident + kv_pages,
            max_running=max_running,
            max_model_len=1000,
            prefix_caching=False,
            max_resident=resident,
        )
        for i in range(adapters):
            self.scheduler.register_adapter(f"a{i}", 100)
        self.steps = 0
        self.copies: list[tuple[str, int]] = []
        self.sent: dict[str, int] = {}
        self.came: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}

    def ask(self, id: str, adapter: str, tokens: int = 200, account: Account = ANYBODY) -> None:
        self.add(id, 5, max_tokens=tokens, adapter=adapter, ignore_eos=True, account=account)
        self.sent[id] = self.steps
        self.came[id] = []

    def go(self) -> list[SeqOutput]:
        """A step, and the loads that end with it."""
        self.steps += 1
        plan = self.plan()
        for load in plan.loads:
            begin = max([self.steps, *(end for _, end in self.copies)])
            self.copies.append((load.digest, begin + LOAD))
        outputs = self.commit(plan)
        for output in outputs:
            assert output.request_id not in self.ends
            self.came[output.request_id] += [self.steps] * len(output.token_ids)
            if output.finish is not None:
                self.ends[output.request_id] = output.finish
        while self.copies and self.copies[0][1] <= self.steps:
            self.scheduler.adapter_loaded(self.copies.pop(0)[0])
            self.scheduler.check_integrity()
        return outputs

    def go_on(self, limit: int = 20_000) -> None:
        """Until nobody is left."""
        while self.scheduler.has_work:
            self.go()
            assert self.steps < limit, "no end in sight"

    def first(self, id: str) -> int:
        """Steps until its first token."""
        return self.came[id][0] - self.sent[id]

    def longest_gap(self, id: str) -> int:
        return max(b - a for a, b in zip(self.came[id], self.came[id][1:], strict=False))

    @property
    def paused(self) -> list[str]:
        return [s.request.id for s in self.scheduler._stage.running if s.paused]

    @property
    def pauses(self) -> int:
        return self.scheduler.stats().pauses


def crowd(account: Account = ANYBODY) -> Bench:
    """16 in flight, each with another adapter, 200 tokens each; room for 8."""
    bench = Bench(adapters=16, resident=8)
    for i in range(16):
        bench.ask(f"r{i}", f"a{i}", account=account)
    sent = 16
    while bench.scheduler.has_work:
        for output in bench.go():
            if output.finish is not None and sent < 64:
                bench.ask(f"r{sent}", f"a{sent % 16}", account=account)
                sent += 1
    assert list(bench.ends.values()) == ["length"] * 64
    assert all(len(tokens) == 200 for tokens in bench.came.values())
    return bench


@pytest.mark.parametrize("account", [ANYBODY, Account("one")])
def test_in_a_crowd_first_tokens_come_soon_and_the_whole_takes_hardly_longer(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = crowd(account)
    waits = [bench.first(f"r{i}") for i in range(64)]
    gaps = [bench.longest_gap(f"r{i}") for i in range(64)]
    assert bench.pauses > 50
    monkeypatch.setattr(turns, "TURN_STEPS", 10**9)
    patient = crowd(account)
    assert patient.pauses == 0
    assert mean(waits) <= 40
    assert mean(patient.first(f"r{i}") for i in range(64)) > 100, "there was no crowd"
    assert max(gaps) <= (LATE_TURNS + 1) * TURN_STEPS
    assert bench.steps <= 1.12 * patient.steps
