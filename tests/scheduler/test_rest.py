"""What a tenant that asks for little gets beside one that always asks: steps in a row, and the last one ends early."""

from __future__ import annotations

import random

from motet.scheduler.fairness import REST_SHARE, REST_STEPS, Rest
from motet.scheduler.stage import CREDIT_STEPS
from motet.scheduler.step import Step
from motet.types import BASE, Account, Chunk
from tests.scheduler.driver import Driver

ROWS = 10
HOG, QUIET = Account("hog"), Account("quiet")


def beside_a_hog(steps: int = 40, max_running: int = 10) -> Driver:
    """It has a prompt of hundreds of steps, of which some are done."""
    driver = Driver(num_pages=3000, max_step_tokens=ROWS, max_running=max_running, max_model_len=9000)
    driver.add("hog", 8000, account=HOG)
    driver.run(steps)
    return driver


def served(driver: Driver, steps: int) -> list[dict[str, int]]:
    """What each of the next steps computes."""
    plans = []
    for _ in range(steps):
        plans.append(driver.plan())
        driver.commit(plans[-1])
    return [driver.rows(plan) for plan in plans]


def test_the_step_with_the_end_of_a_prompt_is_not_filled_with_those_of_others() -> None:
    driver = beside_a_hog()
    driver.add("quiet", 25, max_tokens=1, account=QUIET)
    assert served(driver, 4) == [{"quiet": 10}, {"quiet": 10}, {"quiet": 5}, {"hog": 10}]


def test_nor_with_one_that_waits() -> None:
    driver = Driver(num_pages=3000, max_step_tokens=ROWS, max_model_len=9000)
    driver.add("row", 1, max_tokens=500, account=HOG)
    driver.run(200)
    driver.add("new", 50, max_tokens=1, account=HOG)
    driver.add("quiet", 5, max_tokens=1, account=QUIET)
    assert served(driver, 2) == [{"row": 1, "quiet": 5}, {"row": 1, "new": 9}]


def test_decode_rows_and_its_own_other_prompts_go_on() -> None:
    driver = beside_a_hog()
    driver.add("row", 1, max_tokens=20, account=Account("other"))
    driver.run(1)
    driver.add("quiet", 5, max_tokens=1, account=QUIET)
    driver.add("quiet too", 7, max_tokens=1, account=QUIET)
    assert served(driver, 2) == [{"row": 1, "quiet": 5, "quiet too": 4}, {"row": 1, "quiet too": 3}]


def test_who_has_more_to_ask_for_does_not_wait_for_that_end_alone() -> None:
    driver = beside_a_hog(max_running=2)
    driver.add("quiet", 5, max_tokens=1, account=QUIET)
    driver.add("no place", 5, max_tokens=1, account=QUIET)
    assert served(driver, 1) == [{"quiet": 5, "hog": 5}]


def test_who_is_no_more_than_a_step_ahead_leaves_nothing_empty() -> None:
    """Two that always ask have their turns one after the other."""
    driver = beside_a_hog()
    for i in range(100):
        driver.add(f"busy {i}", 5, max_tokens=1, account=Account("busy"))
        driver.run(1)
    assert driver.scheduler.stats().waiting
    driver.add("a class of its own", 5, max_tokens=1, account=Account("quiet", priority=1))
    assert [sum(rows.values()) for rows in served(driver, 30)] == [ROWS] * 30


def test_what_is_left_empty_is_a_small_share_of_what_is_computed() -> None:
    """Twenty tenants that ask for little, in turn, leave no more empty than one."""
    rng = random.Random(5)
    driver = beside_a_hog(steps=0)
    computed = left = 0
    for i in range(600):
        if i % 3 == 0:
            driver.add(f"quiet {i}", rng.randint(2, 12), max_tokens=1, account=Account(f"quiet {i % 20}"))
        plan = driver.plan()
        driver.commit(plan)
        assert plan.chunks
        computed, left = computed + plan.num_tokens, left + ROWS - plan.num_tokens
        assert left <= REST_SHARE * computed
    assert left > 0.9 * REST_SHARE * computed, "all that may be left empty was asked for"


def test_little_is_saved_up() -> None:
    rest = Rest(ROWS)
    rest.count(100_000, 0)
    assert rest.may_be_left(REST_STEPS * ROWS, ROWS + 1)
    assert not rest.may_be_left(REST_STEPS * ROWS + 1, ROWS + 1)
    assert not rest.may_be_left(1, ROWS)
    rest.count(0, REST_STEPS * ROWS)
    assert not rest.may_be_left(1, ROWS + 1)


def test_whose_rows_are_taken_back_ends_nothing() -> None:
    step = Step(ROWS)
    step.add(Chunk(7, (1, 2, 3), 0, ((0,),), BASE, sample=True))
    assert (step.ending, step.budget) == (7, 7)
    step.drop(7)
    assert (step.ending, step.budget) == (None, ROWS)


def test_two_prompts_of_seven_steps_share_theirs_with_nobody() -> None:
    driver = beside_a_hog(steps=2 * CREDIT_STEPS)
    for i in range(5):
        driver.add(f"quiet {i}", 70, max_tokens=1, account=QUIET)
    own = [rows.get("hog", 0) == 0 for rows in served(driver, 30)]
    assert all(own[:14])
    assert not all(own[CREDIT_STEPS:20]), "later it is the turn of either"
