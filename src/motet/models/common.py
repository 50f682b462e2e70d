"""What the decoder families have in common: geometry, sites, KV groups, and the refusal of unknown options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch

from motet.errors import ModelRefused
from motet.layers.rotary import Rotary, rotary_table
from motet.models.config import ModelConfig
from motet.types import FULL, FusedExperts, KVGroup, ModelSpec, Site


@dataclass(frozen=True)
class Geometry:
    """Head counts and sizes of grouped-query attention."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(config: ModelConfig) -> Geometry:
        """From a Hugging Face config; head_dim defaults to hidden / heads."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Geometry(config.hidden_size, heads, config.num_key_value_heads, head_dim)


_FP8 = {
    "quant_method": ("fp8",),
    "activation_scheme": ("dynamic",),
    "fmt": ("e4m3",),
    "scale_fmt": ("float", "ue8m0"),
    "expert_dtype": ("fp8",),
}
"""Values of a quantization_config that say: weights are in eight-bit floats with scales per block, inputs are not."""
_FP8_HARMLESS = {
    "weight_block_size",
    "modules_to_not_convert",
    "modules_to_convert",
    "ignored_layers",
    "dequantize",
}
"""Which tensors are in eight bits is told by their scales."""


def fp8_block(config: ModelConfig) -> tuple[int, int] | None:
    """The block size [outputs, inputs] of a checkpoint in eight-bit floats with one scale per block, else None."""
    quantisation = getattr(config, "quantization_config", None) or {}
    block = quantisation.get("weight_block_size")
    known = all(
        option in _FP8_HARMLESS or value in _FP8.get(option, ()) for option, value in quantisation.items()
    )
    if not known or "quant_method" not in quantisation or not block or len(block) != 2 or min(block) < 1:
        return None
    return block[0], block[1]


def refuse_options(config: ModelConfig, supported: Mapping[str, object]) -> None:
    """Refuse by name every listed option whose value is not the supported one.

    Quantised weights are refused unless listed, but for those in eight-bit floats (`fp8_block`): they become float32.
    """
    if getattr(config, "is_heterogeneous", False):
        raise ModelRefused(f"per_layer_config is not supported for {config.model_type}")
    unquantised = {} if fp8_block(config) else {"quantization_config": None}
    for option, value in {**unquantised, **supported}.items():
        found = getattr(config, option, value)
        if found != value:
            raise ModelRefused(
                f"{option} = {found!r} is not supported for {config.model_type}, only {value!r} is"
            )


_COMPUTING = (
    "alibi", "bias", "clip", "expert", "layer_types", "moe", "multiplier", "qk_norm", "residual", "rope", "rotary",
    "scal", "sink", "softcap", "window",
)  # fmt: skip
"""Parts of the names of options that change what a decoder computes."""


def refuse_unknown_options(config: ModelConfig, harmless: Sequence[str] = ()) -> None:
    """Refuse by name options that the config's class does not have and whose names say that they change the result.

    Such a checkpoint expects other code than its architecture's. Notes such as `unsloth_version` are left alone.
    """
    for option, value in config.unknown_options.items():
        neutral = value is not True and value in (None, False, 1)
        if neutral or option in harmless or option.startswith("_"):
            continue
        if any(part in option for part in _COMPUTING):
            raise ModelRefused(f"{option} = {value!r} is not known for {config.model_type}, so not supported")


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
    layer: int, hidden: int, wide: int, paths: Sequence[Sequence[str]], expert: int = -1, prefix: str = ""
) -> list[Site]:
    """gate, up and down of one MLP or expert; `paths` are the names of each of the three."""
    gate, up, down = (tuple(names) for names in paths)
    return [
        Site(layer, f"{prefix}gate", expert, hidden, wide, gate),
        Site(layer, f"{prefix}up", expert, hidden, wide, up),
        Site(layer, f"{prefix}down", expert, wide, hidden, down),
    ]


def projections(path: str) -> list[list[str]]:
    """The names of gate, up and down below the module `path`."""
    return [[f"{path}.{name}_proj"] for name in ("gate", "up", "down")]


def dense_mlp_sites(config: ModelConfig, layer: int) -> list[Site]:
    """The three projections of Llama's MLP."""
    return mlp_sites(
        layer, config.hidden_size, config.intermediate_size, projections(f"model.layers.{layer}.mlp")
    )


