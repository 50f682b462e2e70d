"""Motet's logits against transformers + PEFT: one request at a time there, all mixed in one batch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import Tensor

from motet.adapters.store import ImageStore
from motet.config import EngineConfig
from motet.engine import runner
from motet.engine.gpu_sampler import GpuDraw, GpuSampler
from motet.engine.loop import Engine
from motet.engine.sampler import SamplingRow, sample
from motet.registry.prepare import prepare
from motet.types import BASE, Request, Sampled, SamplingParams
from tests.close import assert_close
from tests.tiny import VOCAB, load_reference

Logits = dict[tuple[int, ...], list[Tensor]]


@dataclass(frozen=True)
class Job:
    """A request of the mixed batch: the adapter's folder (None is the base), its prompt and what Motet answered."""

    adapter: Path | None
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logits: Tensor


def check_mixed_batch(
    model: Path, kind: str, adapters: Sequence[Path | None], lengths: Sequence[int] = (), relative: float = 1e-4,
    **options: Any,
) -> None:  # fmt: skip
    """Serve one request per adapter in one engine and compare every sampled row's logits with the reference.

    `lengths` are the prompts' (default: odd and different), `options` go to the engine.
    """
    for job in serve_mixed_batch(model, adapters, lengths, **options):
        tokens = [*job.prompt, *job.answer[:-1]]
        expected = reference_logits(model, kind, job.adapter, tokens)[len(job.prompt) - 1 :]
        assert_close(job.logits, expected, relative=relative)
        if job.adapter is not None:
            base = reference_logits(model, kind, None, tokens)[len(job.prompt) - 1 :]
            effect = float((base - expected).abs().max() / expected.abs().max())
            assert effect > 0.01, f"{job.adapter.name} changes nothing: the comparison would prove nothing"


def serve_mixed_batch(
    model: Path, adapters: Sequence[Path | None], lengths: Sequence[int] = (), tokens: int = 9, **options: Any
) -> list[Job]:
    """Greedy answers of one request per adapter, in chunks of odd lengths mixed with decode rows of those ahead."""
    config = {"pool_bytes": 4 << 20, "page_tokens": 5, "max_step_tokens": 17, **options}
    engine = Engine(EngineConfig(model=str(model), **config))
    generator = torch.Generator().manual_seed(9)
    lengths = lengths or [3 + 11 * number for number in range(len(adapters))]
    prompts = [tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    with recorded_logits() as logits:
        for i, (adapter, prompt) in enumerate(zip(adapters, prompts, strict=True)):
            engine.add(Request(f"r{i}", prompt, params, _register(engine, adapter, model.parent / "images")))
        answers: dict[str, list[int]] = {f"r{i}": [] for i in range(len(adapters))}
        for _ in range(1000):
            for output in engine.step():
                assert output.finish in (None, "length"), output.error
                answers[output.request_id] += output.token_ids
            engine.scheduler.check_integrity()
            if not engine.has_work:
                break
    engine.close()
    jobs = []
    for i, (adapter, prompt) in enumerate(zip(adapters, prompts, strict=True)):
        answer = answers[f"r{i}"]
        assert len(answer) == tokens
        jobs.append(Job(adapter, prompt, tuple(answer), torch.stack(logits[prompt])))
    return jobs


def _register(engine: Engine, adapter: Path | None, images: Path) -> str:
    if adapter is None:
        return BASE
    pool = engine.runner.pool
    rounded = pool.kv_dtype == torch.bfloat16
    found = prepare(adapter, engine.spec, pool.page_bytes, ImageStore(images), rounded)
    engine.register_adapter(found.digest, Path(found.image), found.num_pages)
    return found.digest


def reference_logits(model: Path, kind: str, adapter: Path | None, tokens: Sequence[int]) -> Tensor:
    """Logits [len(tokens), V] of one sequence under transformers, with PEFT's own loader for the adapter.

    Where PEFT cannot read an adapter, its folder has the base with the adapter merged into it, under `merged`.
    """
    module: torch.nn.Module
    if adapter is None:
        module = load_reference(model, kind)
    elif (adapter / "merged").is_dir():
        module = load_reference(adapter / "merged", kind)
    else:
        module = PeftModel.from_pretrained(load_reference(model, kind), adapter).eval()
    with torch.inference_mode():
        logits: Tensor = module(input_ids=torch.tensor([tokens])).logits[0]
    return logits


@contextmanager
def recorded_logits() -> Iterator[Logits]:
    """What the engine's sampler is given meanwhile, by the request's prompt, in order of generation."""
    seen: Logits = {}

    def record(rows_of_logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
        for i, row in enumerate(rows):
            seen.setdefault(tuple(row.prompt), []).append(rows_of_logits[i].clone())
        return sample(rows_of_logits, rows)

    on_gpu = GpuSampler.draw

    def record_gpu(self: GpuSampler, rows_of_logits: Tensor, rows: Sequence[SamplingRow]) -> GpuDraw:
        for i, row in enumerate(rows):
            seen.setdefault(tuple(row.prompt), []).append(rows_of_logits[i].clone())
        return on_gpu(self, rows_of_logits, rows)

    with patch.object(runner, "sample", record), patch.object(GpuSampler, "draw", record_gpu):
        yield seen
