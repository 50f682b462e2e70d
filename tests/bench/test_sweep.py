from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from motet.bench.calls import Closed
from motet.bench.endpoint import Endpoint
from motet.bench.experiment import Experiment, Tokens, perform
from motet.bench.page import curve_page
from motet.bench.sweep import (
    Axes,
    Curve,
    Point,
    by_rank,
    experiments,
    lines,
    parse_numbers,
    point,
    read_curve,
    write_curve,
)
from motet.errors import ConfigError
from tests.bench.fake_endpoint import Behaviour, fake_endpoint
from tests.bench.virtual import run_virtual

START = Experiment("there", "base", (), output=12, warm_up=1, seed=5)


def test_the_axes_multiply_and_the_base_is_measured_once() -> None:
    ranks: dict[int | None, tuple[str, ...]] = {8: ("a", "b"), 64: ("c", "d")}
    wanted = experiments(START, Axes((1, 4), (100, 200), (0, 2), ranks), 4)
    assert len(wanted) == 2 * 2 + 2 * 2 * 2
    assert [one.models for one in wanted[:4]] == [("base",)] * 4
    assert [one.rank for one in wanted[:4]] == [None] * 4
    assert {(one.models, one.rank) for one in wanted[4:]} == {(("a", "b"), 8), (("c", "d"), 64)}
    assert [one.requests for one in wanted[:2]] == [4, 16]
    assert all(isinstance(one.arrival, Closed) for one in wanted)
    assert len({one.seed for one in wanted}) == len(wanted)


def test_more_adapters_than_are_named_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 adapters are wanted, 2 of rank 8 are named"):
        experiments(START, Axes((1,), (100,), (3,), {8: ("a", "b"), 64: ("c", "d", "e")}), 4)


def test_ranks_come_with_the_names() -> None:
    assert by_rank(["a:8", "b:64", "c:8"]) == {8: ("a", "c"), 64: ("b",)}
    assert by_rank(["a", "org:b"]) == {None: ("a", "org:b")}
    assert by_rank([]) == {None: ()}
    with pytest.raises(ConfigError, match="some without"):
        by_rank(["a:8", "b"])


def test_numbers_are_read_in_rising_order() -> None:
    assert parse_numbers("16,1,4,4", "--concurrency") == [1, 4, 16]
    assert parse_numbers("0", "--adapters", 0) == [0]
    for text in ("", "x", "0", "1,-2"):
        with pytest.raises(ConfigError, match="--concurrency"):
            parse_numbers(text, "--concurrency")


def measured(concurrency: int) -> Point:
    """A point of an endpoint that takes 0.2 s to the first token and 20 ms for each after it."""

    async def main() -> Point:
        async with fake_endpoint(base=Behaviour(0.2, 0.02), a=Behaviour(0.2, 0.02)) as (url, _):
            (wanted,) = experiments(START, Axes((concurrency,), (60,), (1,), {16: ("a",)}), 3)
            async with Endpoint(url) as endpoint:
                return point(await perform(endpoint, wanted, Tokens(), lambda _: None), "base")

    return run_virtual(main())


def test_a_point_is_what_the_delays_make_it() -> None:
    told = measured(4)
    assert (told.concurrency, told.adapters, told.rank, told.requests, told.failed) == (4, 1, 16, 12, 0)
    assert told.output == 12
    assert told.prompt == pytest.approx(
        60, abs=1
    )  # found by two probes: the fake counts 1.3 a word and 5 more
    assert told.ttft_p50 == pytest.approx(0.2, rel=0.02)
    assert told.ttft_p95 is not None
    assert told.ttft_p95 >= 0.2
    assert told.step_s == pytest.approx(0.02, rel=0.02)
    assert told.otps == pytest.approx(50, rel=0.02)
    assert told.tokens_per_s == pytest.approx(
        4 * 12 / (0.2 + 11 * 0.02), rel=0.1
    )  # windows hold a token more or less


def some_curve() -> Curve:
    def at(concurrency: int, adapters: int, failed: int = 0) -> Point:
        lost = None if failed else 0.1
        return Point(
            concurrency, 100, 100.2 + concurrency, 50, adapters, 8 if adapters else None, 4, failed, lost, lost, lost,
            None if failed else 40.0, 40.0 * concurrency, lost,
        )  # fmt: skip

    return Curve(
        "http://there", "H200", "base", "2026-01-01", (at(1, 0), at(4, 2), at(1, 2), at(16, 2, failed=4))
    )


def test_a_curve_is_the_same_after_a_file(tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    write_curve(file, some_curve())
    assert read_curve(file) == some_curve()
    assert msgspec.json.decode(file.read_bytes())["points"][1]["concurrency"] == 4
    file.write_text('{"kind": "run"}')
    with pytest.raises(ConfigError, match="is not a curve"):
        read_curve(file)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_curve(tmp_path / "no" / "folder", some_curve())


def test_points_that_differ_in_concurrency_are_a_line() -> None:
    found = [(name, [p.concurrency for p in points]) for name, points in lines(some_curve().points)]
    assert found == [("100 in, base", [1]), ("100 in, 2 of rank 8", [1, 4, 16])]


def test_the_page_of_a_curve_draws_what_was_measured() -> None:
    html = curve_page(some_curve())
    assert html.count("<svg") == 4
    assert "100 in, 2 of rank 8" in html
    assert "http://there" in html
