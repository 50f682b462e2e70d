"""Mixtral: Llama's attention with a mixture of experts for its feed-forward."""

from __future__ import annotations

from motet.kernels.route import RoutingRule
from motet.layers.decoder import Decoder
from motet.layers.mlp import SparseMLP
from motet.models.builder import Builder
from motet.models.common import (
    Geometry,
    attention_sites,
    common_spec,
    mlp_sites,
    refuse_options,
    refuse_unknown_options,
    rotary,
    router_site,
)
from motet.models.config import ModelConfig
from motet.models.weights import Weights
from motet.types import FusedExperts, ModelSpec, Site


def spec(config: ModelConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a Mixtral config."""
    refuse_options(config, {"hidden_act": "silu"})
    refuse_unknown_options(config)
    geometry = Geometry.of(config)
    layers, experts = range(config.num_hidden_layers), range(config.num_local_experts)
    sites = [
        site
        for layer in layers
        for group in (
            attention_sites(geometry, layer),
            [_router_site(config, layer)],
            *(_expert_sites(config, layer, expert) for expert in experts),
        )
        for site in group
    ]
    fused = [FusedExperts(f"model.layers.{layer}.mlp.experts", layer, len(experts)) for layer in layers]
    return common_spec(config, name, digest, sites, fused, num_experts=len(experts))


def _router_site(config: ModelConfig, layer: int) -> Site:
    path = f"model.layers.{layer}"
    names = f"{path}.block_sparse_moe.gate", f"{path}.mlp.gate"
    return router_site(config, layer, config.num_local_experts, *names)


def _expert_sites(config: ModelConfig, layer: int, expert: int) -> list[Site]:
    """PEFT files name experts as the hub does (w1 gate, w3 up, w2 down) or as transformers does today."""
    classic = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    today = f"model.layers.{layer}.mlp.experts.{expert}"
    paths = [
        (f"{classic}.{old}", f"{today}.{new}_proj")
        for old, new in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    ]
    return mlp_sites(layer, config.hidden_size, config.intermediate_size, paths, expert)


def build(config: ModelConfig, spec: ModelSpec, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed, from the hub's layout (`block_sparse_moe.experts.N.w1`) or today's."""
    builder, table = Builder(config, spec, weights), rotary(config, max_positions)
    rule = RoutingRule(config.num_experts_per_tok, normalise=True)

    def mlp(layer: int) -> SparseMLP:
        path, count, wide = f"model.layers.{layer}.mlp", config.num_local_experts, config.intermediate_size
        if f"{path}.gate.weight" in weights:
            experts = builder.fused_experts(f"{path}.experts", count, wide)
        else:
            path = f"model.layers.{layer}.block_sparse_moe"
            paths = [f"{path}.experts.{expert}" for expert in range(count)]
            names = [[f"{one}.{name}.weight" for name in ("w1", "w3", "w2")] for one in paths]
            experts = builder.experts(names, wide)
        router = builder.router(layer, f"{path}.gate", count)
        return SparseMLP(router, rule, experts, builder.site(layer, "gate", 0))

    return builder.decoder(lambda layer: builder.attention(layer, table), mlp)
