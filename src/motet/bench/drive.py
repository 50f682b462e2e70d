"""One run against a target: probes and warm-up one request at a time, a lead-in, then what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from motet.bench.calls import Call
from motet.bench.records import Answer, Phase, Record, Target, record


@dataclass(frozen=True)
class Plan:
    """The calls of a run. `concurrency` None sends each of `measured` when it is due, whatever else is in flight."""

    measured: Sequence[Call]
    concurrency: int | None
    lead_in: Sequence[Call] = ()
    warm_up: Sequence[Call] = ()


@dataclass
class Log:
    """The records of a run as they come; `on_end` is told of each."""

    on_end: Callable[[Record], None] = lambda _record: None
    origin: float = field(default_factory=time.perf_counter)
    records: list[Record] = field(default_factory=list)

    async def send(self, target: Target, call: Call, phase: Phase) -> Answer:
        """Send one request and record its answer."""
        answer = await target.send(call)
        entry = record(call, answer, phase, self.origin)
        self.records.append(entry)
        self.on_end(entry)
        return answer


async def run(target: Target, plan: Plan, log: Log) -> list[Record]:
    """Everything in its order; the records stand in the order in which requests ended."""
    for call in plan.warm_up:
        await log.send(target, call, "warm-up")
    if plan.concurrency is None:
        await _open(target, plan.measured, log)
    else:
        await _closed(target, plan, plan.concurrency, log)
    return log.records


async def _closed(target: Target, plan: Plan, concurrency: int, log: Log) -> None:
    """So many workers take calls from one queue."""
    calls: Iterator[tuple[Call, Phase]] = iter(
        [*((call, "lead-in") for call in plan.lead_in), *((call, "measured") for call in plan.measured)]
    )

    async def worker() -> None:
        for call, phase in calls:
            await log.send(target, call, phase)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


async def _open(target: Target, calls: Sequence[Call], log: Log) -> None:
    """Every call at its time, in seconds from now."""
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for call in calls:
            assert call.at is not None, "a call without a time in an open loop"
            due = begin + call.at
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(log.send(target, msgspec.structs.replace(call, at=due), "measured"))
