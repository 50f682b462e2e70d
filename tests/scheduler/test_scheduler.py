"""Steps, ends, prefixes and preemption; what concerns adapters is in test_cold_adapters.py."""

from __future__ import annotations

import pytest

from motet.errors import CapacityExceeded, InvalidRequest
from motet.scheduler.waiting import PATIENCE
from motet.types import BASE, PENDING, Plan, SeqOutput
from tests.scheduler.driver import EOS, Driver

# Steps


def test_a_request_goes_from_prefill_over_decode_to_its_end() -> None:
    driver = Driver()
    driver.add("r", (11, 12, 13, 14, 15), max_tokens=3)
    assert driver.scheduler.has_work
    plan = driver.plan()
    (chunk,) = plan.chunks
    assert (chunk.tokens, chunk.start, chunk.sample) == ((11, 12, 13, 14, 15), 0, True)
    assert [len(table) for table in chunk.pages] == [2]
    assert driver.commit(plan, token=21) == [SeqOutput("r", token_ids=(21,))]
    plan = driver.plan()
    (row,) = plan.chunks
    assert (row.seq, row.tokens, row.start, row.sample) == (chunk.seq, (21,), 5, True)
    assert driver.commit(plan, token=22) == [SeqOutput("r", token_ids=(22,))]
    assert driver.step(token=23) == [SeqOutput("r", token_ids=(23,), finish="length")]
    assert not driver.scheduler.has_work
    assert driver.plan() == Plan()


def test_a_long_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    driver = Driver(max_step_tokens=5)
    driver.add("r", 13)
    chunks = []
    for _ in range(3):
        plan = driver.plan()
        chunks.append(driver.chunk(plan, "r"))
        outputs = driver.commit(plan)
    assert [(chunk.start, len(chunk.tokens), chunk.sample) for chunk in chunks] == [
        (0, 5, False),
        (5, 5, False),
        (10, 3, True),
    ]
    assert [output.request_id for output in outputs] == ["r"]


def test_decode_rows_come_first_and_prefill_takes_the_rest() -> None:
    driver = Driver(max_step_tokens=8)
    driver.add("a", 2)
    driver.add("b", 3)
    driver.step()
    driver.add("c", 20)
    driver.add("d", 20)
    assert driver.rows(driver.plan()) == {"a": 1, "b": 1, "c": 6}


def test_several_sequences_prefill_in_one_step() -> None:
    driver = Driver(max_step_tokens=10)
    for id, length in (("a", 3), ("b", 5), ("c", 4)):
        driver.add(id, length)
    plan = driver.plan()
    assert driver.rows(plan) == {"a": 3, "b": 5, "c": 2}
    assert [chunk.sample for chunk in plan.chunks] == [True, True, False]
    driver.commit(plan)
    assert driver.rows(driver.plan()) == {"a": 1, "b": 1, "c": 2}


def test_with_more_sequences_than_rows_the_oldest_go_first() -> None:
    driver = Driver(max_step_tokens=2)
    for id in ("a", "b", "c"):
        driver.add(id, 1, max_tokens=3)
    driver.step()
    for _ in range(2):
        plan = driver.plan()
        assert driver.rows(plan) == {"a": 1, "b": 1}
        driver.commit(plan)
    assert driver.rows(driver.plan()) == {"c": 1}


def test_no_more_than_max_running_are_admitted() -> None:
    driver = Driver(max_running=2)
    for id in ("a", "b", "c"):
        driver.add(id, 2, max_tokens=2)
    plan = driver.plan()
    assert driver.rows(plan) == {"a": 2, "b": 2}
    driver.commit(plan)
    driver.step()
    assert driver.rows(driver.plan()) == {"c": 2}


def test_the_next_plan_may_be_made_before_the_last_one_is_committed() -> None:
    driver = Driver()
    driver.add("a", 6, max_tokens=3)
    driver.step(token=8)
    driver.add("b", 3)
    first, second = driver.plan(), driver.plan()
    assert driver.chunk(first, "a").tokens == (8,)
    assert driver.chunk(second, "a").tokens == driver.chunk(second, "b").tokens == (PENDING,)
    assert (driver.chunk(second, "a").start, driver.chunk(second, "b").start) == (7, 3)
    driver.commit(first, token=7)
    third = driver.plan()
    assert driver.rows(third) == {"b": 1}, "the second plan chooses the last token that a may have"
    assert [output.finish for output in driver.commit(second, token=6)] == ["length", None]
    assert driver.scheduler.sequence(1).tokens[-2:] == [7, 6]


