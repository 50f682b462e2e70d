"""Random checkpoints and adapters in the shape of well-known models, to measure with.

    python benchmarks/gpu/random_checkpoint.py KIND OUT [--adapters 8] [--rank 32] [--layers N]

KIND is gpt-oss-20b, qwen3-30b or llama-8b.

OUT becomes a Hugging Face model directory (13, 61 and 16 GB), OUT-lora0, OUT-lora1, … PEFT adapters of all its linear
maps. Needs a GPU to be quick, and memory-backed storage; about a minute at most.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
COMMON: dict[str, Any] = {"hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
        "sliding_window": 128, "swiglu_limit": 7.0, "attention_bias": True, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "eos_token_id": 200002,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "qwen3-30b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "vocab_size": 151936, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
        "eos_token_id": 151645, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
        "eos_token_id": 128001, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}  # fmt: skip


class Shape:
    """A config, and random tensors for it."""

    def __init__(self, kind: str, layers: int | None) -> None:
        self.kind = kind
        self.config = {**COMMON, **CONFIGS[kind]}
        if layers is not None:
            self.config["num_hidden_layers"] = layers
        self.layers = int(self.config["num_hidden_layers"])
        self.hidden = int(self.config["hidden_size"])
        self.experts = int(self.config.get("num_local_experts", self.config.get("num_experts", 0)))
        self.wide = int(self.config.get("moe_intermediate_size", self.config["intermediate_size"]))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._generator = torch.Generator(self._device).manual_seed(0)

    def normal(self, *shape: int, std: float = 0.02) -> Tensor:
        found = torch.randn(shape, device=self._device, generator=self._generator) * std
        return found.bfloat16().cpu()

    def codes(self, low: int, high: int, *shape: int) -> Tensor:
        found = torch.randint(
            low, high, shape, device=self._device, generator=self._generator, dtype=torch.uint8
        )
        return found.cpu()

    def attention(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the attention's projections."""
        config, hidden = self.config, self.hidden
        queries = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        return {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        }

    def mlp(self) -> dict[str, tuple[int, int]]:
        """(out, in) of one MLP's or expert's."""
        return {
            "gate_proj": (self.wide, self.hidden),
            "up_proj": (self.wide, self.hidden),
            "down_proj": (self.hidden, self.wide),
        }

    def layer(self, index: int) -> Weights:
        path = f"model.layers.{index}."
        ones = torch.ones(self.hidden, dtype=torch.bfloat16)
        found = {
            f"{path}input_layernorm.weight": ones,
            f"{path}post_attention_layernorm.weight": ones.clone(),
        }
        for name, shape in self.attention().items():
            found[f"{path}self_attn.{name}.weight"] = self.normal(*shape)
            if self.kind == "gpt-oss-20b":
                found[f"{path}self_attn.{name}.bias"] = self.normal(shape[0])
        if self.kind == "gpt-oss-20b":
            found |= self._four_bit_experts(path)
        elif self.kind == "qwen3-30b":
            dim = self.config["head_dim"]
            found[f"{path}mlp.gate.weight"] = self.normal(self.experts, self.hidden)
            for name in ("q_norm", "k_norm"):
                found[f"{path}self_attn.{name}.weight"] = torch.ones(dim, dtype=torch.bfloat16)
            for name, shape in self.mlp().items():
                for expert, weight in enumerate(self.normal(self.experts, *shape)):
                    found[f"{path}mlp.experts.{expert}.{name}.weight"] = weight.clone()
        else:
            found |= {f"{path}mlp.{name}.weight": self.normal(*shape) for name, shape in self.mlp().items()}
        return found

    def _four_bit_experts(self, path: str) -> Weights:
        count, heads = self.experts, self.config["num_attention_heads"]
        found = {
            f"{path}self_attn.sinks": self.normal(heads, std=1.0),
            f"{path}mlp.router.weight": self.normal(count, self.hidden),
            f"{path}mlp.router.bias": self.normal(count),
        }
        for name, rows, columns in (
            ("gate_up_proj", 2 * self.wide, self.hidden),
            ("down_proj", self.hidden, self.wide),
        ):
            expert = f"{path}mlp.experts.{name}"
            found[f"{expert}_blocks"] = self.codes(0, 256, count, rows, columns // 32, 16)
            found[f"{expert}_scales"] = self.codes(118, 121, count, rows, columns // 32)
            found[f"{expert}_bias"] = self.normal(count, rows)
        return found

    def adapter(self, rank: int) -> tuple[Weights, dict[str, Any]]:
        """Factors of every linear map, experts as PEFT's target_parameters write them, and the config."""
        found: Weights = {}
        modules = self.attention() | ({} if self.experts else self.mlp())
        config: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
            "target_modules": sorted(modules),
        }  # fmt: skip
        if self.experts:
            config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        for layer in range(self.layers):
            path = f"base_model.model.model.layers.{layer}."
            for name, (out, inputs) in modules.items():
                part = "mlp" if name in self.mlp() else "self_attn"
                found[f"{path}{part}.{name}.lora_A.weight"] = self.normal(rank, inputs)
                found[f"{path}{part}.{name}.lora_B.weight"] = self.normal(out, rank)
            if self.experts:
                ranks = rank * self.experts
                for name, out, inputs in (
                    ("experts.base_layer", 2 * self.wide, self.hidden), ("experts", self.hidden, self.wide)
                ):  # fmt: skip
                    found[f"{path}mlp.{name}.lora_A.weight"] = self.normal(ranks, inputs)
                    found[f"{path}mlp.{name}.lora_B.weight"] = self.normal(out, ranks)
        return found, config


WRITERS = 3
"""Files written at a time, while the next layer is made."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=CONFIGS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    shape, out = Shape(arguments.kind, arguments.layers), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(shape.config, indent=1))
    files: dict[str, str] = {}

    def save(weights: Weights, name: str) -> None:
        save_file(weights, out / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(weights, name))

    vocabulary = shape.config["vocab_size"]
    outer = {
        "model.embed_tokens.weight": shape.normal(vocabulary, shape.hidden, std=1.0),
        "lm_head.weight": shape.normal(vocabulary, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    save(outer, "model-outer.safetensors")
    with ThreadPoolExecutor(WRITERS) as writers:
        written: deque[Future[None]] = deque()
        for layer in range(shape.layers):
            written.append(writers.submit(save, shape.layer(layer), f"model-{layer:02d}.safetensors"))
            if len(written) > WRITERS:
                written.popleft().result()
        while written:
            written.popleft().result()
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for number in range(arguments.adapters):
        folder = out.with_name(f"{out.name}-lora{number}")
        folder.mkdir(exist_ok=True)
        weights, config = shape.adapter(arguments.rank)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
