"""What a step does not look for in vain."""

from __future__ import annotations

from typing import Any

import pytest

from motet.scheduler.stage import Stage
from motet.types import Account
from tests.scheduler.driver import Driver


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tenants for which somebody was looked for who must give way."""
    found: list[str] = []
    search = Stage._who_gives_way

    def counted(stage: Stage, seq: Any, *rest: Any) -> Any:
        found.append(seq.request.account.tenant)
        return search(stage, seq, *rest)

    monkeypatch.setattr(Stage, "_who_gives_way", counted)
    return found


def test_with_all_places_full_one_search_in_vain_is_enough(searches: list[str]) -> None:
    """The only one who holds more than its share is the oldest, which never gives way."""
    driver = Driver(num_pages=200, max_running=1)
    driver.add("first", 4, account=Account("first"))
    driver.run(2)
    for i in range(12):
        driver.add(str(i), 4, account=Account(f"tenant {i}", weight=2.0))
    assert driver.rows(driver.plan()) == {"first": 1}
    assert len(searches) == 1


def test_for_those_whose_turn_comes_last_nobody_is_looked_for(searches: list[str]) -> None:
    """Who holds all was served least, so it need not give way; that takes no search at all."""
    driver = Driver(num_pages=200, max_running=3)
    for i in range(3):
        driver.add(f"large {i}", 4, account=Account("large"))
    driver.run(2)
    ledger = driver.scheduler._stage.ledger
    for i in range(12):
        account = Account(f"tenant {i}")
        driver.add(str(i), 4, account=account)
        ledger._classes[0].tenants.settled[account.tenant] += 1e6
    assert set(driver.rows(driver.plan())) == {"large 0", "large 1", "large 2"}
    assert searches == []


def test_who_needs_less_than_one_that_found_nobody_is_looked_for(searches: list[str]) -> None:
    driver = Driver(num_pages=20, max_running=3, prefix_caching=False)
    for i in range(3):
        driver.add(f"big {i}", 16, account=Account("big"))
    driver.run(2)
    driver.add("large", 60, account=Account("large", weight=4.0))
    driver.add("small", 8, account=Account("small"))
    plan = driver.plan()
    assert searches == ["large", "small"]
    assert set(driver.rows(plan)) == {"big 0", "big 1", "small"}
