from __future__ import annotations

import random
from collections import Counter

import pytest
from typer.testing import CliRunner

from motet.bench.residency import (
    Fifo,
    Item,
    Lru,
    adapters,
    bursts,
    compare,
    overall,
    policies,
    replay,
    traces,
    zipf,
)
from motet.cli.main import app
from motet.errors import ConfigError

A, B, C, D = (Item(i, 2) for i in range(4))


def test_lru_and_fifo_differ_in_what_a_hit_means() -> None:
    trace = (A, B, A, C, A)
    assert replay(trace, Lru(), 4).misses == 3 / 5
    assert replay(trace, Fifo(), 4).misses == 4 / 5


def test_misses_are_counted_in_pages_of_adapters_and_in_seconds() -> None:
    talk = Item(-1, 4)
    outcome = replay((A, talk, A, talk), Lru(), 6)
    assert (outcome.misses, outcome.copied) == (0.5, 2)
    assert outcome.seconds == pytest.approx(A.seconds + talk.seconds)
    assert replay((A, talk, A, talk), Lru(), 4).copied == 4


def test_traces_are_as_long_as_asked_and_alike_for_one_seed() -> None:
    first, again, other = traces(50, 400, 1), traces(50, 400, 1), traces(50, 400, 2)
    assert first == again
    assert first != other
    assert {len(trace) for trace in first.values()} == {400}


def test_zipf_is_in_proportion_and_bursts_stay_with_few() -> None:
    rng = random.Random(0)
    items = adapters(100, rng)
    counts = Counter(zipf(items, 1.0, 20_000, rng))
    assert counts[items[0]] / counts[items[3]] == pytest.approx(4, rel=0.15)
    trace = tuple(bursts(items, 2000, rng))
    assert max(len(set(trace[i : i + 60])) for i in range(0, 1900, 60)) < 25


def test_the_cost_model_is_never_far_from_the_best_and_on_average_the_best() -> None:
    rows = list(compare((300, 1500), 500, 6000, 0))
    scores = {name: overall(rows, name) for name in policies(1)}
    mean, worst = scores["cost model"]
    assert mean == min(mean for mean, _ in scores.values())
    assert worst < 1.3
    assert min(mean for name, (mean, _) in scores.items() if name != "cost model") > 1.05


def test_the_command_prints_a_table_and_refuses_a_pool_for_less_than_an_adapter() -> None:
    result = CliRunner().invoke(
        app, ["bench", "residency", "--pages", "100,300", "--adapters", "40", "--uses", "300"]
    )
    assert result.exit_code == 0, result.output
    assert "cost model" in result.output
    assert result.output.count("bursts") == 2
    for pages in ("63", "many"):
        result = CliRunner().invoke(app, ["bench", "residency", "--pages", pages])
        assert isinstance(result.exception, ConfigError)
