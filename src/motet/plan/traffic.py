"""Who asks for what: traffic per fine-tune from a table of rates, a trace, or scraped metrics.

rates    CSV with name, requests_per_second or requests_per_day, prompt and output (mean tokens), and where wanted
         peak (the busiest minutes' rate over the mean one), rank and targets of the adapter
trace    CSV or JSON lines with at (seconds), prompt, output and adapter, as `motet bench` replays it
metrics  Prometheus' text format, see `scrape`
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

import msgspec

from motet.errors import ConfigError
from motet.plan.scrape import read_scrape
from motet.plan.simulate import Arrival

T = TypeVar("T")
DAY = 86_400.0
PEAK_WINDOW = 60.0
"""Seconds: a trace's peak is its busiest minute. Shorter ones are what Poisson arrivals have anyway."""
RANK = 16
_COLUMNS = {"name", "requests_per_second", "requests_per_day", "prompt", "output", "peak", "rank", "targets"}


class FineTune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fine-tune and its traffic. `rate` is the mean in requests per second, `rate · peak` what is planned for.

    `lengths` are (prompt, output) of real requests; without them all have the mean ones. `targets` are the parts that
    the adapter changes, see `sizes`; rank 0 is the base model itself.
    """

    name: str
    rate: float
    prompt: int
    output: int
    peak: float = 1.0
    rank: int = RANK
    targets: tuple[str, ...] = ("attention", "mlp")
    lengths: tuple[tuple[int, int], ...] = ()

    @property
    def peak_rate(self) -> float:
        return self.rate * self.peak

    def length(self, chance: Random) -> tuple[int, int]:
        """Prompt and output of a request."""
        return chance.choice(self.lengths) if self.lengths else (self.prompt, self.output)


class _Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    at: float
    prompt: int
    output: int
    adapter: str = ""


def read_traffic(file: Path, hours: float | None, rank: int, targets: tuple[str, ...]) -> list[FineTune]:
    """The fine-tunes of a file of any of the three kinds, which its first line tells.

    `hours` is how long scraped counters have counted, `rank` and `targets` are those of adapters of which the file does
    not tell. ConfigError names the file, the line and what is wrong.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    head = text.lstrip().partition("\n")[0]
    if head.startswith("{"):
        lines = enumerate(text.splitlines(), 1)
        found = summarise(
            [_event(line.encode(), f"{file}, line {number}") for number, line in lines if line.strip()]
        )
    elif head.startswith("#"):
        found = [
            FineTune(use.name, use.rate, use.prompt, use.output) for use in read_scrape(text, file, hours)
        ]
    elif {"at", "prompt", "output"} <= {name.strip() for name in head.split(",")}:
        found = summarise([_converted(row, where, _Event) for where, row in _rows(text, file)])
    else:
        return _rates(text, file, rank, targets)
    return [msgspec.structs.replace(one, rank=one.rank and rank, targets=targets) for one in found]


def merge(fine_tunes: Sequence[FineTune]) -> list[FineTune]:
    """Those of several files together. ConfigError if two of them have the same name."""
    by_name: dict[str, FineTune] = {}
    for one in fine_tunes:
        if by_name.setdefault(one.name, one) is not one:
            raise ConfigError(f"the traffic of {one.name!r} is told twice")
    return list(by_name.values())


def summarise(events: Sequence[_Event]) -> list[FineTune]:
    """The traffic of a trace: mean rates over its whole length, peaks of its busiest minutes, real lengths."""
    if not events:
        raise ConfigError("the trace has no requests")
    by_name: dict[str, list[_Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.at):
        if event.prompt < 1 or event.output < 1:
            raise ConfigError(f"a request of the trace at {event.at} has no prompt or no output")
        by_name[event.adapter or "base"].append(event)
    times = [event.at for event in events]
    span = max(max(times) - min(times), PEAK_WINDOW)
    found = []
    for name, own in by_name.items():
        rate = len(own) / span
        found.append(
            FineTune(
                name,
                rate,
                round(sum(event.prompt for event in own) / len(own)),
                round(sum(event.output for event in own) / len(own)),
                rank=RANK if own[0].adapter else 0,
                peak=max(_busiest([event.at for event in own]) / PEAK_WINDOW / rate, 1.0),
                lengths=tuple((event.prompt, event.output) for event in own),
            )
        )
    return found


def arrivals(
    fine_tunes: Sequence[FineTune], count: int, factors: Mapping[str, float], seed: int = 0
) -> list[Arrival]:
    """About `count` requests at peak rates times `factors` (1 where there is none), as Poisson processes."""
    rates = [one.peak_rate * factors.get(one.name, 1.0) for one in fine_tunes]
    total, chance, now = sum(rates), Random(seed), 0.0
    found = []
    for one in chance.choices(fine_tunes, rates, k=count):
        now += chance.expovariate(total)
        found.append(Arrival(now, one.name, *one.length(chance)))
    return found


def _busiest(times: Sequence[float]) -> int:
    """The most requests in any window; `times` are in order."""
    first, most = 0, 0
    for last, time in enumerate(times):
        while time - times[first] > PEAK_WINDOW:
            first += 1
        most = max(most, last - first + 1)
    return most


def _rates(text: str, file: Path, rank: int, targets: tuple[str, ...]) -> list[FineTune]:
    found: dict[str, FineTune] = {}
    for where, row in _rows(text, file):
        one = _fine_tune(row, where, rank, targets)
        if one.name in found:
            raise ConfigError(f"{where}: {one.name!r} is there twice")
        found[one.name] = one
    if not found:
        raise ConfigError(f"{file} names no fine-tune")
    return list(found.values())


def _fine_tune(row: Mapping[str, str], where: str, rank: int, targets: tuple[str, ...]) -> FineTune:
    unknown = sorted(row.keys() - _COLUMNS)
    if unknown:
        raise ConfigError(f"{where}: unknown column {unknown[0]!r}; there are {', '.join(sorted(_COLUMNS))}")
    given = {name: value for name, value in row.items() if value}
    second, day = given.pop("requests_per_second", None), given.pop("requests_per_day", None)
    if (second is None) == (day is None):
        raise ConfigError(f"{where}: one of requests_per_second and requests_per_day is needed")
    named = tuple(given.pop("targets", "").split()) or targets
    values = {"rank": rank, **given, "rate": second or day, "targets": named}
    one = _converted(values, where, FineTune)
    one = msgspec.structs.replace(one, rate=one.rate / (DAY if second is None else 1.0))
    if not (0 < one.rate < math.inf and 1 <= one.peak < math.inf):
        raise ConfigError(f"{where}: the rate must be positive and peak at least 1")
    if min(one.prompt, one.output) < 1 or one.rank < 0:
        raise ConfigError(f"{where}: prompt and output must be at least 1, rank at least 0")
    return one


def _rows(text: str, file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file, with where they stand; surplus or missing fields are errors."""
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    for row in reader:
        where = f"{file}, line {reader.line_num}"
        if None in row or None in row.values():
            raise ConfigError(f"{where}: {len(reader.fieldnames or ())} fields are needed")
        yield where, {name.strip(): value.strip() for name, value in row.items()}


def _event(line: bytes, where: str) -> _Event:
    try:
        return msgspec.json.decode(line, type=_Event)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _converted(values: Mapping[str, object], where: str, kind: type[T]) -> T:
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
