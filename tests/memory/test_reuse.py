from __future__ import annotations

from math import exp, log

import pytest

from motet.memory.reuse import NEVER, TURNOVERS, Reuse


def test_worth_is_the_log_of_the_sum_of_decayed_uses() -> None:
    reuse = Reuse(num_pages=10)
    tick = 1 / (10 * TURNOVERS)
    worth = reuse.used(NEVER, 1)
    assert worth == pytest.approx(tick)
    reuse.used(NEVER, 6)
    worth = reuse.used(worth, 1)
    assert worth == pytest.approx(log(exp(1 * tick) + exp(8 * tick)))


def test_old_uses_count_less_and_many_count_more() -> None:
    reuse = Reuse(num_pages=10)
    popular = NEVER
    for _ in range(10):
        popular = reuse.used(popular, 1)
    once = reuse.used(NEVER, 1)
    assert popular > once
    for _ in range(10 * TURNOVERS * 3):
        reuse.used(NEVER, 1)
    assert reuse.used(NEVER, 1) > popular, "after three units even ten uses are forgotten"
