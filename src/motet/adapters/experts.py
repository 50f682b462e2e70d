"""Adapters of all experts of a layer in one pair of tensors.

By PEFT's target_parameters, on a 3-D parameter [E, d1, d2] of the module <experts>:

    <experts>(.base_layer)*.lora_A.weight        nested wrappers around a module with two adapted parameters, whose
                                                 names do not tell which is which

With A_e = A.view(E, r, -1)[e], B_e = B.view(-1, r, E)[:, :, e], and the linear map [out, in] = scaling · …

                 A            B             linear map of expert e
    straight     [E·r, in]    [out, r·E]    B_e @ A_e
    swapped      [E·r, out]   [in, r·E]     (B_e @ A_e).T

    d1, d2       of                         straight is written by          swapped is written by
    out, in      most models                PEFT >= 0.19.1                  PEFT <= 0.19.0
    in, out      Llama 4, unmarked          PEFT <= 0.19.0                  PEFT >= 0.19.1
    in, out      gpt-oss, unmarked          PEFT <= 0.19.0                  PEFT >= 0.19.1
    in, out      gpt-oss, marked            PEFT <= 0.18, >= 0.19.1         PEFT 0.19.0

in, out are H, 2I of gate_up_proj and I, H of down_proj. Marked is a module that has is_transposed: gpt-oss's has it in
transformers 5.23 and not in 4.55, and no adapter says which it was. So shapes decide, not versions. One file was
written by one PEFT, so one layout must fit all its parameters; if both do (H = I or H = 2I and nothing else tells) the
adapter is refused: a wrong guess would serve a wrong model without a sign. Megatron-Bridge writes the straight layout
for vLLM with a dimension more, A [E, r, in] and B [out, r, E].

As stacks of matrices, of which the first dimension of A, of B or of both may be 1 (a factor that all experts share):

    <experts>.<name>.lora_A.weight [E, r, in]    <experts>.<name>.lora_B.weight [E, out, r]

                 name                                 written by
                 w1 (gate), w3 (up), w2 (down)        Tinker; A of w1 and w3 and B of w2 are shared
                 gate_proj, up_proj, down_proj        Megatron-Bridge, SGLang, and for gpt-oss and the like
                 gate_up_proj, down_proj              the same; B of gate_up_proj is [E, 2I, r]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from motet.adapters.pairs import Pair, scaling_of
from motet.adapters.peft_config import LoraConfig
from motet.adapters.places import Place, Places
from motet.adapters.safetensors_check import TensorInfo, refused

PARAMETERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclass(frozen=True, slots=True)
class ParameterBinding:
    """A pair that PEFT's target_parameters made for a parameter of all experts; `places[e]` is expert e's."""

    places: tuple[Place, ...]
    a: TensorInfo
    b: TensorInfo
    rank: int
    swapped: bool
    scaling: float

    def split(self, a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """From the tensors of `a` and `b` to A [r, in] and B [out, r] of each site."""
        experts = len(self.places)
        rows = a.view(experts, self.rank, -1)
        columns = b.view(-1, self.rank, experts)
        if self.swapped:
            rows, columns = columns.permute(2, 1, 0).contiguous(), rows.transpose(1, 2).contiguous()
        else:
            columns = columns.permute(2, 0, 1).contiguous()
        for place, one_a, one_b in zip(self.places, rows, columns, strict=True):
            yield from place.split(one_a, one_b)


@dataclass(frozen=True, slots=True)
class StackBinding:
    """A pair of stacks, one matrix for each expert or one for all; `places[e]` is expert e's."""

    places: tuple[Place, ...]
    a: TensorInfo
    b: TensorInfo
    scaling: float

    def split(self, a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """From the tensors of `a` and `b` to A [r, in] and B [out, r] of each site."""
        all_a, all_b = list(a), list(b)
        for expert, place in enumerate(self.places):
            yield from place.split(all_a[expert % len(all_a)], all_b[expert % len(all_b)])


def bind_stack(pair: Pair, places: Places, config: LoraConfig) -> StackBinding:
    """The binding of a pair of stacks. AdapterRefused names a tensor of a wrong shape or rank."""
    stack = places.stacks[pair.path]
    found = places.experts(stack.layer, stack.modules)
    if found[0].interleaved:
        raise refused(
            f"tensor {pair.b}: the base's gate_up_proj alternates outputs of gate and up, and nothing says whether "
            "this tensor does; save gate and up apart, as w1 and w3 or gate_proj and up_proj"
        )
    (depth, width), rank = places.shape(found[0]), pair.rank
    for info, shape in ((pair.a, (rank, depth)), (pair.b, (width, rank))):
        if info.shape not in ((1, *shape), (len(found), *shape)):
            raise refused(
                f"tensor {info} has shape {list(info.shape)}, {places.spec.name} needs "
                f"{[len(found), *shape]}, or {[1, *shape]} for all experts"
            )
    return StackBinding(found, pair.a, pair.b, scaling_of(pair, pair.path, rank, config))


def bind_parameters(pairs: Sequence[Pair], places: Places, config: LoraConfig) -> list[ParameterBinding]:
    """The bindings of all pairs of PEFT's target_parameters on experts.

    AdapterRefused says which tensors fit no parameter, or why the layout is not clear.
    """
    if not pairs:
        return []
    fits = {swapped: _parameters(pairs, places, swapped) for swapped in (False, True)}
    possible = [(swapped, parameters) for swapped, parameters in fits.items() if parameters is not None]
    if not possible:
        raise refused(_unfit(pairs, places))
    if len(possible) == 2:
        raise refused(_unclear(pairs[0], places))
    ((swapped, parameters),) = possible
    bindings = []
    for pair, parameter in zip(pairs, parameters, strict=True):
        fused = places.fused[pair.path]
        rank = _rank(pair, fused.num_experts)
        scaling = scaling_of(pair, f"{pair.path}.{parameter}", rank, config)  # the name that patterns match
        found = places.experts(fused.layer, PARAMETERS[parameter])
        bindings.append(ParameterBinding(found, pair.a, pair.b, rank, swapped, scaling))
    return bindings


def _sizes(path: str, places: Places) -> tuple[int, int]:
    """Hidden size and intermediate size of the experts."""
    return places.shape(places.expert(places.fused[path].layer, 0, ("gate",)))


def _parameters(pairs: Sequence[Pair], places: Places, swapped: bool) -> list[str] | None:
    """The parameter of each pair if all were written in this layout, else None."""
    found: list[str] = []
    taken: set[tuple[str, str]] = set()
    for pair in pairs:
        hidden, wide = _sizes(pair.path, places)
        sides = pair.a.shape[-1], pair.b.shape[0]  # (in, out), or (out, in) when swapped
        sides = sides[::-1] if swapped else sides
        parameter = {(hidden, 2 * wide): "gate_up_proj", (wide, hidden): "down_proj"}.get(sides)
        if parameter is None or (pair.path, parameter) in taken:
            return None
        taken.add((pair.path, parameter))
        found.append(parameter)
    return found


def _unfit(pairs: Sequence[Pair], places: Places) -> str:
    for pair in pairs:
        if all(_parameters([pair], places, swapped) is None for swapped in (False, True)):
            hidden, wide = _sizes(pair.path, places)
            return (
                f"tensors {pair.a} {list(pair.a.shape)} and {pair.b} {list(pair.b.shape)} fit neither "
                f"gate_up_proj nor down_proj of experts of hidden size {hidden}, intermediate size {wide}"
            )
    return f"tensor {pairs[0].a} and its neighbours do not fit one layout of gate_up_proj and down_proj"


def _unclear(pair: Pair, places: Places) -> str:
    hidden, wide = _sizes(pair.path, places)
    transposed = places.fused[pair.path].transposed
    why = "how transformers marked the module" if transposed else "whether PEFT was older than 0.19.1"
    return (
        f"tensor {pair.a}: with hidden size {hidden} and intermediate size {wide} its shape fits two layouts, A on the "
        f"inputs and A on the outputs, and no other tensor tells which ({why} decided it); adapt gate_up_proj and "
        "down_proj together, or save the adapter per expert"
    )


def _rank(pair: Pair, num_experts: int) -> int:
    rows, columns = math.prod(pair.a.shape[:-1]), math.prod(pair.b.shape[1:])
    flat = len(pair.a.shape) == len(pair.b.shape) == 2
    deep = pair.a.shape[0] == pair.b.shape[-1] == num_experts and len(pair.a.shape) == len(pair.b.shape) == 3
    if rows != columns or rows % num_experts or not (flat or deep):
        raise refused(
            f"tensors {pair.a} {list(pair.a.shape)} and {pair.b} {list(pair.b.shape)} do not hold one "
            f"rank for each of {num_experts} experts"
        )
    return rows // num_experts
