from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from motet.adapters.checkpoint import Checkpoint, LoraFactors, load_checkpoint
from motet.adapters.peft_config import parse_config
from motet.errors import AdapterRefused
from tests.adapters.peft_files import (
    ATTENTION,
    CONFIG,
    EXPERTS,
    FUSED,
    HIDDEN,
    PREFIX,
    WEIGHTS,
    WIDE,
    base_of,
    classic_expert,
    deltas,
    module_tensors,
    our_deltas,
    peft_adapter,
    q_tensors,
    spec_of,
    write_adapter,
)
from tests.close import assert_close

LLAMA = spec_of("llama")
MIXTRAL = spec_of("mixtral")


def check_same(checkpoint: Checkpoint, kind: str, expected: dict[str, torch.Tensor]) -> None:
    """The normal form adds what PEFT adds, to the same maps and to no other."""
    found = our_deltas(checkpoint, spec_of(kind))
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert_close(found[name], delta, 1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 6}),
        ("llama", {"target_modules": "all-linear", "r": 7, "lora_alpha": 3}),
        ("llama", {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0, 2], "r": 2}),
        ("llama", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 6, "use_rslora": True}),
        (
            "llama",
            {
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 3, "proj": 9},
                "alpha_pattern": {r".*\.[kv]_proj": 11, "^model.layers.2.+": 2.5},
                "r": 4,
            },
        ),
        ("llama", {"target_modules": ATTENTION, "rank_pattern": {"(q|o)_proj": 6}, "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
        ("mixtral", {"target_modules": ATTENTION, "r": 4}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": FUSED, "r": 4, "lora_alpha": 6}),
        ("mixtral", {"target_modules": [], "target_parameters": FUSED[:1], "r": 3}),
        ("mixtral", {"target_modules": [], "target_parameters": FUSED[1:], "r": 3, "use_rslora": True}),
        (
            "mixtral",
            {
                "target_modules": ["o_proj"],
                "target_parameters": FUSED,
                "rank_pattern": {"experts.gate_up_proj": 6, r"layers\.1\.mlp\.experts\.down_proj": 2},
                "alpha_pattern": {"down_proj": 1},
                "r": 4,
            },
        ),
    ],
)
def test_normal_form_equals_peft(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    expected = peft_adapter(kind, tmp_path, **options)
    checkpoint = load_checkpoint(tmp_path, spec_of(kind))
    check_same(checkpoint, kind, expected)
    assert list(checkpoint.factors) == sorted(checkpoint.factors)
    assert checkpoint.no_effect == ()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_nothing_is_rounded(tmp_path: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    expected = peft_adapter(
        "mixtral", tmp_path, dtype, target_modules=["k_proj"], target_parameters=FUSED, r=4
    )
    checkpoint = load_checkpoint(tmp_path, MIXTRAL)
    assert {one.a.dtype for one in checkpoint.factors.values()} == {stored}
    assert {one.b.dtype for one in checkpoint.factors.values()} == {stored}
    check_same(checkpoint, "mixtral", expected)


def test_unequal_dtypes_of_a_pair_become_the_wider(tmp_path: Path) -> None:
    tensors = q_tensors()
    name = next(name for name in tensors if "lora_A" in name)
    write_adapter(tmp_path, tensors | {name: tensors[name].bfloat16()})
    (one,) = load_checkpoint(tmp_path, LLAMA).factors.values()
    assert one.a.dtype == one.b.dtype == torch.float32
    assert torch.equal(one.a, tensors[name].bfloat16().float())


def test_experts_by_name_equal_peft(tmp_path: Path) -> None:
    """PEFT fuses classic per-expert files when it loads them, ranks of gate and up side by side."""
    ranks = {"w1": 4, "w2": 4, "w3": 4}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            tensors |= classic_expert(layer, expert, ranks)
    write_adapter(tmp_path, tensors, target_modules=["w1", "w2", "w3"])
    checkpoint = load_checkpoint(tmp_path, MIXTRAL)
    assert len(checkpoint.factors) == 2 * EXPERTS * 3
    expected = deltas(PeftModel.from_pretrained(base_of("mixtral"), tmp_path))
    check_same(checkpoint, "mixtral", expected)


def test_some_experts_with_their_own_ranks(tmp_path: Path) -> None:
    tensors = classic_expert(0, 2, {"w1": 4, "w3": 3}) | classic_expert(1, 0, {"w2": 9})
    pattern = {r"experts\.2\.w3": 3, "layers.1.block_sparse_moe.experts.0.w2": 9}
    write_adapter(tmp_path, tensors, rank_pattern=pattern, use_rslora=True)
    checkpoint = load_checkpoint(tmp_path, MIXTRAL)
    found = {str(MIXTRAL.sites[site]): one for site, one in checkpoint.factors.items()}
    assert {name: one.rank for name, one in found.items()} == {
        "layers.0.experts.2.gate": 4, "layers.0.experts.2.up": 3, "layers.1.experts.0.down": 9,
    }  # fmt: skip
    up = f"{PREFIX}model.layers.0.block_sparse_moe.experts.2.w3.lora_"
    assert torch.equal(found["layers.0.experts.2.up"].a, tensors[f"{up}A.weight"])
    assert torch.equal(found["layers.0.experts.2.up"].b, tensors[f"{up}B.weight"])
    assert found["layers.0.experts.2.up"].scaling == 6 / math.sqrt(3)
    assert checkpoint.rank == 9


def test_todays_and_classic_names_and_adapter_segment_agree(tmp_path: Path) -> None:
    """Names are not part of the normal form, so neither of the digest."""
    classic = classic_expert(0, 1, {"w1": 4, "w2": 4, "w3": 4})
    renamed = {}
    for name, tensor in classic.items():
        name = name.replace("block_sparse_moe", "mlp").replace("lora_A.", "lora_A.default.")
        for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f".{old}.", f".{new}.")
        renamed[name] = tensor
    first = load_checkpoint(write_adapter(tmp_path / "a", classic), MIXTRAL)
    second = load_checkpoint(write_adapter(tmp_path / "b", renamed, target_modules=["gate_proj"]), MIXTRAL)
    assert first.digest == second.digest


def test_gate_and_up_share_one_tensor(tmp_path: Path) -> None:
    peft_adapter("mixtral", tmp_path, target_modules=[], target_parameters=FUSED, r=3)
    checkpoint = load_checkpoint(tmp_path, MIXTRAL)
    where = {(s.layer, s.module, s.expert): index for index, s in enumerate(MIXTRAL.sites)}
    for layer in range(2):
        for expert in range(EXPERTS):
            gate, up, down = (checkpoint.factors[where[layer, m, expert]] for m in ("gate", "up", "down"))
            assert gate.a is up.a
            assert gate.a.shape == (3, HIDDEN)
            assert gate.b.shape == up.b.shape == (WIDE, 3)
            assert down.a.shape == (3, WIDE)


def old_experts(
    layer: int, parameter: str, rank: int, hidden: int = HIDDEN, wide: int = WIDE
) -> dict[str, Any]:
    """Factors as PEFT before 0.19 laid them out: dimension 1 is the input, 2 the output."""
    rows, columns = (2 * wide, hidden) if parameter == "gate_up_proj" else (hidden, wide)
    inner = ".base_layer" if parameter == "gate_up_proj" else ""
    path = f"model.layers.{layer}.mlp.experts{inner}"
    return module_tensors(path, rows, columns, EXPERTS * rank, seed=rows)


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_layout_of_old_peft_is_told_by_shapes(tmp_path: Path, parameters: list[str]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for parameter in parameters:
        tensors |= (mine := old_experts(1, parameter, 4))
        a, b = (tensor for _, tensor in sorted(mine.items()))
        a, b = a.view(EXPERTS, 4, -1), b.view(len(b), 4, EXPERTS)
        delta = 1.5 * torch.einsum("ore,eri->eio", b, a)  # PEFT 0.18's, [E, d1, d2] like the weight
        for expert, one in enumerate(delta):
            names = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
            for name, part in zip(names, one.chunk(len(names)), strict=True):
                expected[f"model.layers.1.mlp.experts.{expert}.{name}"] = part
    checkpoint = load_checkpoint(write_adapter(tmp_path, tensors), MIXTRAL)
    check_same(checkpoint, "mixtral", expected)


def test_all_zero_b_is_reported(tmp_path: Path) -> None:
    tensors = q_tensors(0) | {
        name: torch.zeros_like(t) if "lora_B" in name else t for name, t in q_tensors(2).items()
    }
    checkpoint = load_checkpoint(write_adapter(tmp_path, tensors), LLAMA)
    assert [str(LLAMA.sites[site]) for site in checkpoint.no_effect] == ["layers.2.q"]
    assert load_checkpoint(write_adapter(tmp_path, tensors, lora_alpha=0), LLAMA).no_effect == tuple(
        checkpoint.factors
    )


def test_facts(tmp_path: Path) -> None:
    tensors = q_tensors(0) | {name: tensor.bfloat16() for name, tensor in q_tensors(1).items()}
    checkpoint = load_checkpoint(write_adapter(tmp_path, tensors, base_model_name_or_path="x/y"), LLAMA)
    assert checkpoint.num_parameters == 2 * 2 * 4 * HIDDEN
    assert checkpoint.dtypes == ("BF16", "F32")
    assert checkpoint.config.base_model == "x/y"
    assert checkpoint.config.alpha == 6
    assert checkpoint.rank == 4


def test_digest_covers_weights_scaling_places_and_base(tmp_path: Path) -> None:
    def digest(tensors: dict[str, torch.Tensor], base: str = "base", **config: object) -> str:
        return load_checkpoint(
            write_adapter(tmp_path, tensors, **config), spec_of("llama", digest=base)
        ).digest

    plain = q_tensors()
    (a, b) = sorted(plain)
    first = digest(plain)
    assert len(bytes.fromhex(first)) == 32
    assert digest(plain, revision="main", lora_dropout=0.5) == first
    assert digest({name: tensor.half().float() for name, tensor in plain.items()}) == digest(
        {name: tensor.half() for name, tensor in plain.items()}
    )
    nudged = plain[b].clone()
    nudged[0, 0] += 1
    others = [
        digest(plain, lora_alpha=7),
        digest(plain, use_rslora=True),
        digest(plain, base="other"),
        digest({a: plain[a], b: nudged}),
        digest({a: plain[a], b: -plain[b] * 0}),
        digest({a: plain[a], b: plain[b] * 0}),
        digest({name.replace("layers.0", "layers.1"): tensor for name, tensor in plain.items()}),
        digest({name: tensor.bfloat16() for name, tensor in plain.items()}),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_bytes_that_were_checked_are_the_bytes_used(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_adapter(tmp_path, q_tensors()), LLAMA)
    (one,) = checkpoint.factors.values()
    before = one.a.clone()
    with (tmp_path / WEIGHTS).open("r+b") as file:  # a mapped file would change under us
        file.seek(-1000, 2)
        file.write(b"\x7f" * 1000)
    assert torch.equal(one.a, before)


def test_links_as_in_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs = write_adapter(tmp_path / "blobs", q_tensors())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(blobs / name)
    assert load_checkpoint(snapshot, LLAMA).digest == load_checkpoint(blobs, LLAMA).digest


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite_is_refused_by_name(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in (q_tensors(0) | q_tensors(1)).items()}
    tensors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"][3, 2] = bad
    write_adapter(tmp_path, tensors)
    with pytest.raises(
        AdapterRefused, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight' holds NaN or infinity"
    ):
        load_checkpoint(tmp_path, LLAMA)


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was opened",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path, q_tensors())
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).unlink()
    torch.save(Bomb(), tmp_path / name)
    with pytest.raises(AdapterRefused, match=f"{name} is a pickle, which can run code"):
        load_checkpoint(tmp_path, LLAMA)
    with pytest.raises(AdapterRefused, match=r"is not a directory .*pickles are never opened"):
        load_checkpoint(tmp_path / name, LLAMA)
    (tmp_path / WEIGHTS).write_bytes(weights)  # beside safetensors a pickle is no matter
    assert load_checkpoint(tmp_path, LLAMA).factors


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="nothing' is not a directory"):
        load_checkpoint(tmp_path / "nothing", LLAMA)
    with pytest.raises(AdapterRefused, match="is not a directory"):
        load_checkpoint(tmp_path / "x\0y", LLAMA)
    with pytest.raises(AdapterRefused, match=r"adapter_config\.json: missing"):
        load_checkpoint(tmp_path, LLAMA)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    with pytest.raises(AdapterRefused, match=r"adapter_model\.safetensors: missing"):
        load_checkpoint(tmp_path, LLAMA)
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(
        AdapterRefused, match=r"adapter_model\.safetensors: (not a regular file|cannot be read)"
    ):
        load_checkpoint(tmp_path, LLAMA)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """An adapter on every projection of every layer: a directory to damage, its config and its weights."""
    path = tmp_path_factory.mktemp("whole")
    peft_adapter("llama", path, target_modules="all-linear", r=2, rank_pattern={"q_proj": 3})
    tensors = load_file(path / WEIGHTS)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    return path, (path / CONFIG).read_bytes(), (path / WEIGHTS).read_bytes()


FLIPS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3)
FUZZ = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def flipped(content: bytes, flips: list[tuple[int, int]], end: int) -> bytes:
    damaged = bytearray(content)
    for at, value in flips:
        damaged[at % end] = value
    return bytes(damaged)


def factors_equal(a: LoraFactors, b: LoraFactors) -> bool:
    return torch.equal(a.a, b.a) and torch.equal(a.b, b.b) and a.scaling == b.scaling


@FUZZ
@given(flips=FLIPS)
def test_damaged_header_is_refused_or_harmless(
    whole: tuple[Path, bytes, bytes], flips: list[tuple[int, int]]
) -> None:
    path, config, weights = whole
    (path / CONFIG).write_bytes(config)
    (path / WEIGHTS).write_bytes(weights)
    sound = load_checkpoint(path, LLAMA)
    (path / WEIGHTS).write_bytes(flipped(weights, flips, 8 + int.from_bytes(weights[:8], "little")))
    try:
        found = load_checkpoint(path, LLAMA)
    except AdapterRefused:
        return
    assert found.digest == sound.digest
    assert all(factors_equal(found.factors[site], one) for site, one in sound.factors.items())


@FUZZ
@given(flips=FLIPS)
def test_damaged_config_is_refused_or_another_config(
    whole: tuple[Path, bytes, bytes], flips: list[tuple[int, int]]
) -> None:
    path, config, weights = whole
    (path / WEIGHTS).write_bytes(weights)
    (path / CONFIG).write_bytes(config)
    sound = load_checkpoint(path, LLAMA)
    damaged = flipped(config, flips, len(config))
    (path / CONFIG).write_bytes(damaged)
    try:
        found = load_checkpoint(path, LLAMA)
    except AdapterRefused:
        return
    same = parse_config(damaged).alpha == sound.config.alpha
    assert (found.digest == sound.digest) == same
    assert all(torch.equal(found.factors[site].b, one.b) for site, one in sound.factors.items())
