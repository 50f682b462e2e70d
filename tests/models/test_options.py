"""Options of the Llama-like families, each against transformers; and the refusal, by name, of what is not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from motet.errors import ModelRefused
from motet.models.registry import load_model, load_spec
from tests.parity import check_mixed_batch
from tests.tiny import KINDS, load_reference, write_adapter, write_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LONG = [3, 34, 67]
"""Prompts shorter and longer than the windows and original lengths below."""
ROPE = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-tuned": {
        "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.8,
        "mscale_all_dim": 0.5, "truncate": False,
    },
    "yarn-attention": {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.9},
}  # fmt: skip


def _check(
    folder: Path, kind: str, options: dict[str, Any], lengths: list[int] = LONG, **engine: Any
) -> None:
    """A mixed batch of the base and of two adapters, on a model with these options."""
    model = write_model(folder / "model", kind, **options)
    adapters = [
        write_adapter(
            folder / f"a{rank}", model, kind, rank, r=rank, lora_alpha=2 * rank, target_modules=ATTENTION
        )
        for rank in (3, 9)
    ]
    check_mixed_batch(model, kind, [None, *adapters], lengths, **engine)


@pytest.mark.parametrize("window", [1, 7, 10])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {}),
        ("mixtral", {}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        ("qwen3-moe", {"use_sliding_window": True}),
    ],
    ids=["mistral", "mixtral", "qwen3-upper", "qwen3-mixed", "qwen3-moe"],
)
def test_sliding_window(kind: str, options: dict[str, Any], window: int, tmp_path: Path) -> None:
    _check(tmp_path, kind, {"sliding_window": window, **options}, tokens=19)


def test_sliding_window_of_whole_prompts(tmp_path: Path) -> None:
    _check(tmp_path, "mistral", {"sliding_window": 11}, tokens=5, max_step_tokens=200, page_tokens=16)


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "qwen3"])
@pytest.mark.parametrize("rope", ROPE)
def test_rope_scaling_beyond_the_original_length(rope: str, kind: str, tmp_path: Path) -> None:
    parameters = {"rope_type": rope.partition("-")[0], "rope_theta": 10000.0, **ROPE[rope]}
    _check(tmp_path, kind, {"rope_parameters": parameters, "head_dim": 14})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 22}),
        ("llama", {"num_key_value_heads": 1, "vocab_size": 293}),
        ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 1021}),
        ("mistral", {"head_dim": None, "tie_word_embeddings": True, "rms_norm_eps": 0.03}),
        ("mistral", {"head_dim": 6, "hidden_size": 44, "intermediate_size": 37}),
        ("mixtral", {"num_experts_per_tok": 1, "num_local_experts": 3, "head_dim": 26}),
        ("mixtral", {"num_experts_per_tok": 4, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 34, "num_attention_heads": 3, "num_key_value_heads": 3}),
        ("qwen3-moe", {"attention_bias": True, "norm_topk_prob": True}),
        ("qwen3-moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "tie_word_embeddings": True}),
        ("qwen3-moe", {"num_experts_per_tok": 6, "moe_intermediate_size": 28, "vocab_size": 293}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_option(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    _check(tmp_path, kind, options, [3, 14, 25])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_fused_experts_in_the_checkpoint(kind: str, tmp_path: Path) -> None:
    """transformers writes experts as the hub has them, or, if told so, as it holds them itself."""
    hub = write_model(tmp_path / "hub", kind)
    load_reference(hub, kind).save_pretrained(tmp_path / "fused", save_original_format=False)
    check_mixed_batch(tmp_path / "fused", kind, [None, None])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_router_adapter(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind)

    def write(name: str, seed: int, **config: Any) -> Path:
        return write_adapter(tmp_path / name, model, kind, seed, lora_alpha=12, **config)

    router = ["mlp.gate.weight"]
    adapters = [
        write("router", 1, r=3, target_modules=[], target_parameters=router),
        write("all", 2, r=5, target_modules=ATTENTION, target_parameters=[*router, "mlp.experts.down_proj"]),
    ]
    check_mixed_batch(model, kind, [None, *adapters])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_patterns_of_a_router_adapter_name_its_parameter(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind)
    router = ["mlp.gate.weight"]
    config: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "target_parameters": router,
    }
    patterns = [{"alpha_pattern": {"gate.weight": 40}}, {"rank_pattern": {"mlp.gate.weight": 2}}]
    adapters = [
        write_adapter(tmp_path / str(number), model, kind, number, **config, **pattern)
        for number, pattern in enumerate(patterns)
    ]
    check_mixed_batch(model, kind, [None, *adapters])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's advice on merging
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_embedding_and_head_adapters(kind: str, tied: bool, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind, tie_word_embeddings=tied)
    adapters = [
        write_adapter(
            tmp_path / str(number), model, kind, number, r=2 + number, lora_alpha=12, target_modules=modules
        )
        for number, modules in enumerate(
            [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]]
        )
    ]
    check_mixed_batch(model, kind, [None, *adapters, None])


def _config(folder: Path, kind: str, **options: Any) -> Path:
    """A model directory without weights."""
    config_class, model_class, defaults = KINDS[kind]
    config = {**config_class(**defaults).to_dict(), "architectures": [model_class.__name__], **options}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x02" + b"\x00" * 7 + b"{}")
    return folder


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported for llama"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config = .*awq"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not known for llama"),
        ("llama", {"sliding_window": 64}, "sliding_window = 64 is not known for llama"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
        ("mistral", {"attention_bias": True}, "attention_bias = True is not known for mistral"),
        ("mixtral", {"layer_types": ["full_attention"] * 32}, "layer_types = .* is not known for mixtral"),
        ("mixtral", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("qwen3", {"layer_types": ["linear_attention"] * 32}, "layer type 'linear_attention' is not supported"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 32}, "sliding_window, which is not given"),
        ("qwen3-moe", {"num_shared_experts": 2}, "num_shared_experts = 2"),
    ],
)  # fmt: skip
def test_option_is_refused_by_name(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=message):
        load_spec(_config(tmp_path, kind, **options))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported for llama"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "factor": 2.0},
            "rope_type 'longrope'",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 .* llama"),
    ],
    ids=["dynamic", "longrope", "partial"],
)
def test_rope_is_refused_by_name(rope: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama", rope_parameters={"rope_theta": 10000.0, **rope})
    with pytest.raises(ModelRefused, match=message):
        load_model(model, load_spec(model), 32)


def test_notes_in_a_config_are_harmless(tmp_path: Path) -> None:
    notes = {
        "unsloth_version": "2025.1",
        "rope_interleaved": False,
        "is_llama_config": True,
        "max_window_layers": None,
    }
    assert load_spec(_config(tmp_path, "llama", **notes)).architecture == "llama"
    window = {"max_window_layers": 48, "sliding_window": 4096}
    assert load_spec(_config(tmp_path, "qwen3-moe", **window)).kv_groups[0].window == 0


def test_mistral_with_layer_types_is_ministral(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 16
    spec = load_spec(_config(tmp_path, "mistral", layer_types=kinds, sliding_window=64))
    assert (spec.architecture, [group.window for group in spec.kv_groups]) == ("ministral", [0, 64])


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"architecture \['OtherForCausalLM'\] is not supported"):
        load_spec(_config(tmp_path, "llama", architectures=["OtherForCausalLM"]))
