"""Motet's logits against transformers + PEFT, one request at a time there, all mixed in one batch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from motet.config import EngineConfig
from motet.engine import runner
from motet.engine.loop import Engine
from motet.engine.sampler import SamplingRow, sample
from motet.registry.prepare import prepare
from motet.types import BASE, Request, Sampled, SamplingParams
from tests.close import assert_close
from tests.tiny import KINDS, VOCAB, load_reference, write_adapter, write_expert_adapter, write_model

Logits = dict[tuple[int, ...], list[Tensor]]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def _dense_adapters(folder: Path, model: Path, kind: str) -> list[Path]:
    def write(name: str, seed: int, **config: object) -> Path:
        return write_adapter(folder / name, model, kind, seed, **config)

    every = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    return [
        write("all", 1, r=8, lora_alpha=16, target_modules=every),
        write("attention", 2, r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
        write("one-layer", 3, r=33, lora_alpha=8, target_modules=["down_proj", "k_proj"], layers_to_transform=[1]),
        write(
            "patterns", 4, r=4, lora_alpha=4, target_modules=[*ATTENTION, "up_proj"], use_rslora=True,
            rank_pattern={"o_proj": 9, "layers.2.self_attn.q_proj": 1}, alpha_pattern={"up_proj": 12},
        ),
    ]  # fmt: skip


def _moe_adapters(folder: Path, model: Path, kind: str) -> list[Path]:
    def write(name: str, seed: int, **config: object) -> Path:
        return write_adapter(folder / name, model, kind, seed, **config)

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    found = [
        write("fused", 1, r=5, lora_alpha=10, target_modules=ATTENTION, target_parameters=experts),
        write("attention", 2, r=16, lora_alpha=16, target_modules=["q_proj", "o_proj"]),
        write("down-only", 3, r=2, lora_alpha=8, target_modules=[], target_parameters=experts[1:]),
        write("one-layer", 5, r=24, lora_alpha=8, target_modules=["v_proj"], layers_to_transform=[2]),
    ]
    if kind == "mixtral":
        found.append(write_expert_adapter(folder / "per-expert", model, 4, rank=6))
    return found


def _reference(model: Path, kind: str, adapter: Path | None, tokens: Sequence[int]) -> Tensor:
    """Logits [len(tokens), V] of one sequence under transformers, with PEFT's own loader for the adapter."""
    module: torch.nn.Module = load_reference(model, kind)
    if adapter is not None:
        module = PeftModel.from_pretrained(load_reference(model, kind), adapter).eval()
    with torch.inference_mode():
        logits: Tensor = module(input_ids=torch.tensor([tokens])).logits[0]
    return logits


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> Logits:
    """What the engine's sampler was given, by the request's prompt, in order of generation."""
    seen: Logits = {}

    def record(rows_of_logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
        for i, row in enumerate(rows):
            seen.setdefault(tuple(row.prompt), []).append(rows_of_logits[i].clone())
        return sample(rows_of_logits, rows)

    monkeypatch.setattr(runner, "sample", record)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_matches_peft(kind: str, tmp_path: Path, logits: Logits) -> None:
    model = write_model(tmp_path / "model", kind)
    adapters = _moe_adapters if "num_experts_per_tok" in KINDS[kind][2] else _dense_adapters
    folders: list[Path | None] = [None, *adapters(tmp_path, model, kind), None]
    # 17 tokens a step cut the prompts into chunks of odd lengths, mixed with decode rows of requests that are ahead.
    engine = Engine(EngineConfig(model=str(model), pool_bytes=4 << 20, page_tokens=5, max_step_tokens=17))
    generator = torch.Generator().manual_seed(9)
    jobs: list[tuple[Path | None, tuple[int, ...], str]] = []
    for number, folder in enumerate(folders):
        digest = BASE
        if folder is not None:
            found = prepare(folder, engine.spec, engine.runner.pool.page_bytes, tmp_path / "images")
            engine.register_adapter(found.digest, Path(found.image), found.num_pages)
            digest = found.digest
        prompt = tuple(torch.randint(2, VOCAB, (3 + 11 * number,), generator=generator).tolist())
        jobs.append((folder, prompt, digest))
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    for i, (_, prompt, digest) in enumerate(jobs):
        engine.add(Request(f"r{i}", prompt, params, digest))
    answers: dict[str, list[int]] = {f"r{i}": [] for i in range(len(jobs))}
    for _ in range(500):
        for output in engine.step():
            assert output.finish in (None, "length"), output.error
            answers[output.request_id] += output.token_ids
        if not engine.has_work:
            break
    engine.scheduler.check_integrity()
    engine.close()
    for i, (folder, prompt, _) in enumerate(jobs):
        answer = answers[f"r{i}"]
        assert len(answer) == 9
        expected = _reference(model, kind, folder, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
        assert_close(torch.stack(logits[prompt]), expected, relative=1e-4)
        if folder is not None:
            base = _reference(model, kind, None, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
            effect = float((base - expected).abs().max() / expected.abs().max())
            assert effect > 0.01, f"{folder.name} changes nothing: the comparison would prove nothing"
