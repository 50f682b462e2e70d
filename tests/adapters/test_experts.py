"""Every way in which files say the same of experts gives the same normal form: that of one file entry per expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from motet.adapters.checkpoint import Checkpoint, load_checkpoint
from motet.adapters.describe import describe
from motet.adapters.image import chunk_factors, pack
from motet.errors import AdapterRefused
from motet.types import ModelSpec
from tests.adapters.bases import BLOCKS, LAYER, base
from tests.adapters.fixtures.generate import EXPERTS, HIDDEN, VOCAB, WIDE
from tests.adapters.peft_files import PREFIX, write_adapter

RANK = 4
Factors = dict[str, tuple[Tensor, Tensor]]  # module → A [E or 1, r, in], B [E or 1, out, r]
Tensors = dict[str, Tensor]
MOE = ["mixtral", "gpt-oss", "llama4", "deepseek"]
STRAIGHT = ["mixtral", "llama4", "deepseek"]  # gate over up
SHAPES = {"gate": (HIDDEN, WIDE), "up": (HIDDEN, WIDE), "down": (WIDE, HIDDEN)}


def factors(a: int = EXPERTS, b: int = EXPERTS, outer: bool = False, seed: int = 0) -> Factors:
    """Random ones, with `a` and `b` different matrices; `outer` swaps the two for down, as shared outer factors are."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, (depth, width) in SHAPES.items():
        swap = outer and module == "down"
        of_a, of_b = (b, a) if swap else (a, b)
        found[module] = (
            torch.randn(of_a, RANK, depth, generator=generator),
            torch.randn(of_b, width, RANK, generator=generator),
        )
    return found


def gate_up(a: int = EXPERTS, b: int = EXPERTS) -> Factors:
    """Random ones in which gate and up have the same A."""
    found = factors(a, b)
    return found | {"up": (found["gate"][0], found["up"][1])}


def entry(path: str, a: Tensor, b: Tensor) -> Tensors:
    return {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}


def per_expert(kind: str, all_factors: Factors, experts: int = EXPERTS) -> Tensors:
    """`<experts>.<e>.gate_proj` and so on: what every other form is compared with."""
    tensors: Tensors = {}
    for module, (a, b) in all_factors.items():
        for expert in range(experts):
            path = f"{experts_of(kind)}.{expert}.{module}_proj"
            tensors |= entry(path, a[expert % len(a)], b[expert % len(b)])
    return tensors


def experts_of(kind: str) -> str:
    return f"{LAYER}.{BLOCKS[kind]}.experts"


def stacked(kind: str, all_factors: Factors, names: tuple[str, str, str], path: str = "") -> Tensors:
    tensors: Tensors = {}
    for module, name in zip(SHAPES, names, strict=True):
        tensors |= entry(f"{path or experts_of(kind)}.{name}", *all_factors[module])
    return tensors


def load(path: Path, tensors: Tensors, spec: ModelSpec, **config: object) -> Checkpoint:
    return load_checkpoint(write_adapter(path, tensors, r=RANK, **config), spec)


def refuse(path: Path, tensors: Tensors, spec: ModelSpec, message: str, **config: object) -> None:
    write_adapter(path, tensors, r=RANK, **config)
    with pytest.raises(AdapterRefused, match=message):
        load_checkpoint(path, spec)


@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize(
    "names", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")], ids=["w1", "gate_proj"]
)
@pytest.mark.parametrize(
    "make",
    [
        factors,
        lambda: factors(1, EXPERTS, outer=True),
        lambda: factors(EXPERTS, 1),
        lambda: factors(1, 1),
    ],
    ids=["own", "shared outer", "shared B", "all shared"],
)
def test_stacks(tmp_path: Path, kind: str, names: tuple[str, str, str], make: Callable[[], Factors]) -> None:
    spec, all_factors = base(kind), make()
    expected = load(tmp_path / "a", per_expert(kind, all_factors), spec)
    found = load(tmp_path / "b", stacked(kind, all_factors, names), spec)
    assert found.digest == expected.digest
    assert len(found.factors) == 3 * EXPERTS
    assert found.num_parameters == sum(tensor.numel() for pair in all_factors.values() for tensor in pair)


def test_stacks_below_the_classic_names(tmp_path: Path) -> None:
    spec, all_factors = base("mixtral"), factors(1, EXPERTS, outer=True)
    classic = stacked("mixtral", all_factors, ("w1", "w3", "w2"), f"{LAYER}.block_sparse_moe.experts")
    expected = load(tmp_path / "a", per_expert("mixtral", all_factors), spec)
    assert load(tmp_path / "b", classic, spec).digest == expected.digest


