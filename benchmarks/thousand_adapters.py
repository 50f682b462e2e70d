"""A thousand adapters behind a pool for sixteen: `python -m benchmarks.thousand_adapters` (about 15 minutes, 2 cores).

The real server, its engine in a process of its own, on a CPU. Adapters have random weights and ranks of 2 to 16; what
is asked for follows Zipf's law, P(rank k) ~ 1 / k. Arrivals are Poisson, at a share of what the server can do.

    hot     all requests go to the sixteen most popular adapters, which the pool holds
    zipf    the same traffic over all adapters

The two take turns, five times each.
Proven: every request of `zipf` succeeds; a sample of them gives the same text again when it is asked alone; memory of
both processes stays; and the p95 of TTFT over requests for hot adapters, against that in `hot`.
`--quick` takes a tiny random model, a hundred adapters and fewer requests: about half a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.image import pack
from motet.config import EngineConfig
from motet.memory.pool import page_bytes
from motet.models.embedded import ensure_embedded_dense
from motet.models.registry import load_spec
from motet.types import ModelSpec

RANKS = (2, 4, 8, 16)
PROMPT_TOKENS = (4, 12)
MAX_RUNNING = 16
ROUNDS = 5
_SERVING = re.compile(r"serving on http://([^:]+):(\d+)/v1")
_TIER = re.compile(r'^motet_tier_(\w+){tier="(\w+)"} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Size:
    """How much is asked of whom. `output` is in tokens, `load` the share of the capacity that arrives."""

    adapters: int
    requests: int
    hot_requests: int
    sample: int
    hot: int = 16
    output: int = 2
    load: float = 0.5


FULL = Size(adapters=1000, requests=5000, hot_requests=1000, sample=100)
QUICK = Size(adapters=100, requests=400, hot_requests=200, sample=40)


@dataclass(frozen=True)
class Ask:
    """One request: to which adapter, with what prompt, when after the start."""

    adapter: int
    prompt: tuple[int, ...]
    at: float


@dataclass(frozen=True)
class Answer:
    """What came back: the text, and seconds to its first piece; `error` if nothing did."""

    ask: Ask
    text: str
    ttft: float
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """What a run gave. Times are in milliseconds, memory in MiB."""

    adapters: int
    pool_adapters: float
    requests: int
    failed: int
    sampled: int
    different: int
    capacity_per_s: float
    rate_per_s: float
    ttft_p50_hot_ms: float
    ttft_p95_hot_ms: float
    ttft_p50_zipf_ms: float
    ttft_p95_zipf_ms: float
    ttft_p95_zipf_all_ms: float
    hot_ratio: float
    engine_mib: tuple[int, ...]
    server_mib: tuple[int, ...]
    tiers: dict[str, dict[str, float]]
    start_s: float


def write_adapters(model: Path, spec: ModelSpec, folder: Path, count: int) -> dict[str, Path]:
    """PEFT directories of random adapters on q and v, the rank of adapter i is RANKS[i % 4]."""
    found = {}
    sites = [site for site in spec.sites if site.module in ("q", "v")]
    for i in range(count):
        rank, generator = RANKS[i % len(RANKS)], torch.Generator().manual_seed(i)
        tensors = {}
        for site in sites:
            a = torch.randn(rank, site.in_features, generator=generator) / site.in_features**0.5
            b = torch.randn(site.out_features, rank, generator=generator) * 0.5
            tensors[f"base_model.model.{site.paths[0]}.lora_A.weight"] = a.bfloat16()
            tensors[f"base_model.model.{site.paths[0]}.lora_B.weight"] = b.bfloat16()
        path = folder / f"tenant-{i}"
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
            "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(model),
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))
        found[path.name] = path
    return found


def zipf(count: int, adapters: int, chance: random.Random) -> list[int]:
    """Adapters by Zipf's law with exponent 1; adapter 0 is the most popular."""
    return chance.choices(range(adapters), [1 / (k + 1) for k in range(adapters)], k=count)


