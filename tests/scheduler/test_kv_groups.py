"""Models whose layers keep their KV for different times: what bounded groups hold, share and give back."""

from __future__ import annotations

from itertools import islice

import pytest

from motet.errors import CapacityExceeded
from motet.types import KVGroup
from tests.scheduler.driver import FULL, Driver

WINDOW = KVGroup(layers=(1,), window=6)  # a page and a half
CHUNK = KVGroup(layers=(2,), chunk=10)


def held(tables: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """For each group the blocks that have a page."""
    return [[block for block, page in enumerate(table) if page >= 0] for table in tables]


# Bounded groups


def test_a_long_prompt_goes_through_a_small_window_in_a_pool_that_could_not_hold_it() -> None:
    driver = Driver(num_pages=4, max_step_tokens=8, groups=(WINDOW,))
    driver.add("r", 80, max_tokens=15)
    outputs = driver.finish()
    assert len(outputs) == 15
    stats = driver.scheduler.stats()
    assert (stats.steps, stats.preemptions, stats.kv_pages) == (10 + 14, 0, 0)


def test_what_does_not_fit_at_its_widest_is_refused() -> None:
    driver = Driver(num_pages=3, max_step_tokens=8, groups=(WINDOW,))
    with pytest.raises(CapacityExceeded, match="up to 4 pages of KV cache and 0 for its adapter"):
        driver.add("r", 80)
    driver = Driver(num_pages=23, max_step_tokens=8, groups=(FULL, WINDOW))
    with pytest.raises(CapacityExceeded, match="up to 24 pages of KV cache"):
        driver.add("r", 80, max_tokens=1)
    driver.add("r", 76, max_tokens=1)
    assert len(driver.finish()) == 1


def test_each_group_has_the_pages_that_its_queries_read_and_no_others() -> None:
    driver = Driver(max_step_tokens=8, groups=(FULL, WINDOW, CHUNK))
    driver.add("r", 21, max_tokens=5)
    seen = []
    for _ in range(6):
        plan = driver.plan()
        seen.append(held(driver.chunk(plan, "r").pages))
        driver.commit(plan)
    assert seen == [
        [[0, 1, 2, 3, 4, 5], [0, 1], [0, 1]],
        [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3], [0, 1, 2, 3]],
        [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [2, 3, 4, 5]],
        [[0, 1, 2, 3, 4, 5], [4, 5], [5]],
        [[0, 1, 2, 3, 4, 5], [4, 5], [5]],
        [[0, 1, 2, 3, 4, 5], [4, 5], [5]],
    ]


@pytest.mark.parametrize(("num_pages", "rows"), [(11, {"a": 1}), (12, {"a": 1, "long": 7})])
def test_a_prompt_is_admitted_only_with_room_for_all_that_it_will_hold_at_a_time(
    num_pages: int, rows: dict[str, int]
) -> None:
    """It takes 2 pages at once and has up to 8 later; "a" has 3 and may ask for another."""
    driver = Driver(num_pages=num_pages, max_step_tokens=8, groups=(KVGroup(layers=(0,), window=20),))
    driver.add("a", 9, max_tokens=12)
    driver.run(2)
    driver.add("long", 60, max_tokens=1)
    assert driver.rows(driver.plan()) == rows


# Lack of pages


def contention(max_step_tokens: int) -> tuple[Driver, list[dict[str, int]]]:
    """An old prompt takes pages of its window as it goes, a young sequence one after another for good.

    The old one comes in late, for its adapter was loaded meanwhile. The rows of each step up to the first
    preemption.
    """
    driver = Driver(
        num_pages=32, max_step_tokens=max_step_tokens, groups=(FULL, WINDOW), prefix_caching=False
    )
    driver.scheduler.register_adapter("x", 1)
    driver.add("old", 90, max_tokens=1, adapter="x")
    driver.plan()
    driver.add("young", 1, max_tokens=90)
    driver.run(3)
    driver.scheduler.adapter_loaded("x")
    rows = []
    while True:
        plan = driver.plan()
        rows.append(driver.rows(plan))
        if driver.scheduler.stats().preemptions:
            driver.commit(plan)
            return driver, rows
        driver.commit(plan)


def test_a_prompt_that_lacks_pages_computes_what_it_has_pages_for_and_then_the_youngest_gives_way() -> None:
    _, rows = contention(max_step_tokens=6)
    assert rows[:5] == [{"young": 1, "old": 5}] * 5
    assert [row["old"] for row in rows[5:-1]] == [3, 4, 4, 4]
    assert all(row["young"] == 1 for row in rows[:-1])
    assert rows[-1] == {"old": 6}


def test_a_prompt_takes_the_pages_and_the_row_of_a_younger_one_that_was_to_decode() -> None:
    driver, rows = contention(max_step_tokens=5)
    assert rows == [{"young": 1, "old": 4}] * 5 + [{"old": 5}]
    emitted = 3 + len(rows) - 1
    outputs = driver.finish()
    assert len([output for output in outputs if output.request_id == "young"]) == 90 - emitted
    assert {output.request_id for output in outputs if output.finish == "length"} == {"old", "young"}