def router_site(config: ModelConfig, layer: int, num_experts: int, *paths: str) -> Site:
    """The map from hidden states to the scores of experts."""
    return Site(layer, "router", -1, config.hidden_size, num_experts, paths)


def reaches(config: ModelConfig) -> list[KVGroup]:
    """How far each layer sees, from `layer_types`, `sliding_window` and `attention_chunk_size`."""
    window = getattr(config, "sliding_window", None) or 0
    known = {
        "full_attention": FULL,
        "sliding_attention": KVGroup((), window=window),
        "chunked_attention": KVGroup((), chunk=getattr(config, "attention_chunk_size", None) or 0),
    }
    default = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    for kind in kinds:
        if kind not in known:
            raise ModelRefused(f"layer type {kind!r} is not supported for {config.model_type}")
        if kind != "full_attention" and known[kind] == FULL:
            option = "sliding_window" if kind == "sliding_attention" else "attention_chunk_size"
            raise ModelRefused(
                f"layer type {kind!r} of {config.model_type} needs {option}, which is not given"
            )
    return [known[kind] for kind in kinds]


def kv_groups(reaches: Sequence[KVGroup]) -> tuple[KVGroup, ...]:
    """KV groups from how far each layer sees (its `layers` are ignored): layers that see equally far share groups.

    All groups have equally many layers, the most that every kind can be cut into, so that one page size fits all.
    """
    kinds: dict[KVGroup, list[int]] = {}
    for layer, reach in enumerate(reaches):
        kinds.setdefault(KVGroup((), reach.window, reach.chunk), []).append(layer)
    size = gcd(*(len(layers) for layers in kinds.values()))
    return tuple(
        KVGroup(tuple(layers[start : start + size]), reach.window, reach.chunk)
        for reach, layers in kinds.items()
        for start in range(0, len(layers), size)
    )


def common_spec(
    config: ModelConfig,
    name: str,
    digest: str,
    sites: Sequence[Site],
    fused: Sequence[FusedExperts] = (),
    num_experts: int = 0,
) -> ModelSpec:
    """The ModelSpec of a Llama-like config; `sites` are those of the layers."""
    geometry = Geometry.of(config)
    eos = config.eos_token_id
    hidden, vocabulary, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    return ModelSpec(
        architecture=config.model_type,
        name=name,
        digest=digest,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=geometry.heads,
        num_kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=vocabulary,
        max_model_len=config.max_position_embeddings,
        num_experts=num_experts,
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        kv_groups=kv_groups(reaches(config)),
        sites=(
            Site(-1, "embed", -1, vocabulary, hidden, ("model.embed_tokens",)),
            *sites,
            Site(layers, "head", -1, hidden, vocabulary, ("lm_head", "model.unembed_tokens")),
        ),
        fused=tuple(fused),
    )


def rotary(
    config: ModelConfig, max_positions: int, dim: int | None = None, interleaved: bool = False
) -> Rotary:
    """The rotation table of a config's rope parameters, for heads of which `dim` (default all) elements rotate."""
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    part = parameters.get("partial_rotary_factor", 1.0)
    if dim is None and part != 1:
        raise ModelRefused(
            f"partial_rotary_factor = {part} is not supported for {config.model_type}, only 1.0 is"
        )
    if kind == "default":
        dim = dim or Geometry.of(config).head_dim
        inverse = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        return rotary_table(inverse, max_positions, 1.0, interleaved)
    if config.rope_frequencies is None:
        raise ModelRefused(f"rope_type {kind!r} is not supported for {config.model_type}")
    frequencies, scale = config.rope_frequencies
    return rotary_table(torch.tensor(frequencies), max_positions, scale, interleaved)
