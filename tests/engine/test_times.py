"""Waits are told once, and steps are counted where they belong."""

from __future__ import annotations

from motet.engine.times import StepTimes
from motet.types import Chunk, Plan, Request, SamplingParams, SeqOutput


def chunk(seq: int, tokens: int, sample: bool = True) -> Chunk:
    return Chunk(seq, (1,) * tokens, 0, (), "", sample)


def request(seq: int) -> Request:
    return Request(f"r{seq}", (1, 2), SamplingParams(), arrival=10.0 + seq)


def test_a_wait_is_told_once_with_the_first_output() -> None:
    now = 20.5
    times = StepTimes(lambda: now)
    times.launched(Plan(chunks=(chunk(0, 2), chunk(1, 2, False))), request, 13.0)
    times.launched(Plan(chunks=(chunk(0, 1), chunk(1, 1))), request, 20.0)
    first = times.told([SeqOutput("r0", (1,)), SeqOutput("r0", (2,)), SeqOutput("r1", (3,), finish="stop")])
    assert [output.queue_seconds for output in first] == [3.0, None, 2.0]
    assert [output.prefill_seconds for output in first] == [7.5, None, 7.5], "from the first step on"
    assert [output.at for output in first] == [20.5] * 3
    now = 21.0
    (last,) = times.told([SeqOutput("r0", (4,))])
    assert (last.at, last.queue_seconds, last.prefill_seconds) == (21.0, None, None)
    ended = times.told([SeqOutput("r0", finish="abort"), SeqOutput("never", finish="error")])
    assert ended == [SeqOutput("r0", finish="abort"), SeqOutput("never", finish="error")]
    assert vars(times)["_begun"] == {}


def test_a_request_that_ends_at_once_is_forgotten() -> None:
    times = StepTimes()
    times.launched(Plan(chunks=(chunk(0, 1),)), request, 9.0)
    (output,) = times.told([SeqOutput("r0", finish="abort")])
    assert output == SeqOutput("r0", finish="abort", queue_seconds=0.0)
    assert vars(times)["_begun"] == {}


def test_steps_by_what_they_compute() -> None:
    times = StepTimes()
    for chunks, seconds in (
        ((chunk(0, 5), chunk(1, 1)), 1.0),
        ((chunk(0, 1, False),), 2.0),
        ((chunk(0, 1), chunk(1, 1)), 4.0),
    ):
        times.landed(Plan(chunks=chunks), seconds)
    assert (times.prefill_seconds, times.decode_seconds) == (3.0, 4.0)
