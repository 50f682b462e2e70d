"""Loads, evictions and what happens to requests around them."""

from __future__ import annotations

import pytest

from motet.errors import InvalidRequest
from motet.scheduler.waiting import PATIENCE
from motet.types import Load, SeqOutput
from tests.scheduler.driver import Driver

# Loading


def test_a_cold_adapter_is_loaded_once_for_all_and_stalls_nobody_else() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.add("x1", 5, adapter="x")
    driver.add("x2", 6, adapter="x")
    driver.add("base", 7)
    plan = driver.plan()
    ((digest, pages),) = [(load.digest, load.pages) for load in plan.loads]
    assert (digest, len(pages)) == ("x", 3)
    assert driver.rows(plan) == {"base": 7}
    assert not set(pages) & set(driver.chunk(plan, "base").pages[0])
    driver.commit(plan)
    assert driver.state("x") == "loading"
    plan = driver.plan()
    assert plan.loads == ()
    assert driver.rows(plan) == {"base": 1}
    driver.commit(plan)
    driver.scheduler.adapter_loaded("x")
    plan = driver.plan()
    assert driver.rows(plan) == {"base": 1, "x1": 5, "x2": 6}
    assert driver.chunk(plan, "x1").adapter == "x"


def test_a_load_starts_even_when_no_more_sequences_can_run() -> None:
    driver = Driver(max_running=1)
    driver.scheduler.register_adapter("x", 3)
    driver.add("base", 5)
    driver.step()
    driver.add("next", 5)
    driver.add("cold", 5, adapter="x")
    assert [load.digest for load in driver.plan().loads] == ["x"]


def test_an_empty_plan_means_that_a_load_is_awaited() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.add("r", 5, adapter="x")
    assert len(driver.plan().loads) == 1
    plan = driver.plan()
    assert (plan.loads, plan.chunks) == ((), ())
    assert driver.scheduler.has_work


def test_a_failed_load_ends_those_who_waited_and_the_next_request_tries_again() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.add("a", 5, adapter="x")
    driver.add("b", 5, adapter="x")
    driver.add("base", 5)
    driver.step()
    assert driver.scheduler.adapter_failed("x", "bad disk") == [
        SeqOutput("a", finish="error", error="bad disk", code="adapter_load_failed"),
        SeqOutput("b", finish="error", error="bad disk", code="adapter_load_failed"),
    ]
    driver.scheduler.check_integrity()
    assert driver.state("x") == "absent"
    assert driver.scheduler.stats().adapter_pages == 0
    driver.add("again", 5, adapter="x")
    assert [load.digest for load in driver.plan().loads] == ["x"]
    driver.scheduler.adapter_loaded("x")
    assert driver.plan().evictions == ()


def test_a_load_whose_requests_are_gone_completes_and_can_be_evicted() -> None:
    driver = Driver(num_pages=6)
    driver.scheduler.register_adapter("x", 3)
    driver.add("gone", 5, max_tokens=1, adapter="x")
    driver.step()
    driver.scheduler.abort("gone")
    driver.add("r", 16, max_tokens=5)
    assert driver.plan().chunks == ()
    driver.scheduler.adapter_loaded("x")
    plan = driver.plan()
    assert plan.evictions == ("x",)
    assert driver.rows(plan) == {"r": 16}


def test_a_load_leaves_room_for_the_request_that_it_is_for() -> None:
    driver = Driver(num_pages=9)
    driver.scheduler.register_adapter("x", 4)
    driver.add("base", 12, max_tokens=1)
    driver.add("r", 12, max_tokens=1, adapter="x")
    plan = driver.plan()
    assert driver.rows(plan) == {"base": 12}
    assert plan.loads == ()
    driver.commit(plan)
    assert len(driver.plan().loads) == 1


# Eviction


def test_of_equal_use_adapters_leave_before_cached_prefixes_that_take_longer_to_bring_back() -> None:
    driver = Driver(num_pages=12)
    driver.make_ready("x", 3)
    driver.add("p", 12, max_tokens=1)
    driver.finish()
    driver.make_ready("y", 3)
    assert driver.scheduler.stats().free_pages == 3
    driver.add("a", 16, max_tokens=1)
    plan = driver.plan()
    assert plan.evictions == ("x",)
    assert driver.scheduler.stats().cached_pages == 3
    driver.scheduler.abort("a")
    driver.add("b", 17, max_tokens=1)
    plan = driver.plan()
    assert plan.evictions == ("y",)
    assert driver.scheduler.stats().cached_pages == 7, "those of a too, whose plan counts as executed"
    driver.commit(plan)
    driver.add("c", 46, max_tokens=1)
    driver.plan()
    assert driver.scheduler.stats().cached_pages == 0
    assert driver.scheduler.stats().evictions == 2


