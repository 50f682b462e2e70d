from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.memory.pages import Owner, PageAllocator


def test_a_new_pool_is_all_free() -> None:
    pages = PageAllocator(7)
    assert (pages.num_pages, pages.free) == (7, 7)
    pages.check_integrity()


def test_an_empty_pool_gives_nothing() -> None:
    pages = PageAllocator(0)
    assert pages.alloc(0, "kv") == ()
    pages.check_integrity()


def test_alloc_gives_distinct_pages_and_counts_their_owners() -> None:
    pages = PageAllocator(7)
    kv, weights = pages.alloc(2, "kv"), pages.alloc(3, "adapter")
    assert len({*kv, *weights}) == 5
    assert pages.free == 2
    assert (pages.held("kv"), pages.held("cached"), pages.held("adapter")) == (2, 0, 3)
    pages.check_integrity()


def test_more_than_is_free_is_a_mistake_of_ours_and_takes_nothing() -> None:
    pages = PageAllocator(3)
    pages.alloc(1, "kv")
    with pytest.raises(AssertionError, match="3 pages asked for, 2 free"):
        pages.alloc(3, "kv")
    assert pages.free == 2
    pages.check_integrity()


def test_a_shared_page_is_free_only_after_its_last_holder() -> None:
    pages = PageAllocator(2)
    (page,) = pages.alloc(1, "kv")
    pages.retain(page)
    assert pages.references(page) == 2
    pages.release([page])
    assert pages.free == 1
    assert pages.held("kv") == 1
    pages.release([page])
    assert pages.free == 2
    assert pages.held("kv") == 0
    pages.check_integrity()


def test_a_free_page_can_be_neither_released_nor_retained() -> None:
    pages = PageAllocator(1)
    with pytest.raises(AssertionError, match="free already"):
        pages.release([0])
    with pytest.raises(AssertionError, match="is free"):
        pages.retain(0)


def test_the_only_reference_can_change_hands() -> None:
    pages = PageAllocator(2)
    (page,) = pages.alloc(1, "kv")
    pages.hand_over(page, "cached")
    assert (pages.held("kv"), pages.held("cached")) == (0, 1)
    pages.retain(page)
    with pytest.raises(AssertionError, match="2 holders"):
        pages.hand_over(page, "kv")
    pages.check_integrity()


def test_check_integrity_sees_a_page_that_is_free_and_held() -> None:
    pages = PageAllocator(3)
    pages.alloc(2, "kv")
    pages._free.append(0)
    with pytest.raises(AssertionError):
        pages.check_integrity()


OWNERS: list[Owner] = ["kv", "cached", "adapter"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from(OWNERS)), max_size=60))
def test_any_order_of_calls_agrees_with_a_plain_count(events: list[tuple[int, int, Owner]]) -> None:
    pages = PageAllocator(13)
    held: list[int] = []  # one entry per reference
    owner: dict[int, Owner] = {}
    for kind, number, who in events:
        if kind == 0 and number <= pages.free:
            taken = pages.alloc(number, who)
            assert not set(taken) & set(held)
            held += taken
            owner |= dict.fromkeys(taken, who)
        elif kind == 1 and held:
            pages.retain(held[number % len(held)])
            held.append(held[number % len(held)])
        elif kind == 2 and held:
            pages.release([held.pop(number % len(held))])
        elif kind == 3 and held and held.count(page := held[number % len(held)]) == 1:
            pages.hand_over(page, who)
            owner[page] = who
        pages.check_integrity()
        assert pages.free == 13 - len(set(held))
        assert all(pages.references(page) == held.count(page) for page in range(13))
        assert all(pages.held(who) == sum(owner[page] == who for page in set(held)) for who in OWNERS)
