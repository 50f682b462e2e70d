"""Building the parts of a decoder from a checkpoint; an architecture's file says which parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from motet.kernels.attention import Heads
from motet.kernels.linear import PackedWeight
from motet.kernels.moe import Experts
from motet.layers.attention import Attention, HeadNorms, KVPlace
from motet.layers.decoder import Decoder, DecoderLayer
from motet.layers.latent import LatentAttention
from motet.layers.linear import AdaptedLinear
from motet.layers.mlp import DenseMLP, SparseMLP
from motet.layers.rotary import Rotary
from motet.models.common import Geometry
from motet.models.weights import Weights
from motet.types import KVGroup, ModelSpec


def pack(*weights: Tensor) -> PackedWeight:
    """Weights that read the same input, stacked along their outputs and packed."""
    return PackedWeight(weights[0] if len(weights) == 1 else torch.cat(weights))


class Builder:
    """Takes weights by name and makes layers of them."""

    def __init__(self, config: PretrainedConfig, spec: ModelSpec, weights: Weights) -> None:
        self.config = config
        self.spec = spec
        self.weights = weights
        self.geometry = Geometry.of(config)
        self._index = {(site.layer, site.module, site.expert): i for i, site in enumerate(spec.sites)}
        self._places = {
            layer: KVPlace(number, index)
            for number, group in enumerate(spec.kv_groups)
            for index, layer in enumerate(group.layers)
        }

    def site(self, layer: int, module: str, expert: int = -1) -> int:
        """A site's index in the adapter table."""
        return self._index[layer, module, expert]

    def place(self, layer: int) -> KVPlace:
        """Where a layer's KV lives."""
        return self._places[layer]

    def reach(self, layer: int) -> KVGroup:
        """How far a layer sees."""
        return self.spec.kv_groups[self._places[layer].group]

    def linear(
        self, layer: int, modules: Sequence[str], names: Sequence[str], inputs: int, widths: Sequence[int],
        bias: bool = False,
    ) -> AdaptedLinear:  # fmt: skip
        """Projections of one input side by side: weights (and biases) `names[i].weight` [widths[i], inputs]."""
        take = self.weights.take
        weight = pack(*(take(f"{n}.weight", w, inputs) for n, w in zip(names, widths, strict=True)))
        biases = [take(f"{n}.bias", w) for n, w in zip(names, widths, strict=True)] if bias else None
        return AdaptedLinear(
            weight, self.site(layer, modules[0]), widths, torch.cat(biases) if biases is not None else None
        )

    def attention(
        self,
        layer: int,
        rotary: Rotary,
        *,
        bias: bool = False,
        norms: HeadNorms | None = None,
        sinks: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Attention:
        """Grouped-query self-attention; `bias` says that its projections have biases."""
        g, path = self.geometry, f"model.layers.{layer}.self_attn"
        q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
        names = [f"{path}.{name}_proj" for name in "qkv"]
        return Attention(
            self.linear(layer, "qkv", names, g.hidden, (q, kv, kv), bias),
            self.linear(layer, "o", [f"{path}.o_proj"], q, (g.hidden,), bias),
            rotary,
            self.place(layer),
            Heads(g.heads, g.head_dim**-0.5, self.reach(layer), sinks),
            norms,
            temperature,
        )

    def head_norms(self, layer: int) -> HeadNorms:
        """RMSNorm of every q and k head."""
        take, path, dim = self.weights.take, f"model.layers.{layer}.self_attn", self.geometry.head_dim
        return HeadNorms(
            take(f"{path}.q_norm.weight", dim), take(f"{path}.k_norm.weight", dim), self.config.rms_norm_eps
        )

    def dense_mlp(
        self, layer: int, path: str = "", wide: int = 0, prefix: str = "", bias: bool = False
    ) -> DenseMLP:
        """Llama's MLP, or a shared expert under another path (`prefix` "shared_" of its sites' modules)."""
        path, wide = path or f"model.layers.{layer}.mlp", wide or self.config.intermediate_size
        hidden = self.geometry.hidden
        gate, up, down = (f"{prefix}{module}" for module in ("gate", "up", "down"))
        names = [f"{path}.gate_proj", f"{path}.up_proj"]
        return DenseMLP(
            self.linear(layer, (gate, up), names, hidden, (wide, wide), bias),
            self.linear(layer, (down,), [f"{path}.down_proj"], wide, (hidden,), bias),
        )

    def router(self, layer: int, name: str, num_experts: int, bias: bool = False) -> AdaptedLinear:
        """The map to expert scores, `name.weight`."""
        return self.linear(layer, ("router",), [name], self.geometry.hidden, (num_experts,), bias)

    def experts(self, names: Sequence[Sequence[str]], wide: int) -> Experts:
        """Experts stored one by one; `names` are each one's gate, up and down weights, `wide` their inner size."""
        hidden, take = self.geometry.hidden, self.weights.take
        gate_up, down = [], []
        for gate_name, up_name, down_name in names:
            gate_up.append(pack(take(gate_name, wide, hidden), take(up_name, wide, hidden)))
            down.append(pack(take(down_name, hidden, wide)))
        return Experts(gate_up, down)

    def fused_experts(self, path: str, count: int, wide: int, transposed: bool = False) -> Experts:
        """Experts stored as `path.gate_up_proj` [E, 2I, H], gate over up, and `path.down_proj` [E, H, I].

        With `transposed` they are [E, H, 2I] and [E, I, H].
        """
        hidden = self.geometry.hidden
        gate_up, down = (
            self.weights.take(f"{path}.{name}", count, *(shape[::-1] if transposed else shape))
            for name, shape in (("gate_up_proj", (2 * wide, hidden)), ("down_proj", (hidden, wide)))
        )
        if transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        return Experts([pack(one) for one in gate_up], [pack(one) for one in down])

    def decoder(
        self,
        attention: Callable[[int], Attention | LatentAttention],
        mlp: Callable[[int], DenseMLP | SparseMLP],
    ) -> Decoder:
        """All layers, with the parts that the functions make for each, between embedding and output matrix."""
        config, weights, hidden = self.config, self.weights, self.geometry.hidden
        layers = [
            DecoderLayer(
                attention_norm=weights.take(f"model.layers.{layer}.input_layernorm.weight", hidden),
                attention=attention(layer),
                mlp_norm=weights.take(f"model.layers.{layer}.post_attention_layernorm.weight", hidden),
                mlp=mlp(layer),
            )
            for layer in range(config.num_hidden_layers)
        ]
        tied = config.tie_word_embeddings and "lm_head.weight" not in weights
        head_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        head = pack(weights.take(head_name, config.vocab_size, hidden))
        embedding = weights.table("model.embed_tokens.weight", config.vocab_size, hidden)
        return Decoder(
            embedding,
            self.site(-1, "embed"),
            layers,
            weights.take("model.norm.weight", hidden),
            AdaptedLinear(head, self.site(config.num_hidden_layers, "head"), (config.vocab_size,)),
            config.rms_norm_eps,
        )