def test_an_adapter_that_is_used_often_stays_when_prefixes_used_once_go() -> None:
    driver = Driver(num_pages=12)
    driver.make_ready("x", 3)
    for i in range(6):
        driver.add(f"x{i}", 1, max_tokens=1, adapter="x")
        driver.finish()
    for i in range(4):
        driver.add(f"p{i}", 20, max_tokens=1)
        plan = driver.plan()
        assert plan.evictions == ()
        driver.commit(plan)
    assert driver.state("x") == "ready"


def test_an_evicted_adapter_is_loaded_again_when_wanted() -> None:
    driver = Driver(num_pages=5)
    driver.make_ready("x", 3)
    driver.add("base", 12, max_tokens=1)
    assert driver.plan().evictions == ("x",)
    driver.scheduler.abort("base")
    driver.add("r", 4, max_tokens=1, adapter="x")
    assert driver.plan().loads[0].digest == "x"


def test_a_pinned_adapter_stays_however_long_it_was_not_used() -> None:
    driver = Driver(num_pages=8, max_step_tokens=3)
    driver.make_ready("x", 3)
    driver.add("pinning", 5, max_tokens=3, adapter="x")
    driver.add("large", 24, max_tokens=1)
    for _ in range(4):
        plan = driver.plan()
        assert plan.evictions == ()
        assert "large" not in driver.rows(plan)
        driver.commit(plan)
    plan = driver.plan()
    assert plan.evictions == ("x",)
    assert driver.rows(plan) == {"large": 3}


def test_a_loading_adapter_is_not_taken_even_by_the_oldest() -> None:
    driver = Driver(num_pages=9)
    driver.scheduler.register_adapter("x", 4)
    driver.add("old", 8, max_tokens=16)
    driver.step()
    driver.add("cold", 4, max_tokens=1, adapter="x")
    plan = driver.plan()
    assert len(plan.loads) == 1
    for _ in range(20):
        driver.commit(plan)
        plan = driver.plan()
        assert plan.evictions == ()
    driver.commit(plan)
    assert driver.scheduler.stats().running == 0
    driver.scheduler.adapter_loaded("x")
    plan = driver.plan()
    assert plan.evictions == ("x",)
    assert set(driver.rows(plan)) == {"old"}


def warm_and_wanted(num_pages: int) -> Driver:
    """ "x" (3 pages) is ready, "middle" waits with it for a place that "old" (2 pages) has."""
    driver = Driver(num_pages=num_pages, max_running=1)
    driver.make_ready("x", 3)
    driver.add("old", 8, max_tokens=12)
    driver.step()
    driver.add("middle", 4, max_tokens=1, adapter="x")
    return driver


def test_an_adapter_that_is_waited_for_is_not_evicted_for_a_load() -> None:
    driver = warm_and_wanted(num_pages=8)
    driver.scheduler.register_adapter("y", 3)
    driver.add("young", 4, max_tokens=1, adapter="y")
    for _ in range(3):
        plan = driver.plan()
        assert (plan.evictions, plan.loads) == ((), ())
        driver.commit(plan)
    driver.scheduler.abort("middle")
    plan = driver.plan()
    assert plan.evictions == ("x",)
    assert [load.digest for load in plan.loads] == ["y"]


def test_an_older_running_sequence_may_take_an_adapter_that_is_waited_for() -> None:
    driver = warm_and_wanted(num_pages=6)
    evictions: list[str] = []
    for _ in range(12):
        plan = driver.plan()
        evictions += plan.evictions
        assert set(driver.rows(plan)) == {"old"}
        outputs = driver.commit(plan)
        if outputs[-1].finish:
            break
    assert evictions == ["x"]
    assert driver.scheduler.stats().preemptions == 0
    assert [output.finish for output in driver.finish()] == ["length"]


def test_a_younger_running_sequence_gives_way_to_an_adapter_that_an_older_one_waits_for() -> None:
    driver = Driver(num_pages=7)
    driver.scheduler.register_adapter("x", 3)
    driver.add("old", 4, max_tokens=1, adapter="x")
    driver.plan()
    driver.add("young", 9, max_tokens=12)
    plan = driver.plan()
    assert driver.rows(plan) == {"young": 9}
    driver.commit(plan)
    driver.run(3)
    driver.scheduler.adapter_loaded("x")
    while "old" not in driver.rows(plan := driver.plan()):
        assert plan.evictions == ()
        driver.commit(plan)
    assert driver.scheduler.stats().residency == {"x": "ready"}
    driver.commit(plan)
    driver.finish()


