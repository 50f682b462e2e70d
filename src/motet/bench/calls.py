"""Which requests a run sends, and when: popularity of adapters, arrivals, warm-up. Pure: the same seed, the same run.

Popularity gives request i its adapter:

    one             always the first
    distinct        each in turn, so that requests in flight together differ as much as they can
    uniform         any, equally likely
    zipf:ALPHA      the k-th with probability in proportion to k ** -ALPHA
    weights:5,3,1   in proportion to these

Arrivals are a closed loop (so many in flight; the next is sent when one ends) or an open loop at a rate, of single
requests (Poisson) or of bursts (a burst's requests come together, bursts at even distances).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from motet.errors import ConfigError

WARM_UP_TOKENS = 16
"""Longest answer of a warm-up request: what surprises the first request comes with its prompt and first steps."""

Content = str | tuple[int, ...] | tuple[dict[str, Any], ...]
"""A prompt: text, token ids or the messages of a chat."""


class Call(msgspec.Struct, frozen=True):
    """One request to send: the served name of its model, its prompt, the length of its answer, and in an open loop
    the second at which it is due."""

    model: str
    prompt: Content
    output: int
    at: float | None = None


@dataclass(frozen=True)
class Closed:
    """`concurrency` requests in flight; `together` starts them all at once and counts them all, otherwise a first wave
    of answers of different lengths, not counted, brings the requests out of step as in steady traffic."""

    concurrency: int
    together: bool = False


@dataclass(frozen=True)
class Open:
    """`rate` requests a second, in bursts of `burst`."""

    rate: float
    burst: int = 1


Arrival = Closed | Open


def chooser(popularity: str, names: Sequence[str], seed: int = 0) -> Iterator[str]:
    """The model of each request in turn. Raises ConfigError for a popularity that is not one of the above."""
    kind, _, values = popularity.partition(":")
    if kind == "one" and not values:
        return itertools.repeat(names[0])
    if kind == "distinct" and not values:
        return itertools.cycle(names)
    weights = _weights(kind, values, len(names), popularity)
    chance = random.Random(seed)
    return iter(lambda: chance.choices(names, weights)[0], None)


def _weights(kind: str, values: str, count: int, popularity: str) -> list[float]:
    if kind == "uniform" and not values:
        return [1.0] * count
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        numbers = []
    if kind == "zipf" and len(numbers) == 1:
        return [(rank + 1) ** -numbers[0] for rank in range(count)]
    if kind == "weights" and len(numbers) == count and sum(numbers) > 0:
        return numbers
    if kind == "weights" and numbers and len(numbers) != count:
        raise ConfigError(f"popularity {popularity!r} has {len(numbers)} weights for {count} models")
    raise ConfigError(
        f"popularity {popularity!r} is none of one, distinct, uniform, zipf:ALPHA and weights:W,W,…"
    )


def spread(calls: Sequence[Call], arrival: Open, seed: int = 0) -> list[Call]:
    """The calls with the seconds at which they are due, from 0 on."""
    chance, now, due = random.Random(seed), 0.0, []
    for i, call in enumerate(calls):
        if i and arrival.burst == 1:
            now += chance.expovariate(arrival.rate)
        elif i and i % arrival.burst == 0:
            now += arrival.burst / arrival.rate
        due.append(msgspec.structs.replace(call, at=now))
    return due


def lead_in(make: Callable[[int], Call], concurrency: int, output: int) -> list[Call]:
    """A first wave whose answers end one after the other, evenly over the time of a whole one."""
    return [make(max(1, output * (i + 1) // concurrency)) for i in range(concurrency)]


def warm_up(make: Callable[[str, int], Call], models: Sequence[str], times: int, output: int) -> list[Call]:
    """Each model `times` times in a row, with short answers."""
    length = min(output, WARM_UP_TOKENS)
    return [make(model, length) for model in models for _ in range(times)]
