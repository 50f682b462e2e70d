"""Mixtral: Llama's attention with a mixture of experts for its feed-forward."""

from __future__ import annotations

from transformers import PretrainedConfig

from motet.layers.decoder import Decoder
from motet.layers.mlp import SparseMLP
from motet.models.common import Geometry, attention_sites, build_decoder, common_spec, pack, refuse_options
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
    wide, hidden = config.intermediate_size, config.hidden_size
    classic = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    today = f"model.layers.{layer}.mlp.experts.{expert}"
    return [
        Site(layer, "gate", expert, hidden, wide, (f"{classic}.w1", f"{today}.gate_proj")),
        Site(layer, "up", expert, hidden, wide, (f"{classic}.w3", f"{today}.up_proj")),
        Site(layer, "down", expert, wide, hidden, (f"{classic}.w2", f"{today}.down_proj")),
    ]


def build(config: PretrainedConfig, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed, from the hub's layout (`block_sparse_moe.experts.N.w1`)."""
    wide, hidden, experts = config.intermediate_size, config.hidden_size, config.num_local_experts
    sites_per_layer = 4 + 3 * experts

    def mlp(layer: int) -> SparseMLP:
        path = f"model.layers.{layer}.block_sparse_moe"
        gate_up, down = [], []
        for expert in range(experts):
            one = f"{path}.experts.{expert}"
            gate_up.append(
                pack(
                    weights.take(f"{one}.w1.weight", wide, hidden),
                    weights.take(f"{one}.w3.weight", wide, hidden),
                )
            )
            down.append(pack(weights.take(f"{one}.w2.weight", hidden, wide)))
        router = pack(weights.take(f"{path}.gate.weight", experts, hidden))
        return SparseMLP(router, gate_up, down, config.num_experts_per_tok, layer * sites_per_layer + 4)

    return build_decoder(config, weights, max_positions, sites_per_layer, mlp)
