from __future__ import annotations

import random

import pytest

from motet.scheduler.blocks import GONE, BlockTables, KVLayout
from motet.types import KVGroup

FULL = KVGroup(layers=(0,))
WINDOW = KVGroup(layers=(1,), window=5)
CHUNK = KVGroup(layers=(2,), chunk=6)


def layout(*groups: KVGroup, page_tokens: int = 3, max_step_tokens: int = 7) -> KVLayout:
    return KVLayout(groups, page_tokens, max_step_tokens)


def take(blocks: BlockTables, known: int, end: int, first_page: int) -> None:
    """Give it the pages that it lacks, numbered from `first_page`."""
    lacking = blocks.lacking(known, end)
    blocks.extend(tuple(range(first_page, first_page + lacking)), known, end)


def tables(blocks: BlockTables) -> list[list[int]]:
    return [list(table) for table in blocks.tables]


# Bounds


@pytest.mark.parametrize("page_tokens", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("max_step_tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("bounds", [(1, 0), (2, 0), (7, 0), (16, 0), (0, 1), (0, 5), (0, 12), (5, 8), (9, 4)])
def test_the_bounds_of_a_group_are_what_the_hungriest_chunk_needs(
    page_tokens: int, max_step_tokens: int, bounds: tuple[int, int]
) -> None:
    group = KVGroup((0,), *bounds)
    it = layout(group, page_tokens=page_tokens, max_step_tokens=max_step_tokens)

    def hungriest(chunk_tokens: int, num_tokens: int) -> int:
        """Of all chunks of so many tokens in a long sequence, the most pages from the first key to the last."""
        return max(
            (min(start + chunk_tokens, num_tokens) - 1) // page_tokens - it.first_block(0, start) + 1
            for start in range(num_tokens)
        )

    # Chunks of positions that are whole pages never begin within one: there the bound is a page too high.
    slack = int(group.chunk > 0)
    for bound, chunk_tokens in ((it.step_bounds[0], max_step_tokens), (it.decode_bounds[0], 1)):
        assert bound - slack <= hungriest(chunk_tokens, 200) <= bound
    for num_tokens in (1, 3, 8, 20):
        assert hungriest(max_step_tokens, num_tokens) <= it.most_pages(num_tokens)
        assert it.most_pages(num_tokens) <= -(-num_tokens // page_tokens)


def test_unbounded_groups_need_all_pages_and_bounded_ones_their_bound() -> None:
    it = layout(FULL, WINDOW)
    assert it.most_pages(9) == 3 + 3
    assert it.most_pages(90) == 30 + 5


# Tables


def test_unbounded_groups_take_pages_for_all_known_tokens_and_bounded_ones_for_the_chunk() -> None:
    blocks = BlockTables(layout(FULL, WINDOW), ((), ()))
    assert blocks.lacking(20, 7) == 7 + 3
    take(blocks, 20, 7, first_page=50)
    assert tables(blocks) == [[50, 51, 52, 53, 54, 55, 56], [57, 58, 59]]
    assert blocks.num_tokens == 9
    assert blocks.lacking(20, 9) == 0
    assert blocks.lacking(20, 10) == 1
    assert blocks.pages() == [50, 57, 51, 58, 52, 59, 53, 54, 55, 56]


def test_pages_are_dropped_once_all_their_tokens_are_out_of_reach() -> None:
    blocks = BlockTables(layout(FULL, WINDOW, CHUNK), ((), (), ()))
    take(blocks, 12, 12, first_page=50)
    assert tables(blocks) == [[50, 51, 52, 53], [54, 55, 56, 57], [58, 59, 60, 61]]
    assert blocks.drop_unread(5) == []
    assert blocks.drop_unread(6) == [58, 59]
    assert blocks.drop_unread(7) == [54]
    assert blocks.drop_unread(12) == [55, 60, 61]
    assert blocks.drop_unread(12) == []
    assert tables(blocks) == [[50, 51, 52, 53], [GONE, GONE, 56, 57], [GONE] * 4]
    blocks.check_integrity(computed=12, known=13, max_blocks=9)
    take(blocks, 13, 13, first_page=70)
    assert tables(blocks) == [[50, 51, 52, 53, 70], [GONE, GONE, 56, 57, 71], [GONE] * 4 + [72]]


def test_tables_begin_with_a_cached_prefix() -> None:
    blocks = BlockTables(layout(FULL, WINDOW), ((1, 2, 3), (GONE, 4, 5)))
    assert (blocks.num_tokens, blocks.pages()) == (9, [1, 2, 4, 3, 5])
    assert blocks.lacking(13, 11) == 2 + 1
    take(blocks, 13, 11, first_page=50)
    assert tables(blocks) == [[1, 2, 3, 50, 51], [GONE, 4, 5, 52]]
    assert blocks.drop_unread(11) == [4]


def test_pages_to_come_are_those_of_the_prompt_up_to_the_bound() -> None:
    blocks = BlockTables(layout(FULL, WINDOW), ((), ()))
    assert blocks.to_come(7, 7) == 0
    assert blocks.to_come(12, 7) == 1
    assert blocks.to_come(90, 7) == 2
    take(blocks, 90, 7, first_page=50)
    assert blocks.to_come(90, 7) == 2
    take(blocks, 90, 14, first_page=90)
    assert blocks.to_come(90, 14) == 0
    assert blocks.drop_unread(14) == [80, 81, 82]
    assert blocks.to_come(90, 14) == 3


def test_a_decoding_window_grows_only_as_long_as_it_is_not_full() -> None:
    blocks = BlockTables(layout(FULL, WINDOW), ((), ()))
    take(blocks, 6, 6, first_page=50)
    assert blocks.may_grow(2) == 0
    assert blocks.may_grow(9) == 2
    take(blocks, 7, 7, first_page=60)
    assert blocks.may_grow(9) == 1
    assert blocks.drop_unread(7) == [52]
    assert blocks.may_grow(9) == 2
    assert blocks.may_grow(3) == 0


def test_a_walk_through_a_prompt_never_holds_more_than_was_announced() -> None:
    rng = random.Random(5)
    for _ in range(500):
        groups = [KVGroup((), rng.choice([0, 1, 4, 9]), rng.choice([0, 0, 5, 8])) for _ in range(3)]
        max_step_tokens, known = rng.randint(1, 9), rng.randint(1, 60)
        it = layout(*groups, page_tokens=rng.randint(1, 4), max_step_tokens=max_step_tokens)
        blocks = BlockTables(it, it.no_blocks)
        announced, computed, page = it.most_pages(known), 0, 0
        while computed < known:
            end = min(known, computed + rng.randint(1, max_step_tokens))
            to_come = blocks.to_come(known, end)
            take(blocks, known, end, first_page=page)
            held, page = len(blocks.pages()), page + 500
            assert held + to_come <= announced
            announced = held + to_come
            blocks.drop_unread(end)
            blocks.check_integrity(end, known, max_blocks=60)
            computed = end
            assert len(blocks.pages()) + blocks.to_come(known, computed) <= announced
        assert blocks.to_come(known, computed) == 0
