"""Motet against transformers + PEFT on a CPU, in one run: `python benchmarks/cpu_vs_peft.py` (about 3 minutes).

Workload: SmolLM2-135M-Instruct (dense), 8 requests with 8 different rank-16 adapters on q k v o gate up down; prefill
of 8 × 128 tokens, then decoding. The two systems take turns in fresh processes, so that a machine whose speed drifts
bends both alike; quote the ratios, not the absolute figures.

PEFT serves the mixed batch with `adapter_names`, its own way of choosing an adapter per row, and a KV cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import torch

from motet.adapters.store import ImageStore
from motet.config import EngineConfig
from motet.engine import runner
from motet.engine.loop import Engine
from motet.kernels.bfloat16 import Bfloat16Weight
from motet.layers import cpu
from motet.memory.pool import page_bytes
from motet.models.embedded import ensure_embedded_dense
from motet.models.registry import load_spec
from motet.registry.prepare import prepare
from motet.scheduler.scheduler import Scheduler
from motet.types import BASE, PreparedAdapter, Request, SamplingParams

ADAPTERS, RANK, PROMPT, DECODE = 8, 16, 128, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
POOL_BYTES = 1 << 30
PREPARED = "prepared.json"


def write_adapters(model: Path, folder: Path) -> None:
    """Eight random adapters as PEFT saves them, bfloat16, and packed as Motet's server hands them to its engine."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    wrapped = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    for i in range(ADAPTERS):
        generator = torch.Generator().manual_seed(i)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.01).bfloat16()
        wrapped.save_pretrained(str(folder / f"adapter-{i}"))
    spec = load_spec(model)
    size = page_bytes(spec, EngineConfig(model=str(model)).page_tokens)
    images = ImageStore(folder / "images")
    found = [prepare(folder / f"adapter-{i}", spec, size, images) for i in range(ADAPTERS)]
    (folder / PREPARED).write_bytes(msgspec.json.encode(found))


def prompts() -> list[list[int]]:
    """Eight different prompts of random tokens."""
    generator = torch.Generator().manual_seed(7)
    tokens: list[list[int]] = torch.randint(100, 40_000, (ADAPTERS, PROMPT), generator=generator).tolist()
    return tokens


