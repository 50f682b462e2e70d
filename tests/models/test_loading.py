"""Base models from Hugging Face directories: dtypes, shards, rope scaling, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from motet.adapters.table import AdapterTable
from motet.engine.inputs import build_inputs
from motet.errors import ModelRefused
from motet.memory.pool import Pool
from motet.models.registry import load_model, load_spec, locate
from motet.types import Chunk, Plan
from tests.close import assert_close
from tests.tiny import SHAPE, VOCAB, load_reference, write_model

TOKENS = tuple(range(20, 90))


def last_logits(model: Path) -> Tensor:
    spec = load_spec(model)
    pool = Pool(spec, 1 << 20, 16)
    plan = Plan(chunks=(Chunk(0, TOKENS, 0, ((4, 0, 2, 1, 3),), "", True),))
    with torch.inference_mode():
        logits = load_model(model, spec, 256).decoder(
            build_inputs(plan, pool, AdapterTable(len(spec.sites), pool.flat, pool.page_bytes)).batch
        )
    return logits[0]


def reference_logits(model: Path, kind: str = "llama") -> Tensor:
    with torch.inference_mode():
        logits: Tensor = load_reference(model, kind)(input_ids=torch.tensor([TOKENS])).logits[0, -1]
    return logits


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_every_dtype_loads_exactly(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = write_model(tmp_path, "llama", tie_word_embeddings=tied)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert_close(last_logits(model), reference_logits(model))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_shards_load_like_one_file(tmp_path: Path, kind: str) -> None:
    model = write_model(tmp_path / "one", kind)
    whole = last_logits(model)
    reference = load_reference(model, kind)
    reference.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(last_logits(tmp_path / "many"), whole)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)  # fmt: skip
def test_rope_scaling_matches_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    model = write_model(tmp_path, "llama", rope_parameters=rope)
    assert_close(last_logits(model), reference_logits(model))


def test_head_dim_of_its_own(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama", head_dim=20)
    assert_close(last_logits(model), reference_logits(model))


def test_the_digest_tells_models_apart(tmp_path: Path) -> None:
    first, again = write_model(tmp_path / "a", "llama"), write_model(tmp_path / "b", "llama")
    other = write_model(tmp_path / "c", "llama", seed=1)
    assert load_spec(first).digest == load_spec(again).digest
    assert load_spec(first).digest != load_spec(other).digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .*fp8"),
    ],
)
def test_unsupported_options_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = write_model(tmp_path, "llama")
    edit_config(model, **changes)
    with pytest.raises(ModelRefused, match=message):
        load_spec(model)


def test_unsupported_rope_is_refused_by_name(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = write_model(tmp_path, "llama", rope_parameters=rope)
    with pytest.raises(ModelRefused, match="dynamic"):
        load_model(model, load_spec(model), 64)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama")
    weights = load_file(model / "model.safetensors")

    def save(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    save({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})
    with pytest.raises(ModelRefused, match=r"q_proj\.bias"):
        load_model(model, load_spec(model), 64)
    save({name: tensor for name, tensor in weights.items() if "layers.2.mlp.up" not in name})
    with pytest.raises(ModelRefused, match=r"layers\.2\.mlp\.up_proj"):
        load_model(model, load_spec(model), 64)
    save({**weights, "model.norm.weight": torch.zeros(47)})
    with pytest.raises(ModelRefused, match=r"model\.norm\.weight is \(47,\)"):
        load_model(model, load_spec(model), 64)
    save({**weights, "model.norm.weight": torch.zeros(48, dtype=torch.int8)})
    with pytest.raises(ModelRefused, match="int8"):
        load_model(model, load_spec(model), 64)


def test_missing_places_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelRefused, match=r"no config\.json"):
        locate(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelRefused, match="nobody/nothing"):
        locate("nobody/nothing")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).config.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelRefused, match="safetensors weights only"):
        load_spec(tmp_path)


def test_vocabulary_is_the_configs(tmp_path: Path) -> None:
    assert last_logits(write_model(tmp_path, "mixtral")).shape == (VOCAB,)


def test_end_tokens_of_the_generation_config_stop_too(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1, 9]}))
    assert load_spec(model).eos_token_ids == (1, 7, 9)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": "seven"}))
    with pytest.raises(ModelRefused, match=r"generation_config\.json"):
        load_spec(model)
