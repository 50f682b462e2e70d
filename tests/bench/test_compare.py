from __future__ import annotations

import random
from pathlib import Path

import pytest

from motet.bench.compare import Ratio, compare
from motet.bench.figures import report
from motet.bench.records import Record, Run, Settings, read_run, write_run
from motet.errors import ConfigError

SETTINGS = Settings("there", "sonnet", ("base",), "one", 10, 20, concurrency=1, slo={"ttft": 500.0})


def a_run(ttft: float, gap: float, seed: int, count: int = 60) -> Run:
    """Requests one after the other, latencies spread by a tenth."""
    chance, now, records = random.Random(seed), 0.0, []
    for _ in range(count):
        times = [now + chance.gauss(ttft, ttft / 10)]
        for _ in range(19):
            times.append(times[-1] + gap * chance.uniform(0.9, 1.1))
        records.append(Record("base", "measured", now, now, tuple(times), 10, 20))
        now = times[-1]
    return Run(SETTINGS, tuple(records))


def by_name(a: Run, b: Run) -> dict[str, Ratio]:
    return {ratio.name: ratio for ratio in compare(a, b)}


def test_a_difference_is_told_from_chance() -> None:
    told = by_name(a_run(0.2, 0.01, 1), a_run(0.2, 0.012, 2))
    ttft, tpot, otps, rate = (told[name] for name in ("TTFT mean, ms", "TPOT mean, ms", "OTPS", "tokens/s"))
    assert ttft.low < 1 < ttft.high
    assert tpot.ratio == pytest.approx(1.2, rel=0.01)
    assert 1 < tpot.low < tpot.ratio < tpot.high < 1.25
    assert not tpot.better
    assert otps.ratio == pytest.approx(1 / 1.2, rel=0.01)
    assert rate.ratio == pytest.approx((0.2 + 19 * 0.01) / (0.2 + 19 * 0.012), rel=0.02)
    assert rate.high < 1
    assert not rate.better


def test_both_sides_are_what_the_reports_say() -> None:
    a, b = a_run(0.2, 0.01, 1), a_run(0.1, 0.01, 2)
    told, first, second = by_name(a, b), report(a).overall, report(b).overall
    assert first.ttft is not None
    assert second.ttft is not None
    assert told["TTFT p99, ms"].a == pytest.approx(1e3 * first.ttft.p99)
    assert told["TTFT p99, ms"].b == pytest.approx(1e3 * second.ttft.p99)
    assert (told["OTPS"].a, told["OTPS"].b) == pytest.approx((first.otps, second.otps))
    assert (told["tokens/s"].a, told["tokens/s"].b) == pytest.approx(
        (first.tokens_per_s, second.tokens_per_s)
    )
    assert told["TTFT p50, ms"].better


def test_an_interval_holds_the_truth_about_nineteen_times_in_twenty() -> None:
    held = [
        ratio.low <= 1 <= ratio.high
        for seed in range(60)
        for ratio in compare(a_run(0.2, 0.01, seed, 40), a_run(0.2, 0.01, seed + 1000, 40))
        if ratio.name == "TTFT mean, ms"
    ]
    assert 50 <= sum(held) <= 60


def test_runs_without_an_answer_cannot_be_compared() -> None:
    failed = Run(SETTINGS, (Record("base", "measured", 0.0, 0.0, (), None, 0, "timeout"),))
    with pytest.raises(ConfigError, match="against there has no answer"):
        compare(a_run(0.2, 0.01, 1), failed)


def test_what_would_divide_by_zero_is_left_out() -> None:
    at_once = tuple(Record("base", "measured", i, i, (i + 0.5,) * 3, 10, 3) for i in range(4))
    names = by_name(Run(SETTINGS, at_once), a_run(0.2, 0.01, 1))
    assert "TPOT mean, ms" not in names
    assert "OTPS" not in names
    assert "TTFT mean, ms" in names


def test_a_run_is_the_same_after_a_file(tmp_path: Path) -> None:
    run, file = a_run(0.2, 0.01, 1, 3), tmp_path / "run.jsonl"
    write_run(file, run, report(run))
    assert read_run(file) == run
    assert len(file.read_text().splitlines()) == 1 + 3 + 1


def test_files_that_are_no_runs_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"kind": "curve"}')
    with pytest.raises(ConfigError, match=r"other\.json is not a result"):
        read_run(file)
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        read_run(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_run(tmp_path / "no" / "folder", a_run(0.2, 0.01, 1, 1))
