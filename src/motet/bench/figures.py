"""Records → figures, by the definitions of `vllm bench serve` (docs/benchmarking.md sets them side by side).

    TTFT   first token − request sent
    E2E    last token − request sent
    ITL    the gaps between pieces of an answer, of all answers together
    TPOT   (E2E − TTFT) / (output tokens − 1), one figure for an answer of two tokens or more
    OTPS   1 / mean TPOT: the output tokens per second that one request sees

Tokens per second are output tokens of all answers by the time from the first request sent to the last token. At the
end of a closed loop fewer and fewer requests are in flight, so `full_load_tokens_per_s` counts the tokens that came
while all were.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from motet.bench.records import Record, Run
from motet.errors import ConfigError

SLO_KEYS = ("ttft", "tpot", "e2el", "otps")
_COLD_FACTOR, _COLD_SECONDS = 2.0, 0.02
_STALL_FACTOR, _STALL_SECONDS = 10.0, 0.1


class Spread(msgspec.Struct, frozen=True):
    """How values are distributed; percentiles are interpolated linearly."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True):
    """Figures of all requests or of one model's; times in seconds, rates per second. Where no request came to an end,
    what would be measured on one is None. `goodput` is requests per second that met the objective, None without one;
    `prompt_tokens` is the mean that the endpoint counted."""

    name: str
    requests: int
    completed: int
    errors: dict[str, int]
    prompt_tokens: float | None
    output_tokens: int
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    otps: float | None
    tokens_per_s: float
    requests_per_s: float
    goodput: float | None = None


class FirstUse(msgspec.Struct, frozen=True):
    """A model's first request in this run against its later ones sent under the same conditions: TTFT in seconds.

    `surprise` calls out a first request that took more than twice as long and 20 ms longer: something was loaded or
    compiled for it.
    """

    model: str
    cold: float
    warm: float | None
    surprise: bool


class Stall(msgspec.Struct, frozen=True):
    """Tokens of `requests` measured requests that stood still at the same time, for up to `seconds`; `at` is when it
    ended, in seconds since the run began. More than ten times the median gap and 0.1 s: a compilation or a load that
    others had to wait for, or a long prompt."""

    at: float
    seconds: float
    requests: int


class Report(msgspec.Struct, frozen=True, tag="report", tag_field="kind"):
    """Figures of a run. `failed_before` counts errors of probes, warm-up and lead-in by class, `messages` has one
    message for each class; `late` is by how much the client itself sent a request late at worst, in an open loop."""

    overall: Summary
    models: tuple[Summary, ...]
    duration: float
    full_load_tokens_per_s: float | None
    first_uses: tuple[FirstUse, ...]
    stalls: tuple[Stall, ...]
    slo: dict[str, float]
    failed_before: dict[str, int]
    messages: dict[str, str]
    late: float


def parse_slo(text: str) -> dict[str, float]:
    """'ttft:500,tpot:40': at most so many milliseconds (ttft, tpot, e2el), at least so many tokens a second (otps)."""
    slo = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition(":")
        try:
            slo[key] = float(value)
        except ValueError:
            slo[key] = 0.0
        if key not in SLO_KEYS or not slo[key] > 0:
            raise ConfigError(
                f"{part!r} is no objective; write KEY:NUMBER with a key of {', '.join(SLO_KEYS)}"
            )
    return slo


def report(run: Run) -> Report:
    """All figures of a run. Raises ConfigError if nothing was measured."""
    measured = [record for record in run.records if record.phase == "measured"]
    if not measured:
        raise ConfigError("the run measured no request")
    ends = [record.times[-1] for record in measured if record.times] or [max(r.sent for r in measured)]
    duration = max(max(ends) - min(record.sent for record in measured), 1e-6)
    slo = run.settings.slo
    names = sorted({record.model for record in measured})
    return Report(
        overall=summary("all", measured, duration, slo),
        models=tuple(
            summary(name, [record for record in measured if record.model == name], duration, slo)
            for name in names
        ),
        duration=duration,
        full_load_tokens_per_s=_full_load(run),
        first_uses=first_uses(run.records),
        stalls=stalls(measured),
        slo=slo,
        failed_before=dict(Counter(r.error for r in run.records if r.error and r.phase != "measured")),
        messages={record.error: record.message for record in run.records if record.error},
        late=max(record.sent - record.due for record in measured),
    )