@pytest.mark.parametrize("kind", STRAIGHT)
@pytest.mark.parametrize("of_a", [1, EXPERTS])
def test_stacks_of_gate_over_up(tmp_path: Path, kind: str, of_a: int) -> None:
    spec, all_factors = base(kind), gate_up(of_a)
    (a, gate), (_, up) = all_factors["gate"], all_factors["up"]
    fused = entry(f"{experts_of(kind)}.gate_up_proj", a, torch.cat([gate, up], 1))
    fused |= entry(f"{experts_of(kind)}.down_proj", *all_factors["down"])
    expected = load(tmp_path / "a", per_expert(kind, all_factors), spec)
    assert load(tmp_path / "b", fused, spec).digest == expected.digest


def test_a_stack_of_gate_and_up_on_a_base_that_alternates_them(tmp_path: Path) -> None:
    (a, gate), (_, up) = gate_up()["gate"], gate_up()["up"]
    fused = entry(f"{experts_of('gpt-oss')}.gate_up_proj", a, torch.cat([gate, up], 1))
    refuse(
        tmp_path,
        fused,
        base("gpt-oss"),
        r"gate_up_proj\.lora_B\.weight': .*alternates .* save gate and up apart",
    )


def mixed(kind: str, all_factors: Factors, experts: int = EXPERTS) -> Tensors:
    """Megatron-Bridge's: what is shared as a stack of one, the other factor by expert."""
    tensors: Tensors = {}
    for module, pair in all_factors.items():
        for factor, tensor in zip("AB", pair, strict=True):
            name = f"{module}_proj.lora_{factor}.weight"
            if len(tensor) == 1:
                tensors[f"{PREFIX}{experts_of(kind)}.{name}"] = tensor
            else:
                tensors |= {f"{PREFIX}{experts_of(kind)}.{e}.{name}": tensor[e] for e in range(experts)}
    return tensors


@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize("half", [False, True])
def test_one_stack_of_one_with_the_experts_own(tmp_path: Path, kind: str, half: bool) -> None:
    spec, all_factors = base(kind), factors(1, EXPERTS, outer=True)
    tensors = mixed(kind, all_factors)
    if half:  # each shared tensor is converted, and still shared
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
        all_factors = {module: (a.half(), b.half()) for module, (a, b) in all_factors.items()}
    expected = load(tmp_path / "a", per_expert(kind, all_factors), spec)
    found = load(tmp_path / "b", tensors, spec)
    assert found.digest == expected.digest
    assert describe(tmp_path / "b", None).reason is None


def test_part_of_the_experts_own_is_missing(tmp_path: Path) -> None:
    tensors = mixed("mixtral", factors(1, EXPERTS, outer=True))
    down_b = r"mlp\.experts\.down_proj\.lora_B\.weight' "
    del tensors[f"{PREFIX}{LAYER}.mlp.experts.1.down_proj.lora_A.weight"]
    refuse(
        tmp_path,
        tensors,
        base("mixtral"),
        down_b + "is for all 3 experts, of which 2 have a factor of their own",
    )
    tensors = {name: tensor for name, tensor in tensors.items() if "down_proj.lora_A" not in name}
    refuse(tmp_path, tensors, base("mixtral"), down_b + "has no lora_A beside it")
    tensors = mixed("mixtral", factors(1, EXPERTS, outer=True))
    del tensors[f"{PREFIX}{LAYER}.mlp.experts.down_proj.lora_B.weight"]
    refuse(
        tmp_path, tensors, base("mixtral"), r"experts\.0\.down_proj\.lora_A\.weight' has no lora_B beside it"
    )


def deep(kind: str, all_factors: Factors, swapped: bool, stacked_dimension: bool) -> Tensors:
    """As PEFT's target_parameters, and the same with the experts in a dimension of their own."""
    (a, gate), (_, up) = all_factors["gate"], all_factors["up"]
    out = torch.stack([gate, up], 2).flatten(1, 2) if kind == "gpt-oss" else torch.cat([gate, up], 1)
    tensors: Tensors = {}
    for wrapper, one_a, one_b in ((".base_layer", a, out), ("", *all_factors["down"])):
        if swapped:
            one_a, one_b = one_b.transpose(1, 2), one_a.transpose(1, 2)
        one_b = one_b.permute(1, 2, 0)
        if not stacked_dimension:
            one_a, one_b = one_a.flatten(0, 1), one_b.flatten(1, 2)
        tensors |= entry(experts_of(kind) + wrapper, one_a, one_b)
    return tensors


