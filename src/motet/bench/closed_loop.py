"""A fixed number of requests in flight, and when their tokens come: the cases that peers are measured with.

    steady     every adapter in turn, requests out of step, as under real traffic
    together   the same, all starting at once
    base       no request uses an adapter, all adapters are known
    alone      one request at a time, with an adapter
    cold       an adapter never seen arrives while others decode
    crowd      twice as many adapters, short answers
    many       64 adapters, all in the pool before it begins, each request with another one
    zipf       128 adapters, more than the pool holds, the i-th asked for 1/i times as often as the first; short answers

Prompts are random token ids, all different; answers have their full length. OTPS is the output tokens per second of one
request, the inverse of the mean time per output token; TTFT the time to the first token.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Event

import msgspec

from motet.engine.loop import Engine
from motet.types import BASE, Request, SamplingParams

MANY, ZIPF = 64, 128
"""Different adapters of the cases of these names."""


class Result(msgspec.Struct, frozen=True):
    """What a case gave. Times are in milliseconds, gaps are between tokens of one request."""

    system: str
    case: str
    requests: int
    in_flight: int
    otps: float
    tpot_ms: float
    ttft_mean_ms: float
    ttft_max_ms: float
    tokens_per_s: float
    gap_p99_ms: float
    gap_max_ms: float
    cold_ttft_ms: tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """`adapter_of(i)` is request i's adapter, by number; None is the base.

    `steady` gives the first wave staggered lengths; `warm` has every adapter used once before it begins. Each of
    `newcomers` is an adapter sent once, 150 steps apart, on top of a single wave.
    """

    requests: int
    in_flight: int
    adapter_of: Callable[[int], int | None]
    output: int = 600
    steady: bool = False
    warm: bool = False
    newcomers: tuple[int, ...] = ()


def cases(in_flight: int, adapters: int, output: int = 600) -> dict[str, Case]:
    """The cases by name; answers have `output` tokens, those of `alone` half, those of `crowd` a third."""
    n = in_flight
    popular = random.Random(1).choices(range(ZIPF), [1 / (i + 1) for i in range(ZIPF)], k=16 * n)
    return {
        "steady": Case(4 * n, n, lambda i: i % adapters, output, steady=True),
        "together": Case(2 * n, n, lambda i: i % adapters, output),
        "base": Case(3 * n, n, lambda _: None, output, steady=True),
        "alone": Case(2, 1, lambda i: i % adapters, output // 2),
        "cold": Case(n - 1, n - 1, lambda i: i % max(adapters - 1, 1), output, newcomers=(20, 21, 22)),
        "crowd": Case(3 * n, n, lambda i: 30 + i % (2 * adapters), output // 3, steady=True),
        "zipf": Case(len(popular), n, popular.__getitem__, output // 3, steady=True),
        "many": Case(max(MANY, 2 * n), n, lambda i: i % MANY, output // 2, steady=True, warm=True),
    }


@dataclass
class _Clock:
    """When requests were sent and their tokens came, in seconds."""

    sent: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)

    def token(self, request: str, now: float, tokens: int) -> None:
        if request in self.first:
            self.gaps.append(now - self.last[request])
        self.first.setdefault(request, now)
        self.last[request] = now
        self.count[request] = self.count.get(request, 0) + tokens


class ClosedLoop:
    """Drives an engine in this process; `digest_of(number)` makes sure that the engine knows an adapter.

    `loaded` is what the engine sets when a load ends: who steps on meanwhile takes the interpreter from the thread that
    copies.
    """

    def __init__(
        self,
        engine: Engine,
        loaded: Event,
        digest_of: Callable[[int], str],
        vocabulary: int,
        prompt: int = 1600,
    ) -> None:
        self._engine = engine
        self._loaded = loaded
        self._digest_of = digest_of
        self._vocabulary = vocabulary
        self._prompt = prompt
        self._serial = 0

    def run(self, name: str, case: Case) -> Result:
        """One case from start to end."""
        for number in {case.adapter_of(i) for i in range(case.requests)} | set(case.newcomers):
            if number is not None:
                self._digest_of(number)
        self._random = random.Random(1)
        if case.warm:
            self._started(replace(case, output=2, steady=False)).finish(name)
        return self._started(case).finish(name)

    def _started(self, case: Case) -> _Run:
        return _Run(case, self._engine, self._loaded, self._submit)

    def _submit(self, adapter: int | None, length: int) -> Request:
        self._serial += 1
        low = self._vocabulary // 200
        prompt = tuple(self._random.randrange(low, self._vocabulary) for _ in range(self._prompt))
        params = SamplingParams(max_tokens=length, temperature=1.0, ignore_eos=True, seed=self._serial)
        digest = BASE if adapter is None else self._digest_of(adapter)
        return Request(f"r{self._serial}", prompt, params, digest, time.perf_counter())


class _Run:
    """One case under way."""

    def __init__(
        self, case: Case, engine: Engine, loaded: Event, request: Callable[[int | None, int], Request]
    ) -> None:
        self._case = case
        self._engine = engine
        self._loaded = loaded
        self._request = request
        self._clock = _Clock()
        self._live: set[str] = set()
        self._issued = 0
        self._first_wave: set[str] = set()
        self._cold: list[str] = []

    def finish(self, name: str) -> Result:
        """Run to the end."""
        case, began, steps = self._case, time.perf_counter(), 0
        while self._issued < min(case.in_flight, case.requests):
            self._first_wave.add(self._issue())
        while self._live:
            self._step()
            steps += 1
            sent = len(self._cold)
            if sent < len(case.newcomers) and steps >= 150 * (sent + 1):
                self._cold.append(self._send(case.newcomers[sent], 20))
        # in a steady case the first wave's prompts all came at once, which is not what is measured
        skipped = self._first_wave if case.steady else set()
        return _result(name, case, self._clock, skipped, self._cold, time.perf_counter() - began)

    def _step(self) -> None:
        if self._engine.must_wait:
            self._loaded.wait()
        self._loaded.clear()  # before the step, which takes in what has ended by now
        for output in self._engine.step():
            if output.error is not None:
                raise RuntimeError(f"{output.request_id}: {output.error}")
            self._clock.token(output.request_id, time.perf_counter(), len(output.token_ids))
            if output.finish is not None:
                self._live.discard(output.request_id)
                if self._issued < self._case.requests and not self._case.newcomers:
                    self._issue()

    def _issue(self) -> str:
        case, number = self._case, self._issued
        self._issued += 1
        staggered = case.steady and number < case.in_flight
        length = max(case.output * (number + 1) // case.in_flight, 1) if staggered else case.output
        return self._send(case.adapter_of(number), length)

    def _send(self, adapter: int | None, length: int) -> str:
        request = self._request(adapter, length)
        self._clock.sent[request.id] = time.perf_counter()
        self._live.add(request.id)
        for output in self._engine.add(request):
            raise RuntimeError(f"{request.id}: {output.error}")
        return request.id


def _result(
    name: str, case: Case, clock: _Clock, skipped: set[str], cold: Sequence[str], wall: float
) -> Result:
    ttft = {request: clock.first[request] - sent for request, sent in clock.sent.items()}
    counted = [ttft[request] for request in ttft if request not in skipped and request not in cold]
    per_token = [
        (clock.last[request] - clock.first[request]) / max(count - 1, 1)
        for request, count in clock.count.items()
        if request not in cold
    ]
    gaps = sorted(clock.gaps)
    tpot = statistics.mean(per_token)
    return Result(
        system="motet",
        case=name,
        requests=case.requests,
        in_flight=case.in_flight,
        otps=round(1 / tpot, 1),
        tpot_ms=round(1e3 * tpot, 2),
        ttft_mean_ms=round(1e3 * statistics.mean(counted or [0.0]), 1),
        ttft_max_ms=round(1e3 * max(counted or [0.0]), 1),
        tokens_per_s=round(sum(clock.count.values()) / wall, 1),
        gap_p99_ms=round(1e3 * gaps[int(0.99 * len(gaps))], 1),
        gap_max_ms=round(1e3 * gaps[-1], 1),
        cold_ttft_ms=tuple(round(1e3 * ttft[request], 1) for request in cold),
    )