def summary(name: str, records: Sequence[Record], duration: float, slo: dict[str, float]) -> Summary:
    """Figures of some requests of a run that took `duration` seconds."""
    ended = [record for record in records if not record.error]
    prompts = [record.prompt_tokens for record in ended if record.prompt_tokens is not None]
    tokens = sum(record.output_tokens for record in ended)
    per_token = [record.tpot for record in ended if record.output_tokens > 1]
    mean = statistics.fmean(per_token) if per_token else 0.0
    return Summary(
        name=name,
        requests=len(records),
        completed=len(ended),
        errors=dict(Counter(record.error for record in records if record.error)),
        prompt_tokens=statistics.fmean(prompts) if prompts else None,
        output_tokens=tokens,
        ttft=spread([record.ttft for record in ended]),
        itl=spread([gap for record in ended for gap in record.gaps]),
        tpot=spread(per_token),
        e2e=spread([record.e2e for record in ended]),
        otps=1 / mean if mean else None,
        tokens_per_s=tokens / duration,
        requests_per_s=len(ended) / duration,
        goodput=sum(meets(record, slo) for record in ended) / duration if slo else None,
    )


def spread(values: Sequence[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
    return Spread(float(np.mean(values)), p50, p90, p95, p99, float(max(values)))


def meets(record: Record, slo: dict[str, float]) -> bool:
    """Whether a request that came to its end was as fast as the objective wants; `slo` as `parse_slo` gives it."""
    tpot = record.tpot if record.output_tokens > 1 else 0.0
    taken = {"ttft": 1e3 * record.ttft, "tpot": 1e3 * tpot, "e2el": 1e3 * record.e2e}
    fast = all(taken[key] <= bound for key, bound in slo.items() if key in taken)
    return fast and tpot * slo.get("otps", 0.0) <= 1


def first_uses(records: Sequence[Record]) -> tuple[FirstUse, ...]:
    """Of each model the first request sent, against the later ones of the warm-up, or of the rest if it had none."""
    uses = []
    sent = sorted((record for record in records if record.times), key=lambda record: record.sent)
    for model in dict.fromkeys(record.model for record in sent):
        first, *later = [record for record in sent if record.model == model]
        alike = [record for record in later if record.phase in ("probe", "warm-up")] or later
        warm = statistics.median(record.ttft for record in alike) if alike else None
        surprise = warm is not None and first.ttft > max(_COLD_FACTOR * warm, warm + _COLD_SECONDS)
        uses.append(FirstUse(model, first.ttft, warm, surprise))
    return tuple(uses)


def stalls(records: Sequence[Record]) -> tuple[Stall, ...]:
    """The longest first. Gaps of several requests that end within a tenth of a second are one stall."""
    gaps = sorted((later, gap) for r in records for later, gap in zip(r.times[1:], r.gaps, strict=True))
    if not gaps:
        return ()
    bound = max(_STALL_FACTOR * statistics.median(gap for _, gap in gaps), _STALL_SECONDS)
    found: list[Stall] = []
    for at, gap in gaps:
        if gap <= bound:
            continue
        if found and at - found[-1].at < _STALL_SECONDS:
            last = found.pop()
            found.append(Stall(at, max(gap, last.seconds), last.requests + 1))
        else:
            found.append(Stall(at, gap, 1))
    return tuple(sorted(found, key=lambda stall: -stall.seconds))


def _full_load(run: Run) -> float | None:
    """Tokens per second from the first measured request to the last one sent, of requests of the lead-in too."""
    if run.settings.concurrency is None:
        return None
    sent = [record.sent for record in run.records if record.phase == "measured"]
    begin, end = min(sent), max(sent)
    came = [
        (time, record.output_tokens / len(record.times))
        for record in run.records
        if record.phase in ("lead-in", "measured") and not record.error
        for time in record.times
    ]
    tokens = sum(count for time, count in came if begin < time <= end)
    return tokens / (end - begin) if end - begin > 0 and tokens else None