def test_who_ended_in_the_last_plan_has_a_row_in_vain_in_the_next() -> None:
    driver = Driver()
    driver.add("a", 6)
    first, second = driver.plan(), driver.plan()
    (output,) = driver.commit(first, token=EOS)
    assert output.finish == "stop"
    assert driver.commit(second) == []
    assert not driver.scheduler.has_work


# Ends


@pytest.mark.parametrize(
    ("token", "stop_token_ids", "ignore_eos", "finish"),
    [
        (EOS, (), False, "stop"),
        (EOS, (), True, None),
        (7, (7, 8), False, "stop"),
        (EOS, (EOS,), True, "stop"),
        (9, (7, 8), False, None),
    ],
)
def test_which_tokens_end_a_sequence(
    token: int, stop_token_ids: tuple[int, ...], ignore_eos: bool, finish: str | None
) -> None:
    driver = Driver()
    driver.add("r", 3, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos)
    (output,) = driver.step(token)
    assert (output.token_ids, output.finish) == ((token,), finish)
    assert driver.scheduler.has_work == (finish is None)


def test_a_request_may_use_the_whole_context_and_the_whole_pool() -> None:
    driver = Driver(num_pages=3, max_model_len=13)
    driver.add("r", 5, max_tokens=8)
    outputs = driver.finish()
    assert len(outputs) == 8
    assert outputs[-1].finish == "length"
    assert driver.scheduler.stats().preemptions == 0


def test_what_can_never_be_served_is_refused_at_once() -> None:
    driver = Driver(num_pages=3, max_model_len=20)
    driver.scheduler.register_adapter("x", 2)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        driver.add("r", ())
    with pytest.raises(InvalidRequest, match="together 21, more than the model's context of 20"):
        driver.add("r", 15, max_tokens=6)
    with pytest.raises(CapacityExceeded, match="up to 4 pages of KV cache and 0 for its adapter"):
        driver.add("r", 5, max_tokens=9)
    with pytest.raises(CapacityExceeded, match="up to 2 pages of KV cache and 2 for its adapter"):
        driver.add("r", 5, max_tokens=1, adapter="x")
    with pytest.raises(InvalidRequest, match="'y'"):
        driver.add("r", 1, max_tokens=1, adapter="y")
    assert not driver.scheduler.has_work
    driver.add("r", 4, max_tokens=1)
    with pytest.raises(InvalidRequest, match="'r' is in flight"):
        driver.add("r", 4, max_tokens=1)
    assert len(driver.finish()) == 1
    driver.add("r", 4, max_tokens=1)


def test_abort_ends_a_waiting_or_running_request_and_frees_its_pages() -> None:
    driver = Driver(max_running=1)
    driver.add("running", 9)
    driver.add("waiting", 9)
    driver.step()
    for id in ("waiting", "running"):
        assert driver.scheduler.abort(id) == SeqOutput(id, finish="abort")
        assert driver.scheduler.abort(id) is None
        driver.scheduler.check_integrity()
    stats = driver.scheduler.stats()
    assert (stats.kv_pages, stats.cached_pages, stats.free_pages) == (0, 2, 48)
    assert not driver.scheduler.has_work


# Prefixes


def test_a_known_prefix_is_not_computed_again_and_reported_once() -> None:
    driver = Driver()
    prompt = tuple(range(100, 110))
    driver.add("a", prompt, max_tokens=1)
    driver.finish()
    driver.add("b", (*prompt[:9], 7, 7), max_tokens=2)
    plan = driver.plan()
    chunk = driver.chunk(plan, "b")
    assert (chunk.start, chunk.tokens) == (8, (108, 7, 7))
    assert [output.cached_tokens for output in driver.commit(plan)] == [8]
    assert [output.cached_tokens for output in driver.step()] == [0]
    stats = driver.scheduler.stats()
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens) == (8, 21)


def test_of_a_fully_known_prompt_one_token_is_left_to_compute() -> None:
    driver = Driver()
    prompt = tuple(range(100, 108))
    for id in ("a", "b"):
        driver.add(id, prompt, max_tokens=1)
        plan = driver.plan()
        driver.commit(plan)
    chunk = driver.chunk(plan, "b")
    assert (chunk.start, len(chunk.tokens)) == (4, 4)


def test_running_sequences_share_pages_as_soon_as_they_are_computed() -> None:
    driver = Driver()
    prompt = tuple(range(100, 110))
    driver.add("a", prompt)
    driver.step()
    driver.add("b", prompt)
    plan = driver.plan()
    ((a,), (b,)) = driver.chunk(plan, "a").pages, driver.chunk(plan, "b").pages
    assert a[:2] == b[:2]
    assert a[2] != b[2]
    assert driver.scheduler.stats().kv_pages == 4


