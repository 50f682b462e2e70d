from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from motet.adapters import pairs
from motet.adapters.checkpoint import load_checkpoint
from motet.errors import AdapterRefused
from tests.adapters.peft_files import (
    EXPERTS,
    FUSED,
    HIDDEN,
    PREFIX,
    VOCAB,
    WIDE,
    classic_expert,
    module_tensors,
    peft_adapter,
    q_tensors,
    spec_of,
    write_adapter,
)

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
EXPERT_PATH = "model.layers.0.mlp.experts"


def refuse(path: Path, kind: str, tensors: dict[str, Tensor], message: str, **config: object) -> None:
    write_adapter(path, tensors, **config)
    with pytest.raises(AdapterRefused, match=message):
        load_checkpoint(path, spec_of(kind))


def named(name: str, *shape: int) -> dict[str, Tensor]:
    return {name: torch.ones(shape)}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (named(f"{Q}.lora_magnitude_vector", 48), "is a DoRA magnitude, which is not supported"),
        (named(f"{Q}.lora_B.bias", 48), r"q_proj\.lora_B\.bias' is a bias"),
        (
            named(f"{PREFIX}model.embed_tokens.weight", 64, 48),
            r"embed_tokens\.weight' is a weight of the base",
        ),
        (named(f"{PREFIX}lm_head.weight", 64, 48), r"lm_head\.weight' .*save_embedding_layers=False"),
        (
            named(f"{PREFIX}lm_head.base_layer.weight", 64, 48),
            r"lm_head\.base_layer\.weight' .*save_embedding_layers=False",
        ),
        (named(f"{PREFIX}model.embed_tokens.lora_embedding_A.x.y", 4, 64), "unknown tensor"),
        (named(f"{PREFIX}model.embed_tokens.lora_embedding_A.weight.x", 4, 64), "unknown tensor"),
        (named(f"{PREFIX}model.embed_tokens.lora_embedding_A", 4, 64), "A' has no lora_B beside it"),
        (named(f"{PREFIX}model.norm.weight", 48), "unknown tensor"),
        (
            named(f"{PREFIX}model.norm.modules_to_save.weight", 48),
            r"fully trained module \(modules_to_save\)",
        ),
        (
            named(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 48),
            "trained embedding rows",
        ),
        (named(f"{Q}.lora_diag", 4), "is a KaSA diagonal"),
        (named(f"{Q}.lora_C.weight", 4, 4), r"unknown tensor '.*lora_C\.weight'"),
        (named("model.layers.1.self_attn.q_proj.lora_A.weight", 4, 48), "unknown tensor 'model.layers.1"),
        (named(f"{Q}.lora_A.x.y.weight", 4, 48), "unknown tensor"),
        (named(f"{PREFIX}.lora_A.weight", 4, 48), "unknown tensor|has no linear map"),
        (named("", 1), "unknown tensor ''"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path: Path, extra: dict[str, Tensor], message: str) -> None:
    refuse(tmp_path, "llama", q_tensors() | extra, message)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    a, b = sorted(q_tensors())
    refuse(tmp_path, "llama", {a: q_tensors()[a]}, r"lora_A\.weight' has no lora_B beside it")
    refuse(tmp_path, "llama", {b: q_tensors()[b]}, r"lora_B\.weight' has no lora_A beside it")


def test_empty_adapter_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "llama", {}, "no LoRA tensors")


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    second = {name.replace("lora_A.", "lora_A.other."): tensor for name, tensor in q_tensors().items()}
    refuse(tmp_path, "llama", q_tensors() | second, "are the same factor")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.layers.0.mlp.gate", "tiny-llama has no linear map 'model.layers.0.mlp.gate'"),
        ("model.layers.0.self_attn.q_a_proj", "has no linear map"),
        ("model.layers.3.self_attn.q_proj", "tiny-llama has no linear map 'model.layers.3.self_attn.q_proj'"),
        ("model.layers.0.self_attn.qkv_proj", "has no linear map"),
        ("model.layers.0.self_attn.q_proj.base_layer", "has no linear map"),
        ("model.layers.0.mlp.experts", "has no linear map"),
        ("transformer.h.0.attn.c_attn", "has no linear map"),
    ],
)
def test_modules_that_the_base_lacks(tmp_path: Path, path: str, message: str) -> None:
    refuse(tmp_path, "llama", q_tensors() | module_tensors(path, HIDDEN, HIDDEN), message)


