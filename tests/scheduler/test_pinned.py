"""Pinned and prefetched adapters, how many copies there are at a time, and how many adapters fit."""

from __future__ import annotations

import pytest

from motet.errors import CapacityExceeded, InvalidRequest
from tests.scheduler.driver import Driver


def test_a_pinned_adapter_is_no_victim_until_it_is_unpinned() -> None:
    driver = Driver(num_pages=8)
    driver.make_ready("x", 3)
    driver.scheduler.pin_adapter("x", True)
    driver.add("large", 20, max_tokens=1)
    plan = driver.plan()
    assert plan.evictions == ()
    driver.commit(plan)
    with pytest.raises(CapacityExceeded, match="the pool has 8, 3 of them for pinned adapters"):
        driver.add("larger", 21, max_tokens=1)
    driver.add("own", 20, max_tokens=1, adapter="x")
    driver.scheduler.pin_adapter("x", False)
    driver.add("larger", 21, max_tokens=1)
    assert len([output for output in driver.finish() if output.finish == "length"]) == 2


def test_pinned_adapters_have_a_bounded_share_and_leave_room_for_requests_in_flight() -> None:
    driver = Driver(num_pages=20)
    for digest, pages in (("x", 6), ("y", 4), ("z", 1), ("w", 11)):
        driver.scheduler.register_adapter(digest, pages)
    driver.add("flying", 42, max_tokens=1, adapter="z")
    with pytest.raises(CapacityExceeded, match="would take 11 pages; they may take 10"):
        driver.scheduler.pin_adapter("w", True)
    driver.scheduler.pin_adapter("x", True)
    driver.scheduler.pin_adapter("x", True)
    with pytest.raises(CapacityExceeded, match="needs up to 12 of 20 besides"):
        driver.scheduler.pin_adapter("y", True)
    driver.scheduler.pin_adapter("z", True)
    driver.finish()
    with pytest.raises(CapacityExceeded, match="would take 11 pages; they may take 10"):
        driver.scheduler.pin_adapter("y", True)
    driver.scheduler.forget_adapter("z")
    driver.scheduler.pin_adapter("y", True)
    with pytest.raises(InvalidRequest, match="'nobody'"):
        driver.scheduler.pin_adapter("nobody", True)


def test_a_prefetched_adapter_is_there_when_it_is_wanted() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.scheduler.prefetch("x")
    assert driver.scheduler.has_work
    plan = driver.plan()
    assert [load.digest for load in plan.loads] == ["x"]
    assert not driver.scheduler.has_work
    driver.scheduler.prefetch("x")
    driver.scheduler.adapter_loaded("x")
    driver.scheduler.prefetch("x")
    assert driver.plan().loads == ()
    driver.add("r", 5, adapter="x")
    assert driver.rows(driver.plan()) == {"r": 5}
    with pytest.raises(InvalidRequest, match="'y'"):
        driver.scheduler.prefetch("y")


def test_a_prefetch_takes_nothing_that_anybody_wants_and_is_tried_once() -> None:
    driver = Driver(num_pages=10, max_running=1)
    driver.make_ready("x", 3)
    driver.scheduler.register_adapter("y", 5)
    driver.add("running", 8, max_tokens=6)
    driver.step()
    driver.add("waiting", 4, max_tokens=1, adapter="x")
    driver.scheduler.prefetch("y")
    plan = driver.plan()
    assert (plan.loads, plan.evictions) == ((), ())
    driver.commit(plan)
    driver.scheduler.abort("waiting")
    assert driver.plan().loads == ()
    driver.scheduler.prefetch("y")
    plan = driver.plan()
    assert ([load.digest for load in plan.loads], plan.evictions) == (["y"], ("x",))


def test_a_forgotten_adapter_is_not_prefetched() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.scheduler.prefetch("x")
    driver.scheduler.forget_adapter("x")
    assert driver.plan().loads == ()


def test_stats_estimate_how_many_adapters_fit() -> None:
    driver = Driver(num_pages=16)
    for digest in ("x", "y"):
        driver.make_ready(digest, 3)
    for i in range(4):
        driver.add(f"r{i}", 1, max_tokens=1, adapter="xy"[i % 2])
        driver.finish()
    stats = driver.scheduler.stats()
    assert stats.adapter_requests == 6
    assert stats.adapter_hits_by_pages[4] == 0
    assert stats.adapter_hits_by_pages[8] == stats.adapter_hits_by_pages[16] == 4


def test_few_copies_are_under_way_at_a_time_so_that_turns_count() -> None:
    driver = Driver(num_pages=200, max_step_tokens=8)
    for i in range(6):
        driver.scheduler.register_adapter(f"a{i}", 4)
        driver.add(f"r{i}", 2, max_tokens=1, adapter=f"a{i}")
    assert [load.digest for load in driver.plan().loads] == ["a0", "a1"]
    assert driver.plan().loads == ()
    driver.scheduler.adapter_loaded("a0")
    assert [load.digest for load in driver.plan().loads] == ["a2"]
    small = Driver(num_pages=200, max_step_tokens=8)
    for i in range(12):
        small.scheduler.register_adapter(f"a{i}", 1)
        small.add(f"r{i}", 2, max_tokens=1, adapter=f"a{i}")
    assert len(small.plan().loads) == 7, "of one page each: as many as are copied in the time of a step"
