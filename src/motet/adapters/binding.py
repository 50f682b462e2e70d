"""From the names and shapes of a PEFT file's tensors to the base's sites, before any weight is read.

    base_model.model.<path>.lora_A[.<adapter>].weight
        a module: A [r, in], B [out, r]
    base_model.model.<path>(.base_layer)*.lora_A[.<adapter>].weight
        by PEFT's target_parameters, a 3-D parameter of the module <path> that holds E experts

A module with two adapted parameters has nested wrappers whose names do not tell which is which, and PEFT laid
a parameter [E, d1, d2] out in two ways. With hidden size H, intermediate size I and rank r:

                          A            B                delta of expert e, as the linear map [out, in]
    PEFT >= 0.19          [E·r, d2]    [d1, r·E]        B_e @ A_e
    PEFT <  0.19          [E·r, d1]    [d2, r·E]        (B_e @ A_e).T
    A_e = A.view(E, r, -1)[e], B_e = B.view(-1, r, E)[:, :, e]
    gate_up_proj is [E, 2I, H], gate over up; down_proj is [E, H, I]

Shapes decide. One file was written by one PEFT, so a layout must fit all its parameters; if both do (H = I or
H = 2I and nothing else tells) the adapter is refused: a wrong guess would serve a wrong model without a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from motet.adapters.peft_config import LoraConfig, show
from motet.adapters.safetensors_check import TensorInfo, refused
from motet.types import FusedExperts, ModelSpec

PREFIX = "base_model.model."
WRAPPER = ".base_layer"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
MAX_MATCHING = 10_000_000  # microseconds; 10 regular expressions on 20,000 modules

_FOREIGN = (
    (".lora_magnitude_vector", "a DoRA magnitude"),
    (".lora_embedding_", "LoRA on an embedding"),
    (".lora_diag", "a KaSA diagonal"),
    (".modules_to_save.", "a fully trained module (modules_to_save)"),
    (".original_module.", "a fully trained module (modules_to_save)"),
    (".token_adapter.", "trained embedding rows (trainable_token_indices)"),
    ("trainable_tokens", "trained embedding rows (trainable_token_indices)"),
    (".bias", "a bias"),
    ("embed_tokens", "embedding weights"),
    ("lm_head", "weights of the output head"),
)
"""Parts of tensor names that stand for something known but not supported."""


class Name(NamedTuple):
    """A tensor name in parts: the module's path, how many wrappers lie around the factor's, and A or B."""

    path: str
    wrappers: int
    factor: str


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one wrapper."""

    path: str
    wrappers: int
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True)
class ModuleBinding:
    """A pair that belongs to one site."""

    site: int
    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def all_sites(self) -> list[int]:
        """The site."""
        return [self.site]


@dataclass(frozen=True, slots=True)
class ExpertsBinding:
    """A pair that belongs to all experts of a layer.

    `sites[e]` are the sites of expert e whose outputs are stacked in the parameter: (gate, up) or (down,).
    `transposed` says that B holds the input side (PEFT < 0.19).
    """

    sites: tuple[tuple[int, ...], ...]
    a: TensorInfo
    b: TensorInfo
    rank: int
    transposed: bool
    scaling: float

    @property
    def all_sites(self) -> list[int]:
        """The sites of all experts."""
        return [site for sites in self.sites for site in sites]


Binding = ModuleBinding | ExpertsBinding