def embedding(rank: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    path = f"{PREFIX}model.embed_tokens.lora_embedding_"
    return {
        f"{path}A": torch.randn(rank, VOCAB, generator=generator),
        f"{path}B": torch.randn(HIDDEN, rank, generator=generator),
    }


def test_embedding_and_head_are_plain_maps(tmp_path: Path) -> None:
    head = module_tensors("lm_head", HIDDEN, VOCAB)
    spec = spec_of("llama")
    found = load_checkpoint(write_adapter(tmp_path, embedding() | head | q_tensors()), spec).factors
    by_name = {str(spec.sites[index]): one for index, one in found.items()}
    assert list(by_name) == ["embed", "layers.0.q", "head"]
    for site, tensors in (("embed", embedding()), ("head", head)):
        a, b = (tensor for _, tensor in sorted(tensors.items()))
        assert torch.equal(by_name[site].a, a)
        assert torch.equal(by_name[site].b, b)
        assert by_name[site].scaling == 1.5
    renamed = {f"{name}.default" if "embedding" in name else name: t for name, t in embedding().items()}
    assert load_checkpoint(write_adapter(tmp_path, renamed), spec).rank == 4


def test_factors_of_an_embedding_have_names_of_their_own(tmp_path: Path) -> None:
    """As a module of another kind the embedding's factors would have other shapes, and a square one nothing tells."""
    linear = module_tensors("model.embed_tokens", VOCAB, HIDDEN)
    refuse(tmp_path, "llama", linear, "embed_tokens.* named lora_embedding_A and _B; .* is an embedding")
    path = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_embedding_"
    wrong = named(f"{path}A", 4, 48) | named(f"{path}B", 48, 4)
    refuse(tmp_path, "llama", wrong, r"q_proj\.lora_embedding_A': .* is no embedding")
    half = {name: tensor for name, tensor in embedding().items() if name.endswith("A")}
    b = {name: tensor for name, tensor in linear.items() if "lora_B" in name}
    refuse(tmp_path, "llama", half | b, "embedding_A' has no lora_B beside it")


def test_another_vocabulary(tmp_path: Path) -> None:
    larger = {name: torch.cat([t, t[:, :1]], 1) if "_A" in name else t for name, t in embedding().items()}
    refuse(tmp_path, "llama", larger, r"lora_embedding_A' has shape \[4, 65\], tiny-llama needs \[4, 64\]")


@pytest.mark.parametrize("module", ["embed", "head", "router"])
def test_a_base_without_such_a_map(tmp_path: Path, module: str) -> None:
    spec = spec_of("mixtral")
    site = next(site for site in spec.sites if site.module == module)
    poorer = msgspec.structs.replace(spec, sites=tuple(s for s in spec.sites if s.module != module))
    tensors = embedding() if module == "embed" else module_tensors(site.paths[0], HIDDEN, site.out_features)
    assert load_checkpoint(write_adapter(tmp_path, tensors), spec).factors
    with pytest.raises(AdapterRefused, match=f"tiny-mixtral has no linear map '{site.paths[0]}'"):
        load_checkpoint(tmp_path, poorer)


def tied(rank: int = 4) -> dict[str, Tensor]:
    """What ensure_weight_tying makes of the head: the embedding's factors, each in the other's place."""
    a, b = (tensor for _, tensor in sorted(embedding(rank).items()))
    return embedding(rank) | {f"{PREFIX}lm_head.lora_A.weight": b.T, f"{PREFIX}lm_head.lora_B.weight": a.T}


def test_tied_embeddings(tmp_path: Path) -> None:
    spec = spec_of("llama")
    write_adapter(tmp_path, tied(), ensure_weight_tying=True)
    assert len(load_checkpoint(tmp_path, spec).factors) == 2
    write_adapter(tmp_path, q_tensors(), ensure_weight_tying=True)
    assert len(load_checkpoint(tmp_path, spec).factors) == 1  # nothing to tie
    message = "ensure_weight_tying=True, but .* does not hold one update for both embed_tokens and lm_head"
    for tensors in (
        embedding(),
        tied() | module_tensors("lm_head", HIDDEN, VOCAB),
        module_tensors("lm_head", HIDDEN, VOCAB),
    ):
        refuse(tmp_path, "llama", tensors, message, ensure_weight_tying=True)
        write_adapter(tmp_path, tensors, ensure_weight_tying=False)
        assert load_checkpoint(tmp_path, spec).factors


def test_patterns_know_a_targeted_parameter_by_its_own_name(tmp_path: Path) -> None:
    """PEFT matches rank_pattern with mlp.gate.weight if that parameter was targeted, else with mlp.gate."""
    router = module_tensors("model.layers.0.mlp.gate", HIDDEN, EXPERTS, rank=3)
    spec = spec_of("mixtral")
    for targets in (
        ["gate.weight"],
        ["mlp.gate.weight"],
        ["model.layers.0.mlp.gate.weight"],
        ["x", "gate.weight"],
    ):
        write_adapter(tmp_path, router, target_parameters=targets, rank_pattern={"gate.weight": 3, "gate": 9})
        assert load_checkpoint(tmp_path, spec).rank == 3
    for targets in ([], ["late.weight"], ["gate.weigh"], ["experts.gate_up_proj"]):
        write_adapter(tmp_path, router, target_parameters=targets, rank_pattern={"gate.weight": 9, "gate": 3})
        assert load_checkpoint(tmp_path, spec).rank == 3


def test_another_base(tmp_path: Path) -> None:
    write_adapter(tmp_path, q_tensors() | classic_expert(0, 1, {"w1": 4}))
    assert load_checkpoint(tmp_path, spec_of("mixtral")).factors
    with pytest.raises(
        AdapterRefused, match=r"experts\.1\.w1\.lora_A\.weight': tiny-llama has no linear map"
    ):
        load_checkpoint(tmp_path, spec_of("llama"))
    for hidden in (44, 52):
        with pytest.raises(
            AdapterRefused, match=rf"lora_A\.weight' has shape \[4, 48\], .* needs \[4, {hidden}\]"
        ):
            load_checkpoint(tmp_path, spec_of("mixtral", hidden))


@pytest.mark.parametrize(
    ("factor", "shape", "message"),
    [
        ("A", (4, 47), r"lora_A\.weight' has shape \[4, 47\], tiny-llama needs \[4, 48\]"),
        ("A", (4, 4096), r"has shape \[4, 4096\], tiny-llama needs \[4, 48\]"),
        ("B", (47, 4), r"lora_B\.weight' has shape \[47, 4\], tiny-llama needs \[48, 4\]"),
        ("B", (48, 5), r"has shape \[48, 5\], tiny-llama needs \[48, 4\]"),
        ("B", (4, 48), r"has shape \[4, 48\], tiny-llama needs \[48, 4\]"),
        ("A", (192,), r"has shape \[192\], not a matrix's"),
        ("A", (4, 48, 1), r"has shape \[4, 48, 1\], tiny-llama needs \[48, 48\]"),
        ("A", (1, 4, 48), r"has shape \[1, 4, 48\], tiny-llama needs \[4, 48\]"),
        ("A", (4, 48, 1, 1), r"has shape \[4, 48, 1, 1\], not a matrix's"),
        ("A", (0, 48), r"has shape \[0, 48\], not a matrix's"),
    ],
)
def test_wrong_shapes_name_the_tensor(
    tmp_path: Path, factor: str, shape: tuple[int, ...], message: str
) -> None:
    refuse(tmp_path, "llama", q_tensors() | named(f"{Q}.lora_{factor}.weight", *shape), message)


def test_rank_must_be_the_config_s(tmp_path: Path) -> None:
    message = r"lora_A\.weight' has rank 4, the config states {} for it"
    refuse(tmp_path, "llama", q_tensors(), message.format(8), r=8)
    refuse(tmp_path, "llama", q_tensors(), message.format(2), rank_pattern={"q_proj": 2})
    write_adapter(tmp_path, q_tensors(), r=8, rank_pattern={"q_proj": 4})
    assert load_checkpoint(tmp_path, spec_of("llama")).rank == 4


def test_too_many_patterns_for_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAX_MATCHING", 3)
    patterns = {"rank_pattern": {"x": 1}, "alpha_pattern": {"x": 1}}
    message = "too many rank and alpha patterns to match with 2 modules"
    refuse(tmp_path, "llama", q_tensors(0) | q_tensors(1), message, **patterns)


def test_one_site_under_two_names(tmp_path: Path) -> None:
    ranks = {"w1": 4}
    classic = classic_expert(0, 1, ranks)
    today = {
        name.replace("block_sparse_moe", "mlp").replace("w1", "gate_proj"): tensor
        for name, tensor in classic.items()
    }
    refuse(tmp_path, "mixtral", classic | today, r"both adapt layers\.0\.experts\.1\.gate")
    fused = module_tensors(EXPERT_PATH, HIDDEN, 2 * WIDE, 4 * EXPERTS)
    refuse(tmp_path, "mixtral", fused | classic, r"both adapt layers\.0\.experts\.1\.gate")


def test_fused_shapes_that_fit_nothing(tmp_path: Path) -> None:
    refuse(
        tmp_path,
        "mixtral",
        module_tensors(EXPERT_PATH, HIDDEN, WIDE + 1, 16),
        "fit neither gate_up_proj nor down",
    )
    refuse(
        tmp_path,
        "mixtral",
        module_tensors(EXPERT_PATH, HIDDEN, 2 * WIDE, 15),
        "do not hold one rank for each of 4",
    )
    pair = module_tensors(EXPERT_PATH, HIDDEN, 2 * WIDE, 16)
    a, b = sorted(pair)
    refuse(
        tmp_path, "mixtral", {a: pair[a], b: pair[b][:, :12]}, "do not hold one rank for each of 4 experts"
    )
    refuse(tmp_path, "mixtral", pair, r"has rank 4, the config states 6", rank_pattern={"gate_up_proj": 6})
    same = pair | module_tensors(f"{EXPERT_PATH}.base_layer", HIDDEN, 2 * WIDE, 16)
    refuse(tmp_path, "mixtral", same, "do not fit one layout")
    mixed = module_tensors(EXPERT_PATH, WIDE, HIDDEN, 16) | module_tensors(
        f"{EXPERT_PATH}.base_layer", 2 * WIDE, HIDDEN, 16
    )
    refuse(tmp_path, "mixtral", mixed, "do not fit one layout")


def test_inner_and_outer_wrapper_may_swap(tmp_path: Path) -> None:
    """Which parameter is nested in which depends on the order of training code; shapes tell."""
    peft_adapter("mixtral", tmp_path, target_modules=[], target_parameters=FUSED, r=4, lora_alpha=6)
    spec = spec_of("mixtral")
    first = load_checkpoint(tmp_path, spec)
    inner = module_tensors(f"{EXPERT_PATH}.base_layer", WIDE, HIDDEN, 16)
    outer = module_tensors(EXPERT_PATH, HIDDEN, 2 * WIDE, 16)
    swapped = load_checkpoint(write_adapter(tmp_path, inner | outer), spec)
    plain = load_checkpoint(
        write_adapter(
            tmp_path,
            {name.replace("experts", "experts.base_layer"): tensor for name, tensor in outer.items()}
            | {name.replace(".base_layer", ""): tensor for name, tensor in inner.items()},
        ),
        spec,
    )
    assert swapped.digest == plain.digest != first.digest


@pytest.mark.parametrize(
    ("hidden", "wide", "parameters", "clear"),
    [
        (48, 24, ("gate_up_proj",), False),  # H = 2I
        (48, 24, ("down_proj",), True),
        (48, 24, ("gate_up_proj", "down_proj"), True),
        (48, 48, ("down_proj",), False),  # H = I
        (48, 48, ("gate_up_proj",), True),
        (48, 48, ("gate_up_proj", "down_proj"), True),
    ],
)
def test_ambiguous_layout_is_refused(
    tmp_path: Path, hidden: int, wide: int, parameters: tuple[str, ...], clear: bool
) -> None:
    shapes = {"gate_up_proj": (hidden, 2 * wide), "down_proj": (wide, hidden)}
    wrappers = {"gate_up_proj": ".base_layer", "down_proj": ""}
    tensors: dict[str, Tensor] = {}
    for name in parameters:
        tensors |= module_tensors(EXPERT_PATH + wrappers[name], *shapes[name], 16)
    write_adapter(tmp_path, tensors)
    spec = spec_of("mixtral", hidden, wide)
    if clear:
        found = load_checkpoint(tmp_path, spec).factors
        assert len(found) == EXPERTS * (2 * ("gate_up_proj" in parameters) + ("down_proj" in parameters))
        return
    with pytest.raises(AdapterRefused, match=r"fits two layouts, A on the inputs and A on the outputs"):
        load_checkpoint(tmp_path, spec)
