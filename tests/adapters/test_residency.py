from __future__ import annotations

import pytest

from motet.adapters.residency import MAX_REMAKES, Residency
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


def test_what_finds_no_image_gives_its_pages_back_until_the_image_is_made_again(
    residency: Residency, pages: PageAllocator
) -> None:
    for digest in "ab":
        residency.begin_load(digest)
        residency.missed(digest)
        residency.check_integrity()
    assert residency.states() == {"a": "remaking", "b": "remaking"}
    assert (pages.free, residency.any_loading, residency.take_dropped()) == (11, False, ())
    assert residency.is_on_its_way("a")
    assert list(residency.to_remake()) == ["a", "b"]
    residency.begin_remake("b")
    assert (residency.being_remade, list(residency.to_remake())) == ("b", [])
    with pytest.raises(AssertionError, match="a must wait"):
        residency.begin_remake("a")
    residency.remade("b")
    assert residency.states() == {"a": "remaking", "b": "absent"}
    assert list(residency.to_remake()) == ["a"]
    load(residency, "b")


def test_the_tries_of_a_load_are_counted(residency: Residency) -> None:
    for _ in range(MAX_REMAKES):
        assert residency.may_remake("a")
        residency.begin_load("a")
        residency.missed("a")
        residency.remade("a")
    assert not residency.may_remake("a")
    load(residency, "a")
    assert residency.may_remake("a")


def test_an_image_that_cannot_be_made_again_leaves_an_absent_adapter(residency: Residency) -> None:
    residency.begin_load("a")
    residency.missed("a")
    residency.begin_remake("a")
    residency.failed("a")
    assert (residency.states()["a"], residency.being_remade) == ("absent", None)
    assert residency.may_remake("a")
    residency.check_integrity()


def test_one_that_is_forgotten_while_its_image_is_made_is_gone(residency: Residency) -> None:
    residency.begin_load("a")
    residency.missed("a")
    residency.begin_remake("a")
    residency.forget("a")
    assert residency.states() == {"b": "absent"}
    residency.remade("a")
    assert residency.being_remade is None
    residency.check_integrity()


def test_slots_are_taken_by_loading_and_ready_adapters(pages: PageAllocator) -> None:
    residency = Residency(pages, Reuse(pages.num_pages), slots=2)
    for digest in "abc":
        residency.register(digest, 1)
    load(residency, "a")
    assert not residency.is_full
    residency.begin_load("b")
    assert (residency.is_full, residency.lacks_slot) == (True, False), "a is idle"
    with pytest.raises(AssertionError, match="2 adapters are resident"):
        residency.begin_load("c")
    residency.claim("a")
    assert residency.lacks_slot
    residency.missed("b")
    assert (residency.is_full, residency.lacks_slot) == (False, False)
    residency.evict("a")
    residency.check_integrity()
    assert residency.num_resident == 0


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
