"""Does `motet plan` predict what an engine does? `python benchmarks/plan_validation.py` (about 4 minutes).

An engine with SmolLM2-135M (dense) and four random adapters runs in this process, on one thread of this CPU. At each of
three loads, a short sweep of closed loops gives the points that a capacity curve is fitted to; then the same Poisson
arrivals, half of them the base's, are simulated and served. So are, in the end, as many requests in flight as may be,
where tokens per second are not those that arrive. Printed are TTFT, OTPS and tokens per second of both, and the error
of the prediction; then one JSON line.

The clock is the process' CPU time, one thread wide, and jumps to the next arrival where the engine is idle: on a
machine that others use too, neither run is charged for the time that they take. `--wall` takes the real clock instead.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from motet.adapters.store import ImageStore
from motet.config import EngineConfig
from motet.engine.loop import Engine
from motet.models.embedded import ensure_embedded_dense
from motet.plan.calibrate import CasePoint, fit
from motet.plan.cost import StepCost
from motet.plan.simulate import AdapterCost, Arrival, Outcome, Replica, Served, percentile, simulate
from motet.registry.prepare import prepare
from motet.scheduler.scheduler import SchedulerConfig
from motet.types import BASE, Account, ModelSpec, Request, SamplingParams

ADAPTERS, RANK = 4, 16
MODULES = ("q", "k", "v", "o", "gate", "up", "down")
STEP_TOKENS, MAX_RUNNING = 512, 16
OUTPUT = 24
Run = Callable[[Sequence[Arrival], Callable[[float], Arrival | None]], Outcome]
LOADS = {"low": 0.3, "middle": 0.55, "high": 0.8, "full": math.inf}
"""Shares of what the engine could do with all its 16 rows in use; "full" keeps them in use."""


def write_adapter(spec: ModelSpec, folder: Path, seed: int) -> Path:
    """A random adapter of all projections, as PEFT saves them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in spec.sites:
        if site.module in MODULES:
            for half, shape in (("A", (RANK, site.in_features)), ("B", (site.out_features, RANK))):
                values = torch.randn(shape, generator=generator) * 0.01
                tensors[f"base_model.model.{site.paths[0]}.lora_{half}.weight"] = values.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Clock:
    """Seconds since it was made: real ones, or those in which this process computed, with idle time skipped."""

    def __init__(self, wall: bool) -> None:
        self._read = time.perf_counter if wall else time.process_time
        self._wall = wall
        self._begin = self._read()

    def now(self) -> float:
        return self._read() - self._begin

    def idle(self, until: float) -> None:
        if self._wall:
            time.sleep(max(0.0, until - self.now()))
        else:
            self._begin -= max(0.0, until - self.now())


class Real:
    """An engine and its adapters, by name."""

    def __init__(self, scratch: Path, wall: bool) -> None:
        self.wall = wall
        config = EngineConfig(
            model=str(ensure_embedded_dense()),
            device="cpu",
            threads=1,
            max_step_tokens=STEP_TOKENS,
            max_running=MAX_RUNNING,
            prefix_caching=False,
        )
        self.engine = Engine(config)
        page = self.engine.runner.pool.page_bytes
        self.digests: dict[str, str] = {}
        self.costs: dict[str, AdapterCost] = {}
        for i in range(ADAPTERS):
            folder = write_adapter(self.engine.spec, scratch / f"adapter-{i}", i)
            found = prepare(folder, self.engine.spec, page, ImageStore(scratch / "images"))
            self.engine.register_adapter(found.digest, Path(found.image), found.num_pages)
            self.digests[f"a{i}"] = found.digest
            self.costs[f"a{i}"] = AdapterCost(found.num_pages, 1.0, 0.0)
        self._serial = 0

    def replica(self, cost: StepCost) -> Replica:
        """What the simulation takes for this engine."""
        spec = self.engine.spec
        config = SchedulerConfig(
            kv_groups=spec.kv_groups,
            page_tokens=16,
            max_step_tokens=STEP_TOKENS,
            max_running=MAX_RUNNING,
            max_model_len=self.engine.max_model_len,
            prefix_caching=False,
            eos_token_ids=(),
        )
        return Replica(config, self.engine.stats().total_pages, cost, ahead=False)

    def serve(
        self, arrivals: Sequence[Arrival], after: Callable[[float], Arrival | None] = lambda _now: None
    ) -> Outcome:
        """What `simulate` does, in earnest."""
        waiting, clock = list(arrivals)[::-1], Clock(self.wall)
        asked: dict[str, Arrival] = {}
        first: dict[str, float] = {}
        served: list[Served] = []
        while waiting or self.engine.has_work:
            now = clock.now()
            while waiting and waiting[-1].at <= now:
                arrival = waiting.pop()
                asked[self._send(arrival)] = arrival
            if not self.engine.has_work:
                clock.idle(waiting[-1].at)
                continue
            for output in self.engine.step():
                assert output.error is None, output.error
                now = clock.now()
                first.setdefault(output.request_id, now)
                if output.finish is not None:
                    served.append(Served(asked[output.request_id], first[output.request_id], now))
                    following = after(now)
                    waiting += [] if following is None else [following]
        served.sort(key=lambda one: one.arrival.at)
        return Outcome(tuple(served), clock.now(), 0.0, 0.0, 0, 0, 0, 0)

    def _send(self, arrival: Arrival) -> str:
        self._serial += 1
        chance = Random(self._serial)
        prompt = tuple(chance.randrange(100, 40_000) for _ in range(arrival.prompt))
        params = SamplingParams(max_tokens=arrival.output, ignore_eos=True, temperature=0.0)
        digest = self.digests.get(arrival.adapter, BASE)
        account = Account(tenant=arrival.adapter)
        request = Request(f"r{self._serial}", prompt, params, digest, arrival.at, account)
        outputs = self.engine.add(request)
        assert not outputs, outputs
        return request.id