def test_a_preempted_sequence_takes_its_window_up_again_and_computes_the_rest_once_more() -> None:
    driver = Driver(num_pages=13, groups=(FULL, WINDOW))
    driver.add("old", 12, max_tokens=12)
    driver.add("young", 7, max_tokens=16)
    emitted = 0
    while not driver.scheduler.stats().preemptions:
        emitted += sum(output.request_id == "young" for output in driver.step(token=30 + emitted))
    assert emitted == 6
    while "young" not in driver.rows(plan := driver.plan()):
        driver.commit(plan)
    chunk = driver.chunk(plan, "young")
    assert chunk.start + len(chunk.tokens) == 7 + emitted
    assert chunk.tokens[-1] == 30 + emitted - 1
    assert held(chunk.pages)[1] == list(range(max(0, chunk.start - 5) // 4, -(-(7 + emitted) // 4)))
    outputs = [o for o in driver.commit(plan) + driver.finish() if o.request_id == "young"]
    assert len(outputs) == 16 - emitted
    assert outputs[-1].finish == "length"


# Prefixes


def test_a_prefix_is_reused_with_the_end_of_its_window_only() -> None:
    driver = Driver(groups=(FULL, WINDOW))
    prompt = tuple(range(100, 120))
    driver.add("a", prompt, max_tokens=1)
    plan = driver.plan()
    a_full, a_window = driver.chunk(plan, "a").pages
    driver.commit(plan)
    driver.add("b", (*prompt, 1, 2, 3))
    plan = driver.plan()
    chunk = driver.chunk(plan, "b")
    assert (chunk.start, chunk.tokens) == (20, (1, 2, 3))
    full, window = chunk.pages
    assert full[:5] == a_full
    assert window[:5] == (-1, -1, -1, *a_window[3:])
    assert len(full) == len(window) == 6
    assert [output.cached_tokens for output in driver.commit(plan)] == [20]


def test_blocks_that_a_running_sequence_gave_back_are_found_until_they_are_evicted() -> None:
    driver = Driver(groups=(FULL, WINDOW))
    prompt = tuple(range(100, 120))
    driver.add("running", prompt)
    driver.step()
    assert driver.scheduler.stats().cached_pages == 3
    for id, evicted, start in (("a", 0, 12), ("b", 3, 0)):
        index = driver.scheduler._stage.room.prefix
        index.evict([page for page, _ in islice(index.cheapest(), evicted)])
        driver.add(id, (*prompt[:12], 1, 2), max_tokens=1)
        plan = driver.plan()
        assert driver.chunk(plan, id).start == start
        driver.scheduler.abort(id)


def test_a_prefix_ends_where_all_groups_still_have_what_is_read() -> None:
    driver = Driver(groups=(FULL, WINDOW))
    prompt = tuple(range(100, 120))
    for id in ("long", "short"):
        driver.add(id, prompt[: {"long": 20, "short": 9}[id]], max_tokens=1)
        driver.finish()
    # The blocks of the long prompt's window were idle first, those that the short one read are idle last.
    index = driver.scheduler._stage.room.prefix
    index.evict([page for page, _ in islice(index.cheapest(), 2)])
    driver.add("again", prompt)
    chunk = driver.chunk(driver.plan(), "again")
    assert chunk.start == 8
    assert held(chunk.pages) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_a_shared_page_of_a_window_stays_with_the_other_when_one_has_passed_it() -> None:
    driver = Driver(max_step_tokens=2, groups=(FULL, WINDOW))
    room = driver.scheduler._stage.room
    prompt = tuple(range(100, 108))
    driver.add("ahead", prompt)
    driver.run(5)
    driver.add("behind", (*prompt, *range(200, 206)))
    shared, held = -1, (0, True)
    while True:
        plan = driver.plan()
        ahead, behind = driver.chunk(plan, "ahead"), driver.chunk(plan, "behind")
        assert (ahead.start, behind.start) == (ahead.start, ahead.start - 1)
        if ahead.pages[1][1] == -1:
            break
        shared = behind.pages[1][1]
        assert ahead.pages[1][1] == shared
        held = (
            driver.scheduler._stage.room.pages.references(shared),
            driver.scheduler._stage.room.prefix.is_idle(shared),
        )
        driver.commit(plan)
    assert held == (1, False), "the one ahead gives it back with the plan in which it reads it last"
    assert behind.pages[1][1] == shared
    assert room.prefix.is_idle(shared)
    driver.commit(plan)
    driver.finish()


def test_prefixes_of_windows_are_never_shared_between_adapters() -> None:
    driver = Driver(groups=(WINDOW,))
    driver.make_ready("x", 1)
    prompt = tuple(range(100, 110))
    for id, adapter, start in (("a", "", 0), ("b", "x", 0), ("c", "x", 8), ("d", "", 8)):
        driver.add(id, prompt, max_tokens=1, adapter=adapter)
        plan = driver.plan()
        assert driver.chunk(plan, id).start == start
        driver.commit(plan)
