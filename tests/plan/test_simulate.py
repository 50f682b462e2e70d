"""The simulation's times, by hand where that is possible and against figures of an H200 where it is not."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from statistics import mean

import pytest

from motet.errors import CapacityExceeded
from motet.plan.cost import StepCost
from motet.plan.curve import find_curve
from motet.plan.fleet import Fleet
from motet.plan.gpus import find_gpu
from motet.plan.simulate import AdapterCost, Arrival, Outcome, Replica, percentile, simulate
from motet.plan.sizes import sizes_of
from motet.plan.traffic import FineTune
from motet.scheduler.scheduler import SchedulerConfig
from motet.types import KVGroup

COST = StepCost(base=0.010, row=0.001, prompt=0.0001, prompt_lora=0.00005, adapter=0.002, context=0.0)
CONFIG = SchedulerConfig(
    kv_groups=(KVGroup(layers=(0,)),),
    page_tokens=4,
    max_step_tokens=100,
    max_running=4,
    max_model_len=1000,
    prefix_caching=False,
    eos_token_ids=(),
)
REPLICA = Replica(CONFIG, num_pages=500, cost=COST, ahead=False)
ADAPTERS = {"a": AdapterCost(10, 1.0, 0.5), "b": AdapterCost(10, 2.0, 0.5)}


def run(
    *arrivals: Arrival, replica: Replica = REPLICA, adapters: dict[str, AdapterCost] = ADAPTERS
) -> Outcome:
    return simulate(replica, adapters, arrivals)


def test_a_lone_request_takes_its_prompt_and_then_a_step_for_each_token() -> None:
    (served,) = run(Arrival(1.0, "", 80, 5)).served
    assert served.ttft == pytest.approx(0.010 + 80 * 0.0001)
    assert served.otps == pytest.approx(1 / 0.011)


def test_a_prompt_longer_than_a_step_takes_several() -> None:
    (served,) = run(Arrival(0.0, "", 250, 2)).served
    assert served.ttft == pytest.approx(3 * 0.010 + 250 * 0.0001)


def test_adapters_cost_what_they_weigh_once_a_step() -> None:
    (served,) = run(Arrival(0.0, "b", 80, 2)).served
    assert served.ttft == pytest.approx(0.010 + 80 * (0.0001 + 0.00005) + 2 * 0.002)
    one, two = run(Arrival(0.0, "a", 2, 9), Arrival(0.0, "a", 2, 9)).served
    assert one.otps == two.otps == pytest.approx(1 / (0.010 + 2 * 0.001 + 0.002))


def test_planned_one_ahead_a_request_waits_for_the_step_under_way_and_the_one_behind_it() -> None:
    """Tokens of the first request land at 0.010 + 0.0002, then every 0.011; the second comes during the third step."""
    arrivals = [Arrival(0.0, "", 2, 50), Arrival(0.025, "", 50, 2)]
    prompt_step = 0.010 + 0.001 + 50 * 0.0001
    late = simulate(replace(REPLICA, ahead=True), {}, arrivals).served[1]
    assert late.first == pytest.approx(0.0102 + 3 * 0.011 + prompt_step)
    soon = simulate(REPLICA, {}, arrivals).served[1]
    assert soon.first == pytest.approx(0.0102 + 2 * 0.011 + prompt_step)


def test_an_answer_of_one_token_has_no_rate() -> None:
    (served,) = run(Arrival(0.0, "", 5, 1)).served
    assert served.otps == math.inf


def test_a_cold_adapter_keeps_nobody_else_waiting() -> None:
    """Room for one adapter at a time: b comes in for 0.5 s while a request of the base goes on."""
    small = replace(REPLICA, num_pages=40)
    tight = {
        "a": AdapterCost(22, 1.0, 0.5),
        "b": AdapterCost(22, 1.0, 0.5),
    }  # b is what the warm-up left there
    outcome = simulate(small, tight, [Arrival(0.0, "", 4, 30), Arrival(0.05, "a", 8, 2)])
    base, cold = outcome.served
    assert outcome.loads == 1
    assert cold.ttft == pytest.approx(0.5 + 0.0128, abs=0.02)
    assert base.otps > 1 / 0.0135


def test_a_closed_loop_keeps_as_many_in_flight() -> None:
    left = iter(range(6))

    def after(now: float) -> Arrival | None:
        return None if next(left, None) is None else Arrival(now, "", 4, 10)

    outcome = simulate(REPLICA, {}, [Arrival(0.0, "", 4, 10)] * 3, after)
    assert len(outcome.served) == 9
    assert outcome.rows == pytest.approx(3)
    assert outcome.busy == pytest.approx(1.0)


def test_time_without_requests_is_idle() -> None:
    outcome = run(Arrival(0.0, "", 2, 1), Arrival(10.0, "", 2, 1))
    assert outcome.busy == pytest.approx(2 * 0.0102 / 10.0102)
    assert outcome.tokens_per_s == pytest.approx(2 / 10.0102)


def test_what_an_engine_would_refuse_is_refused() -> None:
    with pytest.raises(CapacityExceeded, match="the pool has 500"):
        run(Arrival(0.0, "a", 4, 2), adapters={"a": AdapterCost(600, 1.0, 0.1)})


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(20, 0, -1)]
    assert [percentile(values, share) for share in (0.05, 0.5, 0.95, 1.0)] == [1.0, 10.0, 19.0, 20.0]
    assert percentile([], 0.5) == 0.0


def test_simulating_needs_no_torch() -> None:
    code = "import sys, motet.plan.simulate, motet.plan.traffic, motet.plan.curve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "adapters", "waves", "otps", "ttft_ms", "tokens_per_s"),
    [
        ("h200-gpt-oss-20b", 8, 4, 176, 35.1, 2660),
        ("h200-gpt-oss-20b", 0, 3, 205.4, 29.6, 3038),
        ("h200-llama-3.1-8b", 8, 4, 121.8, 55.6, 1817),
        ("h200-llama-3.1-8b", 0, 3, 140.9, 47.6, 2053),
    ],
)
def test_curves_predict_closed_loops_that_they_were_not_fitted_to(
    name: str, adapters: int, waves: int, otps: float, ttft_ms: float, tokens_per_s: float
) -> None:
    """`motet bench`'s cases steady and base: 16 requests in flight, the first wave staggered, 1,600 and 600 tokens."""
    curve = find_curve(name, None, "H200")
    fleet = Fleet.of(curve, sizes_of(curve.config, curve.model), find_gpu("H200"))
    costs = {f"a{i}": fleet.adapter(FineTune(f"a{i}", 1.0, 1600, 600, rank=32)) for i in range(adapters)}
    left = iter(range(16, 16 * waves))

    def model(i: int) -> str:
        return f"a{i % adapters}" if adapters else ""

    def after(now: float) -> Arrival | None:
        i = next(left, None)
        return None if i is None else Arrival(now, model(i), 1600, 600)

    first = [Arrival(0.0, model(i), 1600, 600 * (i + 1) // 16) for i in range(16)]
    outcome = simulate(fleet.replica, costs, first, after)
    tpot = mean(1 / one.otps for one in outcome.served)
    assert 1 / tpot == pytest.approx(otps, rel=0.05)
    assert outcome.tokens_per_s == pytest.approx(tokens_per_s, rel=0.05)
    assert 1e3 * mean(one.ttft for one in outcome.served[16:]) == pytest.approx(ttft_ms, rel=0.13)
