"""What the Llama family has in common: geometry, sites, the parts of a layer, and the refusal of unknown options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from motet.errors import ModelRefused
from motet.kernels.linear import PackedWeight
from motet.layers.attention import Attention, HeadNorms
from motet.layers.decoder import Decoder, DecoderLayer
from motet.layers.linear import AdaptedLinear
from motet.layers.mlp import DenseMLP, SparseMLP
from motet.layers.rotary import Rotary, rotary_table
from motet.models.weights import Weights
from motet.types import FusedExperts, ModelSpec, Site


@dataclass(frozen=True)
class Geometry:
    """Head counts and sizes of grouped-query attention."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(config: PretrainedConfig) -> Geometry:
        """From a Hugging Face config; head_dim defaults to hidden / heads."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Geometry(config.hidden_size, heads, config.num_key_value_heads, head_dim)


def refuse_options(config: PretrainedConfig, supported: Mapping[str, object]) -> None:
    """Refuse by name every listed option whose value is not the supported one."""
    for option, value in supported.items():
        found = getattr(config, option, value)
        if found != value:
            raise ModelRefused(
                f"{option} = {found!r} is not supported for {config.model_type}, only {value!r} is"
            )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelRefused(f"quantised weights are not supported for {config.model_type}")


def attention_sites(g: Geometry, layer: int) -> list[Site]:
    """The four attention projections of a layer."""
    path = f"model.layers.{layer}.self_attn"
    return [
        Site(layer, "q", -1, g.hidden, g.heads * g.head_dim, (f"{path}.q_proj",)),
        Site(layer, "k", -1, g.hidden, g.kv_heads * g.head_dim, (f"{path}.k_proj",)),
        Site(layer, "v", -1, g.hidden, g.kv_heads * g.head_dim, (f"{path}.v_proj",)),
        Site(layer, "o", -1, g.heads * g.head_dim, g.hidden, (f"{path}.o_proj",)),
    ]


def mlp_sites(
    layer: int, hidden: int, wide: int, paths: Sequence[Sequence[str]], expert: int = -1
) -> list[Site]:
    """gate, up and down of one MLP or expert; `paths` are the names of each of the three."""
    gate, up, down = (tuple(names) for names in paths)
    return [
        Site(layer, "gate", expert, hidden, wide, gate),
        Site(layer, "up", expert, hidden, wide, up),
        Site(layer, "down", expert, wide, hidden, down),
    ]


def dense_mlp_sites(config: PretrainedConfig, layer: int) -> list[Site]:
    """The three projections of Llama's MLP."""
    names = [[f"model.layers.{layer}.mlp.{name}_proj"] for name in ("gate", "up", "down")]
    return mlp_sites(layer, config.hidden_size, config.intermediate_size, names)


def common_spec(
    config: PretrainedConfig,
    name: str,
    digest: str,
    sites: Sequence[Site],
    fused: Sequence[FusedExperts] = (),
    num_experts: int = 0,
) -> ModelSpec:
    """The ModelSpec of a Llama-like config."""
    geometry = Geometry.of(config)
    eos = config.eos_token_id
    return ModelSpec(
        architecture=config.model_type,
        name=name,
        digest=digest,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=geometry.heads,
        num_kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        num_experts=num_experts,
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        sites=tuple(sites),
        fused=tuple(fused),
    )


def pack(*weights: Tensor) -> PackedWeight:
    """Weights that read the same input, stacked along their outputs and packed."""
    return PackedWeight(weights[0] if len(weights) == 1 else torch.cat(weights))


def rotary(config: PretrainedConfig, max_positions: int) -> Rotary:
    """The rotation table of a config's rope parameters."""
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        dim = Geometry.of(config).head_dim
        inverse = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        return rotary_table(inverse, max_positions, 1.0)
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelRefused(f"rope_type {kind!r} is not supported")
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return rotary_table(inverse, max_positions, scale)


