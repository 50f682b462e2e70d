"""Tiny bases, adapters that PEFT itself writes for them, and adapters written by hand."""

from __future__ import annotations

import copy
import json
import struct
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from motet.adapters.checkpoint import Checkpoint
from motet.models import llama, mixtral
from motet.models.complete import completed
from motet.types import ModelSpec

HIDDEN, WIDE, EXPERTS, VOCAB = 48, 80, 4, 64
PREFIX = "base_model.model."
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config_of(kind: str, hidden: int = HIDDEN, wide: int = WIDE) -> Any:
    """The Hugging Face config of the tiny "llama" (3 layers) or "mixtral" (2 layers, 4 experts)."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": wide, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "llama":
        return LlamaConfig(num_hidden_layers=3, **shared)
    return MixtralConfig(num_hidden_layers=2, num_local_experts=EXPERTS, num_experts_per_tok=2, **shared)


@cache
def spec_of(kind: str, hidden: int = HIDDEN, wide: int = WIDE, digest: str = "base") -> ModelSpec:
    """Its ModelSpec."""
    make = llama.spec if kind == "llama" else mixtral.spec
    return make(completed(config_of(kind, hidden, wide)), f"tiny-{kind}", digest)


@cache
def _base(kind: str) -> Any:
    torch.manual_seed(7)
    model = LlamaForCausalLM if kind == "llama" else MixtralForCausalLM
    return model(config_of(kind))


def base_of(kind: str) -> Any:
    """A fresh tiny model, which PEFT may change in place."""
    return copy.deepcopy(_base(kind))


def peft_adapter(
    kind: str, path: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Let PEFT write an adapter with random factors to `path`; returns its own delta by name."""
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on patterns of parameters; transformers on itself
        model = get_peft_model(base_of(kind), LoraConfig(task_type="CAUSAL_LM", **options))
        factors = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
        with torch.no_grad():
            for factor in factors:
                factor.copy_(torch.randn(factor.shape, generator=generator).to(dtype))
            found = deltas(model)
        for factor in factors:
            factor.data = factor.data.to(dtype)
        model.save_pretrained(str(path))
    return found


def deltas(model: Any) -> dict[str, Tensor]:
    """What PEFT adds to each linear map [out, in], by name (`experts.E.gate_proj` if fused)."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        path, delta = (
            name.removeprefix(PREFIX).replace(".base_layer", ""),
            module.get_delta_weight("default").detach(),
        )
        parameter = getattr(module, "parameter_name", None)
        if parameter is None:
            found[path] = delta
            continue
        for expert, one in enumerate(delta):
            parts = one.chunk(2) if parameter == "gate_up_proj" else (one,)
            names = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
            found |= {f"{path}.{expert}.{leaf}": part for leaf, part in zip(names, parts, strict=True)}
    return found


def our_deltas(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Tensor]:
    """scaling · B @ A of the normal form in float32, by the last of a site's names."""
    return {
        spec.sites[site].paths[-1]: one.scaling * (one.b.float() @ one.a.float())
        for site, one in checkpoint.factors.items()
    }


def settings(**changes: object) -> dict[str, object]:
    """An adapter_config.json, as a mapping."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **changes}


def write_adapter(path: Path, tensors: Mapping[str, Tensor], **changes: object) -> Path:
    """Write `tensors` under their full names with a hand-made config."""
    path.mkdir(exist_ok=True)
    (path / CONFIG).write_text(json.dumps(settings(**changes)))
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        path / WEIGHTS,
        {"format": "pt"},
    )
    return path


def module_tensors(path: str, depth: int, width: int, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random factors of one module under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{path}.lora_A.weight": torch.randn(rank, depth, generator=generator),
        f"{PREFIX}{path}.lora_B.weight": torch.randn(width, rank, generator=generator),
    }


def q_tensors(layer: int = 0, rank: int = 4) -> dict[str, Tensor]:
    """Factors of a q projection of the tiny bases."""
    return module_tensors(f"model.layers.{layer}.self_attn.q_proj", HIDDEN, HIDDEN, rank, seed=layer)


def classic_expert(layer: int, expert: int, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Factors of w1, w2, w3 of one Mixtral expert under their classic names, as far as `ranks` names them."""
    shapes = {"w1": (HIDDEN, WIDE), "w2": (WIDE, HIDDEN), "w3": (HIDDEN, WIDE)}
    found: dict[str, Tensor] = {}
    for leaf, rank in ranks.items():
        path = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
        found |= module_tensors(path, *shapes[leaf], rank, seed=100 * layer + 10 * expert + int(leaf[1]))
    return found


def raw_safetensors(
    header: bytes | Mapping[str, object], data: bytes = b"", length: int | None = None
) -> bytes:
    """The bytes of a safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def split_file(path: Path) -> Iterator[bytes]:
    """The header (JSON) and the data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    yield content[8 : 8 + length]
    yield content[8 + length :]
