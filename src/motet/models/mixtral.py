"""Mixtral: Llama's attention with a mixture of experts for its feed-forward."""

from __future__ import annotations

from transformers import PretrainedConfig

from motet.layers.decoder import Decoder
from motet.layers.mlp import SparseMLP
from motet.models.common import Builder, Geometry, attention_sites, common_spec, mlp_sites, refuse_options
from motet.models.weights import Weights
from motet.types import FusedExperts, ModelSpec, Site


def spec(config: PretrainedConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a Mixtral config."""
    refuse_options(config, {"hidden_act": "silu", "sliding_window": None})
    geometry = Geometry.of(config)
    layers, experts = range(config.num_hidden_layers), range(config.num_local_experts)
    sites = [
        site
        for layer in layers
        for group in (attention_sites(geometry, layer), *(_expert_sites(config, layer, e) for e in experts))
        for site in group
    ]
    fused = [FusedExperts(f"model.layers.{layer}.mlp.experts", layer, len(experts)) for layer in layers]
    return common_spec(config, name, digest, sites, fused, num_experts=len(experts))


def _expert_sites(config: PretrainedConfig, layer: int, expert: int) -> list[Site]:
    """PEFT files name experts as the hub does (w1 gate, w3 up, w2 down) or as transformers does today."""
    classic = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    today = f"model.layers.{layer}.mlp.experts.{expert}"
    paths = [
        (f"{classic}.{old}", f"{today}.{new}_proj")
        for old, new in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    ]
    return mlp_sites(layer, config.hidden_size, config.intermediate_size, paths, expert)


def build(config: PretrainedConfig, spec: ModelSpec, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed, from the hub's layout (`block_sparse_moe.experts.N.w1`)."""
    builder = Builder(config, spec, weights, max_positions)

    def mlp(layer: int) -> SparseMLP:
        path = f"model.layers.{layer}.block_sparse_moe"
        names = [
            [f"{path}.experts.{expert}.{name}.weight" for name in ("w1", "w3", "w2")]
            for expert in range(config.num_local_experts)
        ]
        return builder.sparse_mlp(
            layer, f"{path}.gate.weight", names, config.intermediate_size, normalise=True
        )

    return builder.decoder(mlp)
