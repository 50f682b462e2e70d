from __future__ import annotations

import pytest

from motet.adapters.residency import Residency
from motet.memory.pages import PageAllocator
from motet.memory.reuse import Reuse
from motet.scheduler.blocks import KVLayout
from motet.scheduler.fairness import Turn
from motet.scheduler.sequence import SequenceState
from motet.scheduler.waiting import PATIENCE, WaitingQueue
from motet.types import BASE, Account, KVGroup, Request, SamplingParams

LAYOUT = KVLayout((KVGroup(layers=(0,)),), page_tokens=3, max_step_tokens=7)


@pytest.fixture
def residency() -> Residency:
    """ "r" is ready, "l" is loading, "a" is absent."""
    residency = Residency(PageAllocator(10), Reuse(10))
    for digest in ("r", "l", "a"):
        residency.register(digest, 1)
    residency.begin_load("r")
    residency.loaded("r")
    residency.begin_load("l")
    return residency


def sequence(id: int, adapter: str = BASE, arrival: float | None = None) -> SequenceState:
    arrival = float(id) if arrival is None else arrival
    return SequenceState.of(id, Request(str(id), (1,), SamplingParams(), adapter, arrival), LAYOUT)


def by_arrival(seq: SequenceState) -> Turn:
    return 0, 0.0, 0.0, seq.request.arrival, seq.id


def queue_of(*sequences: SequenceState) -> WaitingQueue:
    waiting = WaitingQueue(by_arrival, by_arrival)
    for seq in sequences:
        waiting.push(seq)
    return waiting


def asking(waiting: WaitingQueue, residency: Residency, admitting: bool = True) -> list[int]:
    return [seq.id for seq in waiting.in_turn(residency, lambda _: admitting, lambda: True)]


def starve(waiting: WaitingQueue, seq: SequenceState) -> None:
    for _ in range(PATIENCE):
        assert not waiting.is_starving(seq)
        waiting.pass_over(seq)
    assert waiting.is_starving(seq)


def test_the_oldest_asks_first_whatever_its_adapter(residency: Residency) -> None:
    waiting = queue_of(sequence(2, "r"), sequence(0, "r"), sequence(3), sequence(1))
    assert asking(waiting, residency) == [0, 1, 2, 3]
    assert len(waiting) == 4
    assert {seq.id for seq in waiting} == {0, 1, 2, 3}


def test_arrival_decides_and_then_the_order_of_adding(residency: Residency) -> None:
    waiting = queue_of(sequence(0, arrival=5.0), sequence(1, arrival=5.0), sequence(2, arrival=4.0))
    assert asking(waiting, residency) == [2, 0, 1]


def test_requests_for_one_absent_adapter_ask_once_and_while_it_loads_not_at_all(residency: Residency) -> None:
    waiting = queue_of(sequence(0, "l"), sequence(1, "a"), sequence(2, "a"), sequence(3, "r"))
    assert asking(waiting, residency) == [1, 3]


def test_when_nobody_can_be_admitted_only_the_absent_ask(residency: Residency) -> None:
    waiting = queue_of(sequence(0), sequence(1, "a"), sequence(2, "r"))
    assert asking(waiting, residency, admitting=False) == [1]


def test_nobody_asks_before_a_starving_one(residency: Residency) -> None:
    seqs = [sequence(0), sequence(1), sequence(2), sequence(3, "a")]
    waiting = queue_of(*seqs)
    starve(waiting, seqs[1])
    assert asking(waiting, residency) == [0, 1]
    assert asking(waiting, residency, admitting=False) == []
    waiting.remove(seqs[1])
    assert asking(waiting, residency) == [0, 2, 3]


def test_the_oldest_of_the_starving_counts(residency: Residency) -> None:
    seqs = [sequence(0), sequence(1), sequence(2)]
    waiting = queue_of(*seqs)
    starve(waiting, seqs[1])
    starve(waiting, seqs[0])
    assert asking(waiting, residency) == [0]


def test_a_starving_request_lets_others_pass_while_its_adapter_loads(residency: Residency) -> None:
    seqs = [sequence(0, "l"), sequence(1)]
    waiting = queue_of(*seqs)
    starve(waiting, seqs[0])
    assert asking(waiting, residency) == [1]
    residency.loaded("l")
    assert asking(waiting, residency) == [0]


def test_waiting_anew_starts_with_new_patience(residency: Residency) -> None:
    seqs = [sequence(0), sequence(1)]
    waiting = queue_of(*seqs)
    starve(waiting, seqs[0])
    waiting.remove(seqs[0])
    waiting.push(seqs[0])
    assert not waiting.is_starving(seqs[0])
    assert asking(waiting, residency) == [0, 1]


