"""The engine on a GPU: graphs against launches, a busy engine against solo runs, no compilation while serving."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from motet.adapters.store import ImageStore
from motet.config import EngineConfig
from motet.engine import loop
from motet.engine.gpu_runner import GpuRunner
from motet.engine.loop import Engine
from motet.layers.gpu import GpuDevice
from motet.memory.pool import KV_DTYPE
from motet.registry.prepare import prepare
from motet.types import BASE, Chunk, Plan, Request, SamplingParams
from tests.close import assert_close
from tests.formats import write_all
from tests.parity import reference_logits, serve_mixed_batch
from tests.tiny import VOCAB, write_model

KINDS = ["gpt-oss", "qwen3-moe", "llama", "llama4", "deepseek-v2-lite"]


def _engine(model: Path, **options: object) -> Engine:
    config = {"pool_bytes": 64 << 20, "page_tokens": 16, "max_step_tokens": 64, "max_running": 16, **options}
    return Engine(EngineConfig(model=str(model), device="cuda", **config))  # type: ignore[arg-type]


def _register(engine: Engine, adapters: list[Path], images: Path) -> list[str]:
    digests, pool = [], engine.runner.pool
    for adapter in adapters:
        rounded = pool.kv_dtype == torch.bfloat16
        found = prepare(adapter, engine.spec, pool.page_bytes, ImageStore(images), rounded=rounded)
        engine.register_adapter(found.digest, Path(found.image), found.num_pages)
        digests.append(found.digest)
    return digests


@pytest.mark.parametrize("kind", KINDS)
def test_served_logits_are_near_those_of_float32(kind: str, tmp_path: Path) -> None:
    """bfloat16 against float32: some percent of the largest logit in a random model of three layers."""
    model = write_model(tmp_path / "model", kind)
    adapters = list(write_all(tmp_path, model, kind, refused=False).values())
    jobs = serve_mixed_batch(
        model, [None, *adapters], device="cuda", pool_bytes=64 << 20, page_tokens=16, max_step_tokens=33
    )
    for job in jobs:
        expected = reference_logits(model, kind, job.adapter, [*job.prompt, *job.answer[:-1]])
        assert_close(job.logits.float().cpu(), expected[len(job.prompt) - 1 :], relative=6e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_replays_equal_launches_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind)
    engine = _engine(model)
    runner = engine.runner
    assert isinstance(runner, GpuRunner)
    (digest, *_) = _register(
        engine, list(write_all(tmp_path, model, kind, refused=False).values())[:1], tmp_path / "i"
    )
    engine.add(Request("load", (5,) * 9, SamplingParams(max_tokens=2, temperature=0), digest))
    while engine.has_work:
        engine.step()
    groups = len(engine.spec.kv_groups)
    chunks = [
        Chunk(i, (7 + i,), 3 * i, ((50 + i,),) * groups, digest if i % 2 else BASE, True) for i in range(5)
    ]
    ordered = runner._builder.ordered(Plan(chunks=tuple(chunks)))
    with torch.inference_mode():
        replayed = runner._compute(ordered)[:5].clone()
        staging = runner._staging[8]
        idle = runner._builder.idle(ordered)
        launched = runner.decoder(runner._builder.decode_batch(staging, True, idle, pdl=False))[:5]
        assert torch.equal(replayed, launched)
        for _ in range(100):
            assert torch.equal(runner._compute(ordered)[:5], replayed)
        pages = tuple((40 + i, 30 + i) for i in range(groups))
        prompt = Chunk(9, tuple(range(3, 24)), 0, pages, digest, True)
        step = runner._builder.ordered(Plan(chunks=(*chunks, prompt)))
        replayed = runner._compute(step)[:6].clone()
        batch = runner._builder.prompt_batch(runner._prompts, 64, True, runner._builder.idle(step), pdl=False)
        assert torch.equal(replayed, runner.decoder(batch)[:6])
        for _ in range(100):
            assert torch.equal(runner._compute(step)[:6], replayed)
    engine.close()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What weights, KV and adapters are kept in; the engine itself knows bfloat16 only."""
    kind: torch.dtype = request.param
    monkeypatch.setitem(KV_DTYPE, "cuda", kind)
    monkeypatch.setattr(loop, "weights_device", lambda _: GpuDevice(torch.device("cuda"), kind))
    return kind


