from __future__ import annotations

import random

from motet.adapters import ghosts
from motet.adapters.ghosts import SIZES, GhostList


def simulate_lru(asked: list[str], pages: dict[str, int], capacity: int) -> int:
    """Hits of a pool that keeps what was used last."""
    pool: dict[str, int] = {}
    hits = 0
    for digest in asked:
        hits += digest in pool
        pool.pop(digest, None)
        pool[digest] = pages[digest]
        while sum(pool.values()) > capacity:
            del pool[next(iter(pool))]
    return hits


def test_the_estimate_is_what_least_recently_used_pools_of_each_size_would_hit() -> None:
    rng = random.Random(1)
    pages = {f"a{i}": 3 for i in range(40)}
    asked = [f"a{min(int(rng.expovariate(0.15)), 39)}" for _ in range(3000)]
    list_ = GhostList(num_pages=48)
    for digest in asked:
        list_.ask(digest, pages[digest])
    assert list_.requests == 3000
    assert len(list_.hits()) == len(SIZES)
    for capacity, hits in list_.hits().items():
        assert hits == simulate_lru(asked, pages, capacity)
    assert len(set(list_.hits().values())) > 4


def test_a_bounded_number_is_remembered() -> None:
    list_ = GhostList(num_pages=1 << 20)
    for i in range(ghosts.REMEMBERED + 1):
        list_.ask(f"a{i}", 1)
    list_.ask("a1", 1)
    list_.ask("a0", 1)
    assert max(list_.hits().values()) == 1
    assert len(list_._pages) == ghosts.REMEMBERED
