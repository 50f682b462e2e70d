"""Four aggressors against a quiet tenant on the real engine, on a CPU: `python -m benchmarks.aggressors` (8 minutes).

The same as `benchmarks/fairness.py` simulates, with six layers of SmolLM2-135M and real adapters: 128 tokens in a step,
16 places, prompts of the quiet tenant some 900 tokens long. With all thirty layers a step takes a quarter of a second,
and ten minutes hold too few requests for a percentile. Everything is measured with tenants, and first come first
served, where all requests are of nobody. What comes in the first seconds only fills the queues: afterwards a tenant
that asks for less than the engine could give is given as much by either. Throughput counts every token that was
computed, once.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import msgspec
from safetensors.torch import load_file, save_file

from benchmarks.fairness import QUIET, Case, Result, Tenant, Wish, p95
from benchmarks.thousand_adapters import write_adapters
from motet.adapters.store import ImageStore
from motet.config import EngineConfig
from motet.engine.loop import Engine
from motet.engine.sampler import Draw, SamplingRow
from motet.memory.pool import page_bytes
from motet.models.embedded import ensure_embedded_dense
from motet.models.registry import load_spec
from motet.models.weights import weight_files
from motet.registry.prepare import prepare
from motet.types import ANYBODY, BASE, Account, Plan, Request, SamplingParams, SeqOutput

COLD = 100
FILLING = 8.0
"""Seconds until queues are as long as they get."""
LAYERS = 6
CONFIG = EngineConfig(
    model="", device="cpu", pool_bytes=192 << 20, max_step_tokens=128, max_running=16,
    max_model_len=2048,
)  # fmt: skip


_turns = count(1)
AGGRESSORS = (
    Tenant("many short requests", lambda r: Wish(r.randint(20, 80), 8), in_flight=60),
    Tenant("few huge prompts", lambda r: Wish(r.randint(1500, 1900), 8), in_flight=4),
    Tenant("long outputs", lambda r: Wish(50, r.randint(100, 200)), in_flight=40),
    Tenant("adapter thrash", lambda _: Wish(40, 4, f"tenant-{1 + next(_turns) % COLD}"), in_flight=40),
)


def quiet_tenant(prompt: int) -> Tenant:
    """With prompts of some so many tokens: 450 a second."""

    def wish(rng: random.Random) -> Wish:
        return Wish(rng.randint(prompt * 7 // 9, prompt * 11 // 9), rng.randint(2, 8), "tenant-0")

    return Tenant(QUIET, wish, rate=450 / prompt)


class Run:
    """Some tenants' traffic on the engine."""

    def __init__(
        self, engine: Engine, digests: dict[str, str], tenants: Sequence[Tenant], fair: bool
    ) -> None:
        self.engine, self.digests, self.tenants, self.fair = engine, digests, tenants, fair
        self.chances = {tenant.name: random.Random(tenant.name) for tenant in tenants}
        self.due = {t.name: self.chances[t.name].expovariate(t.rate) for t in tenants if t.rate}
        self.live: dict[str, int] = defaultdict(int)
        self.reached: dict[int, int] = {}  # by sequence: the position up to which it was computed
        self.sent: dict[str, tuple[str, float]] = {}
        self.started: set[str] = set()
        self.begin = time.monotonic()
        self.result = Result()

    def serve(self, seconds: float, filling: float = 0.0) -> Result:
        """Results of so many seconds after those of `filling`; then what is left is aborted."""
        self.filling, launch = filling, self.engine.runner.launch

        def counting(plan: Plan, row: Callable[[int], SamplingRow]) -> Draw:
            self._count(plan)
            return launch(plan, row)

        self.engine.runner.launch = counting  # type: ignore[method-assign]
        while self.now < filling + seconds:
            self._take_in()
            self._land(self.engine.step())
            if self.engine.must_wait:
                time.sleep(0.001)
        self.engine.runner.launch = launch  # type: ignore[method-assign]
        self.result.seconds = self.now - filling
        for id, (name, at) in self.sent.items():
            if id not in self.started and at >= filling:
                self.result.ttft[name].append(self.now - at)
            self.engine.abort(id)
        while self.engine.has_work:
            self.engine.step()
        return self.result

    @property
    def now(self) -> float:
        return time.monotonic() - self.begin

    def _take_in(self) -> None:
        now = self.now
        for tenant in self.tenants:
            while tenant.rate and self.due[tenant.name] <= now:
                self._send(tenant, self.due[tenant.name])
                self.due[tenant.name] += self.chances[tenant.name].expovariate(tenant.rate)
            while self.live[tenant.name] < tenant.in_flight:
                self._send(tenant, now)

    def _send(self, tenant: Tenant, at: float) -> None:
        chance = self.chances[tenant.name]
        wish = tenant.wish(chance)
        prompt = tuple(chance.randrange(100, 40_000) for _ in range(wish.prompt))
        account = Account(tenant.name, salt=tenant.name) if self.fair else ANYBODY
        params = SamplingParams(max_tokens=wish.output, ignore_eos=True, temperature=0)
        adapter = BASE if wish.adapter == BASE else self.digests[wish.adapter]
        id = f"{tenant.name} {len(self.sent)}"
        assert not self.engine.add(Request(id, prompt, params, adapter, self.begin + at, account))
        self.sent[id] = tenant.name, at
        self.live[tenant.name] += 1

    def _land(self, outputs: Sequence[SeqOutput]) -> None:
        for output in outputs:
            name, at = self.sent[output.request_id]
            if output.request_id not in self.started:
                self.started.add(output.request_id)
                if at >= self.filling:
                    self.result.ttft[name].append(self.now - at)
            self.live[name] -= output.finish is not None

    def _count(self, plan: Plan) -> None:
        """Tokens computed for the first time, so not those of a sequence that had to give way."""
        for chunk in plan.chunks:
            before = self.reached.get(chunk.seq, chunk.start)
            end = chunk.start + len(chunk.tokens)
            self.reached[chunk.seq] = max(before, end)
            if self.now >= self.filling:
                self.result.tokens[""] += max(end - before, 0)


