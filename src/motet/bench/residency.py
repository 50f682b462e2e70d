"""Policies of residency against each other on made-up traffic: who should leave the pool?

A trace is a series of uses of adapters and of cached conversations. A use of what is not in the pool is a miss: it is
brought back, at its cost in seconds, and others leave by the policy until it fits.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from math import exp, log

from motet.memory.reuse import NEVER, Reuse
from motet.memory.victims import Idle

COPY_SECONDS = 300e-6
"""Of a page of 1 MiB: 0.71 GB of adapter took 0.2 s on an H200."""

PREFILL_SECONDS = 600e-6
"""Of the tokens whose KV fills one: twice that, as in `adapters.residency.PAGE_COST`."""

LOAD_SECONDS = 5e-3
"""Of a load besides its copy: a file is opened, a step passes."""


@dataclass(frozen=True, slots=True)
class Item:
    """An adapter (named by a number from 0), or a conversation's KV (from -1 down), of so many pages."""

    id: int
    pages: int

    @property
    def seconds(self) -> float:
        """To bring it back."""
        if self.id < 0:
            return PREFILL_SECONDS * self.pages
        return COPY_SECONDS * self.pages + LOAD_SECONDS


Trace = Sequence[Item]
Cost = Callable[[Item], float]


def adapters(count: int, rng: random.Random) -> list[Item]:
    """Adapters of mixed ranks."""
    return [Item(i, rng.choice([4, 8, 8, 16, 16, 32, 64])) for i in range(count)]


def zipf(items: Sequence[Item], alpha: float, uses: int, rng: random.Random) -> Iterator[Item]:
    """The k-th item is used in proportion to k^-alpha."""
    ends = list(accumulate((k + 1) ** -alpha for k in range(len(items))))
    for _ in range(uses):
        yield items[bisect_left(ends, rng.random() * ends[-1])]


