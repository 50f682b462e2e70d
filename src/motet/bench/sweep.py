"""A sweep: the same run at many concurrencies, prompt lengths, numbers of adapters and ranks → a capacity curve.

The curve is one JSON object, which a capacity planner reads:

    {"kind": "curve",
     "target": "http://…",         what was measured
     "device": "NVIDIA H200",      as the user named it, or ""
     "model": "gpt-oss-20b",       the base's served name
     "began": "2026-01-31T12:00:00+00:00",
     "points": [{
        "concurrency": 16,         requests in flight, kept so by a closed loop out of step
        "prompt_asked": 1600,      tokens of a prompt that were asked for
        "prompt": 1600.0,          mean tokens of a prompt, as the endpoint counted them
        "output": 600.0,           mean tokens of an answer
        "adapters": 8,             different adapters that requests were spread over in turn; 0: the base alone
        "rank": 32,                of the adapters, null where it was not said or there are none
        "requests": 64, "failed": 0,
        "ttft_mean": 0.037, "ttft_p50": 0.036, "ttft_p95": 0.041,      seconds
        "otps": 155.8,             output tokens per second of one request
        "tokens_per_s": 2358.0,    of all requests in flight while all were; otherwise of the whole run
        "step_s": 0.0064           median gap between pieces: the time of a decode step, prompts apart
     }]}

Latencies are null at a point where every request failed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from motet.bench.calls import Closed
from motet.bench.experiment import Experiment
from motet.bench.figures import Spread, report
from motet.bench.records import Run
from motet.errors import ConfigError


class Point(msgspec.Struct, frozen=True):
    """One measured point; the module says what each field is."""

    concurrency: int
    prompt_asked: int
    prompt: float
    output: float
    adapters: int
    rank: int | None
    requests: int
    failed: int
    ttft_mean: float | None
    ttft_p50: float | None
    ttft_p95: float | None
    otps: float | None
    tokens_per_s: float
    step_s: float | None


class Curve(msgspec.Struct, frozen=True, tag="curve", tag_field="kind"):
    """A capacity curve."""

    target: str
    device: str
    model: str
    began: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Axes:
    """What is varied. `ranks` gives the adapters of each rank by name; without it all `adapters` are of one kind."""

    concurrency: Sequence[int]
    prompt: Sequence[int]
    adapters: Sequence[int]
    ranks: dict[int | None, tuple[str, ...]]


def experiments(base: Experiment, axes: Axes, requests_each: int) -> list[Experiment]:
    """An experiment for each point. Raises ConfigError if more adapters are wanted than there are."""
    for rank, names in axes.ranks.items():
        if max(axes.adapters) > len(names):
            of = "" if rank is None else f" of rank {rank}"
            raise ConfigError(f"{max(axes.adapters)} adapters are wanted, {len(names)}{of} are named")
    found: dict[tuple[object, ...], Experiment] = {}
    for (rank, names), count, prompt, concurrency in itertools.product(
        axes.ranks.items(), axes.adapters, axes.prompt, axes.concurrency
    ):
        labelled = rank if count else None
        found.setdefault((labelled, count, prompt, concurrency), Experiment(
            target=base.target,
            base=base.base,
            models=names[:count] or (base.base,),
            workload=base.workload,
            arrival=Closed(concurrency),
            prompt=prompt,
            output=base.output,
            requests=requests_each * concurrency,
            warm_up=base.warm_up,
            rank=labelled,
            seed=base.seed + len(found),
        ))  # fmt: skip
    return list(found.values())


def point(run: Run, base: str) -> Point:
    """What a planner needs of a run."""
    told, settings = report(run), run.settings
    overall = told.overall
    assert settings.concurrency is not None, "a point of a curve is a closed loop"
    return Point(
        concurrency=settings.concurrency,
        prompt_asked=settings.prompt,
        prompt=settings.prompt if overall.prompt_tokens is None else round(overall.prompt_tokens, 1),
        output=round(overall.output_tokens / overall.completed, 1) if overall.completed else settings.output,
        adapters=len([name for name in settings.models if name != base]),
        rank=settings.rank,
        requests=overall.requests,
        failed=overall.requests - overall.completed,
        ttft_mean=_rounded(overall.ttft, "mean"),
        ttft_p50=_rounded(overall.ttft, "p50"),
        ttft_p95=_rounded(overall.ttft, "p95"),
        otps=None if overall.otps is None else round(overall.otps, 3),
        tokens_per_s=round(told.full_load_tokens_per_s or overall.tokens_per_s, 2),
        step_s=_rounded(overall.itl, "p50"),
    )


def _rounded(spread: Spread | None, name: str) -> float | None:
    return None if spread is None else round(float(getattr(spread, name)), 6)


def write_curve(file: Path, curve: Curve) -> None:
    """Raises ConfigError if the file cannot be written."""
    try:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(curve), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error


def read_curve(file: Path) -> Curve:
    """Raises ConfigError for a file that `write_curve` has not written."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Curve)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{file} is not a curve of motet bench sweep: {error}") from error


def parse_numbers(text: str, what: str, least: int = 1) -> list[int]:
    """'1,4,16' in rising order. Raises ConfigError, naming `what`."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < least:
        raise ConfigError(f"{what} takes numbers of at least {least}, such as 1,4,16, not {text!r}")
    return numbers


def by_rank(adapters: Sequence[str]) -> dict[int | None, tuple[str, ...]]:
    """Adapters by rank, of NAME or NAME:RANK. Raises ConfigError where only some have one."""
    found: dict[int | None, tuple[str, ...]] = {}
    for text in adapters:
        name, _, rank = text.rpartition(":")
        known = bool(name) and rank.isdecimal()
        key = int(rank) if known else None
        found[key] = (*found.get(key, ()), name if known else text)
    if len(found) > 1 and None in found:
        raise ConfigError("some adapters are named with a rank, NAME:RANK, and some without")
    return found or {None: ()}


def lines(points: Sequence[Point]) -> Iterator[tuple[str, list[Point]]]:
    """Points that differ in concurrency only, under a name that says what they share."""

    def shared(point: Point) -> tuple[int, int, int]:
        return (point.prompt_asked, point.adapters, point.rank or 0)

    for (prompt, adapters, rank), group in itertools.groupby(sorted(points, key=shared), shared):
        many = f"{adapters} of rank {rank}" if rank else f"{adapters} adapters"
        name = f"{prompt} in, {many if adapters else 'base'}"
        yield name, sorted(group, key=lambda point: point.concurrency)