def shallow(folder: Path) -> Path:
    """The dense embedded model with its first layers only."""
    whole = ensure_embedded_dense()
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(whole / name)
    values = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": LAYERS}))
    weights = {
        name: tensor
        for file in weight_files(whole)
        for name, tensor in load_file(file).items()
        if ".layers." not in name or int(name.split(".")[2]) < LAYERS
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def start(folder: Path) -> tuple[Engine, dict[str, str]]:
    """An engine that knows the quiet tenant's adapter and a hundred others."""
    model = shallow(folder / "model")
    engine = Engine(msgspec.structs.replace(CONFIG, model=str(model)))
    spec = load_spec(model)
    images, size, digests = ImageStore(folder / "images"), page_bytes(spec, CONFIG.page_tokens), {}
    for name, path in write_adapters(model, spec, folder / "adapters", COLD + 1).items():
        prepared = prepare(path, spec, size, images)
        engine.register_adapter(prepared.digest, Path(prepared.image), prepared.num_pages)
        digests[name] = prepared.digest
    return engine, digests


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Four aggressors against a quiet tenant, on the real engine."
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of each first run; fair ones take twice as long"
    )
    parser.add_argument("--prompt", type=int, default=900, help="tokens of the quiet tenant's prompts")
    options = parser.parse_args()
    seconds, quiet = options.seconds, quiet_tenant(options.prompt)
    with tempfile.TemporaryDirectory() as folder:
        engine, digests = start(Path(folder))
        Run(engine, digests, [quiet], True).serve(10)
        alone = Run(engine, digests, [quiet], True).serve(2 * seconds, FILLING)  # the same requests
        own = p95(alone.ttft[QUIET])
        print(f"Alone, p95 TTFT {1e3 * own:.0f} ms of {len(alone.ttft[QUIET])} requests.", flush=True)
        print(
            "| beside | first come first served | fair | × alone | throughput, × FCFS |\n|---|---|---|---|---|"
        )
        for aggressor in AGGRESSORS:
            tenants = [quiet, aggressor]
            runs = [
                Run(engine, digests, tenants, fair).serve((1 + fair) * seconds, FILLING)
                for fair in (False, True)
            ]
            found = Case(aggressor.name, *runs)
            first, fair = p95(found.first.ttft[QUIET]), p95(found.fair.ttft[QUIET])
            print(
                f"| {found.name} | {1e3 * first:,.0f} ms | {1e3 * fair:,.0f} ms | {fair / own:.2f} "
                f"| {found.throughput:.3f} | {len(found.fair.ttft[QUIET])} of the quiet tenant",
                flush=True,
            )
        engine.close()


if __name__ == "__main__":
    main()
