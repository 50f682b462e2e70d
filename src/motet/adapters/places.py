"""Where names in PEFT files lead to in a base: to one site, to gate and up together, or to all experts of a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from motet.types import ModelSpec, Site

STACKS = {
    "gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",), "gate_up_proj": ("gate", "up"),
    "w1": ("gate",), "w3": ("up",), "w2": ("down",),
}  # fmt: skip
"""The names, below a layer's experts, of tensors that hold one matrix for each of them."""


@dataclass(frozen=True, slots=True)
class Place:
    """The sites whose outputs one linear map stacks: mostly one, else gate and up.

    Gate is the first half of the outputs and up the second; with `interleaved` the even and the odd ones.
    """

    sites: tuple[int, ...]
    interleaved: bool = False

    def split(self, a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """From A [r, in] and B [out, r] of the map to A and B of each site; all have the same A."""
        count = len(self.sites)
        if self.interleaved:
            parts = tuple(b[first::count].contiguous() for first in range(count))
        else:
            parts = b.chunk(count)
        for site, part in zip(self.sites, parts, strict=True):
            yield site, a, part


@dataclass(frozen=True, slots=True)
class Stack:
    """What a name of all experts stands for: these modules, their outputs stacked, in every expert of the layer."""

    layer: int
    modules: tuple[str, ...]


class Places:
    """The names of a base: of linear maps in `modules`, of stacks in `stacks`, of PEFT's 3-D parameters in `fused`."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.fused = {fused.path: fused for fused in spec.fused}
        self.modules = {path: Place((index,)) for index, site in enumerate(spec.sites) for path in site.paths}
        self.num_experts = Counter(s.layer for s in spec.sites if s.expert >= 0 and s.module == "gate")
        self._where = {(site.layer, site.module, site.expert): index for index, site in enumerate(spec.sites)}
        self._interleaved = {fused.layer for fused in spec.fused if fused.interleaved}
        for fused in spec.fused:
            if fused.interleaved:
                self._add_modules_of_experts(fused.path, fused.layer)
        self.stacks = {
            f"{path}.{name}": Stack(layer, modules)
            for path, layer in self._experts()
            for name, modules in STACKS.items()
        }

    def _experts(self) -> Iterator[tuple[str, int]]:
        """The paths of modules that hold experts, and their layers."""
        for path, fused in self.fused.items():
            yield path, fused.layer
        for site in self.spec.sites:
            if site.expert == 0:
                for path in site.paths:
                    experts, _, number = path.rpartition(".")[0].rpartition(".")
                    if number == "0":
                        yield experts, site.layer

    def _add_modules_of_experts(self, path: str, layer: int) -> None:
        """Unsloth turns gpt-oss's parameters into one nn.Linear for each expert, outputs in the same order."""
        for expert in range(self.num_experts[layer]):
            self.modules[f"{path}.gate_up_projs.{expert}"] = self.expert(layer, expert, ("gate", "up"))
            self.modules[f"{path}.down_projs.{expert}"] = self.expert(layer, expert, ("down",))

    def expert(self, layer: int, expert: int, modules: tuple[str, ...]) -> Place:
        """Where `modules` of one expert are, as the base's own parameter stacks them."""
        sites = tuple(self._where[layer, module, expert] for module in modules)
        return Place(sites, interleaved=len(sites) > 1 and layer in self._interleaved)

    def experts(self, layer: int, modules: tuple[str, ...]) -> tuple[Place, ...]:
        """The same of all experts of a layer."""
        return tuple(self.expert(layer, expert, modules) for expert in range(self.num_experts[layer]))

    def shape(self, place: Place) -> tuple[int, int]:
        """(in, out) features of a place's map."""
        sites = [self.site(index) for index in place.sites]
        return sites[0].in_features, sum(site.out_features for site in sites)

    def site(self, index: int) -> Site:
        """The site in this position."""
        return self.spec.sites[index]