@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("stacked_dimension", [False, True])
def test_parameters(tmp_path: Path, kind: str, swapped: bool, stacked_dimension: bool) -> None:
    spec, all_factors = base(kind), gate_up()
    expected = load(tmp_path / "a", per_expert(kind, all_factors), spec)
    found = load(tmp_path / "b", deep(kind, all_factors, swapped, stacked_dimension), spec)
    assert found.digest == expected.digest


def test_one_layout_for_the_whole_file(tmp_path: Path) -> None:
    straight, swapped = (deep("mixtral", gate_up(), swapped, False) for swapped in (False, True))
    mixture = straight | {name: t for name, t in swapped.items() if "base_layer" in name}
    refuse(tmp_path, mixture, base("mixtral"), "do not fit one layout of gate_up_proj and down_proj")


@pytest.mark.parametrize(
    ("kind", "why"),
    [("mixtral", "whether PEFT was older than 0.19.1"), ("gpt-oss", "how transformers marked the module")],
)
def test_an_unclear_layout_is_explained(tmp_path: Path, kind: str, why: str) -> None:
    square = torch.ones(EXPERTS * RANK, HIDDEN), torch.ones(HIDDEN, EXPERTS * RANK)
    message = f"A on the inputs and A on the outputs, .*{why}.*adapt gate_up_proj and down_proj together"
    refuse(tmp_path, entry(experts_of(kind), *square), base(kind, wide=HIDDEN), message)


def test_experts_as_modules_of_their_own(tmp_path: Path) -> None:
    """Unsloth's gpt-oss in 4 bits; B of gate_up_projs alternates gate and up like the parameter that it came from."""
    spec, all_factors = base("gpt-oss"), gate_up()
    (a, gate), (_, up) = all_factors["gate"], all_factors["up"]
    tensors: Tensors = {}
    for expert in range(EXPERTS):
        path = experts_of("gpt-oss")
        out = torch.empty(2 * WIDE, RANK)
        out[0::2], out[1::2] = gate[expert], up[expert]
        tensors |= entry(f"{path}.gate_up_projs.{expert}", a[expert], out)
        tensors |= entry(f"{path}.down_projs.{expert}", *(one[expert] for one in all_factors["down"]))
    expected = load(tmp_path / "a", per_expert("gpt-oss", all_factors), spec)
    assert load(tmp_path / "b", tensors, spec).digest == expected.digest
    refuse(tmp_path / "b", tensors, base("mixtral"), "tiny-mixtral has no linear map '.*projs")


STACK = f"{LAYER}.mlp.experts.w1"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((2, RANK, HIDDEN), (3, WIDE, RANK), r"lora_A\.weight' has shape \[2, .* needs \[3, 4, 22\], or \[1, 4, 22\]"),
        ((3, RANK, HIDDEN), (4, WIDE, RANK), r"lora_B\.weight' has shape \[4, 14, 4\], .* needs \[3, 14, 4\], or"),
        ((1, RANK, WIDE), (3, WIDE, RANK), r"lora_A\.weight' has shape \[1, 4, 14\]"),
        ((1, RANK, HIDDEN), (3, WIDE, RANK + 1), r"lora_B\.weight' has shape \[3, 14, 5\]"),
        ((3, HIDDEN, RANK), (3, RANK, WIDE), r"lora_A\.weight' has shape \[3, 22, 4\]"),
        ((RANK, HIDDEN), (WIDE, RANK), r"lora_A\.weight' has shape \[4, 22\], .* needs \[3, 4, 22\]"),
        ((1, 5, HIDDEN), (3, WIDE, 5), r"lora_A\.weight' has rank 5, the config states 4"),
    ],
)  # fmt: skip
def test_stacks_of_a_wrong_shape(
    tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...], message: str
) -> None:
    refuse(tmp_path, entry(STACK, torch.ones(a), torch.ones(b)), base("mixtral"), message)


def test_a_module_is_no_stack(tmp_path: Path) -> None:
    stack = entry(f"{LAYER}.self_attn.q_proj", torch.ones(1, RANK, HIDDEN), torch.ones(1, 16, RANK))
    refuse(tmp_path, stack, base("mixtral"), r"has shape \[1, 4, 22\], tiny-mixtral needs \[4, 22\]")


