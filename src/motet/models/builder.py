"""Building the parts of a decoder from a checkpoint; an architecture's file says which parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from motet.kernels.activation import SILU
from motet.kernels.attention import Heads
from motet.layers.attention import Attention
from motet.layers.batch import AttentionForm, ExpertSet, HeadNorms, KVPlace, LinearMap
from motet.layers.decoder import Decoder, DecoderLayer
from motet.layers.latent import LatentAttention
from motet.layers.mlp import DenseMLP, SparseMLP
from motet.layers.rotary import Rotary
from motet.models.common import Geometry
from motet.models.config import ModelConfig
from motet.models.weights import Weights
from motet.types import KVGroup, ModelSpec


class Builder:
    """Takes weights by name and makes layers of them."""

    def __init__(self, config: ModelConfig, spec: ModelSpec, weights: Weights) -> None:
        self.config = config
        self.spec = spec
        self.weights = weights
        self.device = weights.device
        self._rotaries: dict[int, tuple[Rotary, Rotary]] = {}
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
    ) -> LinearMap:  # fmt: skip
        """Projections of one input side by side: weights (and biases) `names[i].weight` [widths[i], inputs]."""
        take = self.weights.take
        weights = [take(f"{n}.weight", w, inputs) for n, w in zip(names, widths, strict=True)]
        biases = [take(f"{n}.bias", w) for n, w in zip(names, widths, strict=True)] if bias else []
        return LinearMap(
            self.device.matrix(weights[0] if len(weights) == 1 else torch.cat(weights)),
            self.site(layer, modules[0]),
            tuple(widths),
            torch.cat(biases) if biases else None,
        )

    def rotary(self, table: Rotary) -> Rotary:
        """A rotation table on the device, once however many layers share it."""
        if id(table) not in self._rotaries:
            vector = self.device.vector
            moved = Rotary(vector(table.cos), vector(table.sin), table.interleaved)
            self._rotaries[id(table)] = table, moved  # the table itself is kept, or its id might return
        return self._rotaries[id(table)][1]

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
        form = AttentionForm(
            self.rotary(rotary),
            self.place(layer),
            Heads(g.heads, g.head_dim**-0.5, self.reach(layer), sinks),
            norms,
            temperature,
        )
        return Attention(
            self.linear(layer, "qkv", names, g.hidden, (q, kv, kv), bias),
            self.linear(layer, "o", [f"{path}.o_proj"], q, (g.hidden,), bias),
            form,
        )

    def head_norms(self, layer: int) -> HeadNorms:
        """RMSNorm of every q and k head."""
        vector, path, dim = self.weights.vector, f"model.layers.{layer}.self_attn", self.geometry.head_dim
        q, k = (vector(f"{path}.{name}_norm.weight", dim) for name in "qk")
        return HeadNorms(q, k, self.config.rms_norm_eps)

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

    def router(self, layer: int, name: str, num_experts: int, bias: bool = False) -> LinearMap:
        """The map to expert scores, `name.weight`."""
        return self.linear(layer, ("router",), [name], self.geometry.hidden, (num_experts,), bias)

    def experts(self, names: Sequence[Sequence[str]], wide: int) -> ExpertSet:
        """Experts stored one by one; `names` are each one's gate, up and down weights, `wide` their inner size."""
        hidden, take = self.geometry.hidden, self.weights.take

        def gate_up() -> Iterator[Tensor]:
            for gate, up, _ in names:
                yield torch.cat([take(gate, wide, hidden), take(up, wide, hidden)])

        return self.device.experts(gate_up(), (take(down, hidden, wide) for _, _, down in names), SILU)

    def fused_experts(self, path: str, count: int, wide: int, transposed: bool = False) -> ExpertSet:
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
        return self.device.experts(gate_up, down, SILU)

    def decoder(
        self,
        attention: Callable[[int], Attention | LatentAttention],
        mlp: Callable[[int], DenseMLP | SparseMLP],
    ) -> Decoder:
        """All layers, with the parts that the functions make for each, between embedding and output matrix."""
        config, weights, hidden = self.config, self.weights, self.geometry.hidden
        layers = [
            DecoderLayer(
                attention_norm=weights.vector(f"model.layers.{layer}.input_layernorm.weight", hidden),
                attention=attention(layer),
                mlp_norm=weights.vector(f"model.layers.{layer}.post_attention_layernorm.weight", hidden),
                mlp=mlp(layer),
            )
            for layer in range(config.num_hidden_layers)
        ]
        tied = config.tie_word_embeddings and "lm_head.weight" not in weights
        head_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        head = self.device.matrix(weights.take(head_name, config.vocab_size, hidden))
        embedding = weights.table("model.embed_tokens.weight", config.vocab_size, hidden)
        return Decoder(
            embedding,
            self.site(-1, "embed"),
            layers,
            weights.vector("model.norm.weight", hidden),
            LinearMap(head, self.site(config.num_hidden_layers, "head"), (config.vocab_size,)),
            config.rms_norm_eps,
        )
