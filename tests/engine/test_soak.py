"""Ten thousand adapters come and go."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from motet.adapters.image import AdapterImage, file_bytes, open_image
from motet.adapters.store import ImageStore
from motet.config import EngineConfig
from motet.engine.loop import Engine
from motet.memory.pool import page_bytes
from motet.models.registry import load_spec
from motet.observe.metrics import Metrics
from motet.registry.prepare import prepare
from motet.types import Request, SamplingParams
from tests.tiny import write_adapter, write_model

PROMPT = (5, 6, 7, 8, 9)


def test_ten_thousand_loads_and_unloads_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cycle another digest: written, registered, used, forgotten. Memory, descriptors and labels stay flat."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    model, images = small_images(tmp_path)
    loaded = threading.Event()
    config = EngineConfig(model=str(model), pool_bytes=1 << 20, page_tokens=4, host_bytes=56 << 10)
    engine, metrics = Engine(config, on_loaded=loaded.set), Metrics("base")
    store = ImageStore(tmp_path / "soak", 5 * file_bytes(images[0]))
    answers: dict[int, tuple[int, float]] = {}

    def cycle(number: int) -> None:
        image = replace(images[number % 3], digest=f"{number:064x}")
        path = store.path(image.digest, image.page_bytes, rounded=False)
        store.put(image, path)
        engine.register_adapter(image.digest, path, image.num_pages, "/source")
        metrics.track(name := f"tenant/{number}")
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=0)
        outputs = engine.add(Request(name, PROMPT, params, image.digest))
        while not outputs:
            if engine.must_wait:
                assert loaded.wait(10)
                loaded.clear()
            outputs = engine.step()
        (chosen,) = outputs[0].logprobs
        answer = chosen.token_id, round(chosen.logprob, 4)
        assert answer == answers.setdefault(number % 3, answer)
        metrics.request(name, 5, 0.0).end("length", 0)
        engine.forget_adapter(image.digest)
        metrics.forget(name)

    for number in range(1000):
        cycle(number)
    assert len(set(answers.values())) == 3, answers
    memory, files = footprint()
    for number in range(1000, 10_000):
        cycle(number)
        if number % 1000 == 0:
            engine.scheduler.check_integrity()
    while engine.has_work:
        engine.step()
    memory_after, files_after = footprint()
    assert memory_after - memory < 8 << 20
    assert files_after <= files
    stats = engine.stats()
    assert stats.tiers["disk"].hits == stats.loads == 10_000
    assert stats.residency == {}
    assert stats.loads_by_adapter == {}
    assert engine._images == {}
    assert stats.adapter_pages == 0
    assert stats.free_pages + stats.cached_pages == stats.total_pages
    assert stats.tiers["host"].resident <= 2
    assert store.stats().resident <= 5
    assert "tenant/" not in metrics.render(stats, []).decode()
    engine.close()


def small_images(home: Path) -> tuple[Path, list[AdapterImage]]:
    """A model of one layer and three adapters of it, packed for pages of 4 tokens."""
    model = write_model(home / "model", "llama", num_hidden_layers=1)
    spec, store = load_spec(model), ImageStore(home / "sources")
    images = []
    for i in range(3):
        folder = write_adapter(home / str(i), model, "llama", i, r=4, target_modules=["q_proj", "up_proj"])
        images.append(open_image(Path(prepare(folder, spec, page_bytes(spec, 4), store).image)))
    return model, images


def footprint() -> tuple[int, int]:
    """Bytes and file descriptors that this process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
