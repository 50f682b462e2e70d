"""One kind of engine on one kind of GPU: what it can do, found by simulating it.

The capacity for a mix of traffic is the highest rate at which one engine still keeps the service level. It is searched
for once with the adapters and once without (a replica of its own serves a fine-tune merged into the weights); a
fine-tune's load is its part of the work, in GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from motet.errors import ConfigError, MotetError
from motet.plan.cost import StepCost, touched
from motet.plan.curve import Curve
from motet.plan.gpus import Gpu, find_gpu
from motet.plan.simulate import AdapterCost, Arrival, Outcome, Replica, Served, percentile, simulate
from motet.plan.sizes import PAGE_TOKENS, Sizes
from motet.plan.traffic import FineTune, arrivals
from motet.scheduler.scheduler import SchedulerConfig

MAX_RUNNING = 64
"""An engine's own default."""
SIMULATED_TOKENS = 150_000
"""Output tokens of a simulation: about a second of computing."""
FEWEST, MOST = 300, 2000
FILLING = 3 * MAX_RUNNING // 2
EMPTYING = 30
"""So many requests at the beginning and at the end meet an engine that is still filling up, or emptying already: they
do not count. At most MAX_RUNNING are in flight."""
PRECISION = 1.05
"""A capacity is found within 5 %; another seed changes it as much."""
FULL_SIZE = ("attention", "mlp")
"""What the adapters of a curve change."""


@dataclass(frozen=True)
class Slo:
    """Of every 20 requests, 19 have their first token within `ttft` seconds and `otps` tokens per second after it."""

    ttft: float
    otps: float


@dataclass(frozen=True)
class Quality:
    """How requests fared: percentiles over requests, TTFT in seconds."""

    ttft_p50: float
    ttft_p95: float
    otps_p50: float
    otps_p5: float

    @staticmethod
    def of(served: Sequence[Served]) -> Quality:
        ttft, otps = [one.ttft for one in served], [one.otps for one in served]
        return Quality(
            percentile(ttft, 0.5), percentile(ttft, 0.95), percentile(otps, 0.5), percentile(otps, 0.05)
        )

    def keeps(self, slo: Slo) -> bool:
        return self.ttft_p95 <= slo.ttft and self.otps_p5 >= slo.otps


@dataclass(frozen=True)
class Fleet:
    """Engines of one model, each on one GPU. `cost` is the curve's, scaled if it was measured on another GPU."""

    sizes: Sizes
    gpu: Gpu
    curve: Curve
    cost: StepCost

    @staticmethod
    def of(curve: Curve, sizes: Sizes, gpu: Gpu) -> Fleet:
        """Decode scales with the memory's bandwidth and prompts with arithmetic: an estimate, not a measurement."""
        cost = curve.cost
        if curve.gpu.lower() != gpu.name.lower():
            measured = find_gpu(curve.gpu)
            cost = cost.scaled(measured.bandwidth / gpu.bandwidth, measured.flops / gpu.flops)
        return Fleet(sizes, gpu, curve, cost)

    @property
    def replica(self) -> Replica:
        spec = self.sizes.spec
        config = SchedulerConfig(
            kv_groups=spec.kv_groups,
            page_tokens=PAGE_TOKENS,
            max_step_tokens=self.curve.max_step_tokens,
            max_running=MAX_RUNNING,
            max_model_len=spec.max_model_len,
            prefix_caching=False,
            eos_token_ids=(),
        )
        return Replica(config, self.sizes.pool_pages(self.gpu), self.cost, self.curve.ahead)

    def adapter(self, one: FineTune) -> AdapterCost:
        """Its pages, its weight in a step, the seconds that it takes to load."""
        size = self.sizes.adapter(one.rank, one.targets)
        measured = self.sizes.adapter(self.curve.rank, FULL_SIZE)
        pages = self.sizes.adapter_pages(one.rank, one.targets)
        return AdapterCost(pages, size / measured, size / self.curve.load_bytes_per_s)

    def alone(self, one: FineTune, shared: bool) -> Quality:
        """One request of mean lengths on an idle GPU. ConfigError if an engine cannot take such a request."""
        try:
            request = Arrival(0.0, one.name, one.prompt, one.output)
            return Quality.of(simulate(self.replica, self._adapters([one], shared), [request]).served)
        except MotetError as error:
            raise ConfigError(f"{one.name}: {error}") from error

    def serve(
        self, mix: Sequence[FineTune], shared: bool, factors: Mapping[str, float], room: bool = False
    ) -> Outcome:
        """One GPU under this traffic, times `factors` by name; with `room` adapters take hardly any of its memory."""
        mean = sum(one.output * one.peak_rate for one in mix) / sum(one.peak_rate for one in mix)
        count = int(min(max(SIMULATED_TOKENS / mean, FEWEST), MOST))
        adapters = self._adapters(mix, shared)
        if room:
            adapters = {name: replace(adapter, num_pages=1) for name, adapter in adapters.items()}
        return simulate(self.replica, adapters, arrivals(mix, count, factors))

    def _adapters(self, mix: Sequence[FineTune], shared: bool) -> dict[str, AdapterCost]:
        """Of those that are not the base itself; replicas of their own have none."""
        return {one.name: self.adapter(one) for one in mix if one.rank and shared}


