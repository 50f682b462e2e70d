"""Four aggressors against a quiet tenant, simulated with the real scheduler: `python benchmarks/fairness.py`.

Prints the tables of docs/fairness.md and draws its plots. Each aggressor always has more requests in flight than are
served; the quiet tenant sends some now and then, at random. Everything is measured twice: with tenants, and first come
first served, where all requests are of nobody. A step takes the time that it took of gpt-oss-20b on an H200
(docs/performance.md), and the next one is planned while it runs.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from motet.scheduler.cost import load_cost, progress_cost
from motet.scheduler.scheduler import Scheduler, SchedulerConfig
from motet.types import ANYBODY, BASE, Account, KVGroup, Plan, Request, Sampled, SamplingParams

PAGE_TOKENS = 64
PAGE_SECONDS = 450e-6  # of a copy: 1.6 MB at 3.5 GB/s
ADAPTER_PAGES = 112  # rank 8 on every expert
NUM_PAGES = 8192
ADAPTER_WORK = 0.003
QUIET = "quiet"


def step_seconds(plan: Plan) -> float:
    """One row takes 2.9 ms, 16 rows 6.2, a prompt of 1,600 tokens 41: most of the experts' weights are read soon."""
    rows = sum(len(chunk.tokens) == 1 for chunk in plan.chunks)
    prompt = plan.num_tokens - rows
    return 2.5e-3 + 3.7e-3 * (1 - exp(-plan.num_tokens / 10)) + 50e-6 * rows + 22e-6 * prompt


@dataclass(frozen=True, slots=True)
class Wish:
    """What a tenant asks for next."""

    prompt: int
    output: int
    adapter: str = BASE


@dataclass(frozen=True, slots=True)
class Tenant:
    """A source of requests: `in_flight` at all times, or at `rate` per second if that is not 0."""

    name: str
    wish: Callable[[random.Random], Wish]
    in_flight: int = 0
    rate: float = 0.0
    weight: float = 1.0


def _quiet(rng: random.Random) -> Wish:
    return Wish(min(8000, round(rng.lognormvariate(7.38, 0.6)) + 1), rng.randint(20, 200), "quiet's own")


def _thrash() -> Callable[[random.Random], Wish]:
    count = 0

    def wish(rng: random.Random) -> Wish:
        nonlocal count
        count += 1
        return Wish(rng.randint(100, 300), 20, f"cold {count % 200}")

    return wish


QUIET_TENANT = Tenant(QUIET, _quiet, rate=2.0)
AGGRESSORS: dict[str, Callable[[], Tenant]] = {
    "many short requests": lambda: Tenant("short", lambda r: Wish(r.randint(20, 80), 16), in_flight=500),
    "few huge prompts": lambda: Tenant("huge", lambda r: Wish(r.randint(12_000, 20_000), 50), in_flight=12),
    "long outputs": lambda: Tenant("long", lambda r: Wish(100, r.randint(1000, 2000)), in_flight=200),
    "adapter thrash": lambda: Tenant("thrash", _thrash(), in_flight=150),
}


@dataclass(slots=True)
class Result:
    """TTFTs in seconds by tenant, tokens of prompts and answers, served cost by tenant over time.

    A request that has no token at the end counts with its wait so far.
    """

    ttft: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    served: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    timeline: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    preemptions: int = 0
    loads: int = 0

    @property
    def throughput(self) -> float:
        return sum(self.tokens.values()) / self.seconds


