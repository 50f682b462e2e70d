"""What is to be measured → the calls of a run, and the run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from motet.bench.calls import Arrival, Call, Closed, chooser, lead_in, spread, warm_up
from motet.bench.drive import Log, Plan, run
from motet.bench.prompts import (
    Counted,
    Estimated,
    Measure,
    RandomTokens,
    RandomWords,
    Sonnets,
    Source,
    fitted,
    read_prompts,
    read_trace,
    typical_of_trace,
    typical_prompt,
)
from motet.bench.records import Record, Run, Settings, Target
from motet.errors import ConfigError, MotetError

WORKLOADS = ("sonnet", "random", "jsonl", "trace")
OPEN_LOOP_SECONDS = 60
STEADY = Closed(16)


class ProbeFailed(MotetError):
    """The target did not answer the first request."""

    status = 502
    code = "probe_failed"


@dataclass(frozen=True)
class Experiment:
    """`models` are the served names that popularity chooses from; a trace names its own, `base` where it names none.

    `prompt` and `output` are lengths in tokens; a file has its own, and `output` is for its prompts that name none.
    `requests` are measured; None means four for each in flight, a minute's of an open loop, or all of a file's. Each
    model is sent `warm_up` requests before. `rank`, the adapters', only labels the result. Runs differ in their `seed`,
    as a server may still have the prompts of an earlier one in its prefix cache.
    """

    target: str
    base: str
    models: tuple[str, ...]
    workload: str = "sonnet"
    file: Path | None = None
    popularity: str = "distinct"
    arrival: Arrival = STEADY
    prompt: int = 1600
    output: int = 600
    requests: int | None = None
    warm_up: int = 2
    slo: dict[str, float] = field(default_factory=dict)
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Tokens:
    """What is known of the target's tokens: a counter of them, and how many there are if it takes prompts of ids."""

    counted: Counted | None = None
    vocabulary: int | None = None


async def perform(
    target: Target, wanted: Experiment, tokens: Tokens, on_end: Callable[[Record], None]
) -> Run:
    """Probe, plan, run. Raises ConfigError for what cannot be run, ProbeFailed if the target does not answer."""
    check(wanted)
    wanted = _resolved(wanted)
    log = Log(on_end)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    by_ids = wanted.workload == "random" and tokens.vocabulary is not None
    measure: Measure = tokens.counted or Estimated()
    if not (by_ids or tokens.counted or wanted.workload == "jsonl"):
        measure = await _probed(target, wanted, log)
    records = await run(target, planned(wanted, measure, tokens.vocabulary), log)
    return Run(_settings(wanted, began), tuple(records))


def check(wanted: Experiment) -> None:
    """Raises ConfigError for numbers and combinations that mean nothing."""
    numbers = {"prompt": wanted.prompt, "output": wanted.output, "requests": wanted.requests}
    arrival = wanted.arrival
    if isinstance(arrival, Closed):
        numbers["concurrency"] = arrival.concurrency
    else:
        numbers["burst"] = arrival.burst
        if not (arrival.rate > 0 and math.isfinite(arrival.rate)):
            raise ConfigError(f"the rate must be positive, got {arrival.rate:g}")
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if wanted.warm_up < 0:
        raise ConfigError(f"{wanted.warm_up} warm-up requests cannot be sent")
    if wanted.workload not in WORKLOADS:
        raise ConfigError(f"no workload {wanted.workload!r}; there are {', '.join(WORKLOADS)}")
    if (wanted.file is None) == (wanted.workload in ("jsonl", "trace")):
        need = "needs a file" if wanted.file is None else "takes no file"
        raise ConfigError(f"the workload {wanted.workload} {need}")
    chooser(wanted.popularity, wanted.models)


def _resolved(wanted: Experiment) -> Experiment:
    """With the length of a typical prompt and answer of its file, for probes and warm-up."""
    if wanted.workload not in ("jsonl", "trace"):
        return wanted
    assert wanted.file is not None
    if wanted.workload == "trace":
        prompt, output = typical_of_trace(wanted.file)
        return replace(wanted, prompt=prompt, output=output)
    return replace(wanted, prompt=typical_prompt(wanted.file))


