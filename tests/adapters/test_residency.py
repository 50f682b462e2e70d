from __future__ import annotations

import pytest

from motet.adapters.residency import Residency
from motet.memory.pages import PageAllocator
from motet.memory.reuse import Reuse
from motet.types import BASE


@pytest.fixture
def pages() -> PageAllocator:
    return PageAllocator(11)


@pytest.fixture
def residency(pages: PageAllocator) -> Residency:
    residency = Residency(pages, Reuse(pages.num_pages))
    residency.register("a", 3)
    residency.register("b", 5)
    return residency


def load(residency: Residency, digest: str) -> None:
    residency.begin_load(digest)
    residency.loaded(digest)
    residency.check_integrity()


def idle(residency: Residency) -> list[str]:
    return [digest for digest, _ in residency.cheapest()]


def test_the_base_is_always_ready_and_takes_nothing(residency: Residency) -> None:
    assert residency.accepts(BASE)
    assert residency.is_ready(BASE)
    assert residency.num_pages(BASE) == 0
    for _ in range(2):
        residency.claim(BASE)
        residency.pin(BASE)
        residency.unpin(BASE)
        residency.unclaim(BASE)
    assert idle(residency) == []
    assert BASE not in residency.states()
    residency.check_integrity()


def test_a_load_goes_from_absent_over_loading_to_ready(residency: Residency, pages: PageAllocator) -> None:
    assert residency.states() == {"a": "absent", "b": "absent"}
    begun = residency.begin_load("a")
    assert (begun.digest, len(begun.pages)) == ("a", 3)
    assert residency.states()["a"] == "loading"
    assert residency.any_loading
    assert idle(residency) == []
    residency.check_integrity()
    residency.loaded("a")
    assert residency.is_ready("a")
    assert not residency.any_loading
    assert (idle(residency), residency.idle_pages) == (["a"], 3)
    assert pages.held("adapter") == 3
    assert residency.loads == 1
    residency.check_integrity()


def test_a_load_begins_once_and_ends_once(residency: Residency) -> None:
    residency.begin_load("a")
    with pytest.raises(AssertionError, match="a is loading"):
        residency.begin_load("a")
    residency.loaded("a")
    with pytest.raises(AssertionError, match="a is ready"):
        residency.loaded("a")
    with pytest.raises(AssertionError, match="a is ready"):
        residency.failed("a")


def test_a_failed_load_gives_its_pages_back_and_can_be_tried_again(
    residency: Residency, pages: PageAllocator
) -> None:
    residency.begin_load("a")
    residency.failed("a")
    assert residency.states()["a"] == "absent"
    assert pages.free == 11
    assert residency.accepts("a")
    assert residency.take_dropped() == ()
    residency.check_integrity()
    load(residency, "a")
    assert residency.is_ready("a")


def test_only_ready_adapters_can_be_pinned(residency: Residency) -> None:
    with pytest.raises(AssertionError, match="not ready"):
        residency.pin("a")
    residency.begin_load("a")
    with pytest.raises(AssertionError, match="not ready"):
        residency.pin("a")


def test_pinned_adapters_are_never_victims(residency: Residency) -> None:
    load(residency, "a")
    residency.claim("a")
    residency.claim("a")
    residency.pin("a")
    residency.pin("a")
    assert idle(residency) == []
    residency.unpin("a")
    assert idle(residency) == []
    residency.check_integrity()
    residency.unpin("a")
    assert (idle(residency), residency.idle_pages, residency.wanted()) == ([], 0, ("a",))
    residency.unclaim("a")
    residency.unclaim("a")
    assert (idle(residency), residency.idle_pages, residency.wanted()) == (["a"], 3, ())
    with pytest.raises(AssertionError, match="b is in use"):
        residency.evict("b")


def test_the_least_recently_used_is_the_first_victim(residency: Residency) -> None:
    load(residency, "a")
    load(residency, "b")
    assert idle(residency) == ["a", "b"]
    residency.claim("a")
    residency.pin("a")
    residency.unpin("a")
    residency.unclaim("a")
    assert idle(residency) == ["b", "a"]


def test_an_evicted_adapter_is_absent_known_and_reported_once(
    residency: Residency, pages: PageAllocator
) -> None:
    load(residency, "a")
    residency.evict("a")
    residency.check_integrity()
    assert residency.states()["a"] == "absent"
    assert residency.accepts("a")
    assert pages.free == 11
    assert residency.evictions == 1
    assert residency.any_dropped
    assert residency.take_dropped() == ("a",)
    assert residency.take_dropped() == ()


def test_forgetting_an_idle_adapter_frees_it_at_once(residency: Residency, pages: PageAllocator) -> None:
    load(residency, "a")
    residency.forget("a")
    residency.check_integrity()
    assert not residency.accepts("a")
    assert "a" not in residency.states()
    assert pages.free == 11
    assert residency.take_dropped() == ("a",)
    assert residency.evictions == 0


def test_forgetting_what_is_absent_or_unknown_reports_nothing(residency: Residency) -> None:
    residency.forget("a")
    residency.forget("never seen")
    assert residency.states() == {"b": "absent"}
    assert residency.take_dropped() == ()


def test_a_forgotten_adapter_drains(residency: Residency, pages: PageAllocator) -> None:
    residency.claim("a")
    residency.claim("a")
    residency.forget("a")
    assert not residency.accepts("a")
    assert residency.states()["a"] == "draining"
    load(residency, "a")
    residency.pin("a")
    residency.unpin("a")
    residency.unclaim("a")
    assert residency.is_ready("a")
    assert residency.states()["a"] == "draining"
    residency.check_integrity()
    residency.unclaim("a")
    assert "a" not in residency.states()
    assert pages.free == 11
    assert residency.take_dropped() == ("a",)
    residency.check_integrity()


@pytest.mark.parametrize("ok", [True, False])
def test_an_adapter_forgotten_while_it_loads_keeps_its_pages_until_the_copy_ends(
    residency: Residency, pages: PageAllocator, ok: bool
) -> None:
    residency.begin_load("a")
    residency.forget("a")
    residency.check_integrity()
    assert pages.held("adapter") == 3
    if ok:
        residency.loaded("a")
    else:
        residency.failed("a")
    residency.check_integrity()
    assert "a" not in residency.states()
    assert pages.free == 11
    assert residency.take_dropped() == (("a",) if ok else ())


def test_a_draining_adapter_can_be_registered_again(residency: Residency) -> None:
    load(residency, "a")
    residency.claim("a")
    residency.forget("a")
    residency.register("a", 3)
    assert residency.accepts("a")
    residency.unclaim("a")
    assert residency.is_ready("a")
    with pytest.raises(AssertionError, match="has 3 pages, not 4"):
        residency.register("a", 4)