class Server:
    """The scheduler with a clock. Adapters are copied one after the other, beside the steps."""

    def __init__(self, max_step_tokens: int, fair: bool, tenants: Sequence[Tenant], seed: int) -> None:
        groups = (KVGroup((0,)), KVGroup((1,), window=128))
        self.scheduler = Scheduler(
            SchedulerConfig(
                kv_groups=groups,
                page_tokens=PAGE_TOKENS,
                max_step_tokens=max_step_tokens,
                max_running=64,
                max_model_len=32_768,
                prefix_caching=True,
                eos_token_ids=(),
            ),
            NUM_PAGES,
        )
        for digest in ("quiet's own", *(f"cold {i}" for i in range(200))):
            self.scheduler.register_adapter(digest, ADAPTER_PAGES, ADAPTER_WORK)
        self.fair, self.tenants = fair, tenants
        self.chances = {tenant.name: random.Random(f"{tenant.name} {seed}") for tenant in tenants}
        self.due = {t.name: self.chances[t.name].expovariate(t.rate) for t in tenants if t.rate}
        self.live: dict[str, int] = defaultdict(int)
        self.sent: dict[str, tuple[str, float, int]] = {}
        self.started: set[str] = set()
        self.loading: list[tuple[float, str]] = []
        self.loader_free = 0.0
        self.now = 0.0
        self.result = Result()

    def run(self, seconds: float) -> Result:
        flight, ends = Plan(), 0.0
        while self.now < seconds:
            self._take_in()
            plan = self.scheduler.schedule()
            for load in plan.loads:
                self.loader_free = max(self.loader_free, self.now) + PAGE_SECONDS * len(load.pages)
                self.loading.append((self.loader_free, load.digest))
            self._count(plan)
            landing, landed = flight, ends
            flight, ends = plan, max(self.now, ends) + step_seconds(plan)
            if landing.chunks:
                self.now = landed
                self._land(landing)
            elif not plan.chunks:
                self.now = min((*self.due.values(), *(end for end, _ in self.loading)), default=seconds)
        self.result.seconds = self.now
        for id, (name, at, _) in self.sent.items():
            if id not in self.started:
                self.result.ttft[name].append(self.now - at)
        stats = self.scheduler.stats()
        self.result.preemptions, self.result.loads = stats.preemptions, stats.loads
        return self.result

    def _take_in(self) -> None:
        while self.loading and self.loading[0][0] <= self.now:
            self.scheduler.adapter_loaded(self.loading.pop(0)[1])
        for tenant in self.tenants:
            while tenant.rate and self.due[tenant.name] <= self.now:
                self._send(tenant, self.due[tenant.name])
                self.due[tenant.name] += self.chances[tenant.name].expovariate(tenant.rate)
            while self.live[tenant.name] < tenant.in_flight:
                self._send(tenant, self.now)

    def _send(self, tenant: Tenant, at: float) -> None:
        chance = self.chances[tenant.name]
        wish = tenant.wish(chance)
        first = chance.randrange(1 << 40)
        prompt = tuple(range(first, first + wish.prompt))
        account = Account(tenant.name, tenant.weight, salt=tenant.name) if self.fair else ANYBODY
        id = f"{tenant.name} {len(self.sent)}"
        params = SamplingParams(max_tokens=wish.output, ignore_eos=True)
        self.scheduler.add(Request(id, prompt, params, wish.adapter, at, account))
        self.sent[id] = tenant.name, at, wish.prompt
        self.live[tenant.name] += 1

    def _count(self, plan: Plan) -> None:
        for load in plan.loads:
            name = "thrash" if load.digest.startswith("cold") else QUIET
            self.result.served[name] += load_cost(len(load.pages), PAGE_TOKENS)
        for chunk in plan.chunks:
            name, _, _ = self.sent[self.scheduler.sequence(chunk.seq).request.id]
            work = 0.0 if chunk.adapter == BASE else ADAPTER_WORK
            self.result.served[name] += progress_cost(len(chunk.tokens), chunk.sample, work)
        self.result.steps += bool(plan.chunks)
        if self.result.steps % 20 == 0:
            self.result.timeline.append((self.now, dict(self.result.served)))

    def _land(self, plan: Plan) -> None:
        sampled = [Sampled(chunk.seq, 1) for chunk in plan.chunks if chunk.sample]
        for output in self.scheduler.commit(plan, sampled):
            name, at, prompt = self.sent[output.request_id]
            self.result.tokens[name] += 1
            if output.request_id not in self.started:
                self.started.add(output.request_id)
                self.result.tokens[name] += prompt
                self.result.ttft[name].append(self.now - at)
            self.live[name] -= output.finish is not None


def measure(tenants: Sequence[Tenant], fair: bool, seconds: float, rows: int, seed: int = 0) -> Result:
    """So many seconds of these tenants together."""
    return Server(rows, fair, tenants, seed).run(seconds)


