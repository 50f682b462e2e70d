"""Llama 4: chunked and unbounded layers, experts with weighted inputs, and checkpoints that also see images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration

from motet.adapters.checkpoint import load_checkpoint
from motet.errors import AdapterRefused, ModelRefused
from motet.kernels.route import RoutingRule, choose_experts
from motet.models.registry import load_spec
from tests.close import assert_close
from tests.parity import check_mixed_batch, reference_logits, serve_mixed_batch
from tests.tiny import KINDS, load_reference, write_adapter, write_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28,
    "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
}  # fmt: skip
SEEING = "llama4-seeing"


@pytest.fixture
def _seeing(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**text: Any) -> Llama4Config:
        return Llama4Config(text_config=text, vision_config=VISION)

    monkeypatch.setitem(KINDS, SEEING, (config, Llama4ForConditionalGeneration, KINDS["llama4"][2]))


def _expert_adapters(folder: Path, model: Path, kind: str) -> list[Path]:
    def write(name: str, seed: int, **config: object) -> Path:
        return write_adapter(folder / name, model, kind, seed, **config)

    return [
        write("fused", 1, r=5, lora_alpha=10, target_modules=["q_proj"], target_parameters=EXPERTS),
        write("down-only", 2, r=2, lora_alpha=8, target_modules=[], target_parameters=EXPERTS[1:]),
        write("gate-up-only", 3, r=7, lora_alpha=8, target_modules=[], target_parameters=EXPERTS[:1]),
    ]


def test_experts_of_a_mixed_batch(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama4")
    check_mixed_batch(model, "llama4", [None, *_expert_adapters(tmp_path, model, "llama4"), None], tokens=15)


def test_adapters_of_single_experts_mean_the_same(tmp_path: Path) -> None:
    """Some tools cut the experts into modules first; PEFT's factors of the parameter are theirs the other way round."""
    model, rank = write_model(tmp_path / "model", "llama4"), 5
    fused = write_adapter(
        tmp_path / "fused", model, "llama4", 1, r=rank, target_modules=[], target_parameters=EXPERTS
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, factor in load_file(fused / "adapter_model.safetensors").items():
        path, _, which = name.removesuffix(".weight").rpartition(".")
        for expert in range(3):
            where = f"{path.removesuffix('.base_layer')}.{expert}"
            if which == "lora_A":
                one = factor.view(3, rank, -1)[expert].T.contiguous()  # [2I or H, r], which is some B
                parts = (
                    {"down": one} if len(one) == 48 else dict(zip(("gate", "up"), one.chunk(2), strict=True))
                )
                tensors |= {f"{where}.{part}_proj.lora_B.weight": matrix for part, matrix in parts.items()}
            else:
                one = factor.view(-1, rank, 3)[:, :, expert].T.contiguous()  # [r, H or I], which is some A
                names = ("gate", "up") if one.shape[1] == 48 else ("down",)
                tensors |= {f"{where}.{part}_proj.lora_A.weight": one.clone() for part in names}
    single = tmp_path / "single"
    single.mkdir()
    save_file(tensors, single / "adapter_model.safetensors")
    LoraConfig(r=rank, target_modules=["gate_proj", "up_proj", "down_proj"]).save_pretrained(str(single))
    spec = load_spec(model)
    assert load_checkpoint(single, spec).digest == load_checkpoint(fused, spec).digest


def test_router_and_shared_expert(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama4")
    router = write_adapter(
        tmp_path / "router", model, "llama4", 1, r=3, lora_alpha=9, target_modules=[],
        target_parameters=["feed_forward.router.weight"],
    )  # fmt: skip
    shared = [f"shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    expert = write_adapter(tmp_path / "shared", model, "llama4", 2, r=4, lora_alpha=8, target_modules=shared)
    check_mixed_batch(model, "llama4", [router, None, expert])


def test_router_chooses_among_scores_that_are_all_one() -> None:
    logits = torch.tensor([[30.0, 40.0, 50.0], [25.0, 45.0, -5.0]])
    weights, experts = choose_experts(logits, RoutingRule(1, scoring="sigmoid", on_input=True))
    assert experts.tolist() == [[2], [1]]
    assert_close(weights, torch.ones(2, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts_per_tok": 2, "attention_bias": True, "rope_parameters": LLAMA3},
        {"use_qk_norm": False, "attn_temperature_tuning": False, "interleave_moe_layer_step": 1},
        {
            "moe_layers": [2],
            "tie_word_embeddings": True,
            "no_rope_layers": None,
            "attn_scale": 0.7,
            "rms_norm_eps": 0.03,
        },
        {"layer_types": ["chunked_attention"] * 3 + ["full_attention"], "num_key_value_heads": 4},
    ],
    ids=["top-2", "plain", "one-moe-layer", "chunks-without-rotation"],
)
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama4", **options)
    every = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    adapter = write_adapter(tmp_path / "all", model, "llama4", 1, r=3, lora_alpha=6, target_modules=every)
    check_mixed_batch(model, "llama4", [None, adapter], [13, 53], tokens=16)
    check_mixed_batch(model, "llama4", [adapter], [60], tokens=2, max_step_tokens=64, page_tokens=13)


@pytest.mark.usefixtures("_seeing")
def test_text_part_of_a_model_that_sees(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", SEEING)
    adapters = [
        write_adapter(
            tmp_path / "modules", model, SEEING, 1, r=3, lora_alpha=6,
            target_modules=r".*language_model.*\.(q_proj|o_proj|gate_proj|down_proj)",
        ),
        *_expert_adapters(tmp_path, model, SEEING)[1:],
    ]  # fmt: skip
    check_mixed_batch(model, SEEING, [None, *adapters])
    both = write_adapter(tmp_path / "both", model, SEEING, 2, r=3, target_modules=["q_proj"])
    with pytest.raises(AdapterRefused, match=r"vision_model\.model\.layers\.0\.self_attn\.q_proj"):
        load_checkpoint(both, load_spec(model))


@pytest.mark.usefixtures("_seeing")
def test_adapter_of_the_text_model_fits_the_one_that_sees(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", SEEING)
    text = tmp_path / "text"
    part = load_reference(model, SEEING).language_model
    assert isinstance(part, Llama4ForCausalLM)
    part.save_pretrained(text)
    adapter = write_adapter(
        tmp_path / "modules", text, "llama4", 1, r=3, target_modules=["q_proj", "up_proj"]
    )
    (job,) = serve_mixed_batch(model, [adapter], [31])
    expected = reference_logits(text, "llama4", adapter, [*job.prompt, *job.answer[:-1]])
    assert_close(job.logits, expected[len(job.prompt) - 1 :], relative=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type 'yarn'"),
        ({"attention_chunk_size": None}, "attention_chunk_size"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding_window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ],
)
def test_refuses_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = KINDS["llama4"][0](**KINDS["llama4"][2]).to_dict()
    config |= {"architectures": ["Llama4ForCausalLM"], **options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + b"\x00" * 7 + b"{}")
    with pytest.raises(ModelRefused, match=message):
        load_spec(tmp_path)
