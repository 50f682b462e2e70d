from __future__ import annotations

import random
from itertools import islice

import pytest

from motet.memory.victims import Idle


def test_the_cheapest_come_first_and_of_equals_the_first_added() -> None:
    idle: Idle[str] = Idle()
    for item, cost in (("a", 2.0), ("b", 1.0), ("c", 2.0), ("d", 1.0)):
        idle.add(item, cost)
    assert list(idle.cheapest()) == [("b", 1.0), ("d", 1.0), ("a", 2.0), ("c", 2.0)]
    assert list(idle.cheapest()) == list(idle.cheapest()), "asking changes nothing"
    assert (len(idle), "c" in idle, "e" in idle) == (4, True, False)


def test_what_comes_back_has_its_new_cost() -> None:
    idle: Idle[str] = Idle()
    idle.add("a", 1.0)
    idle.add("b", 2.0)
    with pytest.raises(AssertionError, match="a is idle already"):
        idle.add("a", 3.0)
    idle.remove("a")
    idle.add("a", 3.0)
    assert [item for item, _ in idle.cheapest()] == ["b", "a"]
    with pytest.raises(KeyError):
        idle.remove("c")


def test_any_order_of_events_leaves_the_sorted_order_and_a_small_heap() -> None:
    rng = random.Random(3)
    idle: Idle[int] = Idle()
    costs: dict[int, float] = {}
    for _ in range(20_000):
        item = rng.randrange(300)
        if item in costs:
            del costs[item]
            idle.remove(item)
        elif rng.random() < 0.7:
            costs[item] = rng.random()
            idle.add(item, costs[item])
        if rng.random() < 0.05:
            few = list(islice(idle.cheapest(), rng.randrange(20)))
            assert few == sorted(costs.items(), key=lambda pair: pair[1])[: len(few)]
        assert len(idle._heap) <= 2 * len(costs) + 66
    assert set(idle) == costs.keys()
