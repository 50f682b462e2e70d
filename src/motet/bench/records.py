"""What a target answers and what a run keeps of it: one record per request, times in seconds.

`times` are when tokens came, one for each piece of the answer: with most servers each piece is a token, but a piece may
carry several (speculation, a busy server), so the number of tokens is the one that the endpoint reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from motet.bench.calls import Call
from motet.errors import ConfigError

Phase = Literal["probe", "warm-up", "lead-in", "measured"]
"""Only `measured` requests are reported; the others bring the endpoint to where it is to be measured, and show what the
first request of each model costs."""


class Answer(msgspec.Struct, frozen=True):
    """How one request went. `error` is a class of errors, such as "timeout" or "http 429"; empty if it went well."""

    sent: float
    times: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str = ""
    message: str = ""


class Target(Protocol):
    """What is measured."""

    async def send(self, call: Call) -> Answer:
        """Send one request and wait for its end; whatever goes wrong is in the answer."""
        ...


class Record(msgspec.Struct, frozen=True, tag="request", tag_field="kind"):
    """One request of a run, in seconds since the run began. `due` is when an open loop wanted to send it."""

    model: str
    phase: Phase
    due: float
    sent: float
    times: tuple[float, ...]
    prompt_tokens: int | None
    output_tokens: int
    error: str = ""
    message: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.times[0] - self.sent

    @property
    def e2e(self) -> float:
        """End-to-end latency: to the last token."""
        return self.times[-1] - self.sent

    @property
    def tpot(self) -> float:
        """Time per output token after the first; 0 for an answer of one token."""
        return (self.times[-1] - self.times[0]) / max(self.output_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Settings(msgspec.Struct, frozen=True, tag="run", tag_field="kind"):
    """What was run: the first line of a file of results."""

    target: str
    workload: str
    models: tuple[str, ...]
    popularity: str
    prompt: int
    output: int
    concurrency: int | None = None
    rate: float | None = None
    burst: int = 1
    together: bool = False
    slo: dict[str, float] = {}
    rank: int | None = None
    began: str = ""
    seed: int = 0


class Run(msgspec.Struct, frozen=True):
    """A run as it is kept in a file."""

    settings: Settings
    records: tuple[Record, ...]


def record(call: Call, answer: Answer, phase: Phase, origin: float) -> Record:
    """The answer in microseconds since `origin`. Pieces are counted as tokens where the endpoint does not say."""
    due = answer.sent if call.at is None else call.at
    return Record(
        model=call.model,
        phase=phase,
        due=round(due - origin, 6),
        sent=round(answer.sent - origin, 6),
        times=tuple(round(time - origin, 6) for time in answer.times),
        prompt_tokens=answer.prompt_tokens,
        output_tokens=len(answer.times) if answer.output_tokens is None else answer.output_tokens,
        error=answer.error,
        message=answer.message,
    )


def write_run(file: Path, run: Run, last: Any = None) -> None:
    """JSON lines: the settings, each request, and `last`. Raises ConfigError if the file cannot be written."""
    lines = [run.settings, *run.records] + ([last] if last is not None else [])
    try:
        file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error


def read_run(file: Path) -> Run:
    """Raises ConfigError for a file that `write_run` has not written."""
    try:
        lines = file.read_bytes().splitlines()
        settings = msgspec.json.decode(lines[0] if lines else b"", type=Settings)
        records = [
            msgspec.json.decode(line, type=Record) for line in lines[1:] if b'"kind":"request"' in line[:20]
        ]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{file} is not a result of motet bench run --out: {error}") from error
    return Run(settings, tuple(records))
