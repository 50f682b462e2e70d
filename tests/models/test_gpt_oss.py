"""gpt-oss from MXFP4 and plain checkpoints: what it loads, what it takes in memory, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from motet.errors import ModelRefused
from motet.kernels.mxfp4 import Mxfp4Weight
from motet.layers.mlp import SparseMLP
from motet.models.common import rotary
from motet.models.complete import completed
from motet.models.registry import load_model, load_spec
from tests.close import assert_close
from tests.parity import check_mixed_batch, reference_logits, serve_mixed_batch
from tests.tiny import KINDS, SHAPE, load_reference, write_adapter, write_model

KIND = "gpt-oss"
EXPERTS, HIDDEN, WIDE = 5, 64, 96
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LENGTHS = (61, 5, 47, 18, 33)
"""Prompts shorter and longer than the window of 6 and YaRN's original length of 16."""


def write_mxfp4_model(folder: Path, **overrides: Any) -> Path:
    """A tiny model in the hub's format: experts in MXFP4, all else in bfloat16."""
    write_model(folder, KIND, **{"hidden_size": HIDDEN, "intermediate_size": WIDE, **overrides})
    generator = torch.Generator().manual_seed(7)

    def random_bytes(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    def quantised(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if name.endswith(("gate_up_proj", "down_proj")):
                count, inputs, outputs = tensor.shape
                yield f"{name}_blocks", random_bytes(0, 256, count, outputs, inputs // 32, 16)
                yield f"{name}_scales", random_bytes(119, 124, count, outputs, inputs // 32)
            else:
                yield name, tensor.bfloat16()

    edit_tensors(folder, lambda tensors: dict(quantised(tensors)))
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    return folder


def edit_tensors(model: Path, change: Any) -> None:
    file = model / "model.safetensors"
    tensors = change(load_file(file))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"}
    )


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_per_expert(folder: Path, fused: Path, rank: int) -> Path:
    """A fused adapter again, with modules of its own for the gate, up and down projection of every expert."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(fused / "adapter_model.safetensors").items():
        path, factor = name.removesuffix(".weight").rsplit(".lora_", 1)
        parts = (
            tensor.view(EXPERTS, rank, -1)
            if factor == "A"
            else tensor.view(-1, rank, EXPERTS).permute(2, 0, 1)
        )
        for expert, part in enumerate(parts):
            target = f"{path.removesuffix('.base_layer')}.{expert}"
            if path.endswith(".base_layer"):
                halves = (part, part) if factor == "A" else (part[0::2], part[1::2])
                tensors[f"{target}.gate_proj.lora_{factor}.weight"] = halves[0].clone()
                tensors[f"{target}.up_proj.lora_{factor}.weight"] = halves[1].clone()
            else:
                tensors[f"{target}.down_proj.lora_{factor}.weight"] = part.clone()
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    LoraConfig(r=rank, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"]).save_pretrained(
        str(folder)
    )
    return folder


def write_published_adapter(folder: Path, model: Path, rank: int) -> Path:
    """q, k, v, o and every expert of a square model (H = I) in bfloat16, with no more config than is common."""
    generator = torch.Generator().manual_seed(5)
    config = load_spec(model)
    hidden, q = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    shapes = {
        f"self_attn.{name}": (rank, rank, hidden, out)
        for name, out in zip(ATTENTION[:3], (q, kv, kv), strict=True)
    }
    shapes["self_attn.o_proj"] = (rank, rank, q, hidden)
    shapes["mlp.experts.base_layer"] = (rank * EXPERTS, rank * EXPERTS, hidden, 2 * hidden)
    shapes["mlp.experts"] = (rank * EXPERTS, rank * EXPERTS, hidden, hidden)
    tensors = {}
    for layer in range(config.num_layers):
        for path, (a, b, inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            for factor, shape in (("A", (a, inputs)), ("B", (outputs, b))):
                tensor = torch.randn(shape, generator=generator) * 0.15
                tensors[f"{prefix}.lora_{factor}.weight"] = tensor.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    stated = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0,
        "bias": "none", "base_model_name_or_path": str(model), "target_modules": ATTENTION, "modules_to_save": None,
        "target_parameters": FUSED, "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def write_adapters(folder: Path, model: Path) -> list[Path | None]:
    def write(name: str, seed: int, **config: Any) -> Path:
        return write_adapter(folder / name, model, KIND, seed, **config)

    return [
        None,
        write("all", 1, r=3, lora_alpha=6, target_modules=ATTENTION, target_parameters=FUSED),
        write("experts", 2, r=4, lora_alpha=8, target_modules=[], target_parameters=FUSED),
        write(
            "router", 3, r=2, lora_alpha=20, target_modules=["k_proj"], target_parameters=["router.weight"]
        ),
        write(
            "attention",
            4,
            r=17,
            lora_alpha=9,
            target_modules=["q_proj", "o_proj"],
            layers_to_transform=[0, 1],
        ),
    ]


@pytest.mark.parametrize("write", [write_model, write_mxfp4_model])
def test_long_prompts_match_transformers(tmp_path: Path, write: Any) -> None:
    model = write(tmp_path / "model", KIND) if write is write_model else write(tmp_path / "model")
    check_mixed_batch(model, KIND, write_adapters(tmp_path, model), LENGTHS)


def test_square_experts_as_published(tmp_path: Path) -> None:
    model = write_mxfp4_model(tmp_path / "model", intermediate_size=HIDDEN, num_hidden_layers=2)
    published = write_published_adapter(tmp_path / "published", model, rank=3)
    check_mixed_batch(model, KIND, [None, published, None], (7, 23, 40))


def test_adapters_per_expert_are_those_of_fused_experts(tmp_path: Path) -> None:
    model = write_mxfp4_model(tmp_path / "model")
    fused = write_adapter(
        tmp_path / "fused", model, KIND, 2, r=4, lora_alpha=8, target_modules=[], target_parameters=FUSED
    )
    single = write_per_expert(tmp_path / "single", fused, rank=4)
    (job,) = serve_mixed_batch(model, [single], (19,))
    expected = reference_logits(model, KIND, fused, [*job.prompt, *job.answer[:-1]])
    assert_close(job.logits, expected[len(job.prompt) - 1 :], relative=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": False, "tie_word_embeddings": True},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "swiglu_alpha": 0.9},
    ],
    ids=lambda options: str(next(iter(options))),
)
def test_options_match_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", KIND, **options)
    check_mixed_batch(model, KIND, [None, None], (41, 7), tokens=3)


def test_what_transformers_writes_of_a_dequantised_model_loads(tmp_path: Path) -> None:
    model = write_mxfp4_model(tmp_path / "model")
    load_reference(model, KIND).save_pretrained(tmp_path / "saved")
    (expected,) = serve_mixed_batch(model, [None], (19,), tokens=3)
    (found,) = serve_mixed_batch(tmp_path / "saved", [None], (19,), tokens=3)
    assert_close(found.logits, expected.logits)


def test_experts_stay_in_four_bits(tmp_path: Path) -> None:
    model = write_mxfp4_model(tmp_path / "model")
    loaded = load_model(model, load_spec(model), 64)
    for layer in loaded.decoder.layers:
        assert isinstance(layer.mlp, SparseMLP)
        assert all(isinstance(weight, Mxfp4Weight) for weight in layer.mlp.experts.gate_up)
        held = sum(weight.nbytes for weight in (*layer.mlp.experts.gate_up, *layer.mlp.experts.down))
        assert held == EXPERTS * 3 * HIDDEN * WIDE * 4.25 / 8
    tensors = load_file(model / "model.safetensors")
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    table = floats.pop("model.embed_tokens.weight")
    experts = SHAPE["num_hidden_layers"] * EXPERTS * 3 * HIDDEN * WIDE * 4.25 / 8
    matrices = sum(tensor.nbytes for tensor in floats.values() if tensor.dim() > 1)
    vectors = sum(4 * tensor.numel() for tensor in floats.values() if tensor.dim() == 1)
    assert loaded.nbytes == experts + table.nbytes + matrices + vectors


def test_yarn_of_the_published_models() -> None:
    """Beyond the 4,096 positions of training, and not what truncated correction bounds would give."""
    rope = {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    config = GptOssConfig(rope_parameters=rope)
    table = rotary(completed(config), 5003)
    cos, sin = GptOssRotaryEmbedding(config)(torch.zeros(1), torch.arange(5003)[None])
    assert_close(table.cos, cos[0])
    assert_close(table.sin, sin[0])
    truncated = rotary(completed(GptOssConfig(rope_parameters={**rope, "truncate": True})), 5003)
    assert float((truncated.cos - table.cos).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'"),
        ({"quantization_config": {"quant_method": "mxfp4", "block": 64}}, "quantization_config has block"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "'chunked_attention'"),
        ({"layer_types": ["full_attention"]}, "number of `layer_types`"),
        ({"sliding_window": None}, "sliding_window = None"),
        ({"per_layer_config": {"1": {"intermediate_size": 32}}}, "per_layer_config"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            "without rope_type",
        ),
    ],
)
def test_unsupported_options_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = write_model(tmp_path, KIND)
    edit_config(model, **changes)
    with pytest.raises(ModelRefused, match=message):
        load_spec(model)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("down_proj_blocks", None, "has no tensor model.layers.1.mlp.experts.down_proj_blocks"),
        ("down_proj_scales", None, r"experts.down_proj_blocks is \(5, 64, 3, 16\)"),
        ("down_proj_scales", torch.full((EXPERTS, HIDDEN, 3), 255, dtype=torch.uint8), "holds 255"),
        ("gate_up_proj_blocks", torch.zeros(EXPERTS, 2 * WIDE, 2, 16, dtype=torch.int8), "int8"),
        ("gate_up_proj_blocks", torch.zeros(EXPERTS, 2 * WIDE, 2, 8, dtype=torch.uint8), r"\(5, 192, 2, 8\)"),
        ("gate_up_proj", torch.zeros(EXPERTS, HIDDEN, 2 * WIDE), "1 tensors that the architecture does not"),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    model = write_mxfp4_model(tmp_path)
    path = f"model.layers.1.mlp.experts.{name}"

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {key: value for key, value in tensors.items() if key != path}
        return rest if tensor is None else {**rest, path: tensor}

    edit_tensors(model, change)
    with pytest.raises(ModelRefused, match=message):
        load_model(model, load_spec(model), 64)


def test_sizes_that_are_no_multiple_of_a_block_are_refused(tmp_path: Path) -> None:
    assert SHAPE["hidden_size"] % 32
    model = write_model(tmp_path, KIND)
    path, (count, inputs, outputs) = "model.layers.0.mlp.experts.gate_up_proj", (5, 48, 160)
    scales = torch.zeros(count, outputs, inputs // 16, dtype=torch.uint8)
    edit_tensors(model, lambda tensors: {**tensors, f"{path}_scales": scales})
    with pytest.raises(ModelRefused, match=r"gate_up_proj has 48 inputs; MXFP4 needs a multiple of 32"):
        load_model(model, load_spec(model), 64)
    assert KINDS[KIND][2]["num_local_experts"] == count
