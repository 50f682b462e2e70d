"""Llama: the dense decoder (Llama 2 and 3, SmolLM2; Mistral and Ministral, which differ in nothing but windows)."""

from __future__ import annotations

from motet.layers.decoder import Decoder
from motet.models.builder import Builder
from motet.models.common import (
    Geometry,
    attention_sites,
    common_spec,
    dense_mlp_sites,
    refuse_options,
    refuse_unknown_options,
    rotary,
)
from motet.models.config import ModelConfig
from motet.models.weights import Weights
from motet.types import ModelSpec


def spec(config: ModelConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a Llama or Mistral config."""
    refuse_options(config, {"hidden_act": "silu"})
    refuse_unknown_options(config)
    geometry = Geometry.of(config)
    sites = [
        site
        for layer in range(config.num_hidden_layers)
        for site in (*attention_sites(geometry, layer), *dense_mlp_sites(config, layer))
    ]
    return common_spec(config, name, digest, sites)


def build(config: ModelConfig, spec: ModelSpec, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed."""
    builder, table = Builder(config, spec, weights), rotary(config, max_positions)
    attention_bias = getattr(config, "attention_bias", False)
    mlp_bias = getattr(config, "mlp_bias", False)
    return builder.decoder(
        lambda layer: builder.attention(layer, table, bias=attention_bias),
        lambda layer: builder.dense_mlp(layer, bias=mlp_bias),
    )