def drift(items: Sequence[Item], uses: int, rng: random.Random) -> Iterator[Item]:
    """Zipf(1); ten times all is forgotten and others are popular."""
    for _ in range(10):
        yield from zipf(rng.sample(items, len(items)), 1.0, uses // 10, rng)


def bursts(items: Sequence[Item], uses: int, rng: random.Random) -> Iterator[Item]:
    """Six adapters at a time, each for some 20 requests."""
    chosen = zipf(items, 0.8, uses, rng)
    live: list[tuple[Item, float]] = []
    for _ in range(uses):
        live += [(next(chosen), rng.expovariate(1 / 20)) for _ in range(6 - len(live))]
        place = rng.randrange(len(live))
        item, left = live.pop(place)
        yield item
        if left > 1:
            live.append((item, left - 1))


def scan(items: Sequence[Item], uses: int, rng: random.Random) -> Iterator[Item]:
    """Half Zipf(1) over a fifth of them, half somebody who goes through all others again and again."""
    popular, others = items[: len(items) // 5], cycle(items[len(items) // 5 :])
    for item in zipf(popular, 1.0, uses, rng):
        yield item if rng.random() < 0.5 else next(others)


def mixed(items: Sequence[Item], uses: int, rng: random.Random) -> Iterator[Item]:
    """Half Zipf(1), half turns of conversations, most of which have few."""
    live: list[tuple[Item, int]] = []
    begun = 0
    for item in zipf(items, 1.0, uses, rng):
        if rng.random() < 0.5:
            yield item
            continue
        if not live or rng.random() < 0.3:
            begun += 1
            live.append((Item(-begun, rng.randint(8, 48)), rng.choice([1, 1, 2, 4, 8])))
        talk, turns = live.pop(-1 - int(rng.expovariate(1 / 15)) % len(live))
        yield talk
        if turns > 1:
            live.append((talk, turns - 1))


def traces(count: int, uses: int, seed: int) -> dict[str, Trace]:
    """One of each kind, over so many adapters."""
    rng = random.Random(seed)
    items = adapters(count, rng)
    kinds: dict[str, Iterable[Item]] = {
        f"zipf {alpha}": zipf(items, alpha, uses, rng) for alpha in (0.6, 0.8, 1.0, 1.2)
    }
    kinds |= {
        "drift": drift(items, uses, rng),
        "bursts": bursts(items, uses, rng),
        "scan": scan(items, uses, rng),
        "mixed": mixed(items, uses, rng),
    }
    return {name: tuple(kind) for name, kind in kinds.items()}


class Policy:
    """The cost to lose an item, told at each use; `lost` is the cost of the last victim."""

    def used(self, item: Item, *, missed: bool, lost: float) -> float:
        raise NotImplementedError


class Fifo(Policy):
    def __init__(self) -> None:
        self._loaded: dict[Item, float] = {}
        self._clock = 0.0

    def used(self, item: Item, *, missed: bool, lost: float) -> float:
        del lost
        self._clock += 1
        if missed:
            self._loaded[item] = self._clock
        return self._loaded[item]


class Lru(Policy):
    def __init__(self) -> None:
        self._clock = 0.0

    def used(self, item: Item, *, missed: bool, lost: float) -> float:
        del item, missed, lost
        self._clock += 1
        return self._clock


class Ageing(Policy):
    """LFU with ageing (Arlitt et al., 2000): uses since it came, on top of the cost of the last victim.

    With `by_cost` GDSF (Cherkasova, 1998): uses weighted by seconds per page.
    """

    def __init__(self, by_cost: bool) -> None:
        self._by_cost = by_cost
        self._uses: dict[Item, int] = {}

    def used(self, item: Item, *, missed: bool, lost: float) -> float:
        self._uses[item] = 1 if missed else self._uses[item] + 1
        return lost + self._uses[item] * (item.seconds / item.pages / PREFILL_SECONDS if self._by_cost else 1)


class CostModel(Policy):
    """What the scheduler does: decayed uses, times seconds per page."""

    def __init__(self, num_pages: int) -> None:
        self._reuse = Reuse(num_pages)
        self._worth: dict[Item, float] = {}

    def used(self, item: Item, *, missed: bool, lost: float) -> float:
        del lost
        if missed and item.id < 0:
            self._worth.pop(item, None)  # of KV that is gone nothing is remembered
        self._worth[item] = self._reuse.used(self._worth.get(item, NEVER), item.pages)
        return self._worth[item] + log(item.seconds / item.pages)


def policies(num_pages: int) -> dict[str, Policy]:
    return {
        "FIFO": Fifo(),
        "LRU": Lru(),
        "LFU, ageing": Ageing(by_cost=False),
        "GDSF": Ageing(by_cost=True),
        "cost model": CostModel(num_pages),
    }


@dataclass(frozen=True, slots=True)
class Outcome:
    """`seconds` is the time that misses took to bring back, `copied` the pages of adapters among them."""

    misses: float
    copied: int
    seconds: float


def replay(trace: Trace, policy: Policy, num_pages: int) -> Outcome:
    """The trace through a pool of so many pages."""
    pool: Idle[Item] = Idle()
    free, lost = num_pages, 0.0
    misses, copied, seconds = 0, 0, 0.0
    for item in trace:
        missed = item not in pool
        if missed:
            misses += 1
            seconds += item.seconds
            copied += item.pages if item.id >= 0 else 0
            while free < item.pages:
                victim, lost = next(pool.cheapest())
                pool.remove(victim)
                free += victim.pages
            free -= item.pages
        else:
            pool.remove(item)
        pool.add(item, policy.used(item, missed=missed, lost=lost))
    return Outcome(misses / len(trace), copied, seconds)


@dataclass(frozen=True, slots=True)
class Row:
    """A trace through a pool, by each policy."""

    num_pages: int
    trace: str
    outcomes: dict[str, Outcome]

    @property
    def best(self) -> float:
        return min(outcome.seconds for outcome in self.outcomes.values())


def compare(sizes: Iterable[int], count: int, uses: int, seed: int) -> Iterator[Row]:
    """Every trace through every size of pool."""
    made = traces(count, uses, seed)
    for num_pages in sizes:
        for name, trace in made.items():
            outcomes = {
                policy_name: replay(trace, policy, num_pages)
                for policy_name, policy in policies(num_pages).items()
            }
            yield Row(num_pages, name, outcomes)


def overall(rows: Sequence[Row], policy: str) -> tuple[float, float]:
    """How many times the best policy's seconds it takes: the geometric mean over all rows, and the worst."""
    ratios = [row.outcomes[policy].seconds / row.best for row in rows]
    return exp(sum(map(log, ratios)) / len(ratios)), max(ratios)
