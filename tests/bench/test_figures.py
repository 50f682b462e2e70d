from __future__ import annotations

import pytest

from motet.bench.figures import Report, parse_slo, report, summary
from motet.bench.records import Phase, Record, Run, Settings
from motet.errors import ConfigError

SETTINGS = Settings("somewhere", "sonnet", ("base", "a"), "uniform", 10, 3)


def entry(
    sent: float, *times: float, model: str = "base", phase: Phase = "measured", tokens: int | None = None
) -> Record:
    count = len(times) if tokens is None else tokens
    return Record(model, phase, sent, sent, times, 10, count)


def of(*records: Record, concurrency: int | None = None, **slo: float) -> Report:
    return report(
        Run(Settings("x", "sonnet", ("base",), "one", 10, 3, concurrency=concurrency, slo=slo), records)
    )


def test_each_figure_is_what_its_definition_says() -> None:
    told = of(entry(1.0, 1.5, 1.7, 2.1), entry(2.0, 2.1, 2.2, 2.3, 2.4)).overall
    assert told.ttft is not None
    assert told.itl is not None
    assert told.tpot is not None
    assert told.e2e is not None
    assert told.ttft.mean == pytest.approx(0.3)
    assert told.ttft.p90 == pytest.approx(0.1 + 0.9 * 0.4)
    assert told.e2e.mean == pytest.approx((1.1 + 0.4) / 2)
    assert told.itl.mean == pytest.approx((0.2 + 0.4 + 3 * 0.1) / 5)
    assert told.itl.max == pytest.approx(0.4)
    assert told.tpot.mean == pytest.approx((0.3 + 0.1) / 2)
    assert told.otps == pytest.approx(1 / 0.2)
    assert told.tokens_per_s == pytest.approx(7 / 1.4)
    assert told.requests_per_s == pytest.approx(2 / 1.4)


def test_pieces_of_several_tokens_count_as_the_endpoint_counts_them() -> None:
    told = of(entry(0.0, 1.0, 2.0, tokens=5)).overall
    assert told.output_tokens == 5
    assert told.tpot is not None
    assert told.tpot.mean == pytest.approx(1.0 / 4)
    assert told.itl is not None
    assert told.itl.mean == pytest.approx(1.0)


def test_an_answer_of_one_token_has_no_time_per_output_token() -> None:
    told = of(entry(0.0, 1.0)).overall
    assert told.tpot is None
    assert told.otps is None
    assert told.ttft is not None


def test_only_measured_requests_are_reported_and_models_apart() -> None:
    told = of(
        entry(0.0, 9.0, phase="warm-up"),
        entry(9.0, 9.5),
        entry(9.0, 9.8, model="a"),
        entry(9.1, 9.9, model="a"),
    )
    assert told.overall.requests == 3
    assert [(part.name, part.requests) for part in told.models] == [("a", 2), ("base", 1)]
    assert told.duration == pytest.approx(0.9)


def test_errors_are_counted_by_class_and_do_not_enter_latencies() -> None:
    failed = Record("base", "measured", 0.0, 0.0, (0.1,), None, 1, "http 503", "busy")
    late = Record("base", "measured", 0.0, 0.0, (), None, 0, "timeout", "")
    told = of(failed, failed, late, entry(0.0, 0.5)).overall
    assert told.errors == {"http 503": 2, "timeout": 1}
    assert told.completed == 1
    assert told.ttft is not None
    assert told.ttft.mean == 0.5


def test_a_run_of_errors_only_still_has_a_report() -> None:
    late = Record("base", "measured", 0.0, 0.0, (), None, 0, "timeout", "")
    told = of(late)
    assert told.overall.ttft is None
    assert told.overall.tokens_per_s == 0


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ("ttft:500", 2),
        ("ttft:100.1", 1),
        ("tpot:101", 1),
        ("e2el:1000", 1),
        ("otps:4.9", 2),
        ("otps:5.1", 1),
        ("ttft:500.1,otps:5.1", 1),
    ],
)
def test_goodput_counts_what_meets_every_bound(slo: str, good: int) -> None:
    records = [entry(1.0, 1.5, 1.7, 1.9, 2.1), entry(2.0, 2.1, 2.2, 2.3)]
    assert summary("all", records, 2.0, parse_slo(slo)).goodput == good / 2.0


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "tttf:3", "otps:-1", "ttft:nan"])
def test_an_objective_that_cannot_be_read_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_slo(text)


def test_first_requests_are_held_against_those_sent_alike() -> None:
    told = of(
        entry(0.0, 3.0, phase="warm-up"),
        entry(4.0, 4.2, phase="warm-up"),
        entry(5.0, 5.2, model="a", phase="warm-up"),
        entry(6.0, 6.19, model="a", phase="warm-up"),
        entry(7.0, 7.5),
        entry(7.0, 7.5, model="new"),
    )
    assert [(use.model, use.surprise) for use in told.first_uses] == [
        ("base", True),
        ("a", False),
        ("new", False),
    ]
    assert told.first_uses[0].cold == 3.0
    assert told.first_uses[0].warm == pytest.approx(0.2)
    assert told.first_uses[2].warm is None


def test_requests_that_stand_still_together_are_one_stall() -> None:
    steady = [0.1 + 0.01 * i for i in range(50)]
    after = [steady[-1] + 0.7 + 0.01 * i for i in range(50)]
    told = of(entry(0.0, *steady, *after), entry(0.0, *steady, *(time + 0.02 for time in after)))
    (stall,) = told.stalls
    assert stall.requests == 2
    assert stall.seconds == pytest.approx(0.72)


def test_full_load_counts_the_tokens_of_everyone_while_all_are_in_flight() -> None:
    told = of(
        entry(0.0, 0.5, 1.0, phase="lead-in"),
        entry(0.0, 0.5, 1.0, 1.5, 2.0, phase="lead-in"),
        entry(1.0, 1.5, 2.0, 2.5, 3.0),
        entry(2.0, 2.5, 3.0, 3.5, 4.0),
        entry(3.0, 3.5, 4.0, 4.5, 5.0),
        concurrency=2,
    )
    assert told.full_load_tokens_per_s == pytest.approx(8 / 2)
    assert told.overall.tokens_per_s == pytest.approx(12 / 4)


def test_a_run_without_measured_requests_is_refused() -> None:
    with pytest.raises(ConfigError, match="measured no request"):
        of(entry(0.0, 9.0, phase="warm-up"))