def asks(chosen: Sequence[int], rate: float, vocab: int, chance: random.Random) -> list[Ask]:
    """Poisson arrivals with random prompts, all different."""
    found, at = [], 0.0
    for adapter in chosen:
        prompt = tuple(chance.randrange(2, vocab) for _ in range(chance.randint(*PROMPT_TOKENS)))
        found.append(Ask(adapter, prompt, at))
        at += chance.expovariate(rate)
    return found


@dataclass(frozen=True)
class Server:
    """A server that is up."""

    host: str
    port: int
    pid: int
    engine_pid: int

    async def answer(self, ask: Ask, output: int) -> Answer:
        """Send one streamed request and read it to its end."""
        body = json.dumps(
            {
                "model": f"tenant-{ask.adapter}", "prompt": list(ask.prompt), "max_tokens": output,
                "temperature": 0, "ignore_eos": True, "stream": True,
            }
        ).encode()  # fmt: skip
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        began, first, text = time.perf_counter(), 0.0, ""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(head.encode() + body)
            async for line in reader:
                if not line.startswith(b"data: {"):
                    if line.startswith((b"data: [DONE]", b"{")):
                        break
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    break
                first = first or time.perf_counter() - began
                text += "".join(choice["text"] for choice in event["choices"])
        finally:
            writer.close()
        error = None if line.startswith(b"data: [DONE]") else line.decode(errors="replace")
        return Answer(ask, text, first, error)

    async def drive(self, work: Sequence[Ask], output: int) -> list[Answer]:
        """Send each at its time."""
        start = time.perf_counter()
        tasks: list[asyncio.Task[Answer]] = []
        for ask in work:
            await asyncio.sleep(max(0.0, start + ask.at - time.perf_counter()))
            tasks.append(asyncio.create_task(self.answer(ask, output)))
        return await asyncio.gather(*tasks)

    async def tiers(self) -> dict[str, dict[str, float]]:
        """The figures of every tier."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(f"GET /metrics HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n\r\n".encode())
        text = (await reader.read()).decode()
        writer.close()
        found: dict[str, dict[str, float]] = {}
        for field, tier, value in _TIER.findall(text):
            found.setdefault(tier, {})[field] = float(value)
        return found


@contextmanager
def serving(model: Path, adapters: dict[str, Path], pool_bytes: int, home: Path) -> Iterator[Server]:
    """`motet serve` with these adapters, until the block ends."""
    config = home / "motet.toml"
    engine = ["[engine]", 'device = "cpu"', f"max_running = {MAX_RUNNING}"]
    lines = [*engine, "[adapters]", *(f'"{n}" = "{p}"' for n, p in adapters.items())]
    config.write_text("\n".join(lines))
    command = [sys.executable, "-m", "motet.cli.main", "serve", str(model), f"--config={config}", "--port=0"]
    environment = {**os.environ, "MOTET_CACHE": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
    with (
        (home / "server.log").open("w") as log,
        subprocess.Popen([*command, f"--pool={pool_bytes}"], stderr=log, env=environment) as process,
    ):
        try:
            while not (found := _SERVING.search((home / "server.log").read_text())):
                if process.poll() is not None:
                    raise RuntimeError((home / "server.log").read_text())
                time.sleep(0.1)
            children = Path(f"/proc/{process.pid}/task").glob("*/children")
            (child,) = {int(pid) for tasks in children for pid in tasks.read_text().split()}
            yield Server(found[1], int(found[2]), process.pid, child)
        finally:
            process.send_signal(signal.SIGTERM)


def rss_mib(pid: int) -> int:
    """What a process holds of the machine's memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


