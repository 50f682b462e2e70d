"""Counters and shares by themselves, then through the scheduler."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from motet.scheduler.blocks import KVLayout
from motet.scheduler.cost import ADAPTER_PRICE, LOAD_PRICE, OUTPUT_PRICE, load_cost, progress_cost
from motet.scheduler.fairness import Counters, Ledger, Space, Standings, Want, who_gives_way, youngest
from motet.scheduler.sequence import SequenceState
from motet.scheduler.stage import CREDIT_STEPS
from motet.types import BASE, Account, Request, SamplingParams
from tests.scheduler.driver import FULL, Driver

LAYOUT = KVLayout((FULL,), page_tokens=4, max_step_tokens=100)


def sequence(id: int, account: Account, adapter: str = BASE, pages: int = 0) -> SequenceState:
    """With the pages of a running one, all its own."""
    request = Request(str(id), (1,) * 40, SamplingParams(), adapter, float(id), account)
    seq = SequenceState.of(id, request, LAYOUT)
    seq.blocks.extend(tuple(range(100 * id, 100 * id + pages)), 4 * pages, 4 * pages)
    return seq


# Cost


def test_prices() -> None:
    assert progress_cost(100, 0, 0.0) == 100
    assert progress_cost(1, 1, 0.0) == OUTPUT_PRICE
    assert progress_cost(100, 1, 0.01) == pytest.approx((99 + OUTPUT_PRICE) * (1 + 0.01 * ADAPTER_PRICE))
    assert load_cost(5, 16) == 80 * LOAD_PRICE


# Counters


def test_what_is_charged_counts_after_it_is_settled() -> None:
    counters = Counters()
    counters.enter("a")
    counters.charge("a", 3.0)
    assert counters.settled["a"] == 0.0
    counters.settle()
    counters.settle()
    assert counters.settled["a"] == 3.0


def test_who_becomes_active_is_lifted_to_the_lowest_of_the_active_before_the_last_step() -> None:
    counters = Counters()
    for name, cost in (("a", 5.0), ("b", 7.0)):
        counters.enter(name)
        counters.charge(name, cost)
    counters.settle()
    counters.charge("a", 100.0)
    counters.enter("c")
    assert counters.settled["c"] == 5.0
    counters.settle()
    counters.enter("d")
    assert (counters.settled["a"], counters.settled["d"]) == (105.0, 5.0)


def test_leaving_and_coming_back_neither_saves_up_turns_nor_clears_a_debt() -> None:
    counters = Counters()
    for name, cost in (("idle", 1.0), ("busy", 4.0), ("greedy", 50.0)):
        counters.enter(name)
        counters.charge(name, cost)
    counters.settle()
    counters.leave("idle")
    counters.leave("greedy")
    counters.enter("idle")
    counters.enter("greedy")
    assert (counters.settled["idle"], counters.settled["busy"], counters.settled["greedy"]) == (
        4.0,
        4.0,
        50.0,
    )


def test_what_was_not_asked_for_may_be_had_later_up_to_the_credit() -> None:
    counters = Counters(credit=10.0)
    for name, cost in (("quiet", 5.0), ("away", 0.0), ("busy", 12.0), ("greedy", 50.0)):
        counters.enter(name)
        counters.charge(name, cost)
    counters.settle()
    for name in ("quiet", "away", "greedy"):
        counters.leave(name)
    for name in ("quiet", "away", "greedy", "new"):
        counters.enter(name)
    assert counters.settled == {"quiet": 5.0, "away": 2.0, "busy": 12.0, "greedy": 50.0, "new": 2.0}
    counters.charge("busy", 100.0)
    counters.settle()
    counters.enter("newer")
    assert counters.settled["newer"] == 2.0, "whoever spends a credit does not make those of others larger"
    for name in ("quiet", "away", "new", "newer"):
        counters.leave(name)
    counters.enter("new")
    assert counters.settled["new"] == 40.0, "of those who are there greedy is the lowest"


def test_who_has_several_requests_leaves_with_the_last() -> None:
    counters = Counters()
    counters.enter("a")
    counters.enter("a")
    counters.leave("a")
    assert len(counters) == 1
    counters.leave("a")
    assert len(counters) == 0


def test_those_who_left_behind_are_forgotten() -> None:
    counters = Counters()
    counters.enter("stays")
    for i in range(5000):
        counters.enter(f"t{i}")
        counters.charge(f"t{i}", 1.0)
        counters.charge("stays", 1.0)
        counters.leave(f"t{i}")
        counters.settle()
    assert len(counters.settled) < 600


# The ledger


def ledger_of(*seqs: SequenceState) -> Ledger:
    ledger = Ledger()
    for seq in seqs:
        ledger.enter(seq)
    return ledger


def test_turns_go_by_class_then_by_weighted_cost_then_by_adapter_then_by_arrival() -> None:
    light, heavy, high = Account("light", 1.0), Account("heavy", 4.0), Account("high", priority=1)
    x, y, other, first = (
        sequence(0, light, "x"),
        sequence(1, light, "y"),
        sequence(2, heavy, "x"),
        sequence(3, high),
    )
    ledger = ledger_of(x, y, other, first)
    for seq, cost in ((x, 10.0), (y, 6.0), (other, 40.0), (first, 1000.0)):
        ledger.charge(seq, cost)
    ledger.settle()
    assert [seq.id for seq in sorted((x, y, other, first), key=ledger.turn)] == [3, 2, 1, 0]
    assert ledger.turn(y)[:3] == (0, 16.0, 6.0)
    assert ledger.turn(other)[1] == 10.0


def test_without_a_tenant_adapters_are_one_flow_by_arrival() -> None:
    seqs = [sequence(i, Account(), adapter) for i, adapter in enumerate(("x", "y", "x", BASE))]
    ledger = ledger_of(*seqs)
    ledger.charge(seqs[0], 100.0)
    ledger.settle()
    assert [seq.id for seq in sorted(seqs, key=lambda seq: ledger.turn(seq))] == [0, 1, 2, 3]
    assert not ledger.has_rivals


def test_an_empty_ledger_remembers_nothing() -> None:
    seqs = [sequence(i, Account(f"t{i % 3}", priority=i % 2), f"a{i}") for i in range(12)]
    ledger = ledger_of(*seqs)
    for seq in seqs:
        ledger.charge(seq, 5.0)
        ledger.leave(seq)
    assert ledger._classes == {}


# Space

A, B, LOW = Account("a"), Account("b", 2.0), Account("low", priority=-1)
SPACE = Space(places=10, pages=100)


def gives_way(
    taker: SequenceState, running: list[SequenceState], pages: int, places: int, missing: int
) -> list[int]:
    chosen = who_gives_way(
        taker,
        running,
        SPACE,
        pages=pages,
        missing_places=places,
        missing_pages=missing,
        freed=lambda seq: seq.blocks.num_pages,
    )
    return [seq.id for seq in chosen]


@pytest.mark.parametrize("seed", range(60))
def test_no_search_is_left_out_that_would_find_somebody(seed: int) -> None:
    """Whoever stands back according to Standings, or to a Want that found nobody, finds nobody."""
    rng = random.Random(seed)
    accounts = [Account(f"t{i}", rng.choice([0.5, 1.0, 3.0]), rng.choice([0, 0, 1])) for i in range(6)]
    counters = {account: rng.choice([0.0, 1.0, 2.0, 5.0]) for account in accounts}

    def turn(seq: SequenceState) -> tuple[int, float, float, float, int]:
        account = seq.request.account
        return -account.priority, counters[account], 0.0, 0.0, seq.id

    def search(taker: SequenceState, pages: int, places: int, missing: int) -> list[int]:
        own = taker.request.account
        later = [s for s in running if s.request.account == own or turn(s)[:2] > turn(taker)[:2]]
        return gives_way(taker, later, pages, places, missing)

    running = [sequence(i, rng.choice(accounts[:4]), pages=rng.randint(1, 9)) for i in range(8)]
    standings = Standings(running, SPACE, turn)
    vain: list[Want] = []
    left_out = 0
    for id in range(100, 160):
        taker = sequence(id, rng.choice(accounts))
        pages, places, missing = rng.randint(0, 12), rng.randint(0, 1), rng.choice([0, 0, 3, 30])
        if not places and not missing:
            continue
        want = Want(turn(taker)[:2], standings.share(taker.request.account, pages), places, missing)
        found = search(taker, pages, places, missing)
        is_vain = any(map(want.is_no_easier, vain))
        if is_vain or not standings.might_give_way(want.turn, want.share):
            assert not found
            left_out += 1
        elif not found:
            vain.append(want)
    assert left_out


def test_the_youngest_of_who_holds_more_give_way_until_it_suffices() -> None:
    running = [sequence(i, A, pages=5) for i in range(4)]
    assert gives_way(sequence(9, B), running, pages=8, places=0, missing=8) == [3, 2]
    assert gives_way(sequence(9, B), running, pages=1, places=1, missing=-5) == [3]


def test_nobody_gives_way_to_who_would_hold_as_much_or_if_it_did_not_suffice() -> None:
    running = [sequence(0, A, pages=25), sequence(1, Account("c"), pages=15)]
    taker = sequence(9, Account("c"))
    assert gives_way(taker, running, pages=10, places=0, missing=4) == []
    assert gives_way(taker, running, pages=9, places=0, missing=4) == [0]
    assert gives_way(taker, running[:1], pages=25, places=0, missing=4) == []
    assert gives_way(taker, running[:1], pages=19, places=0, missing=26) == []


def test_weights_count_and_lower_classes_come_first() -> None:
    running = [sequence(0, A, pages=12), sequence(1, B, pages=20), sequence(2, LOW, pages=1)]
    assert gives_way(sequence(9, Account("c")), running, pages=2, places=0, missing=8) == [2, 0]
    assert gives_way(sequence(9, LOW), running, pages=1, places=0, missing=1) == []


def test_for_a_running_sequence_the_youngest_of_the_largest_share_of_the_lowest_class_gives_way() -> None:
    running = [sequence(0, A, pages=9), sequence(1, A, pages=9), sequence(2, B, pages=20)]
    assert youngest(running, SPACE).id == 1
    assert youngest([*running, sequence(3, LOW, pages=1)], SPACE).id == 3


# Through the scheduler


def test_the_next_prompt_is_of_who_was_served_less() -> None:
    driver = Driver(max_step_tokens=10, num_pages=200)
    for i in range(3):
        driver.add(f"a{i}", 30, max_tokens=1, account=A)
    driver.step()
    driver.add("c", 15, max_tokens=1, account=Account("c"))
    assert [driver.rows(driver.plan()) for _ in range(5)] == [
        {"c": 10},
        {"a0": 10},
        {"c": 5, "a0": 5},
        {"a0": 5, "a1": 5},
        {"a1": 10},
    ]


def test_a_higher_class_comes_first_and_takes_what_it_needs() -> None:
    driver = Driver(max_running=2, num_pages=50)
    for i in range(3):
        driver.add(f"low {i}", 6, max_tokens=50, account=LOW)
    driver.step()
    driver.add("high", 6, max_tokens=3, account=Account("high"))
    assert driver.rows(driver.plan()) == {"low 0": 1, "high": 6}
    assert driver.scheduler.stats().preemptions == 1


def test_who_holds_all_places_gives_one_to_another_tenant_and_gets_it_back() -> None:
    driver = Driver(max_running=4, num_pages=100, max_model_len=200)
    for i in range(6):
        driver.add(f"hog {i}", 8, max_tokens=60, account=A)
    driver.run(5)
    driver.add("quiet", 8, max_tokens=2, account=Account("c"))
    plan = driver.plan()
    assert driver.rows(plan) == {"hog 0": 1, "hog 1": 1, "hog 2": 1, "quiet": 8}
    driver.commit(plan)
    driver.run(1)
    plan = driver.plan()
    chunk = driver.chunk(plan, "hog 3")
    assert (chunk.start, len(chunk.tokens)) == (12, 1), "its pages were kept for it"
    driver.commit(plan)
    assert len(driver.finish()) > 0


def test_a_new_adapter_of_a_tenant_does_not_wait_behind_all_of_its_busy_one() -> None:
    driver = Driver(max_running=1, num_pages=100)
    for digest in ("x", "y"):
        driver.make_ready(digest, 2)
    for i in range(5):
        driver.add(f"x{i}", 8, max_tokens=2, adapter="x", account=A)
    driver.step()
    driver.add("y", 8, max_tokens=2, adapter="y", account=A)
    ended = [output.request_id for output in driver.finish() if output.finish]
    assert ended == ["x0", "y", "x1", "x2", "x3", "x4"]


@pytest.mark.parametrize("seed", range(12))
def test_the_service_gap_of_two_tenants_that_always_wait_is_bounded(seed: int) -> None:
    rng = random.Random(seed)
    places, rows, longest_answer = 6, 32, rng.choice([1, 8, 20])
    driver = Driver(num_pages=400, max_step_tokens=rows, max_running=places, prefix_caching=False)
    accounts = [Account(f"t{i}", rng.choice([0.5, 1.0, 2.0])) for i in range(rng.choice([2, 3, 5]))]
    works = {BASE: 0.0, "x": 0.02}
    driver.scheduler.register_adapter("x", 3, works["x"])
    longest_prompt = {account.tenant: rng.choice([3, 20, 60]) for account in accounts}
    waiting: dict[str, int] = defaultdict(int)
    served = {account.tenant: 0.0 for account in accounts}
    extremes: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    count = 0
    for step in range(1500):
        for account in accounts:
            while waiting[account.tenant] < 8:
                adapter = "x" if step > 10 and rng.random() < 0.5 else BASE
                prompt, answer = (
                    rng.randint(1, longest_prompt[account.tenant]),
                    rng.randint(1, longest_answer),
                )
                driver.add(f"{account.tenant}/{count}", prompt, answer, adapter, account=account)
                count += 1
                waiting[account.tenant] += 1
        plan = driver.scheduler.schedule()
        for load in plan.loads:
            driver.scheduler.adapter_loaded(load.digest)
        for chunk in plan.chunks:
            account = driver.scheduler.sequence(chunk.seq).request.account
            cost = progress_cost(len(chunk.tokens), chunk.sample, works[chunk.adapter])
            served[account.tenant] += cost / account.weight
        for output in driver.commit(plan):
            waiting[output.request_id.split("/")[0]] -= output.finish is not None
        for a in served:
            for b in served:
                gap = served[a] - served[b]
                low, high = extremes[a, b]
                extremes[a, b] = [min(low, gap), max(high, gap)]
    dearest = 1 + ADAPTER_PRICE * works["x"]
    step_cost = (rows + (OUTPUT_PRICE - 1) * places) * dearest
    answers = places * longest_answer * OUTPUT_PRICE * dearest
    weight = min(account.weight for account in accounts)
    bound = 2 * (step_cost + answers) / weight + CREDIT_STEPS * rows
    assert max(high - low for low, high in extremes.values()) <= bound
    assert max(served.values()) > 3 * bound, "what is bounded would be larger by chance"


def test_prefixes_are_shared_within_a_salt_only() -> None:
    driver = Driver()
    prompt = tuple(range(100, 110))
    salted = [Account("a", salt="s"), Account("b", salt="t"), Account("c", salt="s"), Account()]
    starts = []
    for i, account in enumerate(salted):
        driver.add(f"r{i}", prompt, max_tokens=1, account=account)
        plan = driver.plan()
        starts.append(driver.chunk(plan, f"r{i}").start)
        driver.commit(plan)
    assert starts == [0, 0, 8, 0]


def test_the_oldest_that_runs_gives_way_to_higher_classes_only() -> None:
    driver = Driver(max_running=1, max_model_len=200)
    driver.add("first", 8, max_tokens=60, account=A)
    driver.run(3)
    driver.add("other", 8, max_tokens=2, account=Account("c"))
    assert driver.rows(driver.plan()) == {"first": 1}
    driver.add("high", 8, max_tokens=2, account=Account("c", priority=1))
    assert driver.rows(driver.plan()) == {"high": 8}