def test_stack_and_expert_collide(tmp_path: Path) -> None:
    twice = stacked("mixtral", factors(), ("w1", "w3", "w2")) | per_expert("mixtral", factors())
    refuse(tmp_path, twice, base("mixtral"), r"both adapt layers\.0\.experts\.0\.gate")


def test_scaling_of_a_stack(tmp_path: Path) -> None:
    options = {"alpha_pattern": {"experts.w2": 2.0}, "lora_alpha": 12, "use_rslora": True}
    spec = base("mixtral")
    found = load(tmp_path, stacked("mixtral", factors(), ("w1", "w3", "w2")), spec, **options)
    assert {spec.sites[i].module: one.scaling for i, one in found.factors.items()} == {
        "gate": 6,
        "up": 6,
        "down": 1,
    }


@pytest.mark.parametrize("form", ["stack", "mixed", "repeated"])
def test_a_shared_factor_is_one_tensor_and_stored_once(tmp_path: Path, form: str) -> None:
    def image_bytes(experts: int) -> tuple[int, int]:
        """What shared factors take in the image, and all others."""
        spec, all_factors = base("mixtral", experts=experts), factors(1, experts, outer=True)
        tensors = stacked("mixtral", all_factors, ("w1", "w3", "w2"))
        if form == "repeated":
            tensors = per_expert("mixtral", all_factors, experts)
        elif form == "mixed":
            tensors = mixed("mixtral", all_factors, experts)
        checkpoint = load(tmp_path / str(experts), tensors, spec)
        of = {
            module: [one for i, one in checkpoint.factors.items() if spec.sites[i].module == module]
            for module in SHAPES
        }
        assert len({id(one.a) for one in of["gate"]}) == len({id(one.a) for one in of["up"]}) == 1
        assert len({id(one.b) for one in of["down"]}) == 1
        assert len({id(one.b) for one in of["gate"]}) == len({id(one.a) for one in of["down"]}) == experts
        shared = of["gate"][0].a.nbytes + of["up"][0].a.nbytes + of["down"][0].b.nbytes
        image = pack(checkpoint, 4096)
        chunks = image.chunks
        for index, site in enumerate(chunks.site):
            one = checkpoint.factors[int(site)]
            a, bt = chunk_factors(image, index)
            assert torch.equal(a, one.a)
            assert torch.equal(bt, one.b.T)
        return shared, image.used_bytes - shared

    (few, own_of_few), (many, own_of_many) = image_bytes(EXPERTS), image_bytes(4 * EXPERTS)
    assert few == many
    assert own_of_many == 4 * own_of_few


def test_the_image_follows_from_the_digest(tmp_path: Path) -> None:
    spec, all_factors = base("mixtral"), factors(1, EXPERTS, outer=True)
    shared = pack(load(tmp_path / "a", stacked("mixtral", all_factors, ("w1", "w3", "w2")), spec), 2048)
    repeated = pack(load(tmp_path / "b", per_expert("mixtral", all_factors), spec), 2048)
    assert shared.digest == repeated.digest
    assert shared.pages.tobytes() == repeated.pages.tobytes()


def test_a_file_as_tinker_writes_it(tmp_path: Path) -> None:
    head = entry("model.unembed_tokens", torch.randn(RANK, HIDDEN), torch.randn(VOCAB, RANK))
    q = entry(f"{LAYER}.self_attn.q_proj", torch.randn(RANK, HIDDEN), torch.randn(16, RANK))
    spec = base("gpt-oss")
    tensors = stacked("gpt-oss", factors(1, EXPERTS, outer=True), ("w1", "w3", "w2")) | head | q
    load(tmp_path, tensors, spec, target_modules="all-linear")
    report = describe(tmp_path, spec)
    assert report.binds
    assert [(m.module, m.count, m.different_a, m.different_b) for m in report.modules] == [
        ("q", 1, 1, 1), ("gate", 3, 1, 3), ("up", 3, 1, 3), ("down", 3, 3, 1), ("head", 1, 1, 1),
    ]  # fmt: skip
    assert report.layers == (0,)
    assert {m.module: m.count for m in describe(tmp_path, None).modules} == {
        "q_proj": 1, "w1": 1, "w2": 1, "w3": 1, "unembed_tokens": 1,
    }  # fmt: skip
