"""Images that have to be made again, and the bound on adapters that are resident at a time."""

from __future__ import annotations

import pytest

from motet.adapters.residency import MAX_REMAKES
from motet.errors import CapacityExceeded
from motet.scheduler.waiting import PATIENCE
from motet.types import Account, SeqOutput
from tests.scheduler.driver import Driver

# Images that are made again


def missing(driver: Driver, *digests: str) -> None:
    """Loads of these begin, and find no image."""
    plan = driver.plan()
    assert sorted(load.digest for load in plan.loads) == sorted(digests)
    driver.commit(plan)
    for digest in digests:
        assert driver.scheduler.adapter_missing(digest, "no such file") == []
        driver.scheduler.check_integrity()


def test_while_its_image_is_made_again_an_adapter_has_no_pages_and_its_requests_wait() -> None:
    driver = Driver(num_pages=8)
    driver.scheduler.register_adapter("x", 6)
    driver.add("a", 5, max_tokens=1, adapter="x")
    driver.add("b", 6, max_tokens=1, adapter="x")
    missing(driver, "x")
    stats = driver.scheduler.stats()
    assert (driver.state("x"), stats.adapter_pages, stats.waiting) == ("remaking", 0, 2)
    driver.add("base", 24, max_tokens=1)
    plan = driver.plan()
    assert plan.remakes == ("x",)
    assert plan.loads == ()
    assert driver.rows(plan) == {"base": 24}, "in the pages that it gave back"
    driver.commit(plan)
    for _ in range(2 * PATIENCE):
        assert driver.scheduler.is_remaking
        plan = driver.plan()
        assert (plan.remakes, plan.loads, plan.chunks) == ((), (), ()), "both requests share one remake"
    assert driver.scheduler.image_remade("x") == []
    assert not driver.scheduler.is_remaking
    assert [load.digest for load in driver.plan().loads] == ["x"]
    driver.scheduler.adapter_loaded("x")
    assert {output.request_id: output.finish for output in driver.finish()} == {"a": "length", "b": "length"}


def test_an_image_that_cannot_be_made_again_ends_those_who_wait_and_sticks_to_nothing() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.add("r", 5, max_tokens=1, adapter="x")
    missing(driver, "x")
    driver.plan()
    failed = SeqOutput("r", finish="error", error="no source", code="adapter_load_failed")
    assert driver.scheduler.image_remade("x", "no source") == [failed]
    assert driver.state("x") == "absent"
    driver.add("again", 5, max_tokens=1, adapter="x")
    assert [output.finish for output in driver.finish()] == ["length"]


def test_an_image_that_is_lost_again_and_again_is_given_up() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.add("r", 5, max_tokens=1, adapter="x")
    for _ in range(MAX_REMAKES):
        missing(driver, "x")
        assert driver.plan().remakes == ("x",)
        driver.scheduler.image_remade("x")
    assert driver.plan().loads
    assert [output.error for output in driver.scheduler.adapter_missing("x", "no such file")] == [
        "no such file"
    ]
    driver.add("again", 5, max_tokens=1, adapter="x")
    missing(driver, "x")
    assert driver.state("x") == "remaking", "another load has its own tries"


def test_images_are_made_one_at_a_time_first_for_whom_least_was_loaded() -> None:
    driver = Driver()
    for digest in "abc":
        driver.scheduler.register_adapter(digest, 2)
    greedy, modest = Account("greedy"), Account("modest")
    driver.add("0", 5, account=modest)
    driver.add("1", 5, max_tokens=1, adapter="a", account=greedy)
    driver.add("2", 5, max_tokens=1, adapter="b", account=greedy)
    missing(driver, "a", "b")
    plan = driver.plan()
    assert plan.remakes == ("a",)
    driver.commit(plan)
    driver.add("3", 5, max_tokens=1, adapter="c", account=modest)
    missing(driver, "c")
    plan = driver.plan()
    assert plan.remakes == ()
    driver.commit(plan)
    driver.scheduler.image_remade("a")
    assert driver.plan().remakes == ("c",)


def test_one_that_starved_for_pages_holds_nobody_up_while_its_image_is_made() -> None:
    driver = Driver(num_pages=10, prefix_caching=False)
    driver.scheduler.register_adapter("x", 8)
    driver.add("first", 4, max_tokens=PATIENCE + 8)
    driver.step()
    driver.add("cold", 8, max_tokens=1, adapter="x")
    while not (plan := driver.plan()).loads:
        driver.commit(plan)
    driver.commit(plan)
    driver.scheduler.adapter_missing("x", "no such file")
    driver.add("behind", 4, max_tokens=1)
    assert "behind" in driver.rows(driver.plan())


def test_when_nothing_runs_the_oldest_that_does_not_wait_for_an_image_comes_first() -> None:
    """Making one takes minutes; the next oldest may take an adapter that a younger one waits for."""
    driver = Driver(num_pages=8)
    driver.make_ready("y", 5)
    driver.scheduler.register_adapter("x", 3)
    driver.add("oldest", 4, max_tokens=1, adapter="x")
    missing(driver, "x")
    driver.add("older", 28, max_tokens=1)
    driver.add("young", 8, max_tokens=1, adapter="y")
    plan = driver.plan()
    assert plan.remakes == ("x",)
    assert "older" in driver.rows(plan)


