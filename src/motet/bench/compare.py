"""Two runs against each other: ratios of their figures, with bootstrap intervals.

An interval says how much of a difference may be chance: requests of both runs (for tokens per second: twentieths of
their time) are drawn anew, with replacement, and the ratio taken each time. A ratio whose interval does not hold 1 is a
difference. Requests of one run share a server and are not quite independent, so an interval is rather too narrow than
too wide; what differs from run to run (another machine, another day) it cannot show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from motet.bench.records import Record, Run
from motet.errors import ConfigError

DRAWS = 2000
BLOCKS = 20
Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]


class Ratio(msgspec.Struct, frozen=True):
    """A figure of run A and of run B, B / A, its interval, and whether B is better."""

    name: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    better: bool


def compare(a: Run, b: Run, seed: int = 0) -> list[Ratio]:
    """Ratios of B to A; without those that divide by zero. Raises ConfigError if one of them has no answer."""
    chance = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [
            _ratio(name, ours, theirs, statistic, lower, chance)
            for (name, statistic, lower, ours), (_, _, _, theirs) in zip(
                _figures(a), _figures(b), strict=True
            )
            if len(ours) and len(theirs)
        ]
    return [ratio for ratio in ratios if ratio is not None]


def _ratio(
    name: str, a: Values, b: Values, statistic: Statistic, lower: bool, chance: np.random.Generator
) -> Ratio | None:
    def drawn(values: Values) -> Values:
        return statistic(values[chance.integers(0, len(values), (DRAWS, len(values)))])

    ours, theirs = (statistic(values[None, :])[0] for values in (a, b))
    ratios = drawn(b) / drawn(a)
    ratios = ratios[np.isfinite(ratios)]
    if not (np.isfinite([ours, theirs, theirs / ours]).all() and len(ratios)):
        return None
    low, high = (float(value) for value in np.percentile(ratios, (2.5, 97.5)))
    return Ratio(
        name, float(ours), float(theirs), float(theirs / ours), low, high, bool((theirs < ours) == lower)
    )


def _figures(run: Run) -> Iterator[tuple[str, Statistic, bool, Values]]:
    """Name, statistic, whether less is better, and the values it is of."""
    ended = [r for r in run.records if r.phase == "measured" and not r.error]
    if not ended:
        raise ConfigError(f"the run against {run.settings.target} has no answer to compare")
    ttft = _values(ended, lambda record: 1e3 * record.ttft)
    tpot = _values([r for r in ended if r.output_tokens > 1], lambda record: 1e3 * record.tpot)
    e2e = _values(ended, lambda record: 1e3 * record.e2e)
    yield "TTFT mean, ms", _mean, True, ttft
    yield "TTFT p50, ms", _percentile(50), True, ttft
    yield "TTFT p90, ms", _percentile(90), True, ttft
    yield "TTFT p99, ms", _percentile(99), True, ttft
    yield "TPOT mean, ms", _mean, True, tpot
    yield "TPOT p50, ms", _percentile(50), True, tpot
    yield "E2E mean, ms", _mean, True, e2e
    yield "E2E p50, ms", _percentile(50), True, e2e
    yield "OTPS", lambda values: 1e3 / _mean(values), False, tpot
    yield "tokens/s", _mean, False, _rates(ended)


def _rates(records: Sequence[Record]) -> Values:
    """Tokens per second in each twentieth of the time from the first request sent to the last token."""
    begin, end = min(r.sent for r in records), max(r.times[-1] for r in records)
    times = np.concatenate([r.times for r in records])
    counts = np.concatenate([np.full(len(r.times), r.output_tokens / len(r.times)) for r in records])
    tokens, _ = np.histogram(times, BLOCKS, (begin, end), weights=counts)
    return np.asarray(tokens * BLOCKS / (end - begin))


def _values(records: Sequence[Record], value: Callable[[Record], float]) -> Values:
    return np.array([value(record) for record in records], dtype=np.float64)


def _mean(values: Values) -> Values:
    return np.asarray(values.mean(axis=-1))


def _percentile(share: float) -> Statistic:
    return lambda values: np.asarray(np.percentile(values, share, axis=-1))
