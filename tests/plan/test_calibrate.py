"""A cost function that made the points is found again from them."""

from __future__ import annotations

from statistics import mean

import pytest

from motet.errors import ConfigError
from motet.plan.calibrate import CasePoint, StepPoint, fit
from motet.plan.cost import TERMS, StepCost
from motet.plan.simulate import AdapterCost, Arrival, Replica, simulate
from motet.scheduler.scheduler import SchedulerConfig
from motet.types import KVGroup

TRUE = StepCost(
    base=2e-3, row=1e-4, prompt=1.5e-5, prompt_lora=2e-6, adapter=1.5e-4, context=1e-8, row_lora=2e-5
)


def step(rows: int, context: int, prompt: int, adapters: int) -> StepPoint:
    row_lora, lora = (rows, prompt) if adapters else (0, 0)
    seconds = TRUE.seconds(rows, row_lora, prompt, lora, adapters, rows * context + prompt)
    return StepPoint(1e3 * seconds, rows, context, prompt, adapters)


def case(in_flight: int, prompt: int, output: int, adapters: int, ahead: bool) -> CasePoint:
    """What a long closed loop measures where steps take what they truly take."""
    config = SchedulerConfig(
        kv_groups=(KVGroup(layers=(0,)),),
        page_tokens=16,
        max_step_tokens=2048,
        max_running=64,
        max_model_len=4096,
        prefix_caching=False,
        eos_token_ids=(),
    )
    left = iter(range(in_flight, 4 * in_flight))

    def after(now: float) -> Arrival | None:
        i = next(left, None)
        return None if i is None else Arrival(now, f"{i % adapters}" if adapters else "", prompt, output)

    wave = [
        Arrival(0.0, f"{i % adapters}" if adapters else "", prompt, max(1, output * (i + 1) // in_flight))
        for i in range(in_flight)
    ]
    costs = {f"{i}": AdapterCost(3, 1.0, 0.0) for i in range(adapters)}
    served = simulate(Replica(config, 20_000, TRUE, ahead), costs, wave, after).served[in_flight:]
    tpot, ttft = mean(1 / one.otps for one in served), mean(one.ttft for one in served)
    return CasePoint(in_flight, len(served), prompt, output, adapters, 1e3 * tpot, 1e3 * ttft)


def close(found: StepCost, wanted: StepCost = TRUE) -> None:
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(getattr(wanted, term), rel=1e-6), term


def test_steps_tell_every_coefficient() -> None:
    points = [step(1, 500, 0, 0), step(16, 500, 0, 0), step(16, 4000, 0, 0), step(7, 900, 0, 5)]
    points += [step(0, 0, 700, 0), step(3, 100, 1900, 1), step(0, 0, 1300, 1)]
    found = fit(points, [], {}, 2048, ahead=True)
    close(found)
    assert found.error < 1e-9


@pytest.mark.parametrize("ahead", [True, False])
def test_closed_loops_tell_every_coefficient(ahead: bool) -> None:
    """Of loops in which prompts take most of the time too, so that requests bunch."""
    cases = [
        case(in_flight, prompt, 40, adapters, ahead)
        for in_flight in (1, 5, 16)
        for prompt in (64, 1500)
        for adapters in (0, 3)
    ]
    found = fit([], cases, {}, 2048, ahead)
    assert found.error < 0.005
    for rows, prompt, adapters in ((1, 0, 0), (16, 0, 3), (9, 0, 0), (4, 1000, 2), (0, 300, 1)):
        lora = (rows, prompt) if adapters else (0, 0)
        terms = rows, lora[0], prompt, lora[1], adapters, 800 * rows + prompt
        assert found.seconds(*terms) == pytest.approx(TRUE.seconds(*terms), rel=0.03)


def test_a_prompt_of_several_chunks_takes_as_many_steps() -> None:
    lone = CasePoint(1, 5, 1024, 10, 0, tpot_ms=2.0, ttft_ms=4 * 2.0 + 16.0)
    found = fit([StepPoint(2.0, rows=1)], [lone], {"row": 0.0, "context": 0.0}, 256, ahead=False)
    assert found.base == pytest.approx(2e-3)
    assert found.prompt * 1024 == pytest.approx(16e-3)


def test_what_is_given_is_not_fitted() -> None:
    points = [step(1, 1700, 0, 0), step(16, 1900, 0, 0), step(0, 0, 700, 0)]
    found = fit(points, [], {"context": TRUE.context}, 2048, ahead=True)
    close(found, StepCost(TRUE.base, TRUE.row, TRUE.prompt, 0.0, 0.0, TRUE.context))


def test_no_coefficient_is_negative() -> None:
    """A step with adapters that was faster by chance must not make adapters pay."""
    points = [StepPoint(2.0, rows=1), StepPoint(4.0, rows=16), StepPoint(3.8, rows=16, adapters=8)]
    found = fit(points, [], {}, 2048, ahead=True)
    assert found.adapter == 0.0
    assert min(getattr(found, term) for term in TERMS) >= 0.0
    assert found.error == pytest.approx(0.017, abs=0.005)


@pytest.mark.parametrize(
    ("points", "given", "said"),
    [
        ([], {}, "no measured points"),
        ([StepPoint(2.0)], {"rows": 1.0}, "'rows'"),
        ([StepPoint(0.0)], {}, "no time"),
    ],
)
def test_a_curve_that_tells_nothing_is_refused(
    points: list[StepPoint], given: dict[str, float], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        fit(points, [], given, 2048, ahead=True)