def settled(outcome: Outcome) -> tuple[Served, ...]:
    """The requests that count."""
    return outcome.served[FILLING:-EMPTYING]


@dataclass(frozen=True)
class Capacity:
    """One GPU keeps the service level up to `factor` times the traffic of the mix; `outcome` is what that is like."""

    factor: float
    outcome: Outcome

    def loads(self, cost: StepCost, mix: Sequence[FineTune]) -> dict[str, float]:
        """Each fine-tune's share of the mix' work over what one GPU can do: GPUs that it fills."""
        rows = max(self.outcome.rows, 1.0)
        work = {one.name: one.peak_rate * _seconds(cost, one, rows) for one in mix}
        total = sum(work.values())
        return {name: part / total / self.factor for name, part in work.items()}


def _seconds(cost: StepCost, one: FineTune, rows: float) -> float:
    """A request's share of steps with so many rows."""
    context = one.prompt + one.output / 2
    shared = cost.base + cost.experts * touched(rows, cost.sparsity)
    return one.prompt * cost.prompt + one.output * (shared / rows + cost.row + cost.context * context)


def capacity(fleet: Fleet, mix: Sequence[FineTune], shared: bool, slo: Slo) -> Capacity:
    """The highest rate of this mix that one GPU serves within `slo`, by simulation. ConfigError if there is none.

    Whether all its adapters fit beside each other is a question of placing, not of this.
    """
    for one in mix:
        lone = fleet.alone(one, shared)
        if not lone.keeps(slo):
            raise ConfigError(
                f"{one.name}: a request alone on a {fleet.gpu.name} has its first token after "
                f"{lone.ttft_p95:.3f} s and then {lone.otps_p5:.0f} tokens/s; the service level asks for "
                f"{slo.ttft:g} s and {slo.otps:g}"
            )

    def kept(factor: float) -> Outcome | None:
        outcome = fleet.serve(mix, shared, dict.fromkeys((one.name for one in mix), factor), room=True)
        return outcome if Quality.of(settled(outcome)).keeps(slo) else None

    return _highest(kept, 1 / sum(one.peak_rate * _seconds(fleet.cost, one, 16) for one in mix))


def _highest(kept: Callable[[float], Outcome | None], guess: float) -> Capacity:
    """The highest factor that is kept, within PRECISION: by halves and doubles from `guess`, then in between."""
    low, high, best = guess, guess, kept(guess)
    while best is None:
        if low < guess / 1000:
            raise ConfigError(
                "no rate of this mix keeps the service level: its long prompts hold up the others"
            )
        low, high = low / 2, low
        best = kept(low)
    while high <= low:
        if outcome := kept(2 * low):
            low = high = 2 * low
            best = outcome
        else:
            high = 2 * low
    while high / low > PRECISION:
        middle = math.sqrt(low * high)
        if outcome := kept(middle):
            low, best = middle, outcome
        else:
            high = middle
    return Capacity(low, best)
