"""Steps and weights on the CPU: computed in float32, every operation as `kernels` has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from motet.kernels.activation import Activation, silu_mul
from motet.kernels.attention import AttentionBatch, paged_attention
from motet.kernels.bfloat16 import Bfloat16Weight
from motet.kernels.kv_write import KVLayout, rotary_kv_write
from motet.kernels.latent_attention import latent_attention, latent_write, per_head
from motet.kernels.latent_lora import lora_key_query, lora_value
from motet.kernels.linear import PackedWeight, Weight
from motet.kernels.linear import linear as product
from motet.kernels.lora import LoraRows, LoraTable, Segment, lora_add, lora_embed
from motet.kernels.moe import ExpertLora, Experts, moe
from motet.kernels.mxfp4 import Mxfp4Weight
from motet.kernels.norm import add_rms_norm, head_rms_norm
from motet.kernels.route import RoutingRule
from motet.layers.batch import AttentionForm, FourBit, LatentForm, LinearMap


@dataclass(frozen=True)
class LoraBatch:
    """The adapters of a step: the pointer table, the rows that carry one, and each row's slot ([T] int32, -1 base).

    `segments` are the runs of rows of one adapter, `rows` the same as the kernels take them; `head_rows` are the rows
    whose logits are wanted, counted among themselves.
    """

    table: LoraTable
    segments: Sequence[Segment]
    rows: LoraRows
    head_rows: LoraRows
    slots: Tensor


@dataclass(frozen=True)
class KVBatch:
    """A step in one KV group: slots [T] int32 (page · page tokens + offset) where each row's KV goes, and attention."""

    slots: Tensor
    attention: AttentionBatch