def planned(wanted: Experiment, measure: Measure, vocabulary: int | None = None) -> Plan:
    """All calls of a run."""
    source = _source(wanted, measure, vocabulary)
    names = chooser(wanted.popularity, wanted.models, wanted.seed)

    def make(model: str, output: int) -> Call:
        return Call(model, source.prompt(wanted.prompt), output)

    measured, first, concurrency = _measured(wanted, source, names), [], None
    arrival = wanted.arrival
    if wanted.workload != "trace":  # whose calls have their times
        if isinstance(arrival, Closed):
            concurrency = arrival.concurrency
            if not arrival.together:
                first = lead_in(lambda output: make(next(names), output), concurrency, wanted.output)
        else:
            measured = spread(measured, arrival, wanted.seed)
    models = list(dict.fromkeys(call.model for call in measured))
    return Plan(measured, concurrency, first, warm_up(make, models, wanted.warm_up, wanted.output))


def _measured(wanted: Experiment, source: Source, names: Iterator[str]) -> list[Call]:
    if wanted.workload == "trace":
        assert wanted.file is not None
        return read_trace(wanted.file, source, wanted.base)[: wanted.requests]
    if wanted.workload == "jsonl":
        assert wanted.file is not None
        calls = read_prompts(wanted.file, wanted.output)
        chosen = itertools.islice(itertools.cycle(calls), wanted.requests or len(calls))
        return [msgspec.structs.replace(call, model=call.model or next(names)) for call in chosen]
    arrival = wanted.arrival
    minute = 4 * arrival.concurrency if isinstance(arrival, Closed) else OPEN_LOOP_SECONDS * arrival.rate
    count = wanted.requests or max(1, round(minute))
    return [Call(next(names), source.prompt(wanted.prompt), wanted.output) for _ in range(count)]


def _source(wanted: Experiment, measure: Measure, vocabulary: int | None) -> Source:
    """Of the prompts that are made here; around a file of prompts these are verses too."""
    if wanted.workload != "random":
        return Sonnets(measure, wanted.seed)
    if vocabulary is not None:
        return RandomTokens(vocabulary, wanted.seed)
    return RandomWords(measure, wanted.seed)


async def _probed(target: Target, wanted: Experiment, log: Log) -> Estimated:
    """How many tokens the target makes of words, from a prompt of a third of the wanted length and one of the whole."""

    async def count(tokens: int, measure: Measure, seed: int) -> tuple[int, int]:
        text = _source(replace(wanted, seed=seed), measure, None).prompt(tokens)
        assert isinstance(text, str)
        answer = await log.send(target, Call(wanted.base, text, 1), "probe")
        if answer.error and answer.error != "no text":
            raise ProbeFailed(f"{wanted.target} does not answer: {answer.error}: {answer.message}")
        if answer.prompt_tokens is None:
            raise ProbeFailed(
                f"{wanted.target} does not report usage; name the model's directory with --tokenizer"
            )
        return len(text.split()), answer.prompt_tokens

    short = await count(max(2, wanted.prompt // 3), Estimated(per_word=1), wanted.seed + 1)
    if short[0] < 3:
        return Estimated()
    long = await count(wanted.prompt, Estimated(per_word=short[1] / short[0]), wanted.seed + 2)
    return fitted(short, long) if long[0] > short[0] else Estimated(per_word=short[1] / short[0])


def _settings(wanted: Experiment, began: str) -> Settings:
    arrival = wanted.arrival
    closed = isinstance(arrival, Closed) and wanted.workload != "trace"
    return Settings(
        target=wanted.target,
        workload=wanted.workload,
        models=wanted.models,
        popularity=wanted.popularity,
        prompt=wanted.prompt,
        output=wanted.output,
        concurrency=arrival.concurrency if isinstance(arrival, Closed) and closed else None,
        rate=None if isinstance(arrival, Closed) or wanted.workload == "trace" else arrival.rate,
        burst=1 if isinstance(arrival, Closed) else arrival.burst,
        together=closed and isinstance(arrival, Closed) and arrival.together,
        slo=wanted.slo,
        rank=wanted.rank,
        began=began,
        seed=wanted.seed,
    )
