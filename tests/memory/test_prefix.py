from __future__ import annotations

import random
from itertools import islice

import pytest

from motet.memory.pages import PageAllocator
from motet.memory.prefix import KEY_BYTES, PrefixIndex, extend_keys
from motet.memory.reuse import Reuse
from motet.types import KVGroup

FULL = KVGroup(layers=(0,))


def keys_of(adapter: str, tokens: list[int], page_tokens: int = 3, salt: str = "") -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, adapter, salt, tokens, page_tokens)
    return keys


@pytest.fixture
def pages() -> PageAllocator:
    return PageAllocator(11)


@pytest.fixture
def index(pages: PageAllocator) -> PrefixIndex:
    return PrefixIndex(pages, (FULL,), 3, Reuse(pages.num_pages))


def compute(index: PrefixIndex, pages: PageAllocator, keys: list[bytes]) -> tuple[int, ...]:
    """A sequence computes these blocks in pages of its own."""
    table = pages.alloc(len(keys), "kv")
    for key, page in zip(keys, table, strict=True):
        index.insert(key, 0, page)
    index.check_integrity()
    return table


def match(index: PrefixIndex, keys: list[bytes]) -> tuple[int, ...]:
    """What an index of one group knows of these blocks."""
    (table,) = index.match(keys)
    return table


def evict(index: PrefixIndex, count: int) -> None:
    """Free the cheapest idle pages."""
    index.evict([page for page, _ in islice(index.cheapest(), max(0, count))])


# Keys


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 2), (7, 2)])
def test_only_full_blocks_have_keys(length: int, blocks: int) -> None:
    assert len(keys_of("a", list(range(length)))) == blocks


def test_keys_grow_with_the_tokens_and_are_never_hashed_again() -> None:
    tokens = list(range(20))
    keys: list[bytes] = []
    for length in (0, 4, 9, 10, 20):
        extend_keys(keys, "a", "", tokens[:length], 3)
    assert keys == keys_of("a", tokens)
    extend_keys(keys, "a", "", tokens, 3)
    assert len(keys) == 6
    marked = [b"known"]
    extend_keys(marked, "a", "", tokens, 3)
    assert marked[0] == b"known"


def test_equal_blocks_have_equal_keys_only_after_equal_histories() -> None:
    block = [1, 2, 3]
    adapters = ["", "a", "b"]
    all_keys = [key for adapter in adapters for key in keys_of(adapter, [*block, *block, *block])]
    all_keys += keys_of("a", [3, 2, 1, *block])
    all_keys += keys_of("a", [1, 2, 2**40, *block])
    assert len(set(all_keys)) == 13
    assert all(len(key) == KEY_BYTES for key in all_keys)


def test_nothing_has_equal_keys_under_another_salt() -> None:
    block = [1, 2, 3]
    roots = [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("ab", ""), ("", "ab"), ("b", "a")]
    keys = [keys_of(adapter, block * 2, salt=salt) for adapter, salt in roots]
    assert len({key for pair in keys for key in pair}) == 14
    assert keys_of("a", block, salt="b") == keys[3][:1]


# The index


def test_match_finds_the_longest_run_from_the_start(index: PrefixIndex, pages: PageAllocator) -> None:
    tokens = list(range(9))
    table = compute(index, pages, keys_of("a", tokens))
    assert match(index, keys_of("a", tokens)) == table
    assert match(index, keys_of("a", [*tokens[:6], 99, 99, 99])) == table[:2]
    assert match(index, keys_of("a", [99, 99, 99, *tokens[3:]])) == ()
    assert match(index, []) == ()


def test_nothing_is_shared_between_adapters_or_with_the_base(
    index: PrefixIndex, pages: PageAllocator
) -> None:
    tokens = list(range(9))
    compute(index, pages, keys_of("a", tokens))
    assert match(index, keys_of("b", tokens)) == ()
    assert match(index, keys_of("", tokens)) == ()


def test_indexed_pages_stay_when_released_and_others_become_free(
    index: PrefixIndex, pages: PageAllocator
) -> None:
    table = compute(index, pages, keys_of("a", list(range(6))))
    tail = pages.alloc(1, "kv")
    index.release(table + tail)
    index.check_integrity()
    assert (pages.held("kv"), pages.held("cached"), pages.free) == (0, 2, 9)
    assert all(map(index.is_idle, table))


