"""Qwen3: Llama with q and k normalised per head. The dense models, and those with a mixture of experts."""

from __future__ import annotations

from functools import partial

from transformers import PretrainedConfig

from motet.layers.decoder import Decoder
from motet.layers.mlp import DenseMLP, SparseMLP
from motet.models.common import (
    Builder,
    Geometry,
    attention_sites,
    common_spec,
    dense_mlp_sites,
    mlp_sites,
    refuse_options,
)
from motet.models.weights import Weights
from motet.types import FusedExperts, ModelSpec, Site


def spec(config: PretrainedConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a Qwen3 or Qwen3-MoE config."""
    refuse_options(config, {"hidden_act": "silu", "attention_bias": False, "sliding_window": None})
    geometry = Geometry.of(config)
    sites: list[Site] = []
    fused = []
    for layer in range(config.num_hidden_layers):
        sites += attention_sites(geometry, layer)
        if _is_sparse(config, layer):
            sites += [
                site for expert in range(config.num_experts) for site in _expert_sites(config, layer, expert)
            ]
            fused.append(FusedExperts(f"model.layers.{layer}.mlp.experts", layer, config.num_experts))
        else:
            sites += dense_mlp_sites(config, layer)
    return common_spec(config, name, digest, sites, fused, num_experts=getattr(config, "num_experts", 0))


def _is_sparse(config: PretrainedConfig, layer: int) -> bool:
    if getattr(config, "num_experts", 0) == 0 or layer in config.mlp_only_layers:
        return False
    return bool((layer + 1) % config.decoder_sparse_step == 0)


def _expert_sites(config: PretrainedConfig, layer: int, expert: int) -> list[Site]:
    names = [[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"] for name in ("gate", "up", "down")]
    return mlp_sites(layer, config.hidden_size, config.moe_intermediate_size, names, expert)


def build(config: PretrainedConfig, spec: ModelSpec, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed."""
    builder = Builder(config, spec, weights, max_positions)

    def mlp(layer: int) -> DenseMLP | SparseMLP:
        if not _is_sparse(config, layer):
            return builder.dense_mlp(layer)
        path = f"model.layers.{layer}.mlp"
        names = [
            [f"{path}.experts.{expert}.{name}_proj.weight" for name in ("gate", "up", "down")]
            for expert in range(config.num_experts)
        ]
        return builder.sparse_mlp(
            layer, f"{path}.gate.weight", names, config.moe_intermediate_size, normalise=config.norm_topk_prob
        )

    return builder.decoder(mlp, partial(builder.attention, head_norms=True))