@dataclass(frozen=True)
class CpuBatch:
    """tokens [T] int64, positions [T] int32, a KVBatch for each of the model's KV groups, logit_rows [S] int64.

    `lora` is None when no row carries an adapter: then no LoRA kernel is launched at all.
    """

    tokens: Tensor
    positions: Tensor
    groups: Sequence[KVBatch]
    kv: KVLayout
    logit_rows: Tensor
    lora: LoraBatch | None

    def embed(self, table: Tensor, site: int) -> Tensor:
        x = torch.nn.functional.embedding(self.tokens, table).float()
        if self.lora is not None:
            lora_embed(x, self.tokens, len(table), self.lora.table, site, self.lora.segments)
        return x

    def begin(self, layer: int) -> None:
        """All of an adapter is there before a step begins that uses it."""

    def norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def norm_route(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, router: LinearMap, _rule: RoutingRule
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, residual = self.norm(x, residual, weight, eps)
        return x, residual, self.linear(x, router)

    def norm_columns(self, x: Tensor, weight: Tensor, eps: float) -> None:
        head_rms_norm(x, 0, 1, weight, eps)

    def linear(self, x: Tensor, linear: LinearMap) -> Tensor:
        if self.lora is None:
            return _base(x, linear)
        table, rows, weight = self.lora.table, self.lora.rows, linear.weight
        plain = table.observer is None and linear.bias is None and len(rows.blocks) > 0
        if plain and isinstance(weight, Bfloat16Weight) and weight.unpacks(x):
            y = weight.adapted(x, table, linear.site, linear.widths, rows.blocks)
            rows = rows.singles
        else:
            y = _base(x, linear)
        lora_add(y, x, table, linear.site, linear.widths, rows)
        return y

    def wanted(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, CpuBatch]:
        rows = self.logit_rows
        if len(rows) == len(x):  # each in its place
            return x, residual, self
        lora = self.lora
        if lora is not None:
            lora = replace(lora, segments=(), rows=lora.head_rows, slots=lora.slots[rows])
        return x[rows], residual[rows], replace(self, lora=lora)

    def silu_mul(self, h: Tensor) -> Tensor:
        return silu_mul(h)

    def attention(self, x: Tensor, linear: LinearMap, form: AttentionForm) -> Tensor:
        qkv = self.linear(x, linear)
        heads, place, rotary = form.heads, form.place, form.rotary
        if form.norms is not None:
            head_rms_norm(qkv, 0, heads.num, form.norms.q, form.norms.eps)
            head_rms_norm(qkv, heads.num, self.kv.num_kv_heads, form.norms.k, form.norms.eps)
        if form.temperature is not None:
            qkv[:, : heads.num * self.kv.head_dim] *= form.temperature[self.positions][:, None]
        group = self.groups[place.group]
        rotary_kv_write(
            qkv, self.positions, group.slots, rotary.cos, rotary.sin, self.kv, place.index, heads.num,
            rotary.interleaved,
        )  # fmt: skip
        return paged_attention(qkv, self.kv, place.index, group.attention, heads)

    def latent_attention(self, q: Tensor, z: Tensor, column: int, form: LatentForm) -> Tensor:
        heads, place, rotary = form.heads, form.place, form.rotary
        group = self.groups[place.group]
        per = q[:, : heads.num * (heads.nope + heads.rope)].unflatten(1, (heads.num, -1))
        query = torch.empty(len(q), heads.num, heads.rank + heads.rope)
        query[..., : heads.rank] = per_head(per[..., : heads.nope], form.keys)
        if self.lora is not None:
            lora_key_query(query, per, heads, self.lora.table, form.site, self.lora.segments)
        latent_write(
            q, z, column, query, self.positions, group.slots, rotary.cos, rotary.sin, form.norm, form.eps, self.kv,
            place.index, heads, rotary.interleaved,
        )  # fmt: skip
        o = latent_attention(query, self.kv, place.index, group.attention, heads)
        v = per_head(o, form.values).contiguous()
        if self.lora is not None:
            lora_value(v, o, heads, self.lora.table, form.site, self.lora.segments)
        return v.flatten(1)

    def experts(
        self,
        x: Tensor,
        routing: Tensor,
        rule: RoutingRule,
        experts: Experts,
        site: int,
        shared: Tensor | None,
    ) -> Tensor:
        lora = None if self.lora is None else ExpertLora(self.lora.table, site, self.lora.slots)
        out = moe(x, routing, rule, experts, lora)
        return out if shared is None else out.add_(shared)


def _base(x: Tensor, linear: LinearMap) -> Tensor:
    y = product(x, linear.weight)
    if linear.bias is not None:
        y += linear.bias
    return y


class CpuDevice:
    """Weights as the CPU's products take them."""

    def tensor(self, tensor: Tensor) -> Tensor:
        """Matrices in bfloat16 stay mapped until they are packed."""
        return tensor if tensor.dtype == torch.bfloat16 and tensor.dim() > 1 else tensor.float()

    def bytes(self, tensor: Tensor) -> Tensor:
        """They stay mapped until they are copied into their order."""
        return tensor

    def vector(self, tensor: Tensor) -> Tensor:
        return tensor.float()

    def table(self, tensor: Tensor) -> Tensor:
        """It stays mapped: only rows that are looked up come into memory."""
        return tensor

    def matrix(self, tensor: Tensor) -> Weight:
        return Bfloat16Weight(tensor) if tensor.dtype == torch.bfloat16 else PackedWeight(tensor)

    def per_head(self, tensor: Tensor) -> Tensor:
        return tensor.float().contiguous()

    def experts(
        self,
        gate_up: Iterable[Tensor] | FourBit,
        down: Iterable[Tensor] | FourBit,
        activation: Activation,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Experts:
        first, second = (None if bias is None else bias.float() for bias in (gate_up_bias, down_bias))
        return Experts(self._matrices(gate_up), self._matrices(down), first, second, activation)

    def _matrices(self, weights: Iterable[Tensor] | FourBit) -> Sequence[Weight]:
        if isinstance(weights, FourBit):
            pairs = zip(weights.codes, weights.scales, strict=True)
            return [Mxfp4Weight(codes, scales) for codes, scales in pairs]
        return [self.matrix(weight) for weight in weights]