def test_a_shared_page_is_idle_after_its_last_user(index: PrefixIndex, pages: PageAllocator) -> None:
    keys = keys_of("a", list(range(6)))
    table = compute(index, pages, keys)
    index.share(table)
    index.release(table)
    assert pages.held("cached") == 0
    index.release(table)
    assert pages.held("cached") == 2
    index.share(match(index, keys))
    index.check_integrity()
    assert (pages.held("kv"), pages.held("cached")) == (2, 0)
    assert not any(map(index.is_idle, table))


def test_match_changes_nothing(index: PrefixIndex, pages: PageAllocator) -> None:
    keys = keys_of("a", list(range(6)))
    index.release(compute(index, pages, keys))
    before = list(index.cheapest())
    match(index, keys)
    assert list(index.cheapest()) == before


def test_the_least_recently_used_goes_first_and_the_tail_of_a_chain_before_its_head(
    index: PrefixIndex, pages: PageAllocator
) -> None:
    old_keys, new_keys = keys_of("a", list(range(9))), keys_of("b", list(range(6)))
    old, new = compute(index, pages, old_keys), compute(index, pages, new_keys)
    index.release(old)
    index.release(new)
    assert [page for page, _ in index.cheapest()] == [*old[::-1], *new[::-1]]
    evict(index, 2)
    index.check_integrity()
    assert match(index, old_keys) == old[:1]
    assert match(index, new_keys) == new
    index.share(old[:1])
    index.release(old[:1])
    evict(index, 2)
    assert match(index, old_keys) == old[:1]
    assert match(index, new_keys) == ()
    assert pages.free == 10


def test_a_block_that_several_have_used_outlives_those_of_one(
    index: PrefixIndex, pages: PageAllocator
) -> None:
    shared, once = keys_of("a", list(range(3))), keys_of("b", list(range(6)))
    first, others = compute(index, pages, shared), compute(index, pages, once)
    index.share(first)
    index.release(first)
    index.release(first)
    index.release(others)
    assert [page for page, _ in index.cheapest()] == [*others[::-1], *first]


def test_of_two_equal_blocks_the_first_is_known_and_the_other_free_when_released(
    index: PrefixIndex, pages: PageAllocator
) -> None:
    keys = keys_of("a", list(range(3)))
    first, second = compute(index, pages, keys), compute(index, pages, keys)
    assert match(index, keys) == first
    index.release(second)
    assert pages.free == 10
    assert match(index, keys) == first


def test_a_page_cannot_hold_two_blocks(index: PrefixIndex, pages: PageAllocator) -> None:
    keys = keys_of("a", list(range(6)))
    table = compute(index, pages, keys[:1])
    with pytest.raises(AssertionError, match="indexed already"):
        index.insert(keys[1], 0, table[0])


def test_random_use_never_returns_a_page_of_other_tokens(index: PrefixIndex, pages: PageAllocator) -> None:
    rng = random.Random(7)
    content: dict[int, bytes] = {}
    in_use: list[tuple[int, ...]] = []
    hits = 0
    for _ in range(2000):
        keys = keys_of(rng.choice(["", "a"]), [rng.randrange(2) for _ in range(rng.randrange(13))])
        hit = match(index, keys)
        hits += len(hit)
        assert [content[page] for page in hit] == keys[: len(hit)]
        needed = len(keys) - len(hit)
        spare = pages.free + sum(page not in hit for page, _ in index.cheapest())
        if needed <= spare:
            index.share(hit)
            evict(index, needed - pages.free)
            fresh = pages.alloc(needed, "kv")
            for key, page in zip(keys[len(hit) :], fresh, strict=True):
                index.insert(key, 0, page)
                content[page] = key
            in_use.append(hit + fresh)
        if in_use and (needed > spare or rng.random() < 0.4):
            index.release(in_use.pop(rng.randrange(len(in_use))))
        index.check_integrity()
        pages.check_integrity()
    assert hits > 500


# Groups

WINDOW = KVGroup(layers=(1,), window=4)  # behind n blocks of 3 it reads the last one
WIDE = KVGroup(layers=(2,), window=6)  # ... the last two
CHUNK = KVGroup(layers=(3,), chunk=9)  # ... the last n modulo 3