def split_name(info: TensorInfo) -> Name:
    """The parts of a tensor's name. AdapterRefused says what the tensor is instead of a LoRA factor."""
    name = info.name
    for factor in "AB":
        path, marker, suffix = name.rpartition(f".lora_{factor}.")
        # the suffix is "weight", or "<adapter>.weight" as some training frameworks leave it
        if (
            marker
            and path.startswith(PREFIX)
            and suffix.split(".")[-1] == "weight"
            and suffix.count(".") <= 1
        ):
            path = path.removeprefix(PREFIX)
            bare = path
            while bare.endswith(WRAPPER):
                bare = bare.removesuffix(WRAPPER)
            if bare:
                return Name(bare, (len(path) - len(bare)) // len(WRAPPER), factor)
    what = next((meaning for part, meaning in _FOREIGN if part in name), None)
    if what is None:
        raise refused(f"unknown tensor {info}; expected {PREFIX}<module>.lora_A.weight or lora_B")
    raise refused(f"tensor {info} is {what}, which is not supported")


def pair_up(tensors: Sequence[TensorInfo], config: LoraConfig) -> list[Pair]:
    """Match every A with its B.

    AdapterRefused names a tensor that is alone, doubled or not a matrix. It is also raised when the config has more
    patterns than can be tried on so many modules.
    """
    found: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    for info in tensors:
        path, wrappers, factor = split_name(info)
        if len(info.shape) != 2 or info.size == 0:
            raise refused(f"tensor {info} has shape {list(info.shape)}, not a matrix's")
        factors = found.setdefault((path, wrappers), {})
        if factor in factors:
            raise refused(f"tensors {factors[factor]} and {info} are the same factor")
        factors[factor] = info
    if not found:
        raise refused("no LoRA tensors")
    if (config.ranks.cost + config.alphas.cost) * len(found) > MAX_MATCHING:
        raise refused(f"too many rank and alpha patterns to match with {len(found)} modules")
    pairs = []
    for (path, wrappers), factors in found.items():
        if len(factors) == 1:
            ((factor, info),) = factors.items()
            raise refused(f"tensor {info} has no lora_{'B' if factor == 'A' else 'A'} beside it")
        pairs.append(Pair(path, wrappers, factors["A"], factors["B"]))
    return pairs


def bind(tensors: Sequence[TensorInfo], spec: ModelSpec, config: LoraConfig) -> list[Binding]:
    """Give every tensor of a file to sites of the base, each site at most once.

    AdapterRefused names the first tensor without a place, of a wrong shape, or of a rank that the config does
    not state.
    """
    pairs = pair_up(tensors, config)
    experts = {fused.path: fused for fused in spec.fused}
    paths = {path: index for index, site in enumerate(spec.sites) for path in site.paths}
    bindings: list[Binding] = [
        _bind_module(pair, paths, spec, config) for pair in pairs if pair.path not in experts
    ]
    bindings += _bind_experts([pair for pair in pairs if pair.path in experts], experts, spec, config)
    _check_once(bindings, spec)
    return bindings


def _bind_module(pair: Pair, paths: dict[str, int], spec: ModelSpec, config: LoraConfig) -> ModuleBinding:
    index = paths.get(pair.path)
    if index is None or pair.wrappers:
        raise refused(f"tensor {pair.a}: {_no_place(pair, spec)}")
    site = spec.sites[index]
    rank = pair.a.shape[0]
    _check_shape(pair.a, (rank, site.in_features), spec)
    _check_shape(pair.b, (site.out_features, rank), spec)
    return ModuleBinding(index, pair.a, pair.b, _scaling(pair, rank, pair.path, config))


def _no_place(pair: Pair, spec: ModelSpec) -> str:
    leaf = pair.path.rpartition(".")[2]
    if leaf in ("gate", "router"):
        return "adapting the router of a mixture of experts is not supported"
    if leaf in ("lm_head", "embed_tokens", "wte"):
        return f"adapting {leaf} is not supported"
    return f"{spec.name} has no linear map {show(pair.path)}"


def _check_shape(info: TensorInfo, expected: tuple[int, int], spec: ModelSpec) -> None:
    if info.shape != expected:
        raise refused(f"tensor {info} has shape {list(info.shape)}, {spec.name} needs {list(expected)}")


def _scaling(pair: Pair, rank: int, module: str, config: LoraConfig) -> float:
    """The scaling of a module whose rank is the stated one."""
    stated = config.rank(module)
    if rank != stated:
        raise refused(f"tensor {pair.a} has rank {rank}, the config states {stated} for it")
    return config.scaling(module, rank)


def _bind_experts(
    pairs: list[Pair], experts: dict[str, FusedExperts], spec: ModelSpec, config: LoraConfig
) -> list[ExpertsBinding]:
    if not pairs:
        return []
    where = {(site.layer, site.module, site.expert): index for index, site in enumerate(spec.sites)}
    sizes = {}
    for path, fused in experts.items():
        gate = spec.sites[where[fused.layer, "gate", 0]]
        sizes[path] = gate.in_features, gate.out_features
    fits = {transposed: _parameters(pairs, sizes, transposed) for transposed in (False, True)}
    possible = [transposed for transposed, parameters in fits.items() if parameters is not None]
    if not possible:
        raise refused(_unfit(pairs, sizes))
    if len(possible) == 2:
        hidden, wide = sizes[pairs[0].path]
        raise refused(
            f"tensor {pairs[0].a}: with hidden size {hidden} and intermediate size {wide} its shape "
            "fits the layout of PEFT before 0.19 and that of later versions; adapt gate_up_proj and "
            "down_proj together, or save the adapter per expert"
        )
    transposed = possible[0]
    parameters = fits[transposed]
    assert parameters is not None
    bindings = []
    for pair, parameter in zip(pairs, parameters, strict=True):
        fused = experts[pair.path]
        modules = ("gate", "up") if parameter == GATE_UP else ("down",)
        sites = tuple(
            tuple(where[fused.layer, module, expert] for module in modules)
            for expert in range(fused.num_experts)
        )
        name = f"{pair.path}.{parameter}"  # what PEFT matches patterns against
        rank = _expert_rank(pair, fused.num_experts)
        scaling = _scaling(pair, rank, name, config)
        bindings.append(ExpertsBinding(sites, pair.a, pair.b, rank, transposed, scaling))
    return bindings


def _parameters(pairs: list[Pair], sizes: dict[str, tuple[int, int]], transposed: bool) -> list[str] | None:
    """The parameter of each pair if all were written in this layout, else None."""
    found: list[str] = []
    taken: set[tuple[str, str]] = set()
    for pair in pairs:
        hidden, wide = sizes[pair.path]
        sides = pair.a.shape[1], pair.b.shape[0]  # (in, out), or (out, in) when transposed
        sides = sides[::-1] if transposed else sides
        parameter = {(hidden, 2 * wide): GATE_UP, (wide, hidden): DOWN}.get(sides)
        if parameter is None or (pair.path, parameter) in taken:
            return None
        taken.add((pair.path, parameter))
        found.append(parameter)
    return found


def _unfit(pairs: list[Pair], sizes: dict[str, tuple[int, int]]) -> str:
    for pair in pairs:
        if all(_parameters([pair], sizes, transposed) is None for transposed in (False, True)):
            hidden, wide = sizes[pair.path]
            return (
                f"tensors {pair.a} {list(pair.a.shape)} and {pair.b} {list(pair.b.shape)} fit neither "
                f"gate_up_proj nor down_proj of experts of hidden size {hidden}, intermediate size {wide}"
            )
    return f"tensor {pairs[0].a} and its neighbours do not fit one layout of gate_up_proj and down_proj"


def _expert_rank(pair: Pair, num_experts: int) -> int:
    rows, columns = pair.a.shape[0], pair.b.shape[1]
    if rows != columns or rows % num_experts:
        raise refused(
            f"tensors {pair.a} {list(pair.a.shape)} and {pair.b} {list(pair.b.shape)} do not hold one "
            f"rank for each of {num_experts} experts"
        )
    return rows // num_experts


def _check_once(bindings: list[Binding], spec: ModelSpec) -> None:
    owner: dict[int, TensorInfo] = {}
    for binding in bindings:
        for site in binding.all_sites:
            if site in owner:
                raise refused(f"tensors {owner[site]} and {binding.a} both adapt {spec.sites[site]}")
            owner[site] = binding.a
