"""What layers ask of a device: a step's work on it, and weights put on it. `cpu` and `gpu` answer.

The step is an argument all the way down. It knows its rows, their pages and their adapters; a layer knows its weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from motet.kernels.activation import Activation
from motet.kernels.attention import Heads
from motet.kernels.latent_attention import LatentHeads
from motet.kernels.route import RoutingRule
from motet.layers.rotary import Rotary

Branch = Any
"""What attention or feed-forward adds to the residual stream: [T, H], or what a device can still add up to it."""
Matrix = Any
"""A weight [N, K] in the form in which a device multiplies by it."""
ExpertSet = Any
"""The weights of a layer's experts, likewise."""
Routing = Any
"""Router scores [T, E], or what a device made of them for its experts."""


@dataclass(frozen=True)
class LinearMap:
    """One weight holding projections that read the same input, side by side (q k v, or gate and up).

    `site` is the adapter table's index of the first, the others follow; `widths` are their output features; `bias` is
    [sum(widths)].
    """

    weight: Matrix
    site: int
    widths: tuple[int, ...]
    bias: Tensor | None = None


@dataclass(frozen=True)
class KVPlace:
    """Where a layer's KV lives: its KV group, and its index among the group's layers."""

    group: int
    index: int


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm weights [head dim] for every q head and every k head."""

    q: Tensor
    k: Tensor
    eps: float


@dataclass(frozen=True)
class AttentionForm:
    """How a layer attends. `temperature` [max positions], if given, multiplies each query by its position's value."""

    rotary: Rotary
    place: KVPlace
    heads: Heads
    norms: HeadNorms | None = None
    temperature: Tensor | None = None


@dataclass(frozen=True)
class LatentForm:
    """How a layer attends among latents: the latent's norm, each head's keys [Hq, nope, rank] and values
    [Hq, rank, value] as functions of it, and the site of the projection that they are of."""

    norm: Tensor
    eps: float
    keys: Tensor
    values: Tensor
    site: int
    rotary: Rotary
    place: KVPlace
    heads: LatentHeads


@dataclass(frozen=True)
class FourBit:
    """Matrices [E, N, K] in MXFP4 (`kernels.mxfp4`): codes [E, N, K / 2] and scales [E, N, K / 32], uint8."""

    codes: Tensor
    scales: Tensor


class Batch(Protocol):
    """One step's work. T are its rows, S those of which logits are wanted."""

    def embed(self, table: Tensor, site: int) -> Tensor:
        """Hidden states [T, H] of the step's tokens."""

    def begin(self, layer: int) -> None:
        """What follows needs this layer of the step's adapters, and for the last one the head too."""

    def norm(self, x: Branch, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(RMSNorm of the sum, the sum [T, H]); `residual` None means zeros, else it may be overwritten."""

    def norm_columns(self, x: Tensor, weight: Tensor, eps: float) -> None:
        """RMSNorm of the first len(weight) columns of x, in place."""

    def norm_route(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, router: LinearMap, rule: RoutingRule
    ) -> tuple[Tensor, Tensor, Routing]:
        """What `norm` gives, and how the normalised rows are routed."""

    def linear(self, x: Tensor, linear: LinearMap) -> Tensor:
        """x [T, K] to [T, sum(widths)], adapters included."""

    def wanted(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Batch]:
        """The rows of x and residual whose logits are wanted, [S, ·], and the step of these rows only."""

    def silu_mul(self, h: Tensor) -> Tensor:
        """silu(gate) · up of the two halves of h."""

    def attention(self, x: Tensor, linear: LinearMap, form: AttentionForm) -> Tensor:
        """Queries, keys and values of x [T, K], keys and values to their pages, and attention: [T, Hq·D]."""

    def latent_attention(self, q: Tensor, z: Tensor, column: int, form: LatentForm) -> Tensor:
        """Attention among latents, [T, Hq·value]: q's first columns are the queries, z's from `column` on the latent
        and the rotating key."""

    def experts(
        self,
        x: Tensor,
        routing: Routing,
        rule: RoutingRule,
        experts: ExpertSet,
        site: int,
        shared: Tensor | None,
    ) -> Branch:
        """The mixture of experts that `norm_route` chose, plus `shared` [T, H].

        Expert e's gate, up and down are table sites `site + 3·e` and the two after it.
        """


class Device(Protocol):
    """Where weights go, and in what form."""

    def tensor(self, tensor: Tensor) -> Tensor:
        """A weight as it is taken from a file, in the dtype of products."""

    def bytes(self, tensor: Tensor) -> Tensor:
        """Codes of a packed format, mapped from their file."""

    def vector(self, tensor: Tensor) -> Tensor:
        """Small weights and tables, float32."""

    def table(self, tensor: Tensor) -> Tensor:
        """The embedding, mapped from its file."""

    def matrix(self, tensor: Tensor) -> Matrix:
        """A weight [N, K] that `tensor` gave."""

    def per_head(self, tensor: Tensor) -> Tensor:
        """Matrices [Hq, K, N], one for each head, of a weight that `tensor` gave."""

    def experts(
        self,
        gate_up: Iterable[Tensor] | FourBit,
        down: Iterable[Tensor] | FourBit,
        activation: Activation,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> ExpertSet:
        """Each expert's [2·I, H], gate over up, and [H, I]; biases [E, 2·I] and [E, H]."""