def test_the_queue_may_change_while_it_is_asked(residency: Residency) -> None:
    waiting = queue_of(*(sequence(id) for id in range(5)))
    asked = []
    for seq in waiting.in_turn(residency, lambda _: True, lambda: True):
        waiting.remove(seq)
        asked.append(seq.id)
    assert asked == [0, 1, 2, 3, 4]
    assert len(waiting) == 0


def test_who_loses_its_adapter_meanwhile_asks_no_more(residency: Residency) -> None:
    waiting = queue_of(sequence(0), sequence(1, "r"), sequence(2, "r"), sequence(3))
    asked = []
    for seq in waiting.in_turn(residency, lambda _: True, lambda: True):
        asked.append(seq.id)
        if seq.id == 0:
            residency.evict("r")
    assert asked == [0, 3]
    assert asking(waiting, residency) == [0, 1, 3]


def test_a_group_is_all_that_wait_with_an_adapter() -> None:
    waiting = queue_of(sequence(2, "a"), sequence(1, "a"), sequence(3))
    assert [seq.id for seq in waiting.group("a")] == [1, 2]
    assert waiting.group("r") == ()


def test_who_may_not_run_lets_others_ask(residency: Residency) -> None:
    waiting = queue_of(owned(0, "x", "r"), owned(1, "y"), owned(2, "x", "r"), owned(3, "x", "a"))

    def may_run(seq: SequenceState) -> bool:
        return seq.request.account.tenant != "x"

    assert [seq.id for seq in waiting.in_turn(residency, may_run, lambda: True)] == [1, 3]


def test_a_tenant_is_looked_at_when_it_is_its_turn(residency: Residency) -> None:
    """With hundreds of tenants a step has nothing left to give long before the last."""
    turns: list[int] = []

    def turn(seq: SequenceState) -> Turn:
        turns.append(seq.id)
        return 0, float(seq.request.account.tenant), 0.0, seq.request.arrival, seq.id

    waiting = WaitingQueue(turn, turn)
    for id in range(400):
        residency.register(f"{id}", 1)
        waiting.push(owned(id, str(id % 20), f"{id}"))
    asked = waiting.in_turn(residency, lambda _: True, lambda: True)
    assert [next(asked).id for _ in range(3)] == [0, 20, 40]
    assert len(turns) <= 2 * (20 + 20) + 3 * 20
    turns.clear()
    assert [seq.id for seq in waiting.in_turn(residency, lambda _: False, lambda: False)] == []
    assert len(turns) == 20


def test_adapters_of_those_behind_come_with_the_last_one_first() -> None:
    seqs = [sequence(0, "a"), sequence(2, "b"), sequence(3, "c"), sequence(4, "b")]
    waiting = queue_of(*seqs)
    assert waiting.wanted_behind(sequence(1), ["a", "b", "c"]) == ["c", "b"]
    assert waiting.wanted_behind(sequence(9), ["a", "b", "c"]) == []


# Tenants


def owned(id: int, tenant: str, adapter: str = BASE, priority: int = 0) -> SequenceState:
    account = Account(tenant, priority=priority)
    request = Request(str(id), (1,), SamplingParams(), adapter, float(id), account)
    return SequenceState.of(id, request, LAYOUT)


def test_the_head_of_each_queue_asks_in_its_turn(residency: Residency) -> None:
    counters = {"x": 7.0, "y": 3.0, "z": 5.0}

    def turn(seq: SequenceState) -> Turn:
        account = seq.request.account
        return -account.priority, counters[account.tenant], 0.0, seq.request.arrival, seq.id

    waiting = WaitingQueue(turn, turn)
    for seq in (
        owned(0, "x"),
        owned(1, "y"),
        owned(2, "z", "r"),
        owned(3, "y", "r"),
        owned(4, "x", priority=1),
    ):
        waiting.push(seq)
    assert asking(waiting, residency) == [4, 1, 3, 2, 0]


def test_tenants_that_want_one_absent_adapter_ask_once(residency: Residency) -> None:
    waiting = WaitingQueue(by_arrival, by_arrival)
    for seq in (owned(0, "x", "a"), owned(1, "y", "a"), owned(2, "y", "a"), owned(3, "x")):
        waiting.push(seq)
    assert asking(waiting, residency) == [0, 3]
    assert [seq.id for seq in waiting.group("a")] == [0, 1, 2]
    assert len(waiting) == len(list(waiting)) == 4


def test_for_whom_less_was_loaded_an_adapter_is_loaded_first(residency: Residency) -> None:
    residency.register("b", 1)
    seqs = [owned(0, "x", "a"), owned(1, "y", "b"), owned(2, "y"), owned(3, "z", "r")]
    waiting = WaitingQueue(by_arrival, lambda seq: (0, float(seq.id == 0), 0.0, seq.request.arrival, seq.id))
    for seq in seqs:
        waiting.push(seq)
    assert asking(waiting, residency) == [1, 0, 2, 3]
    assert [seq.id for seq in waiting.in_turn(residency, lambda _: True, lambda: False)] == [2, 3]