def test_forgotten_while_its_image_is_made() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.add("r", 5, max_tokens=1, adapter="x")
    missing(driver, "x")
    driver.plan()
    driver.scheduler.forget_adapter("x")
    assert driver.state("x") == "draining"
    driver.scheduler.abort("r")
    assert driver.scheduler.stats().residency == {}
    driver.scheduler.register_adapter("x", 3)
    driver.add("new", 5, max_tokens=1, adapter="x")
    missing(driver, "x")
    assert driver.plan().remakes == (), "it is being made already"
    driver.scheduler.image_remade("x")
    assert [output.finish for output in driver.finish()] == ["length"]
    assert driver.scheduler.image_remade("x", "an answer that nobody waits for") == []
    assert driver.scheduler.image_remade("unknown") == []
    assert driver.state("x") == "ready"


def test_what_was_prefetched_is_made_again_and_loaded() -> None:
    driver = Driver()
    driver.scheduler.register_adapter("x", 3)
    driver.scheduler.prefetch("x")
    missing(driver, "x")
    assert driver.scheduler.has_work, "there is an image to ask for"
    assert driver.plan().remakes == ("x",)
    assert not driver.scheduler.has_work
    driver.scheduler.image_remade("x")
    assert [load.digest for load in driver.plan().loads] == ["x"]


# Adapters at a time


def full(num_pages: int = 60) -> Driver:
    """Two adapters may be resident; "a", used often, and "b" are."""
    driver = Driver(num_pages=num_pages, max_resident=2)
    for digest in "ab":
        driver.make_ready(digest, 3)
    for i in range(3):
        driver.add(f"often {i}", 4, max_tokens=1, adapter="a")
        driver.finish()
    driver.scheduler.register_adapter("c", 3)
    return driver


def test_the_idle_adapter_that_is_cheapest_to_lose_leaves_for_another_however_many_pages_are_free() -> None:
    driver = full()
    driver.add("r", 4, max_tokens=1, adapter="c")
    plan = driver.plan()
    assert (plan.evictions, [load.digest for load in plan.loads]) == (("b",), ["c"])


def test_while_all_are_in_use_a_request_waits_and_nobody_gives_way() -> None:
    driver = full()
    for digest in "ab":
        driver.add(digest, 4, max_tokens=5 if digest == "a" else 20, adapter=digest, account=Account(digest))
    driver.step()
    driver.add("r", 4, max_tokens=1, adapter="c", account=Account("r", priority=1))
    driver.add("base", 4, max_tokens=1, account=Account("r"))
    answers: list[SeqOutput] = []
    while not (plan := driver.plan()).loads:
        assert plan.evictions == ()
        answers += driver.commit(plan)
    assert [output.request_id for output in answers if output.finish] == ["base", "a"]
    assert plan.evictions == ("a",)
    assert driver.scheduler.stats().preemptions == 0
    driver.commit(plan)
    driver.scheduler.adapter_loaded("c")
    driver.finish()


def test_adapters_that_are_loading_count() -> None:
    driver = Driver(max_resident=1)
    for digest in "ab":
        driver.scheduler.register_adapter(digest, 3)
        driver.add(digest, 4, max_tokens=1, adapter=digest)
    assert [load.digest for load in driver.plan().loads] == ["a"]
    assert driver.plan().loads == ()
    driver.scheduler.adapter_failed("a", "bad disk")
    assert [load.digest for load in driver.plan().loads] == ["b"]


def test_one_that_starves_takes_an_adapter_that_a_younger_one_waits_for() -> None:
    driver = Driver(num_pages=60, max_running=1, max_resident=1)
    driver.make_ready("a", 3)
    driver.scheduler.register_adapter("b", 3)
    driver.add("running", 4, max_tokens=PATIENCE + 8)
    driver.step()
    driver.add("older", 4, max_tokens=1, adapter="b")
    driver.add("younger", 4, max_tokens=1, adapter="a")
    for _ in range(PATIENCE):
        plan = driver.plan()
        assert (plan.evictions, plan.loads) == ((), ())
        driver.commit(plan)
    plan = driver.plan()
    assert (plan.evictions, [load.digest for load in plan.loads]) == (("a",), ["b"])


def test_a_hint_loads_nothing_without_a_slot() -> None:
    driver = full()
    for digest in "ab":
        driver.add(digest, 4, max_tokens=9, adapter=digest)
    driver.step()
    driver.scheduler.prefetch("c")
    plan = driver.plan()
    assert (plan.evictions, plan.loads) == ((), ())


def test_half_of_those_that_may_be_resident_may_be_pinned() -> None:
    driver = full()
    driver.scheduler.pin_adapter("a", True)
    with pytest.raises(CapacityExceeded, match="1 adapters are pinned; of 2 that may be resident, 1 may be"):
        driver.scheduler.pin_adapter("b", True)
    driver.scheduler.pin_adapter("a", False)
    driver.scheduler.pin_adapter("b", True)