def test_generated_tokens_are_a_prefix_for_the_next_turn() -> None:
    driver = Driver()
    driver.add("a", (100, 101, 102), max_tokens=6)
    driver.finish()
    driver.add("b", (100, 101, 102, 9, 9, 9, 9, 9, 9, 50, 51))
    assert driver.chunk(driver.plan(), "b").start == 8


def test_prefixes_are_never_shared_between_adapters() -> None:
    driver = Driver()
    driver.make_ready("x", 1)
    driver.make_ready("y", 1)
    prompt = tuple(range(100, 110))
    for id, adapter in (("a", BASE), ("b", "x"), ("c", "y"), ("d", "x")):
        driver.add(id, prompt, max_tokens=1, adapter=adapter)
        plan = driver.plan()
        assert driver.chunk(plan, id).start == (8 if id == "d" else 0)
        driver.commit(plan)


def test_prefix_caching_can_be_off() -> None:
    driver = Driver(prefix_caching=False)
    for id in ("a", "b"):
        driver.add(id, tuple(range(100, 110)), max_tokens=1)
        plan = driver.plan()
        assert driver.chunk(plan, id).start == 0
        driver.commit(plan)
    stats = driver.scheduler.stats()
    assert (stats.free_pages, stats.cached_pages, stats.prefix_query_tokens) == (50, 0, 0)


# Preemption


def crowd() -> Driver:
    """Two sequences of 2 pages each in a pool of 5, as long as they are before either grows."""
    driver = Driver(num_pages=5)
    driver.add("old", 8, max_tokens=12)
    driver.add("young", 7, max_tokens=12)
    return driver


def test_the_youngest_gives_way_and_resumes_without_sampling_again() -> None:
    driver = crowd()
    driver.step(token=30)
    assert driver.scheduler.stats().running == 2
    emitted = 1
    while not driver.scheduler.stats().preemptions:
        emitted += sum(output.request_id == "young" for output in driver.step(token=30 + emitted))
    assert driver.scheduler.stats().waiting == 1
    while "young" not in driver.rows(plan := driver.plan()):
        driver.commit(plan)
    chunk = driver.chunk(plan, "young")
    known = chunk.start + len(chunk.tokens)
    assert known == 7 + emitted
    assert chunk.tokens[-1] == 30 + emitted - 1
    assert chunk.sample
    outputs = [o for o in driver.commit(plan) + driver.finish() if o.request_id == "young"]
    assert len(outputs) == 12 - emitted
    assert all(output.cached_tokens == 0 for output in outputs)
    assert [output.finish for output in outputs if output.finish] == ["length"]
    assert driver.scheduler.stats().prefix_query_tokens == 8 + 7


def test_the_oldest_is_never_preempted() -> None:
    driver = crowd()
    assert len([o for o in driver.run(12) if o.request_id == "old"]) == 12


def test_idle_prefix_pages_go_before_anyone_is_preempted() -> None:
    driver = Driver(num_pages=6)
    driver.add("gone", 8, max_tokens=1)
    driver.finish()
    driver.add("old", 8, max_tokens=5)
    driver.add("young", 4, max_tokens=5)
    driver.finish()
    assert driver.scheduler.stats().preemptions == 0


def test_a_running_sequence_that_may_grow_keeps_a_page_of_headroom() -> None:
    driver = Driver(num_pages=4)
    driver.add("growing", 8, max_tokens=2)
    driver.add("large", 8, max_tokens=1)
    driver.add("small", 4, max_tokens=1)
    assert driver.rows(driver.plan()) == {"growing": 8, "small": 4}
    driver = Driver(num_pages=4)
    driver.add("full", 8, max_tokens=1)
    driver.add("large", 8, max_tokens=1)
    assert driver.rows(driver.plan()) == {"full": 8, "large": 8}


# Starvation


def test_small_requests_pass_a_large_one_only_so_often() -> None:
    driver = Driver(num_pages=10, prefix_caching=False)
    driver.add("first", 8, max_tokens=8)
    driver.step()
    driver.add("large", 36, max_tokens=1)
    passed = 0
    for i in range(200):
        driver.add(f"small {i}", 4, max_tokens=6)
        plan = driver.plan()
        if "large" in driver.rows(plan):
            break
        passed += any(chunk.start == 0 for chunk in plan.chunks)
        driver.commit(plan)
    assert "large" in driver.rows(plan)
    assert 0 < passed < PATIENCE
    assert i < PATIENCE + 10


def test_a_long_queue_of_requests_that_do_not_fit_is_not_asked_to_its_end() -> None:
    driver = Driver(num_pages=10)
    driver.add("first", 20, max_tokens=8)
    driver.step()
    for i in range(100):
        driver.add(f"large {i}", 36, max_tokens=1)
    driver.step()
    assert sum(seq.passed for seq in driver.scheduler._waiting) == 32
