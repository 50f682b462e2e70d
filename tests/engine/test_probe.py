from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.image import pack
from motet.adapters.store import ImageStore
from motet.config import EngineConfig
from motet.engine.loop import Engine
from motet.engine.probe import PAGE_TOKENS, PROMPT_TOKENS, AdapterEffect, probe_adapter
from motet.errors import AdapterRefused
from motet.memory.pool import page_bytes
from motet.models.registry import load_model, load_spec
from motet.registry.prepare import prepare
from tests.tiny import write_adapter, write_model

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _probe(model: Path, adapter: Path) -> AdapterEffect:
    spec = load_spec(model)
    image = pack(load_checkpoint(adapter, spec), page_bytes(spec, PAGE_TOKENS))
    return probe_adapter(load_model(model, spec, PROMPT_TOKENS).decoder, spec, image)


def _silence(adapter: Path, part: str) -> None:
    """Set the B of every tensor with `part` in its name to zero, as a training bug would leave it."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    silenced = {
        name: torch.zeros_like(t) if part in name and "lora_B" in name else t for name, t in tensors.items()
    }
    assert any(not torch.equal(silenced[name], tensors[name]) for name in tensors)
    save_file(silenced, file)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_every_tensor_has_an_effect_and_the_base_none(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind)
    more: dict[str, Any] = {"target_parameters": EXPERTS} if kind == "mixtral" else {}
    adapter = write_adapter(
        tmp_path / "adapter",
        model,
        kind,
        1,
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "o_proj"],
        **more,
    )
    effect = _probe(model, adapter)
    effect.require()
    assert {site.module for site in effect.sites} >= {"q", "v", "o"}
    assert len(effect.sites) == 3 * (3 + (12 if more else 0))
    assert all(site.relative > 0 for site in effect.sites)
    assert effect.base_untouched
    assert effect.logits > 0


def test_the_effect_is_the_update_over_the_output(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    options = {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    once = write_adapter(tmp_path / "once", model, "llama", 1, lora_alpha=4, **options)
    thrice = write_adapter(tmp_path / "thrice", model, "llama", 1, lora_alpha=12, **options)
    (small,), (large,) = _probe(model, once).sites, _probe(model, thrice).sites
    assert large.relative == pytest.approx(3 * small.relative, rel=1e-4)


def test_a_silent_tensor_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    adapter = write_adapter(
        tmp_path / "adapter", model, "llama", 1, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]
    )
    _silence(adapter, "layers.2.mlp.down_proj")
    effect = _probe(model, adapter)
    assert [str(site) for site in effect.without_effect] == ["layers.2.down"]
    with pytest.raises(AdapterRefused, match=r"layers\.2\.down change nothing"):
        effect.require()


def test_experts_that_the_prompt_does_not_reach_are_tried_with_random_inputs(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3-moe", num_experts=64, num_experts_per_tok=1)
    adapter = write_adapter(
        tmp_path / "adapter",
        model,
        "qwen3-moe",
        1,
        r=2,
        lora_alpha=4,
        target_modules=[],
        target_parameters=EXPERTS[1:],
    )
    effect = _probe(model, adapter)
    effect.require()
    reached = {site.reached for site in effect.sites}
    assert reached == {True, False}, (
        "48 tokens choose one of 64 experts each: some are reached and some are not"
    )


def test_an_engine_that_verifies_refuses_a_silent_adapter(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    adapter = write_adapter(
        tmp_path / "adapter", model, "llama", 1, r=4, lora_alpha=8, target_modules=["q_proj"]
    )
    engine = Engine(EngineConfig(model=str(model), pool_bytes=4 << 20, page_tokens=5, verify_adapters=True))
    images = ImageStore(tmp_path / "images")
    good = prepare(adapter, engine.spec, engine.runner.pool.page_bytes, images)
    engine.register_adapter(good.digest, Path(good.image), good.num_pages)
    _silence(adapter, "layers.1")
    bad = prepare(adapter, engine.spec, engine.runner.pool.page_bytes, images)
    with pytest.raises(AdapterRefused, match=r"layers\.1\.q"):
        engine.register_adapter(bad.digest, Path(bad.image), bad.num_pages)
    engine.close()
