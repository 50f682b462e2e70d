from __future__ import annotations

import itertools
from collections import Counter

import pytest

from motet.bench.calls import Call, Open, chooser, lead_in, spread, warm_up
from motet.errors import ConfigError

NAMES = ("a", "b", "c", "d")


def chosen(popularity: str, count: int = 20_000, seed: int = 3) -> Counter[str]:
    return Counter(itertools.islice(chooser(popularity, NAMES, seed), count))


def test_one_is_the_first_and_distinct_takes_turns() -> None:
    assert chosen("one") == {"a": 20_000}
    assert list(itertools.islice(chooser("distinct", NAMES), 6)) == ["a", "b", "c", "d", "a", "b"]


@pytest.mark.parametrize(
    ("popularity", "weights"),
    [
        ("uniform", (1, 1, 1, 1)),
        ("zipf:1", (1, 1 / 2, 1 / 3, 1 / 4)),
        ("zipf:0", (1, 1, 1, 1)),
        ("zipf:2.5", (1, 2**-2.5, 3**-2.5, 4**-2.5)),
        ("weights:5,0,3,2", (5, 0, 3, 2)),
    ],
)
def test_the_shares_are_those_asked_for(popularity: str, weights: tuple[float, ...]) -> None:
    counts = chosen(popularity)
    for name, weight in zip(NAMES, weights, strict=True):
        assert counts[name] / 20_000 == pytest.approx(weight / sum(weights), abs=0.012)


def test_the_same_seed_chooses_the_same() -> None:
    first, again, other = (list(itertools.islice(chooser("uniform", NAMES, seed), 50)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "popularity",
    [
        "zipf",
        "zipf:x",
        "zipf:1,2",
        "zipf:-1",
        "zipf:nan",
        "weights:1,2",
        "weights:0,0,0,0",
        "unifrm",
        "one:3",
    ],
)
def test_a_popularity_that_cannot_be_read_is_refused_by_name(popularity: str) -> None:
    with pytest.raises(ConfigError, match=popularity.split(":")[0]):
        chooser(popularity, NAMES)


def test_single_requests_come_at_random_with_the_rate_asked_for() -> None:
    due = [call.at or 0.0 for call in spread([Call("a", "x", 1)] * 4001, Open(8.0), 5)]
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert due[0] == 0.0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(
        mean**2, rel=0.12
    )  # exponential


def test_bursts_come_together_at_even_distances() -> None:
    due = [call.at for call in spread([Call("a", "x", 1)] * 7, Open(6.0, burst=3))]
    assert due == [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0]


def test_a_lead_in_ends_one_answer_after_the_other() -> None:
    calls = lead_in(lambda output: Call("a", "x", output), 4, 600)
    assert [call.output for call in calls] == [150, 300, 450, 600]
    assert [call.output for call in lead_in(lambda output: Call("a", "x", output), 4, 2)] == [1, 1, 1, 2]


def test_warm_up_takes_every_model_in_turn_with_short_answers() -> None:
    calls = warm_up(lambda model, output: Call(model, "x", output), ("b", "a"), 2, 600)
    assert [(call.model, call.output) for call in calls] == [("b", 16), ("b", 16), ("a", 16), ("a", 16)]
    assert warm_up(lambda model, output: Call(model, "x", output), ("b",), 1, 4)[0].output == 4
