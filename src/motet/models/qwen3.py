"""Qwen3: Llama with q and k normalised per head. The dense models, and those with a mixture of experts."""

from __future__ import annotations

from motet.kernels.route import RoutingRule
from motet.layers.attention import Attention
from motet.layers.decoder import Decoder
from motet.layers.mlp import DenseMLP, SparseMLP
from motet.models.builder import Builder
from motet.models.common import (
    Geometry,
    attention_sites,
    common_spec,
    dense_mlp_sites,
    mlp_sites,
    projections,
    refuse_options,
    refuse_unknown_options,
    rotary,
    router_site,
)
from motet.models.config import ModelConfig
from motet.models.weights import Weights
from motet.types import FusedExperts, ModelSpec, Site


def spec(config: ModelConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a Qwen3 or Qwen3-MoE config."""
    refuse_options(config, {"hidden_act": "silu"})
    refuse_unknown_options(config, harmless=("max_window_layers",))  # Qwen3-MoE has one window for all layers
    geometry = Geometry.of(config)
    sites: list[Site] = []
    fused = []
    for layer in range(config.num_hidden_layers):
        sites += attention_sites(geometry, layer)
        if _is_sparse(config, layer):
            sites.append(router_site(config, layer, config.num_experts, f"model.layers.{layer}.mlp.gate"))
            sites += [
                site for expert in range(config.num_experts) for site in _expert_sites(config, layer, expert)
            ]
            fused.append(FusedExperts(f"model.layers.{layer}.mlp.experts", layer, config.num_experts))
        else:
            sites += dense_mlp_sites(config, layer)
    return common_spec(config, name, digest, sites, fused, num_experts=getattr(config, "num_experts", 0))


def _is_sparse(config: ModelConfig, layer: int) -> bool:
    if getattr(config, "num_experts", 0) == 0 or layer in config.mlp_only_layers:
        return False
    return bool((layer + 1) % config.decoder_sparse_step == 0)


def _expert_sites(config: ModelConfig, layer: int, expert: int) -> list[Site]:
    names = projections(f"model.layers.{layer}.mlp.experts.{expert}")
    return mlp_sites(layer, config.hidden_size, config.moe_intermediate_size, names, expert)


def build(config: ModelConfig, spec: ModelSpec, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed; experts as the hub has them (`experts.N.gate_proj`) or fused."""
    builder, table = Builder(config, spec, weights), rotary(config, max_positions)
    bias = getattr(config, "attention_bias", False)

    def attention(layer: int) -> Attention:
        return builder.attention(layer, table, bias=bias, norms=builder.head_norms(layer))

    def mlp(layer: int) -> DenseMLP | SparseMLP:
        if not _is_sparse(config, layer):
            return builder.dense_mlp(layer)
        path, count, wide = f"model.layers.{layer}.mlp", config.num_experts, config.moe_intermediate_size
        if f"{path}.experts.gate_up_proj" in weights:
            experts = builder.fused_experts(f"{path}.experts", count, wide)
        else:
            paths = [f"{path}.experts.{expert}" for expert in range(count)]
            names = [[f"{one}.{name}_proj.weight" for name in ("gate", "up", "down")] for one in paths]
            experts = builder.experts(names, wide)
        return SparseMLP(
            builder.router(layer, f"{path}.gate", count),
            RoutingRule(config.num_experts_per_tok, normalise=config.norm_topk_prob),
            experts,
            builder.site(layer, "gate", 0),
        )

    return builder.decoder(attention, mlp)