def closed_loop(real: Real, in_flight: int, prompt: int, adapters: int) -> CasePoint:
    """A first wave of staggered lengths, then two answers for each place, six at least."""

    def name(i: int) -> str:
        return f"a{i % adapters}" if adapters else ""

    left = iter(range(in_flight, in_flight + max(2 * in_flight, 6)))

    def after(now: float) -> Arrival | None:
        i = next(left, None)
        return None if i is None else Arrival(now, name(i), prompt, OUTPUT)

    wave = [Arrival(0.0, name(i), prompt, max(1, OUTPUT * (i + 1) // in_flight)) for i in range(in_flight)]
    counted = real.serve(wave, after).served[in_flight:]
    tpot = sum(1 / one.otps for one in counted) / len(counted)
    ttft = sum(one.ttft for one in counted) / len(counted)
    return CasePoint(in_flight, len(counted), prompt, OUTPUT, adapters, 1e3 * tpot, 1e3 * ttft)


def sweep(real: Real) -> list[CasePoint]:
    """The points of a capacity curve."""
    grid = ((1, 32, 0), (1, 256, ADAPTERS), (4, 32, ADAPTERS), (4, 256, 0), (12, 32, 0), (12, 128, ADAPTERS))
    return [closed_loop(real, *point) for point in grid]


def poisson(rate: float, count: int, seed: int) -> list[Arrival]:
    """Prompts of 32 to 256 tokens, half of them the base's, the others of any adapter."""
    chance, now, found = Random(seed), 0.0, []
    for _ in range(count):
        now += chance.expovariate(rate)
        adapter = f"a{chance.randrange(ADAPTERS)}" if chance.random() < 0.5 else ""
        found.append(Arrival(now, adapter, chance.choice((32, 64, 128, 256)), OUTPUT))
    return found


def runs(arrivals: Sequence[Arrival], run: Run) -> Outcome:
    """What comes of these; those of an infinite rate keep MAX_RUNNING in flight."""
    if arrivals[-1].at > 0:
        return run(arrivals, lambda _now: None)
    left = iter(arrivals[MAX_RUNNING:])

    def after(now: float) -> Arrival | None:
        following = next(left, None)
        return None if following is None else replace(following, at=now)

    return run(arrivals[:MAX_RUNNING], after)


def figures(outcome: Outcome) -> dict[str, float]:
    served: Sequence[Served] = outcome.served
    return {
        "ttft_p50_ms": 1e3 * percentile([one.ttft for one in served], 0.5),
        "ttft_p95_ms": 1e3 * percentile([one.ttft for one in served], 0.95),
        "otps": percentile([one.otps for one in served], 0.5),
        "tokens_per_s": outcome.tokens_per_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100, help="at each load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wall", action="store_true", help="measure in real time")
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        real = Real(Path(scratch), arguments.wall)
        real.serve([Arrival(0.0, name, 32, 4) for name in real.digests])  # loads them
        results = {}
        for load, share in LOADS.items():
            cost = fit((), sweep(real), {}, STEP_TOKENS, ahead=False)
            full = cost.base / MAX_RUNNING + cost.row + 250 * cost.context + cost.adapter / 4
            rate = share / (OUTPUT * full + 120 * (cost.prompt + cost.prompt_lora / 2))
            arrivals = poisson(rate, arguments.requests, arguments.seed)
            predicted = figures(runs(arrivals, partial(simulate, real.replica(cost), real.costs)))
            measured = figures(runs(arrivals, real.serve))
            error = {name: predicted[name] / measured[name] - 1 for name in predicted}
            told = rate if math.isfinite(rate) else None
            results[load] = {"rate": told, "predicted": predicted, "measured": measured}
            offered = "all at once" if told is None else f"{told:.2f} requests/s"
            print(f"{load}: {offered}; mean error of the fit {cost.error:.1%}")
            for name in predicted:
                print(
                    f"  {name:12} predicted {predicted[name]:8.1f}  measured {measured[name]:8.1f}  {error[name]:+.1%}",
                    flush=True,
                )
        real.engine.close()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
