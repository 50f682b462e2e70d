"""Latent attention as DeepSeek V2 and V3 configure it: its sites, and its parts from a checkpoint."""

from __future__ import annotations

import math

import msgspec

from motet.kernels.latent_attention import LatentHeads
from motet.layers.batch import LatentForm
from motet.layers.latent import LatentAttention, QueryUp
from motet.layers.rotary import Rotary
from motet.models.builder import Builder
from motet.models.config import ModelConfig
from motet.types import ModelSpec, Site

LATENT_EPS = 1e-6
"""Of the norms inside the attention, whatever `rms_norm_eps` says."""


def with_latent_cache(spec: ModelSpec, config: ModelConfig) -> ModelSpec:
    """The spec with one plane of latents and rotated keys as its KV cache."""
    cached = config.kv_lora_rank + config.qk_rope_head_dim
    return msgspec.structs.replace(spec, num_kv_heads=1, head_dim=cached, kv_planes=1)


def latent_attention_sites(config: ModelConfig, layer: int) -> list[Site]:
    """q (or its two halves q_a and q_b), kv_a, kv_b and o of a layer."""
    heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    q_rank = config.q_lora_rank
    maps = [
        ("q_a", "q_a_proj", hidden, q_rank) if q_rank else ("q", "q_proj", hidden, queries),
        ("kv_a", "kv_a_proj_with_mqa", hidden, rank + config.qk_rope_head_dim),
        *([("q_b", "q_b_proj", q_rank, queries)] if q_rank else []),
        ("kv_b", "kv_b_proj", rank, heads * (config.qk_nope_head_dim + config.v_head_dim)),
        ("o", "o_proj", heads * config.v_head_dim, hidden),
    ]
    return [
        Site(layer, module, -1, inputs, outputs, (f"model.layers.{layer}.self_attn.{name}",))
        for module, name, inputs, outputs in maps
    ]


def latent_attention(builder: Builder, layer: int, rotary: Rotary) -> LatentAttention:
    """A layer's attention with its weights packed."""
    config = builder.config
    heads = LatentHeads(
        config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank,
        config.v_head_dim, _scale(config),
    )  # fmt: skip
    path, vector = f"model.layers.{layer}.self_attn", builder.weights.vector
    hidden, cached = config.hidden_size, heads.rank + heads.rope
    queries, q_rank = heads.num * (heads.nope + heads.rope), config.q_lora_rank
    query_up = None
    if q_rank:
        query_up = QueryUp(
            vector(f"{path}.q_a_layernorm.weight", q_rank),
            LATENT_EPS,
            builder.linear(layer, ("q_b",), [f"{path}.q_b_proj"], q_rank, (queries,)),
        )
    first = "q_a" if q_rank else "q"
    names = [f"{path}.{first}_proj", f"{path}.kv_a_proj_with_mqa"]
    bias, widths = config.attention_bias, (q_rank or queries, cached)
    kv_b = builder.weights.take(
        f"{path}.kv_b_proj.weight", heads.num * (heads.nope + heads.value), heads.rank
    )
    keys, values = kv_b.view(heads.num, -1, heads.rank).split([heads.nope, heads.value], dim=1)
    form = LatentForm(
        vector(f"{path}.kv_a_layernorm.weight", heads.rank),
        LATENT_EPS,
        builder.device.per_head(keys),
        builder.device.per_head(values.transpose(1, 2)),
        builder.site(layer, "kv_b"),
        builder.rotary(rotary),
        builder.place(layer),
        heads,
    )
    return LatentAttention(
        builder.linear(layer, (first, "kv_a"), names, hidden, widths, bias),
        query_up,
        builder.linear(layer, ("o",), [f"{path}.o_proj"], heads.num * heads.value, (hidden,), bias),
        form,
    )


def _scale(config: ModelConfig) -> float:
    """Of attention scores. YaRN's `mscale_all_dim` is for all of a head, not only for what rotates: it goes in here."""
    rope = config.rope_parameters
    scale = float(config.qk_head_dim**-0.5)
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
    return scale
