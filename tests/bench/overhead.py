"""How much the client itself adds to what it measures: 64 streams of an endpoint that keeps a clock of its own.

    python -m tests.bench.overhead [--seconds 30] [--httpx]

The endpoint, in another process, answers after 0.2 s with 31 tokens, one every 26.4 ms: 2,000 a second of all. The
distortion of a request's TTFT is the client's TTFT less the time between the endpoint's reading of the request and its
writing of the first token; what the endpoint's own event loop adds before and after is in it too. `--httpx` measures a
client on httpx in the same way, for comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from motet.bench.calls import Call
from motet.bench.drive import Log, Plan, run
from motet.bench.endpoint import Endpoint
from motet.bench.records import Answer, Target

STREAMS, TOKENS = 64, 31


@dataclass(frozen=True)
class Overhead:
    """Milliseconds that the client adds to TTFT, the tokens per second that came, the client's share of one core."""

    distortion: list[float]
    tokens_per_s: float
    core: float

    def __str__(self) -> str:
        cut = statistics.quantiles(self.distortion, n=100)
        return (
            f"{len(self.distortion)} requests, {self.tokens_per_s:,.0f} tokens/s, {self.core:.0%} of a core; TTFT "
            f"distortion in ms: mean {statistics.fmean(self.distortion):.2f}, p50 {cut[49]:.2f}, p90 {cut[89]:.2f}, "
            f"p99 {cut[98]:.2f}, max {max(self.distortion):.2f}"
        )


class _Kept:
    """A target that remembers the answers by prompt."""

    def __init__(self, target: Target, answers: dict[str, Answer]) -> None:
        self._target = target
        self._answers = answers

    async def send(self, call: Call) -> Answer:
        answer = await self._target.send(call)
        assert not answer.error, answer
        assert isinstance(call.prompt, str)
        self._answers[call.prompt] = answer
        return answer


class _Httpx:
    """The usual client: httpx, its lines, json."""

    def __init__(self, url: str) -> None:
        self._url = url + "/v1/completions"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=STREAMS)
        self._client = httpx.AsyncClient(limits=limits, timeout=60)

    async def __aenter__(self) -> _Httpx:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def send(self, call: Call) -> Answer:
        sent, times = time.perf_counter(), []
        body = {"model": call.model, "prompt": call.prompt, "max_tokens": call.output, "stream": True}
        async with self._client.stream("POST", self._url, json=body) as response:
            async for line in response.aiter_lines():
                now = time.perf_counter()
                data = line.removeprefix("data:").strip()
                if data and data != "[DONE]" and any(c.get("text") for c in json.loads(data)["choices"]):
                    times.append(now)
        return Answer(sent, tuple(times))


@contextmanager
def _server() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.bench.fake_endpoint"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def measure(seconds: int, make: Callable[[str], Endpoint | _Httpx] = Endpoint) -> Overhead:
    """Answers of a second each, so many in a row on every stream after a lead-in."""
    calls = [Call("steady", f"request {i}", TOKENS) for i in range(STREAMS * seconds)]
    first = [Call("steady", f"first {i}", max(1, TOKENS * (i + 1) // STREAMS)) for i in range(STREAMS)]
    plan = Plan(calls, STREAMS, lead_in=first)
    with _server() as url:
        began, spent = time.perf_counter(), time.process_time()
        answers = asyncio.run(_drive(make, url, plan))
        took, spent = time.perf_counter() - began, time.process_time() - spent
        log = httpx.get(url + "/log", timeout=60).json()
    distortion = []
    for seen in log:
        answer = answers[seen["body"]["prompt"]]
        if seen["body"]["prompt"].startswith("request"):
            served = seen["written"][0] - seen["received"]
            distortion.append(1e3 * (answer.times[0] - answer.sent - served))
    times = sorted(time for answer in answers.values() for time in answer.times)
    middle = times[len(times) // 4 : 3 * len(times) // 4]
    return Overhead(distortion, len(middle) / (middle[-1] - middle[0]), spent / took)


async def _drive(make: Callable[[str], Endpoint | _Httpx], url: str, plan: Plan) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    async with make(url) as target:
        await run(_Kept(target, answers), plan, Log())
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--httpx", action="store_true")
    arguments = parser.parse_args()
    print(measure(arguments.seconds, _Httpx if arguments.httpx else Endpoint))  # noqa: T201


if __name__ == "__main__":
    main()
