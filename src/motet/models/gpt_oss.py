"""gpt-oss: attention with sinks, every other layer through a sliding window, and experts that may be in four bits.

A checkpoint has each layer's experts in tensors of their own format, gate and up outputs interleaved:
    MXFP4        gate_up_proj_blocks [E, 2I, H/32, 16], _scales [E, 2I, H/32], down_proj likewise [E, H, I/32, …]
    plain        gate_up_proj [E, H, 2I], down_proj [E, I, H]
They are kept as they are stored (MXFP4 in `kernels.mxfp4`), the outputs sorted into a gate half and an up half.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from motet.errors import ModelRefused
from motet.kernels.activation import Activation
from motet.kernels.mxfp4 import BLOCK
from motet.kernels.route import RoutingRule
from motet.layers.attention import Attention
from motet.layers.batch import ExpertSet, FourBit
from motet.layers.decoder import Decoder
from motet.layers.mlp import SparseMLP
from motet.models.builder import Builder
from motet.models.common import (
    Geometry,
    attention_sites,
    common_spec,
    mlp_sites,
    projections,
    refuse_options,
    rotary,
    router_site,
)
from motet.models.config import ModelConfig
from motet.models.weights import Weights
from motet.types import FusedExperts, ModelSpec, Site

MXFP4_OPTIONS = {"quant_method", "modules_to_not_convert", "dequantize"}
"""Of a quantization_config; which tensors are in four bits is told by their names."""


def spec(config: ModelConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a gpt-oss config."""
    _refuse(config)
    geometry, count = Geometry.of(config), config.num_local_experts
    sites: list[Site] = []
    fused = []
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}.mlp"
        sites += attention_sites(geometry, layer)
        sites.append(router_site(config, layer, count, f"{path}.router", f"{path}.router.linear"))
        for expert in range(count):
            names = projections(f"{path}.experts.{expert}")
            sites += mlp_sites(layer, config.hidden_size, config.intermediate_size, names, expert)
        fused.append(FusedExperts(f"{path}.experts", layer, count, transposed=True, interleaved=True))
    return common_spec(config, name, digest, sites, fused, num_experts=count)


def _refuse(config: ModelConfig) -> None:
    quantisation = getattr(config, "quantization_config", None)
    refuse_options(config, {"hidden_act": "silu", "quantization_config": quantisation})
    if quantisation is not None:
        _refuse_quantisation(quantisation)
    rope, kinds = config.rope_parameters, set(config.layer_types)
    if "rope_type" not in rope:
        raise ModelRefused(f"rope_parameters {sorted(rope)} without rope_type are not supported for gpt_oss")
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise ModelRefused(f"partial_rotary_factor = {factor} is not supported for gpt_oss")
    for kind in kinds - {"full_attention", "sliding_attention"}:
        raise ModelRefused(f"layer type {kind!r} is not supported for gpt_oss")
    if "sliding_attention" in kinds and not config.sliding_window:
        raise ModelRefused(f"sliding_window = {config.sliding_window} is not supported with sliding layers")


def _refuse_quantisation(options: dict[str, object]) -> None:
    method = options.get("quant_method")
    if method != "mxfp4":
        raise ModelRefused(f"quant_method {method!r} is not supported for gpt_oss, only 'mxfp4' is")
    unknown = sorted(options.keys() - MXFP4_OPTIONS)
    if unknown:
        raise ModelRefused(f"quantization_config has {unknown[0]}, which is not supported for gpt_oss")


def build(config: ModelConfig, spec: ModelSpec, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed or, in four bits, as they are."""
    builder, table = Builder(config, spec, weights), rotary(config, max_positions)
    rule = RoutingRule(config.num_experts_per_tok, normalise=True)

    def attention(layer: int) -> Attention:
        sinks = weights.vector(f"model.layers.{layer}.self_attn.sinks", config.num_attention_heads)
        return builder.attention(layer, table, bias=config.attention_bias, sinks=sinks)

    def mlp(layer: int) -> SparseMLP:
        path = f"model.layers.{layer}.mlp"
        router = builder.router(layer, f"{path}.router", config.num_local_experts, bias=True)
        return SparseMLP(router, rule, _experts(config, weights, path), builder.site(layer, "gate", 0))

    return builder.decoder(attention, mlp)


def _experts(config: ModelConfig, weights: Weights, path: str) -> ExpertSet:
    count, hidden, wide = config.num_local_experts, config.hidden_size, config.intermediate_size
    gate_up, down = f"{path}.experts.gate_up_proj", f"{path}.experts.down_proj"
    halves = torch.cat([torch.arange(0, 2 * wide, 2), torch.arange(1, 2 * wide, 2)])
    # older versions of transformers have the defaults as constants and not as options
    activation = Activation(getattr(config, "swiglu_limit", 7.0), getattr(config, "swiglu_alpha", 1.702))
    return weights.device.experts(
        _matrices(weights, gate_up, count, halves, hidden),
        _matrices(weights, down, count, torch.arange(hidden), wide),
        activation,
        weights.take(f"{gate_up}_bias", count, 2 * wide)[:, halves].contiguous(),
        weights.take(f"{down}_bias", count, hidden),
    )


def _matrices(
    weights: Weights, name: str, count: int, order: Tensor, inputs: int
) -> Iterable[Tensor] | FourBit:
    """Every expert's matrix [outputs, inputs], its outputs in this order."""
    outputs = len(order)
    if f"{name}_scales" not in weights:
        # transformers 5.23 saves experts that it has dequantised under the name of their blocks
        plain = name if name in weights else f"{name}_blocks"
        return (matrix.T[order] for matrix in weights.take(plain, count, inputs, outputs))
    if inputs % BLOCK:
        raise ModelRefused(f"{name} has {inputs} inputs; MXFP4 needs a multiple of {BLOCK}")
    codes = weights.take_bytes(f"{name}_blocks", count, outputs, inputs // BLOCK, BLOCK // 2).flatten(2)
    scales = weights.take_bytes(f"{name}_scales", count, outputs, inputs // BLOCK)
    if bool((scales == 255).any()):
        raise ModelRefused(f"{name}_scales holds 255, which is not a number")
    return FourBit(codes[:, order], scales[:, order])
