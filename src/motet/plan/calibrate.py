"""From measured figures to a `StepCost`.

Two kinds of figures determine it. A `StepPoint` is a step by itself. A `CasePoint` is a closed loop as `motet bench`
runs it. Which steps its requests wait through is for the scheduler to say, and it depends on how long steps take: so
the loop is simulated with the coefficients found so far, the steps that a mean request waited through become its two
equations (time to first token, time per output token), and the coefficients are fitted again, a few times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from motet.errors import ConfigError
from motet.plan.cost import TERMS, StepCost, Vector, solve, touched
from motet.plan.simulate import AdapterCost, Arrival, Replica, Served, simulate
from motet.scheduler.scheduler import SchedulerConfig
from motet.types import KVGroup

ROUNDS = 3
"""After two the coefficients of a CPU's curve change by less than 1 %."""


class StepPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured step: `rows` that decode at `context` tokens each, `prompt` tokens beside them, `adapters` in use."""

    ms: float
    rows: int = 0
    context: int = 0
    prompt: int = 0
    adapters: int = 0


class CasePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured closed loop: means over `requests` that follow a first wave of answers of staggered lengths.

    They have `adapters` in turn (0: all are the base's).
    """

    in_flight: int
    requests: int
    prompt: int
    output: int
    adapters: int
    tpot_ms: float
    ttft_ms: float | None = None


def fit(
    steps: Sequence[StepPoint],
    cases: Sequence[CasePoint],
    given: Mapping[str, float],
    max_step_tokens: int,
    ahead: bool,
    sparsity: float = 0.0,
) -> StepCost:
    """The coefficients that fit best; those `given`, in seconds, are not fitted. ConfigError if nothing can be."""
    measured = [(_step(point, sparsity), point.ms / 1e3) for point in steps]
    for case in cases:
        if (
            min(case.in_flight, case.requests, case.prompt, case.tpot_ms) <= 0
            or case.output < 2
            or case.adapters < 0
        ):
            raise ConfigError(f"a curve has a closed loop that cannot be: {case}")
    cost = msgspec.structs.replace(_guess(cases), sparsity=sparsity)
    for _ in range(ROUNDS if cases else 1):
        equations = [
            equation
            for case in cases
            for equation in _case(case, Replica(_engine(case, max_step_tokens), 1 << 20, cost, ahead))
        ]
        cost = solve(measured + equations, given, sparsity)
    return cost


def _step(point: StepPoint, sparsity: float) -> Vector:
    row_lora, lora = (point.rows, point.prompt) if point.adapters else (0, 0)
    context = point.rows * point.context + point.prompt
    return _terms(sparsity, point.rows, row_lora, point.prompt, lora, point.adapters, context)


def _terms(sparsity: float, rows: float, row_lora: float, prompt: float, *others: float) -> Vector:
    """What is in a step, in the order of TERMS."""
    return np.array([1, rows, row_lora, prompt, *others, touched(rows + prompt, sparsity)], float)


def _guess(cases: Sequence[CasePoint]) -> StepCost:
    """To begin with: the fastest loop's decode step, and prompts at a hundredth of it for each token."""
    base = min((case.tpot_ms for case in cases), default=1.0) / 1e3
    return StepCost(base=base, row=0.0, prompt=base / 100, prompt_lora=0.0, adapter=0.0, context=0.0)


def _engine(case: CasePoint, max_step_tokens: int) -> SchedulerConfig:
    """One with room for everything."""
    return SchedulerConfig(
        kv_groups=(KVGroup(layers=(0,)),),
        page_tokens=64,
        max_step_tokens=max_step_tokens,
        max_running=case.in_flight,
        max_model_len=case.prompt + case.output,
        prefix_caching=False,
        eos_token_ids=(),
    )


def _case(case: CasePoint, replica: Replica) -> list[tuple[Vector, float]]:
    """What a mean request waits through: for each token after the first, and for the first."""
    count, wave = case.requests, case.in_flight
    left = iter(range(wave, wave + count))

    def name(i: int) -> str:
        return f"a{i % case.adapters}" if case.adapters else ""

    def after(now: float) -> Arrival | None:
        i = next(left, None)
        return None if i is None else Arrival(now, name(i), case.prompt, case.output)

    first = [Arrival(0.0, name(i), case.prompt, max(1, case.output * (i + 1) // wave)) for i in range(wave)]
    adapters = {name(i): AdapterCost(1, 1.0, 0.0) for i in range(case.adapters)}
    outcome = simulate(replica, adapters, first, after)

    ends = np.array([step[0] for step in outcome.steps])
    sums = np.vstack(
        [
            np.zeros(len(TERMS)),
            np.cumsum([_terms(replica.cost.sparsity, *step[1:]) for step in outcome.steps], axis=0),
        ]
    )

    def until(time: float) -> Vector:
        """The sum of the terms of all steps that ended by then."""
        found: Vector = sums[np.searchsorted(ends, time, side="right")]
        return found

    served: Sequence[Served] = outcome.served[wave:]
    gaps = sum((until(one.last) - until(one.first) for one in served), np.zeros(len(TERMS)))
    found = [(gaps / (case.output - 1) / count, case.tpot_ms / 1e3)]
    if case.ttft_ms is not None:
        waits = sum((until(one.first) - until(one.arrival.at) for one in served), np.zeros(len(TERMS)))
        found.append((waits / count, case.ttft_ms / 1e3))
    return found