def test_a_waiting_request_takes_an_adapter_that_a_younger_one_waits_for_only_when_it_starves() -> None:
    driver = Driver(num_pages=12)
    driver.make_ready("x", 4)
    driver.scheduler.register_adapter("y", 4)
    driver.add("running", 8, max_tokens=PATIENCE + 3)
    driver.step()
    driver.add("older", 4, max_tokens=1, adapter="y")
    driver.add("younger", 28, max_tokens=1, adapter="x")
    for _ in range(PATIENCE):
        plan = driver.plan()
        assert (plan.evictions, plan.loads) == ((), ())
        driver.commit(plan)
    plan = driver.plan()
    assert plan.evictions == ("x",)
    assert [load.digest for load in plan.loads] == ["y"]


def test_when_nothing_goes_on_the_oldest_may_take_what_the_young_wait_for() -> None:
    driver = Driver(num_pages=8)
    driver.make_ready("x", 3)
    driver.make_ready("y", 3)
    driver.scheduler.register_adapter("z", 5)
    driver.add("oldest", 12, max_tokens=1, adapter="z")
    driver.add("older", 12, max_tokens=1, adapter="x")
    driver.add("youngest", 12, max_tokens=1, adapter="y")
    plan = driver.plan()
    assert plan.evictions == ("y",)
    assert [load.digest for load in plan.loads] == ["z"]
    driver.scheduler.adapter_loaded("z")
    plan = driver.plan()
    assert plan.evictions == ("x",)
    outputs = driver.commit(plan) + driver.finish()
    assert [output.request_id for output in outputs] == ["oldest", "older", "youngest"]


def test_a_cold_request_that_lacks_pages_is_passed_over_only_so_often() -> None:
    driver = Driver(num_pages=10, prefix_caching=False)
    driver.scheduler.register_adapter("x", 8)
    driver.add("first", 4, max_tokens=4)
    driver.step()
    driver.add("cold", 8, max_tokens=1, adapter="x")
    loads: tuple[Load, ...] = ()
    for i in range(200):
        driver.add(f"small {i}", 4, max_tokens=4)
        plan = driver.plan()
        driver.commit(plan)
        if loads := plan.loads:
            break
    assert [load.digest for load in loads] == ["x"]
    assert i < PATIENCE + 6


# Forgetting


def test_forgetting_an_idle_adapter_returns_its_pages_and_tells_the_next_plan() -> None:
    driver = Driver()
    driver.make_ready("x", 3)
    driver.scheduler.forget_adapter("x")
    assert driver.scheduler.stats().adapter_pages == 0
    assert driver.scheduler.stats().residency == {}
    assert driver.scheduler.has_work
    assert driver.plan().evictions == ("x",)
    assert not driver.scheduler.has_work
    with pytest.raises(InvalidRequest, match="'x'"):
        driver.add("r", 5, adapter="x")


def test_requests_accepted_before_the_forgetting_finish_on_it() -> None:
    driver = Driver(max_running=1)
    driver.make_ready("x", 3)
    driver.add("running", 5, max_tokens=3, adapter="x")
    driver.add("waiting", 5, max_tokens=3, adapter="x")
    driver.step()
    driver.scheduler.forget_adapter("x")
    assert driver.state("x") == "draining"
    with pytest.raises(InvalidRequest):
        driver.add("late", 5, adapter="x")
    outputs = driver.finish()
    assert [output.request_id for output in outputs if output.finish == "length"] == ["running", "waiting"]
    assert driver.scheduler.stats().residency == {}
    assert driver.scheduler.stats().adapter_pages == 0


def test_a_waiting_request_for_a_forgotten_cold_adapter_still_gets_it() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.add("r", 5, max_tokens=1, adapter="x")
    driver.scheduler.forget_adapter("x")
    outputs = driver.finish()
    assert [output.finish for output in outputs] == ["length"]
    assert driver.scheduler.stats().residency == {}


def test_a_forgotten_digest_can_come_back_in_the_same_plan() -> None:
    driver = Driver()
    driver.make_ready("x", 3)
    driver.scheduler.forget_adapter("x")
    driver.scheduler.register_adapter("x", 3)
    driver.add("r", 5, adapter="x")
    plan = driver.plan()
    assert plan.evictions == ("x",)
    assert [load.digest for load in plan.loads] == ["x"]


def test_stats_say_who_runs_and_waits_with_which_adapter() -> None:
    driver = Driver()
    driver.make_ready("x", 3)
    driver.scheduler.register_adapter("y", 4)
    driver.add("a", 5, adapter="x")
    driver.add("b", 5)
    driver.add("c", 5, adapter="y")
    driver.step()
    stats = driver.scheduler.stats()
    assert stats.running_by_adapter == {"x": 1, "": 1}
    assert stats.waiting_by_adapter == {"y": 1}
    assert stats.residency == {"x": "ready", "y": "loading"}
    assert (stats.running, stats.waiting, stats.loads, stats.steps) == (2, 1, 1, 2)
    assert (stats.adapter_pages, stats.kv_pages, stats.total_pages) == (7, 4, 50)
