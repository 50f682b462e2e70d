"""What the Llama family has in common: geometry, attention, embeddings, and the refusal of unknown options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from motet.errors import ModelRefused
from motet.kernels.linear import PackedWeight
from motet.layers.attention import Attention
from motet.layers.decoder import Decoder, DecoderLayer
from motet.layers.linear import AdaptedLinear
from motet.layers.mlp import DenseMLP, SparseMLP
from motet.layers.rotary import Rotary, rotary_table
from motet.models.weights import Weights
from motet.types import FusedExperts, ModelSpec, Site


@dataclass(frozen=True)
class Geometry:
    """Head counts and sizes of grouped-query attention."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(config: PretrainedConfig) -> Geometry:
        """From a Hugging Face config; head_dim defaults to hidden / heads."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Geometry(config.hidden_size, heads, config.num_key_value_heads, head_dim)


def refuse_options(config: PretrainedConfig, supported: Mapping[str, object]) -> None:
    """Refuse by name every listed option whose value is not the supported one."""
    for option, value in supported.items():
        found = getattr(config, option, value)
        if found != value:
            raise ModelRefused(
                f"{option} = {found!r} is not supported for {config.model_type}, only {value!r} is"
            )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelRefused(f"quantised weights are not supported for {config.model_type}")


def attention_sites(g: Geometry, layer: int) -> list[Site]:
    """The four attention projections of a layer."""
    path = f"model.layers.{layer}.self_attn"
    return [
        Site(layer, "q", -1, g.hidden, g.heads * g.head_dim, (f"{path}.q_proj",)),
        Site(layer, "k", -1, g.hidden, g.kv_heads * g.head_dim, (f"{path}.k_proj",)),
        Site(layer, "v", -1, g.hidden, g.kv_heads * g.head_dim, (f"{path}.v_proj",)),
        Site(layer, "o", -1, g.heads * g.head_dim, g.hidden, (f"{path}.o_proj",)),
    ]


def common_spec(
    config: PretrainedConfig,
    name: str,
    digest: str,
    sites: Sequence[Site],
    fused: Sequence[FusedExperts] = (),
    num_experts: int = 0,
) -> ModelSpec:
    """The ModelSpec of a Llama-like config."""
    geometry = Geometry.of(config)
    eos = config.eos_token_id
    return ModelSpec(
        architecture=config.model_type,
        name=name,
        digest=digest,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=geometry.heads,
        num_kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        num_experts=num_experts,
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        sites=tuple(sites),
        fused=tuple(fused),
    )


def pack(*weights: Tensor) -> PackedWeight:
    """Weights that read the same input, stacked along their outputs and packed."""
    return PackedWeight(weights[0] if len(weights) == 1 else torch.cat(weights))


def rotary(config: PretrainedConfig, max_positions: int) -> Rotary:
    """The rotation table of a config's rope parameters."""
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        dim = Geometry.of(config).head_dim
        inverse = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        return rotary_table(inverse, max_positions, 1.0)
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelRefused(f"rope_type {kind!r} is not supported")
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return rotary_table(inverse, max_positions, scale)


def build_decoder(
    config: PretrainedConfig,
    weights: Weights,
    max_positions: int,
    sites_per_layer: int,
    mlp: Callable[[int], DenseMLP | SparseMLP],
) -> Decoder:
    """A decoder whose layers differ from Llama's only in the feed-forward that `mlp(layer)` builds."""
    g = Geometry.of(config)
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    table = rotary(config, max_positions)

    def attention(layer: int) -> Attention:
        path, site = f"model.layers.{layer}.self_attn", layer * sites_per_layer
        qkv = pack(
            weights.take(f"{path}.q_proj.weight", q, g.hidden),
            weights.take(f"{path}.k_proj.weight", kv, g.hidden),
            weights.take(f"{path}.v_proj.weight", kv, g.hidden),
        )
        out = pack(weights.take(f"{path}.o_proj.weight", g.hidden, q))
        return Attention(
            AdaptedLinear(qkv, site, (q, kv, kv)),
            AdaptedLinear(out, site + 3, (g.hidden,)),
            table,
            layer,
            g.heads,
        )

    layers = [
        DecoderLayer(
            attention_norm=weights.take(f"model.layers.{layer}.input_layernorm.weight", g.hidden),
            attention=attention(layer),
            mlp_norm=weights.take(f"model.layers.{layer}.post_attention_layernorm.weight", g.hidden),
            mlp=mlp(layer),
        )
        for layer in range(config.num_hidden_layers)
    ]
    # The embedding is only looked up: it stays in the checkpoint's dtype, half the memory for bfloat16.
    embedding = weights.take_stored("model.embed_tokens.weight", config.vocab_size, g.hidden)
    tied = config.tie_word_embeddings and "lm_head.weight" not in weights
    head = embedding.float() if tied else weights.take("lm_head.weight", config.vocab_size, g.hidden)
    weights.nbytes += head.nbytes if tied else 0
    return Decoder(
        embedding, layers, weights.take("model.norm.weight", g.hidden), pack(head), config.rms_norm_eps
    )
