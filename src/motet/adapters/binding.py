"""From the names and shapes of a PEFT file's tensors to the base's sites, before any weight is read.

    pair                                            bound by
    <path of a site>: A [r, in], B [out, r]         ModuleBinding
    one factor [1, …] common to all experts         ModuleBinding, for each expert
    <experts>: PEFT's 3-D parameters                ParameterBinding (experts.py, with the algebra)
    <experts>.<name>: stacks of matrices            StackBinding (experts.py)

The embedding is a map of one-hot tokens: lora_embedding_A is A [r, V], lora_embedding_B is B [H, r]. What base a site
exists in is the base's own matter: this module knows no architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from motet.adapters.experts import ParameterBinding, StackBinding, bind_parameters, bind_stack
from motet.adapters.pairs import WRAPPER, Pair, pair_up, scaling_of
from motet.adapters.peft_config import LoraConfig, show
from motet.adapters.places import Place, Places
from motet.adapters.safetensors_check import TensorInfo, refused
from motet.types import ModelSpec


@dataclass(frozen=True, slots=True)
class ModuleBinding:
    """A pair that belongs to one linear map."""

    place: Place
    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def places(self) -> tuple[Place, ...]:
        """The one place."""
        return (self.place,)

    def split(self, a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """From the tensors of `a` and `b` to A [r, in] and B [out, r] of each site."""
        return self.place.split(a.view(a.shape[-2:]), b.view(b.shape[-2:]))


Binding = ModuleBinding | ParameterBinding | StackBinding


def bind(tensors: Sequence[TensorInfo], spec: ModelSpec, config: LoraConfig) -> list[Binding]:
    """Give every tensor of a file to sites of the base, each site at most once.

    AdapterRefused names the first tensor without a place, of a wrong shape, or of a rank that the config does
    not state.
    """
    places = Places(spec)
    bindings: list[Binding] = []
    parameters: list[Pair] = []
    for pair in pair_up(tensors, config):
        if pair.path in places.fused:
            parameters.append(pair)
        elif pair.path in places.stacks and not pair.wrappers:
            bindings.append(bind_stack(pair, places, config))
        else:
            bindings.append(_bind_module(pair, places, config))
    bindings += bind_parameters(parameters, places, config)
    _check_once(bindings, spec)
    _check_all_experts(bindings, places)
    return bindings


def _bind_module(pair: Pair, places: Places, config: LoraConfig) -> ModuleBinding:
    place = places.modules.get(pair.path)
    if place is None or pair.wrappers:
        path = pair.path + WRAPPER * pair.wrappers
        raise refused(f"tensor {pair.a}: {places.spec.name} has no linear map {show(path)}")
    is_embedding = places.site(place.sites[0]).module == "embed"
    if is_embedding != pair.embedding:
        raise refused(
            f"tensor {pair.a}: factors of an embedding, and no others, are named lora_embedding_A and _B; "
            f"{show(pair.path)} is {'an' if is_embedding else 'no'} embedding"
        )
    (depth, width), rank = places.shape(place), pair.rank
    for factor, info, shape in (("A", pair.a, (rank, depth)), ("B", pair.b, (width, rank))):
        needed = (1, *shape) if pair.shared == factor else shape
        if info.shape != needed:
            raise refused(
                f"tensor {info} has shape {list(info.shape)}, {places.spec.name} needs {list(needed)}"
            )
    return ModuleBinding(place, pair.a, pair.b, scaling_of(pair, config.targeted(pair.path), rank, config))


def _check_once(bindings: Sequence[Binding], spec: ModelSpec) -> None:
    owner: dict[int, TensorInfo] = {}
    for binding in bindings:
        for site in (site for place in binding.places for site in place.sites):
            if site in owner:
                raise refused(f"tensors {owner[site]} and {binding.a} both adapt {spec.sites[site]}")
            owner[site] = binding.a


def _check_all_experts(bindings: Sequence[Binding], places: Places) -> None:
    """A factor that experts have in common has a partner in every one: else some of the file is missing."""
    partners: Counter[str] = Counter()
    common: dict[str, ModuleBinding] = {}
    for binding in bindings:
        for info in (binding.a, binding.b):
            if isinstance(binding, ModuleBinding) and len(info.shape) == 3:
                partners[info.name] += 1
                common[info.name] = binding
    for name, count in partners.items():
        experts = places.num_experts[places.site(common[name].place.sites[0]).layer]
        if count != experts:
            raise refused(
                f"tensor {show(name)} is for all {experts} experts, of which {count} have a factor of their own"
            )
