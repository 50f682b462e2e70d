"""Who gets the canary, and when it goes: the decisions by themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.registry.monitor import KEPT, Monitor
from motet.registry.records import Limits
from motet.registry.release import Divergence, Ended, Figures, Split, choose, figures, verdict

WEIGHTS = st.floats(0.01, 1)


@given(st.text(), WEIGHTS, WEIGHTS)
def test_a_growing_share_keeps_its_users(user: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    few, many = Split("a@1", "a@2", low), Split("a@1", "a@2", high)
    assert choose("a", few, user) in ("a@1", "a@2")
    assert choose("a", few, user) == choose("a", few, user)
    assert choose("a", few, user) == "a@1" or choose("a", many, user) == "a@2"
    assert choose("a", Split("a@1"), user) == "a@1"


@pytest.mark.parametrize("weight", [0.01, 0.1, 0.5, 1.0])
def test_the_share_is_the_weight(weight: float) -> None:
    split = Split("a@1", "a@2", weight)
    got = sum(choose("a", split, f"user {i}") == "a@2" for i in range(20_000)) / 20_000
    assert abs(got - weight) < 4 * (weight * (1 - weight) / 20_000) ** 0.5 + 1e-9, "four standard deviations"


def test_aliases_draw_apart() -> None:
    split = Split("1", "2", 0.5)
    both = sum(choose("a", split, str(i)) == choose("b", split, str(i)) for i in range(10_000))
    assert 4800 < both < 5200


def test_figures() -> None:
    assert figures([]) == Figures()
    seen = [Ended(pace=float(i), first_token=2.0 * i) for i in range(1, 101)]
    seen += [Ended(failed=True)] * 25 + [Ended(first_token=300.0)] * 2 + [Ended()]
    assert figures(seen) == Figures(128, 25, 95.0, 100, 194.0)
    assert figures([Ended(pace=3.0)]) == Figures(1, 0, 3.0, 1)
    assert Figures(125, 25).error_rate == 0.2
    assert Figures().error_rate == 0.0


LIMITS = Limits(error_rate=0.05, latency=2.0, min_requests=20)
GOOD = Figures(200, 2, 0.010, 150)


@pytest.mark.parametrize(
    ("candidate", "stable", "reason"),
    [
        (Figures(20, 1, 0.020, 19), GOOD, None),
        (Figures(20, 2, 0.010, 18), GOOD, "10.0% of 20 requests failed, 1.0% of stable's"),
        (Figures(19, 19, 9.0, 0), GOOD, None),
        (Figures(50, 0, 0.021, 20), GOOD, "p95 21.0 ms per token, 10.0 of stable's"),
        (Figures(50, 0, 0.021, 19), GOOD, None),
        (Figures(50, 0, 0.021, 50), Figures(200, 0, 0.010, 19), None),
        (Figures(50, 0, 0.010, 50, 9.0), Figures(200, 0, 0.010, 150, 0.1), None),
        (Figures(50, 3, 0.010, 47), Figures(), "6.0% of 50 requests failed, 0.0% of stable's"),
        (Figures(50, 25, 0.010, 25), Figures(100, 48, 0.010, 52), None),
        (Figures(), GOOD, None),
    ],
)
def test_verdicts(candidate: Figures, stable: Figures, reason: str | None) -> None:
    assert verdict(LIMITS, stable, candidate) == reason


def test_divergence() -> None:
    found = Divergence().and_one([1, 2, 3, 4], [1, 2, 3, 4]).and_one([1, 2, 3, 4], [1, 9, 3, 4])
    assert found == Divergence(2, 1, 0.625)
    assert found.and_one([1, 2], [1, 2, 3]) == Divergence(3, 1, 0.75)
    assert Divergence().and_one([], []) == Divergence(1, 1, 1.0)
    assert Divergence().and_one([], [1]) == Divergence(1, 0, 0.0)
    assert Divergence().and_one([1], []) == Divergence(1, 0, 0.0)


def test_the_monitor_keeps_the_latest() -> None:
    monitor = Monitor()
    for _ in range(KEPT):
        monitor.record("a@prod", "a@1", Ended(failed=True))
    for _ in range(KEPT // 2):
        monitor.record("a@prod", "a@1", Ended(pace=0.5))
    assert monitor.figures("a@prod", "a@1") == Figures(KEPT, KEPT // 2, 0.5, KEPT // 2)


def test_the_monitor_tells_aliases_apart_and_forgets() -> None:
    monitor = Monitor()
    keys = [("a@prod", "a@1"), ("a@prod", "a@2"), ("a@best", "a@1"), ("a@best", "a@2")]
    for alias, version in keys:
        monitor.record(alias, version, Ended())
        monitor.compare(alias, version, [1], [1])

    def known() -> list[tuple[str, str]]:
        kept = [key for key in keys if monitor.figures(*key).requests]
        assert kept == [key for key in keys if monitor.divergence(*key).answers]
        return kept

    assert known() == keys
    monitor.keep(set(keys[1:]) | {("a@new", "a@3")})
    assert known() == keys[1:]
    monitor.forget("a@best")
    assert known() == keys[1:2]
    monitor.record(*keys[0], Ended())
    assert monitor.figures(*keys[0]).requests == 1