def peft_side(model: Path, folder: Path) -> dict[str, float]:
    """Prefill and decode of the mixed batch, and decode of the base alone, with transformers + PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, folder / "adapter-0", adapter_name="adapter-0")
    for i in range(1, ADAPTERS):
        wrapped.load_adapter(folder / f"adapter-{i}", adapter_name=f"adapter-{i}")
    wrapped.eval()
    names = [f"adapter-{i}" for i in range(ADAPTERS)]
    ids = torch.tensor(prompts())

    def run(adapter_names: list[str]) -> tuple[float, float]:
        began = time.perf_counter()
        out = wrapped(input_ids=ids, adapter_names=adapter_names, use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter()
        for _ in range(DECODE):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = wrapped(
                input_ids=token,
                past_key_values=out.past_key_values,
                adapter_names=adapter_names,
                use_cache=True,
            )
        return prefilled - began, time.perf_counter() - prefilled

    with torch.inference_mode():
        run(names)
        prefill, decode = run(names)
        _, base_decode = run(["__base__"] * ADAPTERS)
    return {
        "prefill": ADAPTERS * PROMPT / prefill,
        "decode": ADAPTERS * DECODE / decode,
        "base_decode": ADAPTERS * DECODE / base_decode,
    }


class MotetSide:
    """The same through Motet's engine: scheduler, pool, sampler and all."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.engine = Engine(
            EngineConfig(
                model=str(model),
                device="cpu",
                pool_bytes=POOL_BYTES,
                max_step_tokens=1024,
                prefix_caching=False,
            )
        )
        prepared = (folder / PREPARED).read_bytes()
        self.adapters = msgspec.json.decode(prepared, type=list[PreparedAdapter])
        self.base = [BASE] * ADAPTERS
        self.mixed = [adapter.digest for adapter in self.adapters]
        self._number = 0

    def measure(self) -> dict[str, Any]:
        """Three rounds of none resident, all resident, mixed; medians of the rates and of their ratios in a round."""
        self._rates(self.base)
        rounds = [self._round() for _ in range(3)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result: dict[str, Any] = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        result["peak_over_weights_and_pool"] = peak / (self.engine.stats().weight_bytes + POOL_BYTES)
        self._make_resident()
        result["time"] = where_the_time_goes(lambda between: self._run(self.mixed, DECODE + 1, between))
        return result

    def _round(self) -> dict[str, float]:
        _, none_resident = self._rates(self.base)
        self._make_resident()
        _, all_resident = self._rates(self.base)
        prefill, decode = self._rates(self.mixed)
        for adapter in self.adapters:
            self.engine.forget_adapter(adapter.digest)
        self.engine.step()
        assert len(self.engine.runner.table) == 0
        return {
            "prefill": prefill,
            "decode": decode,
            "base_decode": none_resident,
            "resident_over_none": all_resident / none_resident,
            "mixed_over_base": decode / all_resident,
        }

    def _make_resident(self) -> None:
        for adapter in self.adapters:
            self.engine.register_adapter(adapter.digest, Path(adapter.image), adapter.num_pages)
        self._run(self.mixed, 2)
        assert len(self.engine.runner.table) == ADAPTERS

    def _rates(self, digests: Sequence[str]) -> tuple[float, float]:
        """Tokens per second of prefill and of decoding."""
        prefill, decode = self._run(digests, DECODE + 1)
        return ADAPTERS * PROMPT / prefill, ADAPTERS * DECODE / decode

    def _run(
        self, digests: Sequence[str], tokens: int, between: Callable[[], None] = lambda: None
    ) -> tuple[float, float]:
        """Seconds until every request has its first token, when `between` is called, and from there to the end."""
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        waiting = set()
        for prompt, digest in zip(prompts(), digests, strict=True):
            self._number += 1
            waiting.add(str(self._number))
            self.engine.add(Request(str(self._number), tuple(prompt), params, digest))
        began = first = time.perf_counter()
        while self.engine.has_work:
            for output in self.engine.step():
                assert output.finish != "error", output.error
                if waiting:
                    first = time.perf_counter()
                    waiting.discard(output.request_id)
                    if not waiting:
                        between()
        return first - began, time.perf_counter() - first


PARTS: tuple[tuple[str, tuple[tuple[Any, str], ...]], ...] = (
    ("base matrix products", ((cpu, "product"),)),
    ("products with LoRA inside", ((Bfloat16Weight, "adapted"),)),
    ("LoRA by itself", ((cpu, "lora_add"), (cpu, "lora_embed"))),
    ("attention", ((cpu, "paged_attention"),)),
    ("norms", ((cpu, "add_rms_norm"), (cpu, "head_rms_norm"))),
    ("activation", ((cpu, "silu_mul"),)),
    ("rotary and KV write", ((cpu, "rotary_kv_write"),)),
    ("sampling", ((runner, "sample"),)),
    ("scheduling", ((Scheduler, "schedule"), (Scheduler, "commit"))),
    ("inputs", ((runner, "build_inputs"),)),
)
"""Parts of a step and where their functions are looked up."""


def where_the_time_goes(
    run: Callable[[Callable[[], None]], tuple[float, float]],
) -> dict[str, tuple[float, float]]:
    """Shares of the wall time of prefill and of decoding that each part takes.

    `run` returns both times and calls what it is given in between.
    """
    spent = {part: 0.0 for part, _ in PARTS}
    prefill = dict(spent)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[part] += time.perf_counter() - began
            return result

        return call

    def prefilled() -> None:
        prefill.update(spent)
        spent.update(dict.fromkeys(spent, 0.0))

    with ExitStack() as stack:
        for part, functions in PARTS:
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        times = run(prefilled)
    shares = {part: (prefill[part] / times[0], spent[part] / times[1]) for part, _ in PARTS}
    return shares | {"the rest": (1 - sum(prefill.values()) / times[0], 1 - sum(spent.values()) / times[1])}


def report(peft: list[dict[str, float]], motet: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the ratios of neighbouring runs, printed as a table."""
    from rich.console import Console
    from rich.table import Table

    def ratio(key: str) -> float:
        return float(statistics.median(m[key] / p[key] for m, p in zip(motet, peft, strict=True)))

    def median(runs: Sequence[dict[str, Any]], key: str) -> float:
        return float(statistics.median(run[key] for run in runs))

    table = Table(
        title=f"{ADAPTERS} requests, {ADAPTERS} rank-{RANK} adapters, SmolLM2-135M, {torch.get_num_threads()} threads"
    )
    for column in ("tokens per second", "PEFT", "Motet", "ratio", "wanted"):
        table.add_column(column, justify="left" if column.startswith("tok") else "right")
    wanted = {"prefill": "≥ 2", "decode": "≥ 5", "base_decode": ""}
    for key, label in (
        ("prefill", "prefill, mixed"),
        ("decode", "decode, mixed"),
        ("base_decode", "decode, base only"),
    ):
        table.add_row(
            label, f"{median(peft, key):.0f}", f"{median(motet, key):.0f}", f"{ratio(key):.1f} ×", wanted[key]
        )
    for key, label, want in (
        ("resident_over_none", "base only, 8 adapters resident / none", "≥ 0.95"),
        ("mixed_over_base", "8 adapters mixed / base only", "≥ 0.70"),
        ("peak_over_weights_and_pool", "peak memory / (weights + pool)", "≤ 1.3"),
    ):
        table.add_row(label, "", "", f"{median(motet, key):.2f}", want)
    console = Console()
    console.print(table)
    shares = Table(title="where Motet's time goes (mixed)")
    shares.add_column("share of")
    for column in ("prefill", "decode"):
        shares.add_column(column, justify="right")
    for part, (prefill, decode) in sorted(motet[-1]["time"].items(), key=lambda item: -item[1][0]):
        shares.add_row(part, f"{prefill:.1%}", f"{decode:.1%}")
    console.print(shares)
    return {
        "prefill_ratio": ratio("prefill"),
        "decode_ratio": ratio("decode"),
        "resident_over_none": median(motet, "resident_over_none"),
        "mixed_over_base": median(motet, "mixed_over_base"),
        "peak_over_weights_and_pool": median(motet, "peak_over_weights_and_pool"),
        "peft": peft,
        "motet": motet,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that the two sides take turns")
    parser.add_argument("--side", choices=["peft", "motet"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = ensure_embedded_dense()
    if arguments.side:
        peft = arguments.side == "peft"
        found = peft_side(model, arguments.folder) if peft else MotetSide(model, arguments.folder).measure()
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(model, folder)
        results: dict[str, list[dict[str, Any]]] = {"peft": [], "motet": []}
        for round_number in range(arguments.rounds):
            for which, runs in results.items():
                print(f"round {round_number + 1} of {arguments.rounds}: {which}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--side", which, "--folder", name]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(report(results["peft"], results["motet"])))


if __name__ == "__main__":
    main()
