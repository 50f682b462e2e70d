"""Llama: the dense decoder (Llama 2 and 3, SmolLM2, and Mistral, which differs in nothing but a window)."""

from __future__ import annotations

from transformers import PretrainedConfig

from motet.layers.decoder import Decoder
from motet.models.common import (
    Builder,
    Geometry,
    attention_sites,
    common_spec,
    dense_mlp_sites,
    refuse_options,
)
from motet.models.weights import Weights
from motet.types import ModelSpec


def spec(config: PretrainedConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a Llama config."""
    refuse_options(
        config, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}
    )
    geometry = Geometry.of(config)
    sites = [
        site
        for layer in range(config.num_hidden_layers)
        for site in (*attention_sites(geometry, layer), *dense_mlp_sites(config, layer))
    ]
    return common_spec(config, name, digest, sites)


def build(config: PretrainedConfig, spec: ModelSpec, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed."""
    builder = Builder(config, spec, weights, max_positions)
    return builder.decoder(builder.dense_mlp)