def p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def jain(values: Sequence[float]) -> float:
    """1 if all are equal, 1/n if one has all (Jain et al., 1984)."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


@dataclass(frozen=True, slots=True)
class Case:
    """An aggressor beside the quiet tenant, first come first served and fair."""

    name: str
    first: Result
    fair: Result

    @property
    def throughput(self) -> float:
        """Of the fair run, in times of the other."""
        return self.fair.throughput / self.first.throughput


def case(name: str, seconds: float, rows: int) -> Case:
    """Both runs, with the same traffic."""
    first, fair = (
        measure([QUIET_TENANT, AGGRESSORS[name]()], is_fair, seconds, rows) for is_fair in (False, True)
    )
    return Case(name, first, fair)


def all_together(seconds: float, rows: int) -> Case:
    """The four aggressors at once."""
    first, fair = (
        measure([make() for make in AGGRESSORS.values()], is_fair, seconds, rows) for is_fair in (False, True)
    )
    return Case("all four", first, fair)


def table(alone: Result, cases: Sequence[Case], together: Case) -> Iterator[str]:
    """The tables of docs/fairness.md."""
    own = p95(alone.ttft[QUIET])
    yield f"Alone, p95 TTFT {1e3 * own:.0f} ms of {len(alone.ttft[QUIET])} requests."
    yield "| beside | first come first served | fair | × alone | throughput, × FCFS | preemptions |"
    yield "|---|---|---|---|---|---|"
    for each in cases:
        first, fair = p95(each.first.ttft[QUIET]), p95(each.fair.ttft[QUIET])
        yield (
            f"| {each.name} | {1e3 * first:,.0f} ms | {1e3 * fair:.0f} ms | {fair / own:.2f} | "
            f"{each.throughput:.3f} | {each.first.preemptions} → {each.fair.preemptions} |"
        )
    yield "| all four, cost per second | " + " | ".join(together.fair.served) + " | Jain's index | tokens/s |"
    yield "|---|---|---|---|---|---|---|"
    for label, result in (("first come first served", together.first), ("fair", together.fair)):
        shares = [result.served[name] / result.seconds for name in together.fair.served]
        cells = " | ".join(f"{share:,.0f}" for share in shares)
        yield f"| {label} | {cells} | {jain(shares):.3f} | {result.throughput:,.0f} |"


def draw(alone: Result, cases: Sequence[Case], together: Case, folder: Path) -> None:
    """Two plots: the quiet tenant's waits, and what each aggressor was served."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fairness"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(cases), figsize=(12, 3), sharey=True)
    for axis, each in zip(axes, cases, strict=True):
        for label, result in (("alone", alone), ("fair", each.fair), ("first come", each.first)):
            waits = sorted(result.ttft[QUIET])
            axis.plot(waits, [(k + 1) / len(waits) for k in range(len(waits))], label=label)
        axis.set(xscale="log", title=each.name, xlabel="TTFT of the quiet tenant, s")
        axis.axhline(0.95, color="0.8", linewidth=0.8)
    axes[0].set_ylabel("share of its requests")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(folder / "fairness-ttft.svg", metadata={"Date": None})

    figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
    for axis, (label, result) in zip(
        axes, (("first come first served", together.first), ("fair", together.fair)), strict=True
    ):
        for name in together.fair.served:
            times = [at for at, _ in result.timeline]
            axis.plot(times, [served.get(name, 0.0) / 1e6 for _, served in result.timeline], label=name)
        axis.set(title=label, xlabel="seconds")
    axes[0].set_ylabel("cost served, millions of tokens")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(folder / "fairness-share.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Four aggressors against a quiet tenant, simulated.")
    parser.add_argument("--seconds", type=float, default=100.0, help="simulated, for each case")
    parser.add_argument("--rows", type=int, default=1024, help="tokens in a step at most")
    parser.add_argument("--plots", type=Path, help="folder to draw the plots into")
    options = parser.parse_args()
    alone = measure([QUIET_TENANT], True, options.seconds, options.rows)
    cases = [case(name, options.seconds, options.rows) for name in AGGRESSORS]
    together = all_together(options.seconds, options.rows)
    for line in table(alone, cases, together):
        print(line)
    if options.plots:
        draw(alone, cases, together, options.plots)


if __name__ == "__main__":
    main()