@pytest.mark.parametrize("kind", ["gpt-oss", "qwen3-moe"])
def test_a_busy_engine_answers_as_a_quiet_one(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """64 greedy requests over all adapters, arriving at random, some cancelled, against each by itself.

    In float32 all answers are the same. Products of few rows and of many add up in other orders, so in bfloat16 an
    answer may part from the other where two tokens are about as likely: so near in float32 that bfloat16, which may
    be off by 6e-2 for each of them, can put either first.
    """
    model = write_model(tmp_path / "model", kind)
    engine = _engine(model)
    adapters: list[Path | None] = [None, *write_all(tmp_path, model, kind, refused=False).values()]
    digests = [BASE, *_register(engine, [a for a in adapters if a is not None], tmp_path / "i")]
    rng = random.Random(3)
    requests = [
        Request(
            f"r{i}",
            tuple(rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 90))),
            SamplingParams(max_tokens=rng.randrange(2, 24), temperature=0, ignore_eos=True),
            digests[i % len(digests)],
        )
        for i in range(64)
    ]

    def run(todo: list[Request], cancel: bool) -> dict[str, tuple[int, ...]]:
        answers: dict[str, tuple[int, ...]] = {request.id: () for request in todo}
        waiting, ended = list(todo), 0
        while ended < len(todo):
            while waiting and rng.random() < 0.5:
                engine.add(waiting.pop(0))
            if cancel and rng.random() < 0.02:
                for output in engine.abort(f"r{rng.randrange(64)}"):
                    ended += output.finish is not None
            for output in engine.step():
                assert output.error is None, output.error
                answers[output.request_id] += output.token_ids
                ended += output.finish is not None
            engine.scheduler.check_integrity()
        return answers

    busy = run(requests, cancel=True)
    parted = 0
    for i, request in enumerate(requests):
        mine = busy[request.id]
        alone = run([request], cancel=False)[request.id][: len(mine)]
        if mine == alone:
            continue
        parted += 1
        assert dtype == torch.bfloat16, f"{request.id} depends on the batch"
        at = next(at for at in range(len(mine)) if mine[at] != alone[at])
        tokens = [*request.prompt, *mine[:at]]
        logits = reference_logits(model, kind, adapters[i % len(adapters)], tokens)[-1]
        least = float(logits.max() - 2 * 6e-2 * logits.abs().max())
        assert min(float(logits[mine[at]]), float(logits[alone[at]])) > least, f"{request.id} is no tie"
    engine.close()
    assert parted < 16, f"{parted} of 64 answers depend on the batch"


@pytest.mark.parametrize("kind", ["gpt-oss", "llama"])
def test_nothing_is_compiled_while_serving_contexts_of_any_length(kind: str, tmp_path: Path) -> None:
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]

    model = write_model(tmp_path / "model", kind, max_position_embeddings=4352)
    engine = _engine(model, max_step_tokens=2048, max_running=4)
    adapters = list(write_all(tmp_path, model, kind, refused=False).values())[:1]
    compiled: list[str] = []
    hook = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = lambda *_, **what: compiled.append(str(what.get("repr")))

    def serve(length: int, adapter: str) -> None:
        prompt = tuple(random.Random(length).randrange(2, VOCAB) for _ in range(length))
        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        engine.add(Request(f"{adapter}{length}", prompt, params, adapter))
        while engine.has_work:
            engine.step()

    try:
        digests = [BASE, *_register(engine, adapters, tmp_path / "i")]
        for length in sorted({1, 2, 3, *(random.Random(0).randrange(1, 4097) for _ in range(60)), 4096}):
            for digest in digests:
                serve(length, digest)
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
        engine.close()
    assert not compiled, f"{len(compiled)} kernels were compiled while serving: {compiled[:3]}"
