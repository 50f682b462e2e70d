"""DeepSeek V2 and V3: latent attention, and experts of which some are shared by all tokens.

The first `first_k_dense_replace` layers have a dense MLP. V2 scores experts by softmax, V3 by sigmoid and chooses them
with a bias (`e_score_correction_bias`). V3's layers for predicting more than one token at once are left on disk.
"""

from __future__ import annotations

from motet.errors import ModelRefused
from motet.kernels.route import RoutingRule
from motet.layers.decoder import Decoder
from motet.layers.mlp import DenseMLP, SparseMLP
from motet.models.builder import Builder
from motet.models.common import (
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
from motet.models.latent import latent_attention, latent_attention_sites, with_latent_cache
from motet.models.weights import Weights
from motet.types import FusedExperts, ModelSpec, Site


def spec(config: ModelConfig, name: str, digest: str) -> ModelSpec:
    """Shapes and adapter sites of a DeepSeek V2 or V3 config."""
    _refuse(config)
    count = config.n_routed_experts
    sites: list[Site] = []
    fused = []
    for layer in range(config.num_hidden_layers):
        sites += latent_attention_sites(config, layer)
        if layer < config.first_k_dense_replace:
            sites += dense_mlp_sites(config, layer)
        else:
            sites += _moe_sites(config, layer, f"model.layers.{layer}.mlp")
            fused.append(FusedExperts(f"model.layers.{layer}.mlp.experts", layer, count))
    return with_latent_cache(common_spec(config, name, digest, sites, fused, num_experts=count), config)


def _refuse(config: ModelConfig) -> None:
    is_v3 = config.model_type == "deepseek_v3"
    v3_only = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    # DeepSeek's own code normalises instead of scaling if V2 asks for it, transformers does not normalise.
    v2_only = {"scoring_func": "softmax", "norm_topk_prob": False, "rope_interleave": True}
    options = {
        "hidden_act": "silu",
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.qk_rope_head_dim,
        "moe_layer_freq": 1,
        **({} if config.q_lora_rank else {"attention_bias": False}),
        **(v3_only if is_v3 else v2_only),
    }
    refuse_options(config, options)
    refuse_unknown_options(config, harmless=(*options, "num_nextn_predict_layers"))
    numbers = {
        name: getattr(config, name)
        for name in ("n_shared_experts", "n_routed_experts", "num_experts_per_tok")
    }
    for name, value in numbers.items():
        if not value:
            raise ModelRefused(f"{name} = {value} is not supported for {config.model_type}")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelRefused(
            f"partial_rotary_factor is not supported for {config.model_type}, only qk_rope_head_dim is"
        )
    if not is_v3 and config.topk_method not in ("greedy", "group_limited_greedy"):
        raise ModelRefused(f"topk_method = {config.topk_method!r} is not supported for {config.model_type}")
    if is_v3 or config.topk_method != "greedy":
        _refuse_groups(config)


def _refuse_groups(config: ModelConfig) -> None:
    """Groups must be equal, hold the two experts that score V3's, and leave enough experts to choose from."""
    count, groups, kept = config.n_routed_experts, config.n_group, config.topk_group
    each = count // groups if groups and count % groups == 0 else 0
    if not kept or each < 2 or kept > groups or config.num_experts_per_tok > kept * each:
        raise ModelRefused(
            f"n_group = {groups} and topk_group = {kept} do not fit {count} experts of which "
            f"{config.num_experts_per_tok} are chosen"
        )


def _moe_sites(config: ModelConfig, layer: int, path: str) -> list[Site]:
    hidden, wide, count = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    shared = wide * config.n_shared_experts
    return [
        router_site(config, layer, count, f"{path}.gate"),
        *mlp_sites(layer, hidden, shared, projections(f"{path}.shared_experts"), prefix="shared_"),
        *(
            site
            for expert in range(count)
            for site in mlp_sites(layer, hidden, wide, projections(f"{path}.experts.{expert}"), expert)
        ),
    ]


def build(config: ModelConfig, spec: ModelSpec, weights: Weights, max_positions: int) -> Decoder:
    """The model with its weights packed."""
    layers, further = config.num_hidden_layers, getattr(config, "num_mtp_layers", None) or 0
    weights.narrow("", skipped=tuple(f"model.layers.{layer}." for layer in range(layers, layers + further)))
    builder = Builder(config, spec, weights)
    interleaved = getattr(config, "rope_interleave", True)
    table = rotary(config, max_positions, config.qk_rope_head_dim, interleaved)
    return builder.decoder(
        lambda layer: latent_attention(builder, layer, table), lambda layer: _mlp(builder, layer)
    )


def _mlp(builder: Builder, layer: int) -> DenseMLP | SparseMLP:
    config, weights, path = builder.config, builder.weights, f"model.layers.{layer}.mlp"
    bias = getattr(config, "mlp_bias", False)
    if layer < config.first_k_dense_replace:
        return builder.dense_mlp(layer, bias=bias)
    count, wide = config.n_routed_experts, config.moe_intermediate_size
    if f"{path}.experts.gate_up_proj" in weights:
        experts = builder.fused_experts(f"{path}.experts", count, wide)
    else:
        names = [[f"{name}.weight" for (name,) in projections(f"{path}.experts.{e}")] for e in range(count)]
        experts = builder.experts(names, wide)
    return SparseMLP(
        builder.router(layer, f"{path}.gate", count),
        _rule(config, weights, f"{path}.gate"),
        experts,
        builder.site(layer, "gate", 0),
        builder.dense_mlp(
            layer, f"{path}.shared_experts", wide * config.n_shared_experts, prefix="shared_", bias=bias
        ),
    )


def _rule(config: ModelConfig, weights: Weights, path: str) -> RoutingRule:
    chosen, scale = config.num_experts_per_tok, config.routed_scaling_factor
    if config.model_type == "deepseek_v3":
        bias = weights.vector(f"{path}.e_score_correction_bias", config.n_routed_experts)
        return RoutingRule(
            chosen, config.norm_topk_prob, "sigmoid", config.n_group, config.topk_group, "top2", bias, scale
        )
    if config.topk_method == "greedy":
        return RoutingRule(chosen, scale=scale)
    return RoutingRule(chosen, groups=config.n_group, top_groups=config.topk_group, scale=scale)
