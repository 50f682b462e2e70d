from __future__ import annotations

import pytest

from motet.adapters.residency import Residency, Victim
from motet.memory.pages import PageAllocator
from motet.scheduler.blocks import KVLayout
from motet.scheduler.fairness import PATIENCE, WaitingQueue
from motet.scheduler.sequence import SequenceState
from motet.types import BASE, KVGroup, Request, SamplingParams

LAYOUT = KVLayout((KVGroup(layers=(0,)),), page_tokens=3, max_step_tokens=7)


@pytest.fixture
def residency() -> Residency:
    """ "r" is ready, "l" is loading, "a" is absent."""
    residency = Residency(PageAllocator(10))
    for digest in ("r", "l", "a"):
        residency.register(digest, 1)
    residency.begin_load("r")
    residency.loaded("r", now=0.0)
    residency.begin_load("l")
    return residency


def sequence(id: int, adapter: str = BASE, arrival: float | None = None) -> SequenceState:
    arrival = float(id) if arrival is None else arrival
    return SequenceState.of(id, Request(str(id), (1,), SamplingParams(), adapter, arrival), LAYOUT)


def queue_of(*sequences: SequenceState) -> WaitingQueue:
    waiting = WaitingQueue()
    for seq in sequences:
        waiting.push(seq)
    return waiting


def asking(waiting: WaitingQueue, residency: Residency, admitting: bool = True) -> list[int]:
    return [seq.id for seq in waiting.in_turn(residency, admitting)]


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
    residency.loaded("l", now=1.0)
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
    for seq in waiting.in_turn(residency, admitting=True):
        waiting.remove(seq)
        asked.append(seq.id)
    assert asked == [0, 1, 2, 3, 4]
    assert len(waiting) == 0


def test_a_load_that_begins_meanwhile_silences_those_it_is_for(residency: Residency) -> None:
    waiting = queue_of(sequence(0), sequence(1, "r"), sequence(2, "r"), sequence(3))
    asked = []
    for seq in waiting.in_turn(residency, admitting=True):
        asked.append(seq.id)
        if seq.id == 0:
            residency.evict("r")
        if seq.id == 1:
            residency.begin_load("r")
    assert asked == [0, 1, 3]


def test_groups_know_their_oldest(residency: Residency) -> None:
    waiting = queue_of(sequence(2, "a"), sequence(1, "a"), sequence(3))
    oldest = waiting.oldest("a")
    assert oldest is not None
    assert oldest.id == 1
    assert [seq.id for seq in waiting.group("a")] == [1, 2]
    assert waiting.oldest("r") is None
    assert waiting.group("r") == ()
    assert asking(waiting, residency) == [1, 3]


def test_adapters_of_younger_requests_come_with_the_youngest_first() -> None:
    waiting = queue_of(sequence(0, "a"), sequence(2, "b"), sequence(3, "c"), sequence(4, "b"))
    victims = [Victim(digest, 1, 0.0) for digest in ("a", "b", "c", "d")]
    assert [victim.adapter for victim in waiting.of_younger(sequence(1), victims)] == ["c", "b"]
    assert waiting.of_younger(sequence(9), victims) == []