async def capacity(server: Server, size: Size, vocab: int, chance: random.Random) -> float:
    """Requests per second with eight in flight, all to hot adapters."""
    work = asks(zipf(max(size.hot_requests // 8, 32), size.hot, chance), 1.0, vocab, chance)
    gate = asyncio.Semaphore(8)

    async def one(ask: Ask) -> None:
        async with gate:
            await server.answer(ask, size.output)

    for ask in asks(range(size.hot), 1.0, vocab, chance):
        await server.answer(ask, size.output)
    began = time.perf_counter()
    await asyncio.gather(*map(one, work))
    return len(work) / (time.perf_counter() - began)


async def measure(server: Server, size: Size, vocab: int, pool_adapters: float, start_s: float) -> Report:
    """Both runs, and the sample."""
    chance = random.Random(11)
    most = await capacity(server, size, vocab, chance)
    rate = size.load * most
    hot: list[Answer] = []
    answers: list[Answer] = []
    memory: list[tuple[int, int]] = []
    for _ in range(ROUNDS):  # in turns, so that a machine whose speed drifts bends both alike
        popular = asks(zipf(size.hot_requests // ROUNDS, size.hot, chance), rate, vocab, chance)
        hot += await server.drive(popular, size.output)
        every = asks(zipf(size.requests // ROUNDS, size.adapters, chance), rate, vocab, chance)
        answers += await server.drive(every, size.output)
        memory.append((rss_mib(server.engine_pid), rss_mib(server.pid)))
    tiers = await server.tiers()
    for answer in [answer for answer in [*hot, *answers] if answer.error is not None][:3]:
        print(f"failed: {answer.error}", file=sys.stderr)
    sample = chance.sample(answers, min(size.sample, len(answers)))
    alone = [await server.answer(answer.ask, size.output) for answer in sample]
    among = [answer for answer in answers if answer.ask.adapter < size.hot]
    p95_hot, p95_among = percentile(hot, 95), percentile(among, 95)
    return Report(
        adapters=size.adapters,
        pool_adapters=round(pool_adapters, 1),
        requests=len(answers),
        failed=sum(answer.error is not None for answer in [*answers, *hot]),
        sampled=size.sample,
        different=sum(a.text != b.text for a, b in zip(sample, alone, strict=True)),
        capacity_per_s=round(most, 1),
        rate_per_s=round(rate, 1),
        ttft_p50_hot_ms=percentile(hot, 50),
        ttft_p95_hot_ms=p95_hot,
        ttft_p50_zipf_ms=percentile(among, 50),
        ttft_p95_zipf_ms=p95_among,
        ttft_p95_zipf_all_ms=percentile(answers, 95),
        hot_ratio=round(p95_among / p95_hot, 2),
        engine_mib=tuple(engine for engine, _ in memory),
        server_mib=tuple(server for _, server in memory),
        tiers=tiers,
        start_s=round(start_s, 1),
    )


def percentile(answers: Sequence[Answer], which: int) -> float:
    """Of the times to the first token, in milliseconds."""
    times = [answer.ttft for answer in answers if answer.error is None]
    return round(1000 * statistics.quantiles(times, n=100)[which - 1], 1)


def run(model: Path, size: Size, home: Path) -> Report:
    """Write the adapters, start the server, measure."""
    spec = load_spec(model)
    page = page_bytes(spec, EngineConfig(model=str(model)).page_tokens)
    adapters = write_adapters(model, spec, home / "adapters", size.adapters)
    each = [
        pack(load_checkpoint(path, spec), page).num_pages
        for path in list(adapters.values())[: max(len(RANKS), size.hot)]
    ]
    pages = sum(each[: size.hot]) + MAX_RUNNING  # a request takes one page of KV cache
    began = time.perf_counter()
    with serving(model, adapters, pages * page, home) as server:
        start_s = time.perf_counter() - began
        held = sum(each[: size.hot]) / statistics.mean(each)
        return asyncio.run(measure(server, size, spec.vocab_size, held, start_s))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few requests")
    parser.add_argument("--requests", type=int, default=None, help="of the Zipf run")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    if arguments.requests is not None:
        size = Size(size.adapters, arguments.requests, max(arguments.requests // 3, 100), size.sample)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if arguments.quick:
            from tests.tiny import write_model

            model = write_model(home / "model", "llama")
        else:
            model = ensure_embedded_dense()
        report = asdict(run(model, size, home))
    for name, value in report.items():
        print(f"{name:24} {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
