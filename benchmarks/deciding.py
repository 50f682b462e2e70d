"""What deciding a step costs: processor time of `schedule()` in long queues: `python benchmarks/deciding.py`.

The real scheduler without a device: a pool of 20,000 pages of 16 tokens, 64 places, 1,024 tokens in a step. Prompts
have 20 to 600 tokens, answers 10 to 100; adapters take 40 pages, so that less than half of 1,000 fit, and one comes in
each step. Whoever ends is followed by another, so that as many requests are always in flight. In the first few hundred
steps adapters come into a pool that is not full yet, which is the most to decide: later most requests that wait for one
lack room.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import deque
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from motet.scheduler.scheduler import Scheduler, SchedulerConfig
from motet.types import ANYBODY, BASE, Account, KVGroup, Request, Sampled, SamplingParams

NUM_PAGES, PAGE_TOKENS, ADAPTER_PAGES, COPY_STEPS = 20_000, 16, 40, 1
PLACES, STEP_TOKENS = 64, 1024
CASES = ((64, 0, 1), (300, 1000, 1), (2000, 1000, 1), (300, 1000, 100), (2000, 1000, 100))
"""Requests in flight, adapters, tenants."""


class Crowd:
    """So many requests of so many tenants for so many adapters, always."""

    def __init__(self, in_flight: int, adapters: int, tenants: int) -> None:
        config = SchedulerConfig(
            kv_groups=(KVGroup(layers=(0,)),),
            page_tokens=PAGE_TOKENS,
            max_step_tokens=STEP_TOKENS,
            max_running=PLACES,
            max_model_len=4096,
            prefix_caching=True,
            eos_token_ids=(),
        )
        self.scheduler = Scheduler(config, NUM_PAGES)
        self.rng = random.Random(0)
        self.adapters = [f"adapter {i}" for i in range(adapters)] or [BASE]
        self.accounts = [Account(f"tenant {i}") for i in range(tenants)] if tenants > 1 else [ANYBODY]
        self.copies: deque[tuple[int, str]] = deque()
        self.count = 0
        for digest in self.adapters[: adapters or 0]:
            self.scheduler.register_adapter(digest, ADAPTER_PAGES)
        for _ in range(in_flight):
            self.arrive()

    def arrive(self) -> None:
        rng = self.rng
        prompt = tuple(rng.randrange(30_000) for _ in range(rng.randint(20, 600)))
        params = SamplingParams(max_tokens=rng.randint(10, 100))
        adapter, account = rng.choice(self.adapters), rng.choice(self.accounts)
        self.scheduler.add(Request(str(self.count), prompt, params, adapter, float(self.count), account))
        self.count += 1

    def step(self, number: int) -> float:
        """Seconds that deciding it took."""
        while self.copies and self.copies[0][0] <= number:
            self.scheduler.adapter_loaded(self.copies.popleft()[1])
        began = time.process_time()
        plan = self.scheduler.schedule()
        seconds = time.process_time() - began
        for load in plan.loads:
            free = max(number, self.copies[-1][0] if self.copies else 0)
            self.copies.append((free + COPY_STEPS, load.digest))
        sampled = [Sampled(chunk.seq, 9) for chunk in plan.chunks if chunk.sample]
        for output in self.scheduler.commit(plan, sampled):
            if output.finish is not None:
                self.arrive()
        return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="of each case, after as many to warm up")
    steps = parser.parse_args().steps
    print(f"{'':55} {'median':>9} {'p95':>9}")
    for in_flight, adapters, tenants in CASES:
        crowd = Crowd(in_flight, adapters, tenants)
        times = [crowd.step(number) for number in range(2 * steps)][steps:]
        middle, last = median(times), quantiles(times, n=20)[-1]
        name = f"{in_flight} requests for {adapters} adapters, {tenants} tenant(s)"
        print(f"{name:55} {1e3 * middle:6.2f} ms {1e3 * last:6.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
