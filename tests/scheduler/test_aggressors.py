"""A quiet tenant beside four aggressors, simulated: half a minute of each, thousands of steps of the real scheduler."""

from __future__ import annotations

import pytest

from benchmarks.fairness import (
    AGGRESSORS,
    QUIET,
    QUIET_TENANT,
    Result,
    all_together,
    case,
    jain,
    measure,
    p95,
)

SECONDS, ROWS = 30.0, 1024


@pytest.fixture(scope="module")
def alone() -> Result:
    return measure([QUIET_TENANT], True, SECONDS, ROWS)


@pytest.mark.parametrize("name", AGGRESSORS)
def test_the_quiet_tenant_hardly_notices_an_aggressor_and_throughput_stays(name: str, alone: Result) -> None:
    found = case(name, SECONDS, ROWS)
    assert found.fair.steps > 500
    assert len(found.fair.ttft[QUIET]) >= 40
    assert p95(found.fair.ttft[QUIET]) <= 1.5 * p95(alone.ttft[QUIET])
    assert p95(found.first.ttft[QUIET]) > 3 * p95(alone.ttft[QUIET]), "it was no aggressor"
    assert found.throughput >= 0.95


def test_four_aggressors_share_what_they_want() -> None:
    together = all_together(SECONDS / 3, ROWS)
    first, fair = (jain(list(result.served.values())) for result in (together.first, together.fair))
    assert fair > first
