"""Specs of one-layer bases of each family, written out by hand: the adapters' room knows bases by their specs alone."""

from __future__ import annotations

from motet.types import FULL, FusedExperts, ModelSpec, Site
from tests.adapters.fixtures.generate import EXPERTS, HIDDEN, VOCAB, WIDE

LAYER = "model.layers.0"
BLOCKS = {"mixtral": "mlp", "gpt-oss": "mlp", "llama4": "feed_forward", "deepseek": "mlp"}
ROUTERS = {"mixtral": "gate", "gpt-oss": "router", "llama4": "router", "deepseek": "gate"}
SHARED = {"llama4": "shared_expert", "deepseek": "shared_experts"}
LATENT = {
    "q_a": ("q_a_proj", HIDDEN, 10), "q_b": ("q_b_proj", 10, 20), "kv_a": ("kv_a_proj_with_mqa", HIDDEN, 16),
    "kv_b": ("kv_b_proj", 12, 26), "o": ("o_proj", 14, HIDDEN),
}  # fmt: skip
CLASSIC = {"gate": "w1", "up": "w3", "down": "w2"}


def base(kind: str, hidden: int = HIDDEN, wide: int = WIDE, experts: int = EXPERTS) -> ModelSpec:
    """The spec of a "llama", "mixtral", "gpt-oss", "llama4" or "deepseek" of one layer."""
    layer = _attention(kind, hidden)
    fused: tuple[FusedExperts, ...] = ()
    if kind != "llama":
        block = f"{LAYER}.{BLOCKS[kind]}"
        layer += _experts(kind, hidden, wide, experts)
        fused = (
            FusedExperts(f"{block}.experts", 0, experts, kind in ("gpt-oss", "llama4"), kind == "gpt-oss"),
        )
    embed = Site(-1, "embed", -1, VOCAB, hidden, ("model.embed_tokens",))
    head = Site(1, "head", -1, hidden, VOCAB, ("lm_head", "model.unembed_tokens"))
    return ModelSpec(
        architecture=kind, name=f"tiny-{kind}", digest="base", num_layers=1, hidden_size=hidden, num_heads=2,
        num_kv_heads=1, head_dim=8, vocab_size=VOCAB, max_model_len=32, num_experts=experts if fused else 0,
        eos_token_ids=(), kv_groups=(FULL,), sites=(embed, *layer, head), fused=fused,
    )  # fmt: skip


def _attention(kind: str, hidden: int) -> list[Site]:
    path = f"{LAYER}.self_attn"
    if kind == "deepseek":
        return [Site(0, module, -1, i, o, (f"{path}.{leaf}",)) for module, (leaf, i, o) in LATENT.items()]
    shapes = {"q": (hidden, 16), "k": (hidden, 8), "v": (hidden, 8), "o": (16, hidden)}
    return [Site(0, module, -1, i, o, (f"{path}.{module}_proj",)) for module, (i, o) in shapes.items()]


def _experts(kind: str, hidden: int, wide: int, experts: int) -> list[Site]:
    block = f"{LAYER}.{BLOCKS[kind]}"
    shapes = {"gate": (hidden, wide), "up": (hidden, wide), "down": (wide, hidden)}
    routers = [f"{block}.{ROUTERS[kind]}"]
    if kind == "mixtral":
        routers.append(f"{LAYER}.block_sparse_moe.gate")
    sites = [Site(0, "router", -1, hidden, experts, tuple(routers))]
    if kind in SHARED:
        shared = f"{block}.{SHARED[kind]}"
        sites += [
            Site(0, f"shared_{module}", -1, i, o, (f"{shared}.{module}_proj",))
            for module, (i, o) in shapes.items()
        ]
    for expert in range(experts):
        for module, (i, o) in shapes.items():
            paths = [f"{block}.experts.{expert}.{module}_proj"]
            if kind == "mixtral":
                paths.append(f"{LAYER}.block_sparse_moe.experts.{expert}.{CLASSIC[module]}")
            sites.append(Site(0, module, expert, i, o, tuple(paths)))
    return sites