def known(
    index: PrefixIndex, pages: PageAllocator, keys: list[bytes], *blocks: set[int]
) -> list[dict[int, int]]:
    """Make some blocks of each group known: block → page."""
    places: list[dict[int, int]] = []
    for group, wanted in enumerate(blocks):
        places.append(dict(zip(sorted(wanted), pages.alloc(len(wanted), "kv"), strict=True)))
        for block, page in places[-1].items():
            index.insert(keys[block], group, page)
    index.check_integrity()
    return places


def test_a_bounded_group_needs_only_what_the_next_query_reads(pages: PageAllocator) -> None:
    index = PrefixIndex(pages, (FULL, WIDE), 3, Reuse(pages.num_pages))
    keys = keys_of("a", list(range(15)))
    full, wide = known(index, pages, keys, {0, 1, 2, 3}, {2, 3})
    assert index.match(keys) == ((full[0], full[1], full[2], full[3]), (-1, -1, wide[2], wide[3]))
    assert index.match(keys[:3]) == ((), ())
    assert index.match(keys_of("b", list(range(15)))) == ((), ())


def test_of_several_prefixes_the_longest_that_all_groups_can_go_on_from_is_chosen(
    pages: PageAllocator,
) -> None:
    index = PrefixIndex(pages, (WIDE, FULL), 3, Reuse(pages.num_pages))
    keys = keys_of("a", list(range(15)))
    wide, full = known(index, pages, keys, {0, 1, 3, 4}, {0, 1, 2, 3})
    assert index.match(keys) == ((wide[0], wide[1]), (full[0], full[1]))


def test_behind_the_end_of_a_chunk_nothing_of_its_group_is_read(pages: PageAllocator) -> None:
    index = PrefixIndex(pages, (FULL, CHUNK), 3, Reuse(pages.num_pages))
    keys = keys_of("a", list(range(15)))
    full, chunk = known(index, pages, keys, {0, 1, 2, 3, 4}, {3})
    assert index.match(keys[:3]) == ((full[0], full[1], full[2]), (-1, -1, -1))
    assert index.match(keys) == ((full[0], full[1], full[2], full[3]), (-1, -1, -1, chunk[3]))


def test_groups_share_no_pages_and_are_evicted_by_one_order(pages: PageAllocator) -> None:
    index = PrefixIndex(pages, (FULL, WINDOW), 3, Reuse(pages.num_pages))
    keys = keys_of("a", list(range(6)))
    full, window = known(index, pages, keys, {0, 1}, {0, 1})
    index.release([window[0]])
    index.release([full[0], full[1], window[1]])
    assert [page for page, _ in index.cheapest()] == [window[0], window[1], full[1], full[0]]
    evict(index, 1)
    assert index.match(keys) == ((full[0], full[1]), (-1, window[1]))
    evict(index, 1)
    assert index.match(keys) == ((), ())
    index.check_integrity()


def test_match_agrees_with_the_definition_for_any_blocks_and_groups() -> None:
    rng = random.Random(11)
    lengths = set()
    for _ in range(1500):
        pages = PageAllocator(40)
        bounds = [(0, 0), (4, 0), (6, 0), (10, 0), (0, 9), (0, 5), (7, 6), (1, 0)]
        groups = [KVGroup((), *rng.choice(bounds)) for _ in range(rng.randint(1, 3))]
        index = PrefixIndex(pages, groups, 3, Reuse(pages.num_pages))
        keys = keys_of("a", list(range(3 * rng.randint(0, 9))))
        density = rng.choice([0.6, 0.8, 0.95, 1.0])
        blocks = [{b for b in range(len(keys)) if rng.random() < density} for _ in groups]
        places = known(index, pages, keys, *blocks)
        firsts = {n: [g.first_key(3 * n) // 3 for g in groups] for n in range(len(keys) + 1)}
        best = max(
            n
            for n, first in firsts.items()
            if all({*range(f, n)} <= k for f, k in zip(first, blocks, strict=True))
        )
        lengths.add(best)
        assert index.match(keys) == tuple(
            tuple(-1 if block < first else place[block] for block in range(best))
            for first, place in zip(firsts[best], places, strict=True)
        )
    assert lengths == set(range(10))
