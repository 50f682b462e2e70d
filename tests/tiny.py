"""Tiny random models and PEFT adapters on disk, for tests of the engine and everything above it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 290
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": None,
}
_MOE = {"num_experts_per_tok": 2}
_LATENT = {
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 16.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "deepseek-v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        {
            **_LATENT,
            "num_key_value_heads": 4,
            "q_lora_rank": 18,
            "n_routed_experts": 12,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 3.0,
            "rope_parameters": _YARN,
        },
    ),
    "deepseek-v2-lite": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        {
            **_LATENT,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "q_lora_rank": None,
            "n_routed_experts": 5,
        },
    ),
    "deepseek-v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            **_LATENT,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "q_lora_rank": 18,
            "n_shared_experts": 1,
            "n_routed_experts": 12,
            "n_group": 3,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "rope_parameters": _YARN,
        },
    ),
    "gpt-oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            **_MOE,
            "head_dim": 14,
            "num_local_experts": 5,
            "sliding_window": 6,
            "swiglu_limit": 0.4,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 16.0,
                "beta_fast": 1.5,
                "beta_slow": 0.2,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama4": (
        Llama4TextConfig,
        Llama4ForCausalLM,
        {
            "num_hidden_layers": 4,
            "intermediate_size": 40,
            "intermediate_size_mlp": 72,
            "head_dim": 10,
            "num_local_experts": 3,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 0, 1],
            "attention_chunk_size": 13,
            "floor_scale": 7,
        },
    ),
    "ministral": (
        MinistralConfig,
        MinistralForCausalLM,
        {
            "sliding_window": 11,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "head_dim": 10,
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {**_MOE, "num_local_experts": 4, "sliding_window": None}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {**_MOE, "num_experts": 6, "moe_intermediate_size": 40, "head_dim": 16, "mlp_only_layers": [1]},
    ),
}
"""Architectures by name: config class, model class, and what the config has beside SHAPE."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_model(folder: Path, kind: str, seed: int = 0, **overrides: Any) -> Path:
    """A random fp32 model of `kind` (a key of KINDS) with a byte-level tokenizer; returns its directory."""
    torch.manual_seed(seed)
    config, model_class, options = KINDS[kind]
    model: PreTrainedModel = model_class(config(**{**SHAPE, **options, **overrides}))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08 if "gate.weight" not in name else 0.5)
        elif name.endswith((".bias", ".sinks")):
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Bytes as tokens: id 0 is unused, 1 is end of sequence, the rest are the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_adapter(folder: Path, model: Path, kind: str, seed: int, **config: Any) -> Path:
    """A random adapter written by PEFT itself; `config` goes to LoraConfig."""
    base = load_reference(model, kind)
    wrapped = get_peft_model(base, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def write_expert_adapter(folder: Path, model: Path, seed: int, rank: int) -> Path:
    """An adapter of every expert of a tiny Mixtral in the classic per-expert names (w1, w2, w3)."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    hidden, wide = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    tensors = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for expert in range(4):
            for name, (out, into) in {
                "w1": (wide, hidden),
                "w2": (hidden, wide),
                "w3": (wide, hidden),
            }.items():
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(rank, into, generator=generator) * 0.15
                tensors[f"{path}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.15
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["w1", "w2", "w3"], base_model_name_or_path=str(model),
        task_type="CAUSAL_LM",
    ).save_pretrained(str(folder))  # fmt: skip
    return folder


def load_reference(model: Path, kind: str) -> PreTrainedModel:
    """The model as transformers runs it, fp32."""
    reference: PreTrainedModel = KINDS[kind][1].from_pretrained(model, dtype=torch.float32)
    for module in reference.modules():
        if hasattr(module, "limit") and hasattr(reference.config, "swiglu_limit"):
            module.limit = reference.config.swiglu_limit  # older transformers have gpt-oss's own built in
    reference.train(False)
    return reference
