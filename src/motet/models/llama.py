"""Llama: the dense decoder (Llama 2 and 3, SmolLM2 and other models saved as LlamaForCausalLM)."""

from __future__ import annotations

from transformers import PretrainedConfig

from motet.layers.decoder import Decoder
from motet.layers.linear import AdaptedLinear
from motet.layers.mlp import DenseMLP
from motet.models.common import (
    Geometry,
    attention_sites,
    build_decoder,
    common_spec,
    pack,
    refuse_options,
)
from motet.models.weights import Weights
from motet.types import ModelSpec, Site

SITES_PER_LAYER = 7


def spec(config: PretrainedConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a Llama config."""
    refuse_options(config, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
    geometry = Geometry.of(config)
    sites = [
        site
        for layer in range(config.num_hidden_layers)
        for site in (*attention_sites(geometry, layer), *_mlp_sites(config, layer))
    ]
    return common_spec(config, name, digest, sites)


def _mlp_sites(config: PretrainedConfig, layer: int) -> list[Site]:
    wide, hidden = config.intermediate_size, config.hidden_size
    path = f"model.layers.{layer}.mlp"
    return [
        Site(layer, "gate", -1, hidden, wide, (f"{path}.gate_proj",)),
        Site(layer, "up", -1, hidden, wide, (f"{path}.up_proj",)),
        Site(layer, "down", -1, wide, hidden, (f"{path}.down_proj",)),
    ]


def build(config: PretrainedConfig, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed."""
    wide, hidden = config.intermediate_size, config.hidden_size

    def mlp(layer: int) -> DenseMLP:
        path, site = f"model.layers.{layer}.mlp", layer * SITES_PER_LAYER + 4
        gate_up = pack(
            weights.take(f"{path}.gate_proj.weight", wide, hidden),
            weights.take(f"{path}.up_proj.weight", wide, hidden),
        )
        down = pack(weights.take(f"{path}.down_proj.weight", hidden, wide))
        return DenseMLP(AdaptedLinear(gate_up, site, (wide, wide)), AdaptedLinear(down, site + 2, (hidden,)))

    return build_decoder(config, weights, max_positions, SITES_PER_LAYER, mlp)
