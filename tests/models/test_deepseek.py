"""DeepSeek V2 and V3: latent attention, shared and grouped experts, eight-bit checkpoints, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from motet.errors import ModelRefused
from motet.kernels.fp8 import dequantise
from motet.kernels.route import RoutingRule, choose_experts
from motet.models.registry import load_model, load_spec
from tests.close import assert_close
from tests.parity import check_mixed_batch, reference_logits, serve_mixed_batch
from tests.tiny import KINDS, SHAPE, write_adapter, write_model

ALL = ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def change_weights(model: Path, change: Any) -> None:
    """Replace the checkpoint's tensors by what `change` makes of them."""
    tensors: dict[str, Tensor] = change(load_file(model / "model.safetensors"))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_rough(folder: Path, kind: str, **overrides: Any) -> Path:
    """A random model whose norms are not all ones and whose biases are not zero."""
    model = write_model(folder, kind, **overrides)
    generator = torch.Generator().manual_seed(1)

    def roughen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        vectors = {name: t for name, t in tensors.items() if t.dim() == 1}
        return tensors | {
            name: t + 0.4 * torch.randn(t.shape, generator=generator) for name, t in sorted(vectors.items())
        }

    change_weights(model, roughen)
    return model


@pytest.mark.parametrize("kind", ALL)
def test_adapters_of_every_projection(kind: str, tmp_path: Path) -> None:
    model = write_rough(tmp_path / "model", kind, rms_norm_eps=0.01)
    queries = ["q_proj"] if kind == "deepseek-v2-lite" else ["q_a_proj", "q_b_proj"]
    modules = [*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    adapters = [
        write_adapter(tmp_path / name, model, kind, rank, r=rank, lora_alpha=2 * rank, target_modules=[name])
        for rank, name in enumerate(modules, start=3)
    ]
    many = write_adapter(
        tmp_path / "many", model, kind, 2, r=37, lora_alpha=20, target_modules=[*modules, *MLP]
    )
    lengths = [5, 41, 23, 1, 30, 2, 18, 9][: len(adapters) + 3]
    check_mixed_batch(model, kind, [None, *adapters, many, None], lengths, verify_adapters=True)


@pytest.mark.parametrize("kind", ALL)
def test_adapters_of_feed_forward_parts(kind: str, tmp_path: Path) -> None:
    model = write_rough(tmp_path / "model", kind)

    def write(name: str, seed: int, **config: Any) -> Path:
        return write_adapter(tmp_path / name, model, kind, seed, **{"target_modules": [], **config})

    adapters = [
        write("shared", 1, r=3, lora_alpha=12, target_modules=[f"shared_experts.{name}" for name in MLP]),
        write("dense", 2, r=6, lora_alpha=12, target_modules=MLP, layers_to_transform=[0]),
        write("experts", 3, r=4, lora_alpha=12, target_parameters=EXPERTS),
        write("down", 4, r=2, lora_alpha=12, target_parameters=EXPERTS[1:]),
        write("router", 5, r=5, lora_alpha=30, target_parameters=["mlp.gate.weight"]),
        write(
            "patterns", 6, r=4, lora_alpha=8, use_rslora=True, target_modules=["kv_b_proj", *MLP],
            target_parameters=[*EXPERTS, "mlp.gate.weight"], rank_pattern={"kv_b_proj": 9},
        ),
    ]  # fmt: skip
    check_mixed_batch(model, kind, [None, *adapters])


@pytest.mark.parametrize("kind", ALL)
def test_long_prompts(kind: str, tmp_path: Path) -> None:
    """YaRN's original length is 16; a chunk is computed in several parts."""
    model = write_rough(tmp_path / "model", kind)
    adapter = write_adapter(tmp_path / "kv", model, kind, 1, r=4, lora_alpha=8, target_modules=["kv_b_proj"])
    check_mixed_batch(model, kind, [None, adapter, adapter], [190, 230, 77], tokens=20, max_step_tokens=150)


LINEAR = {"rope_type": "linear", "rope_theta": 99.0, "factor": 3.0, "mscale_all_dim": 1.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("deepseek-v2", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("deepseek-v2", {"first_k_dense_replace": 0, "num_experts_per_tok": 6}),
        ("deepseek-v2", {"rope_parameters": {**YARN, "attention_factor": 1.4, "mscale_all_dim": 0.5}}),
        ("deepseek-v2-lite", {"first_k_dense_replace": 2, "rope_parameters": {**YARN, "mscale": 0.5}}),
        ("deepseek-v3", {"attention_bias": True, "rope_interleave": False, "norm_topk_prob": False}),
        ("deepseek-v3", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
        ("deepseek-v3", {"rope_parameters": LINEAR}),
    ],
)
def test_options(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = write_rough(tmp_path / "model", kind, **options)
    adapter = write_adapter(
        tmp_path / "some", model, kind, 1, r=3, target_modules=["kv_a_proj_with_mqa", "kv_b_proj", *MLP]
    )
    check_mixed_batch(model, kind, [None, adapter], [13, 53])


@torch.inference_mode()
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_v3_routes_as_transformers_does(offset: float) -> None:
    """Also where biased scores are negative: experts outside the best groups must not win by a zero."""
    config = KINDS["deepseek-v3"][0](**{**SHAPE, **KINDS["deepseek-v3"][2]})
    router = DeepseekV3TopkRouter(config)
    logits = torch.randn(200, 12) * 3
    logits[:3] = -200.0  # all scores are zero
    router.weight.data, router.hidden_dim = torch.eye(12), 12
    router.e_score_correction_bias.copy_(torch.randn(12) + offset)
    _, weights, experts = router(logits)
    rule = RoutingRule(
        3, True, "sigmoid", groups=3, top_groups=2, group_score="top2", bias=router.e_score_correction_bias,
        scale=2.5,
    )  # fmt: skip
    _assert_same_routing(choose_experts(logits, rule), (weights, experts))


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["deepseek-v2", "deepseek-v2-lite"])
def test_v2_routes_as_transformers_does(kind: str) -> None:
    config = KINDS[kind][0](**{**SHAPE, **KINDS[kind][2]})
    router, count = DeepseekV2TopkRouter(config), config.n_routed_experts
    router.weight.data, router.hidden_dim = torch.eye(count), count
    logits = torch.randn(200, count) * 3
    _, weights, experts = router(logits)
    rule = RoutingRule(config.num_experts_per_tok, scale=config.routed_scaling_factor)
    if kind == "deepseek-v2":
        rule = replace(rule, groups=4, top_groups=2)
    _assert_same_routing(choose_experts(logits, rule), (weights, experts))


def _assert_same_routing(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    first, second = (
        torch.zeros(len(weights), 12).scatter_(1, experts, weights) for weights, experts in (actual, expected)
    )
    assert_close(first, second)


@pytest.mark.parametrize("kind", ALL)
def test_fused_experts_in_the_checkpoint(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind)

    def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
        for layer in (1, 2):
            path = f"model.layers.{layer}.mlp.experts"
            count = sum(name.startswith(path) for name in tensors) // 3
            gate, up, down = (
                torch.stack([tensors[f"{path}.{expert}.{name}.weight"] for expert in range(count)])
                for name in MLP
            )
            kept |= {f"{path}.gate_up_proj": torch.cat([gate, up], dim=1), f"{path}.down_proj": down}
        return kept

    change_weights(model, fuse)
    (job,) = serve_mixed_batch(model, [None], [25])
    expected = reference_logits(model, kind, None, [*job.prompt, *job.answer[:-1]])[24:]
    assert_close(job.logits, expected, relative=1e-4)


def in_eight_bits(tensors: dict[str, Tensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """Every projection's weight in e4m3 with a scale per block; norms, routers, embedding and head as they are."""
    result = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight") and "kv_a_proj_with_mqa" not in name:
            result[name] = tensor
            continue
        rows, columns = (-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
        padded = torch.zeros(rows * block[0], columns * block[1])
        padded[: tensor.shape[0], : tensor.shape[1]] = tensor
        scale = padded.view(rows, block[0], columns, block[1]).abs().amax(dim=(1, 3)) / 448
        every = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        result[name] = (padded / every)[: tensor.shape[0], : tensor.shape[1]].to(torch.float8_e4m3fn)
        result[f"{name}_scale_inv"] = scale
    return result


def in_full(tensors: dict[str, Tensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """The same weights in float32."""
    return {
        name: dequantise(tensor, tensors[f"{name}_scale_inv"], block)
        if f"{name}_scale_inv" in tensors
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


@pytest.mark.parametrize(
    ("kind", "block"), [("deepseek-v3", (16, 16)), ("deepseek-v3", (7, 9)), ("qwen3-moe", (128, 128))]
)
def test_eight_bit_checkpoint(kind: str, block: tuple[int, int], tmp_path: Path) -> None:
    small, full = (write_model(tmp_path / name, kind) for name in ("small", "full"))
    change_weights(small, lambda tensors: in_eight_bits(tensors, block))
    change_weights(full, lambda tensors: in_full(in_eight_bits(tensors, block), block))
    module = "kv_b_proj" if kind == "deepseek-v3" else "v_proj"
    adapter = write_adapter(tmp_path / "some", full, kind, 1, r=3, target_modules=[module])
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": block,
    }
    change_config(small, quantization_config=quantisation)
    for job in serve_mixed_batch(small, [None, adapter], [9, 33]):
        expected = reference_logits(full, kind, job.adapter, [*job.prompt, *job.answer[:-1]])
        assert_close(job.logits, expected[len(job.prompt) - 1 :], relative=1e-4)


def test_eight_bit_scales_are_checked(tmp_path: Path) -> None:
    model = write_model(tmp_path, "deepseek-v3")
    change_weights(model, lambda tensors: in_eight_bits(tensors, (16, 16)))
    with pytest.raises(ModelRefused, match="float8_e4m3fn"):
        load_model(model, load_spec(model), 64)
    change_config(model, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]})
    with pytest.raises(ModelRefused, match=r"scale_inv is \(\d, \d\), the config says"):
        load_model(model, load_spec(model), 64)


def test_layers_for_more_tokens_at_once_are_left_on_disk(tmp_path: Path) -> None:
    model = write_model(tmp_path, "deepseek-v3", num_nextn_predict_layers=1)
    further = {
        "model.layers.3.eh_proj.weight": torch.zeros(48, 96),
        "model.layers.3.enorm.weight": torch.zeros(48),
    }
    change_weights(model, lambda tensors: tensors | further)
    load_model(model, load_spec(model), 64)
    change_weights(model, lambda tensors: tensors | {"model.layers.4.enorm.weight": torch.zeros(48)})
    with pytest.raises(ModelRefused, match=r"model\.layers\.4\.enorm\.weight"):
        load_model(model, load_spec(model), 64)


HUB_V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
HUB_V3: dict[str, Any] = {
    **HUB_V2_LITE, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "n_group": 8, "topk_group": 4, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_key_value_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 5,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "vocab_size": 129280,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
}  # fmt: skip


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """A model directory without a single tensor: enough for its spec."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x02" + b"\x00" * 7 + b"{}")
    return folder


def test_specs_of_the_hub(tmp_path: Path) -> None:
    lite = load_spec(write_config(tmp_path, HUB_V2_LITE))
    assert (lite.kv_planes, lite.num_kv_heads, lite.head_dim, lite.max_model_len) == (1, 1, 576, 163840)
    assert [site.module for site in lite.sites[1:8]] == ["q", "kv_a", "kv_b", "o", "gate", "up", "down"]
    assert len(lite.sites) == 2 + 27 * 4 + 3 + 26 * (1 + 3 + 3 * 64)
    shared = next(site for site in lite.sites if site.module == "shared_down")
    assert (shared.in_features, shared.paths) == (2816, ("model.layers.1.mlp.shared_experts.down_proj",))
    v3 = load_spec(write_config(tmp_path, HUB_V3))
    assert [site.module for site in v3.sites[1:6]] == ["q_a", "kv_a", "q_b", "kv_b", "o"]
    assert [fused.path for fused in v3.fused] == [f"model.layers.{layer}.mlp.experts" for layer in (3, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ({"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ({"topk_method": "group_limited_greedy", "n_group": 5}, "n_group = 5"),
        ({"topk_method": "group_limited_greedy", "n_group": 32}, "topk_group = 1 do not fit 64 experts"),
        ({"topk_method": "group_limited_greedy", "n_group": None}, "n_group = None"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok = None"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4"),
        ({"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"quantization_config": {**HUB_V3["quantization_config"], "activation_scheme": "static"}}, "'static'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier = 2.0"),
        ({"index_topk_experts": 7}, "index_topk_experts = 7"),
    ],
)  # fmt: skip
def test_v2_refuses_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {
        key: value
        for key, value in HUB_V2_LITE.items()
        if "rope" not in key or "rope_parameters" not in options
    }
    with pytest.raises(ModelRefused, match=message):
        load_spec(write_config(tmp_path, {**config, **options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"n_group": None}, "n_group = None"),
        ({"n_group": 256, "topk_group": 8}, "n_group = 256"),
        ({"topk_group": 9}, "topk_group = 9"),
        ({"head_dim": 128}, "head_dim = 128"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_v3_refuses_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = write_config(tmp_path, {**HUB_V3, **options})
    with pytest.raises(ModelRefused, match=message):
        load_model(model, load_spec(model), 64)
