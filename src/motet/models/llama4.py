"""Llama 4's text model: layers that rotate and see a chunk of positions, between layers that see all and do not.

Of a checkpoint that also sees images, the text part is served and the rest is left on disk.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from motet.errors import ModelRefused
from motet.kernels.route import RoutingRule
from motet.layers.attention import Attention
from motet.layers.batch import HeadNorms
from motet.layers.decoder import Decoder
from motet.layers.mlp import DenseMLP, SparseMLP
from motet.layers.rotary import Rotary
from motet.models.builder import Builder
from motet.models.common import (
    Geometry,
    attention_sites,
    common_spec,
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

TEXT = "language_model."
"""Where a model that also sees images keeps its text part: in its checkpoint, and in adapters of it."""
VISION = ("vision_model.", "multi_modal_projector.")


def spec(config: ModelConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a Llama 4 config, or of the text part of one that also sees images."""
    refuse_options(config, {})
    config = _text(config)
    refuse_options(config, {"hidden_act": "silu"})
    refuse_unknown_options(config)
    if config.use_qk_norm and config.rope_parameters["rope_type"] == "yarn":
        # q and k are normalised after their rotation. A rotation keeps a head's norm, so before is the same, but YaRN
        # also scales.
        raise ModelRefused("rope_type 'yarn' is not supported for llama4_text with use_qk_norm")
    sites: list[Site] = []
    fused = []
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}.feed_forward"
        sites += attention_sites(Geometry.of(config), layer)
        if layer in config.moe_layers:
            sites += _moe_sites(config, layer, path)
            fused.append(FusedExperts(f"{path}.experts", layer, config.num_local_experts, transposed=True))
        else:
            sites += mlp_sites(layer, config.hidden_size, config.intermediate_size_mlp, projections(path))
    found = common_spec(config, name, digest, sites, fused, config.num_local_experts)
    return _known_below(found, TEXT)


def _text(config: ModelConfig) -> ModelConfig:
    text: ModelConfig = getattr(config, "text_config", config)
    return text


def _moe_sites(config: ModelConfig, layer: int, path: str) -> list[Site]:
    hidden, wide = config.hidden_size, config.intermediate_size
    experts = [
        site
        for expert in range(config.num_local_experts)
        for site in mlp_sites(layer, hidden, wide, projections(f"{path}.experts.{expert}"), expert)
    ]
    shared = mlp_sites(layer, hidden, wide, projections(f"{path}.shared_expert"), prefix="shared_")
    return [router_site(config, layer, config.num_local_experts, f"{path}.router"), *shared, *experts]


def _known_below(spec: ModelSpec, prefix: str) -> ModelSpec:
    """The spec with every adapter path known with `prefix` before it too."""
    replace = msgspec.structs.replace
    sites = (replace(s, paths=(*s.paths, *(prefix + path for path in s.paths))) for s in spec.sites)
    fused = (one for f in spec.fused for one in (f, replace(f, path=prefix + f.path)))
    return replace(spec, sites=tuple(sites), fused=tuple(fused))


def build(config: ModelConfig, spec: ModelSpec, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed."""
    if hasattr(config, "text_config"):
        weights.narrow(TEXT, skipped=VISION)
    config = _text(config)
    builder, rotating = Builder(config, spec, weights), rotary(config, max_positions, interleaved=True)
    still = Rotary(torch.ones_like(rotating.cos), torch.zeros_like(rotating.sin))
    one = builder.device.vector(torch.ones(builder.geometry.head_dim))
    norms = HeadNorms(one, one, config.rms_norm_eps) if config.use_qk_norm else None
    temperature = None
    if config.attn_temperature_tuning:
        temperature = builder.device.vector(_temperature(config, max_positions))
    rule = RoutingRule(config.num_experts_per_tok, scoring="sigmoid", on_input=True)

    def attention(layer: int) -> Attention:
        bias = config.attention_bias
        if config.no_rope_layers[layer]:  # 1 means that the layer rotates
            return builder.attention(layer, rotating, bias=bias, norms=norms)
        return builder.attention(layer, still, bias=bias, temperature=temperature)

    def mlp(layer: int) -> DenseMLP | SparseMLP:
        path, count = f"model.layers.{layer}.feed_forward", config.num_local_experts
        if layer not in config.moe_layers:
            return builder.dense_mlp(layer, path, config.intermediate_size_mlp)
        return SparseMLP(
            builder.router(layer, f"{path}.router", count),
            rule,
            builder.fused_experts(f"{path}.experts", count, config.intermediate_size, transposed=True),
            builder.site(layer, "gate", 0),
            builder.dense_mlp(layer, f"{path}.shared_expert", config.intermediate_size, prefix="shared_"),
        )

    return builder.decoder(attention, mlp)


def _temperature(config: ModelConfig, max_positions: int) -> Tensor:
    """What multiplies a query that sees everything, by position: it grows by steps of `floor_scale` positions.

    [max positions] float32; Nakanishi, "Scalable-Softmax Is Superior for Attention" (2025).
    """
    steps = torch.floor((torch.arange(max_positions) + 1.0) / config.floor_scale)
    return torch.log1p(steps).mul(config.attn_scale).add(1.0)