class Builder:
    """Builds the parts of a Llama-like decoder from a checkpoint; an architecture's file says which parts."""

    def __init__(
        self, config: PretrainedConfig, spec: ModelSpec, weights: Weights, max_positions: int
    ) -> None:
        self.config = config
        self.weights = weights
        self.geometry = Geometry.of(config)
        self._rotary = rotary(config, max_positions)
        self._index = {(site.layer, site.module, site.expert): i for i, site in enumerate(spec.sites)}

    def site(self, layer: int, module: str, expert: int = -1) -> int:
        """A site's index in the adapter table."""
        return self._index[layer, module, expert]

    def attention(self, layer: int, head_norms: bool = False) -> Attention:
        """Self-attention; with `head_norms`, q and k are normalised per head before the rotation."""
        g, take, path = self.geometry, self.weights.take, f"model.layers.{layer}.self_attn"
        q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
        qkv = pack(
            take(f"{path}.q_proj.weight", q, g.hidden),
            take(f"{path}.k_proj.weight", kv, g.hidden),
            take(f"{path}.v_proj.weight", kv, g.hidden),
        )
        out = pack(take(f"{path}.o_proj.weight", g.hidden, q))
        norms = None
        if head_norms:
            norms = HeadNorms(
                take(f"{path}.q_norm.weight", g.head_dim),
                take(f"{path}.k_norm.weight", g.head_dim),
                self.config.rms_norm_eps,
            )
        return Attention(
            AdaptedLinear(qkv, self.site(layer, "q"), (q, kv, kv)),
            AdaptedLinear(out, self.site(layer, "o"), (g.hidden,)),
            self._rotary,
            layer,
            g.heads,
            norms,
        )

    def dense_mlp(self, layer: int) -> DenseMLP:
        """Llama's MLP."""
        wide, hidden = self.config.intermediate_size, self.config.hidden_size
        take, path = self.weights.take, f"model.layers.{layer}.mlp"
        gate_up = pack(
            take(f"{path}.gate_proj.weight", wide, hidden), take(f"{path}.up_proj.weight", wide, hidden)
        )
        down = pack(take(f"{path}.down_proj.weight", hidden, wide))
        return DenseMLP(
            AdaptedLinear(gate_up, self.site(layer, "gate"), (wide, wide)),
            AdaptedLinear(down, self.site(layer, "down"), (hidden,)),
        )

    def sparse_mlp(
        self, layer: int, router: str, names: Sequence[Sequence[str]], wide: int, normalise: bool
    ) -> SparseMLP:
        """A mixture of experts; `names` are each expert's gate, up and down weights, `wide` their inner size."""
        hidden, take = self.config.hidden_size, self.weights.take
        gate_up, down = [], []
        for gate_name, up_name, down_name in names:
            gate_up.append(pack(take(gate_name, wide, hidden), take(up_name, wide, hidden)))
            down.append(pack(take(down_name, hidden, wide)))
        return SparseMLP(
            pack(take(router, len(names), hidden)),
            gate_up,
            down,
            self.config.num_experts_per_tok,
            self.site(layer, "gate", 0),
            normalise,
        )

    def decoder(
        self, mlp: Callable[[int], DenseMLP | SparseMLP], attention: Callable[[int], Attention] | None = None
    ) -> Decoder:
        """All layers, with the feed-forward of `mlp(layer)`, between embedding and output matrix."""
        config, weights, hidden = self.config, self.weights, self.geometry.hidden
        attend = attention or self.attention
        layers = [
            DecoderLayer(
                attention_norm=weights.take(f"model.layers.{layer}.input_layernorm.weight", hidden),
                attention=attend(layer),
                mlp_norm=weights.take(f"model.layers.{layer}.post_attention_layernorm.weight", hidden),
                mlp=mlp(layer),
            )
            for layer in range(config.num_hidden_layers)
        ]
        tied = config.tie_word_embeddings and "lm_head.weight" not in weights
        head_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        head = pack(weights.take(head_name, config.vocab_size, hidden))
        embedding = weights.table("model.embed_tokens.weight", config.vocab_size, hidden)
        norm = weights.take("model.norm.weight", hidden)
        return Decoder(embedding, layers, norm, head, config.rms_norm_eps)
