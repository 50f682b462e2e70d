"""Steps and weights on a GPU: bfloat16 products, a float32 residual stream, every operation as `kernels.gpu` has it.

All shapes follow from the number of rows, and what varies from step to step is data in tensors, so a step can be
captured in a graph once and replayed for every batch of its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from motet.kernels.activation import Activation
from motet.kernels.gpu import dense, lora, moe_lora
from motet.kernels.gpu.attention import (
    DecodeBatch,
    DecodeWorkspace,
    PrefillBatch,
    decode_attention,
    prefill_attention,
)
from motet.kernels.gpu.combine import Normed, combine
from motet.kernels.gpu.dense import DenseUpdate, dense_config, dense_product
from motet.kernels.gpu.embed import embed, lora_embed
from motet.kernels.gpu.kv_write import KVWrite, QueryKey, rotary_kv_write
from motet.kernels.gpu.latent_attention import latent_decode, latent_prefill, latent_write
from motet.kernels.gpu.latent_lora import lora_key_query, lora_value
from motet.kernels.gpu.lora import LoraConfig, LoraTiles, RankBlocks
from motet.kernels.gpu.moe import FEW_TILES, ExpertWeights, ProductConfig, product, product_config, tile_rows
from motet.kernels.gpu.moe_lora import ExpertUpdate
from motet.kernels.gpu.mxfp4 import Mxfp4
from motet.kernels.gpu.norm import add_rms_norm
from motet.kernels.gpu.norm_route import norm_route, norm_scores, takes
from motet.kernels.gpu.per_head import per_head
from motet.kernels.gpu.route import Sorted, route
from motet.kernels.gpu.tuned import tuned
from motet.kernels.kv_write import KVLayout
from motet.kernels.route import RoutingRule
from motet.layers.batch import AttentionForm, FourBit, LatentForm, LinearMap
from motet.layers.decoder import Decoder
from motet.layers.mlp import DenseMLP, SparseMLP

COPIES_FROM = 64
"""Rows of a tile from which products read experts' copies in bfloat16."""


@dataclass(frozen=True)
class GpuExperts:
    """The weights of a layer's experts; `copies` of both in bfloat16, if they are of four bits and there is room."""

    gate_up: ExpertWeights
    down: ExpertWeights
    activation: Activation
    copies: tuple[ExpertWeights, ExpertWeights] | None = None

    def of(self, rows: int) -> tuple[ExpertWeights, ExpertWeights]:
        """Gate and up, and down, for tiles of so many rows."""
        return (self.gate_up, self.down) if self.copies is None or rows < COPIES_FROM else self.copies


@dataclass(frozen=True)
class Pairs:
    """What experts gave each (token, expert) pair, [P, H] in sorted order, still to be weighed and added up."""

    out: Tensor
    dtype: torch.dtype
    work: Sorted
    shared: Tensor | None
    weighed: bool


@dataclass(frozen=True)
class GpuLora:
    """The adapters of a step: the pointer table, each row's slot [T] int32 (-1 base), and tiles of rows of one slot.

    `adapters` bounds how many different ones there are; `rank_blocks` those of any of them at one site. `idle` sites
    have no adapter, so nothing is launched for them. Each layer waits for its gate, unless there are none: then all of
    every adapter is there when the step begins.
    """

    table: RankBlocks
    slots: Tensor
    tiles: LoraTiles
    head_tiles: LoraTiles
    config: LoraConfig
    expert_config: moe_lora.ShrinkConfig
    adapters: int
    rank_blocks: int
    idle: frozenset[int]
    gates: Sequence[torch.cuda.Event] = ()


@dataclass(frozen=True)
class GpuKV:
    """A step in one KV group: slots [T] int32 where each row's KV goes, and who attends to what."""

    slots: Tensor
    decode: DecodeBatch | None
    prefill: PrefillBatch | None


@dataclass(frozen=True)
class GpuBatch:
    """tokens, positions [T] int32, a GpuKV for each KV group, logit_rows [S] int64; `rows` and `logits` [1] int32, how
    many of the T and of the S rows are real. Tokens may stand for what the step before left in `chosen`
    (`embed`). `lora` None: no row carries an adapter, no LoRA kernel is launched. `arrived` counts for products
    (`dense.arrivals`). `all_wanted`: logit_rows are all rows, in their order."""

    tokens: Tensor
    positions: Tensor
    groups: Sequence[GpuKV]
    kv: KVLayout
    logit_rows: Tensor
    rows: Tensor
    logits: Tensor
    lora: GpuLora | None
    chosen: Tensor
    workspace: DecodeWorkspace
    arrived: Tensor
    pdl: bool = False
    all_wanted: bool = False

    def embed(self, table: Tensor, site: int) -> Tensor:
        x, tokens = embed(self.tokens, self.chosen, table)
        if self.lora is not None and site not in self.lora.idle:
            self.begin(0)  # of which the embedding is a part
            lora_embed(x, tokens, len(table), self.lora.table, site, self.lora.slots)
        return x

    def begin(self, layer: int) -> None:
        if self.lora is not None and self.lora.gates:
            torch.cuda.current_stream().wait_event(self.lora.gates[layer])

    def norm(
        self, x: Tensor | Pairs, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if isinstance(x, Pairs):
            assert residual is not None
            y = torch.empty_like(residual, dtype=x.dtype)
            normed = Normed(weight, eps, y)
            combine(x.out, x.work, residual, shared=x.shared, weighed=x.weighed, norm=normed, pdl=self.pdl)
            return y, residual
        return add_rms_norm(x, residual, weight, eps, pdl=self.pdl)

    def norm_route(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, router: LinearMap, rule: RoutingRule
    ) -> tuple[Tensor, Tensor, Sorted]:
        """Few rows take one launch, or two and the update where a row may carry an adapter on the router."""
        matrix, bias, slots = router.weight, router.bias, None if self.lora is None else self.lora.slots
        rows = tile_rows(len(x), rule.top_k, len(matrix))
        adapters = 0 if self.lora is None else self.lora.adapters
        work = Sorted.empty(len(x), rule.top_k, len(matrix), rows, adapters, x.device)
        if not takes(len(x), rule, matrix):
            y, residual = self.norm(x, residual, weight, eps)
            scores = self.linear(y, router)
        elif self.lora is None or router.site in self.lora.idle:
            y, residual, _ = norm_route(
                x, residual, weight, eps, matrix, bias, rule, slots, work, self.rows, self.arrived, pdl=self.pdl,
            )  # fmt: skip
            return y, residual, work
        else:
            y, residual, scores = norm_scores(x, residual, weight, eps, matrix, bias, pdl=self.pdl)
            self._expand(scores, self._shrunk(y, router))
        route(scores, rule, slots, work, self.rows, pdl=self.pdl)
        return y, residual, work

    def norm_columns(self, x: Tensor, weight: Tensor, eps: float) -> None:
        columns = x[:, : len(weight)]
        columns.copy_(torch.nn.functional.rms_norm(columns.float(), weight.shape, weight, eps))

    def linear(self, x: Tensor, linear: LinearMap, write: KVWrite | None = None) -> Tensor:
        """Few rows are multiplied by a kernel that updates them too, and can write them; more by cuBLAS and updated
        after it."""
        update = self._shrunk(x, linear)
        if not _few(x):
            assert write is None
            y = torch.nn.functional.linear(x, linear.weight, linear.bias)
            self._expand(y, update)
            return y
        features, depth = linear.weight.shape
        y = x.new_empty(len(x), features)
        config = tuned("dense_product", dense_config(features, depth), features=features, depth=depth)
        dense_product(
            x, linear.weight, linear.bias, y, self.arrived, config, update=update, write=write, pdl=self.pdl
        )
        return y

    def _shrunk(self, x: Tensor, how: LinearMap) -> DenseUpdate | None:
        """The shrunk input of the map's sites, if any row may carry an adapter there."""
        if self.lora is None or how.site in self.lora.idle:
            return None
        columns = len(how.widths) * self.lora.rank_blocks * lora.RANKS
        table, tiles, config = self.lora.table, self.lora.tiles, self.lora.config
        z = lora.shrunk(len(x), x.shape[1], columns, config, x.device)
        lora.lora_shrink(x, table, how.site, len(how.widths), tiles, z, config, pdl=self.pdl)
        return DenseUpdate(table, how.site, how.widths, tiles, z)

    def _expand(self, y: Tensor, u: DenseUpdate | None) -> None:
        """Add the update to y, if there is one."""
        if self.lora is not None and u is not None:
            lora.lora_expand(y, u.table, u.site, u.widths, u.tiles, u.z, self.lora.config, pdl=self.pdl)

    def wanted(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, GpuBatch]:
        if self.all_wanted:
            return x, residual, self
        rows, lora = self.logit_rows, self.lora
        if lora is not None:
            lora = replace(lora, slots=lora.slots[rows], tiles=lora.head_tiles)
        return x[rows], residual[rows], replace(self, rows=self.logits, lora=lora)

    def silu_mul(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def attention(self, x: Tensor, linear: LinearMap, form: AttentionForm) -> Tensor:
        heads, index, group = form.heads, form.place.index, self.groups[form.place.group]
        norms, rotary = form.norms, form.rotary
        q_norm, k_norm, eps = (None, None, 0.0) if norms is None else (norms.q, norms.k, norms.eps)
        how = QueryKey(rotary.cos, rotary.sin, rotary.interleaved, q_norm, k_norm, eps, form.temperature)
        write = KVWrite(self.positions, group.slots, how, self.kv, index, heads.num)
        fused = write.fusible and _few(x)
        qkv = self.linear(x, linear, write if fused else None)
        if not fused:
            rotary_kv_write(qkv, write, pdl=self.pdl)
        fresh = qkv.new_empty if group.prefill is None else qkv.new_zeros  # padding among prompts stays zeros
        out = fresh(len(qkv), heads.num * self.kv.head_dim)
        if group.decode is not None:
            decode_attention(qkv, self.kv, index, group.decode, heads, self.workspace, out, pdl=self.pdl)
        if group.prefill is not None:
            prefill_attention(qkv, self.kv, index, group.prefill, heads, out, pdl=self.pdl)
        return out

    def latent_attention(self, q: Tensor, z: Tensor, column: int, form: LatentForm) -> Tensor:
        heads, index, group = form.heads, form.place.index, self.groups[form.place.group]
        lora = self.lora if self.lora is not None and form.site not in self.lora.idle else None
        queries = q[:, : heads.num * (heads.nope + heads.rope)].unflatten(1, (heads.num, -1))
        query = q.new_empty(len(q), heads.num, heads.rank + heads.rope)
        per_head(queries[..., : heads.nope], form.keys, query[..., : heads.rank], pdl=self.pdl)
        if lora is not None:
            lora_key_query(query, q, heads, lora.table, form.site, lora.tiles, lora.config, pdl=self.pdl)
        latent_write(
            q, z, column, query, self.positions, group.slots, form.rotary.cos, form.rotary.sin, form.norm, form.eps,
            self.kv, index, heads, form.rotary.interleaved, pdl=self.pdl,
        )  # fmt: skip
        o = (q.new_empty if group.prefill is None else q.new_zeros)(len(q), heads.num, heads.rank)
        if group.decode is not None:
            latent_decode(query, self.kv, index, group.decode, heads, self.workspace, o, pdl=self.pdl)
        if group.prefill is not None:
            latent_prefill(query, self.kv, index, group.prefill, heads, o, pdl=self.pdl)
        v = q.new_empty(len(q), heads.num, heads.value)
        per_head(o, form.values, v, pdl=self.pdl)
        if lora is not None:
            lora_value(v, o, heads, lora.table, form.site, lora.tiles, lora.config, pdl=self.pdl)
        return v.flatten(1)

    def experts(
        self,
        x: Tensor,
        work: Sorted,
        rule: RoutingRule,
        experts: GpuExperts,
        site: int,
        shared: Tensor | None,
    ) -> Pairs:
        gate_up, down = experts.of(work.rows)
        h = x.new_empty(len(work.order), down.shape[2])
        update = self._update(x, work, site, 2, gather=True)
        product(
            x, gate_up, work, h, _expert_config(gate_up, 2, work), gather=True,
            activation=experts.activation, update=update, weigh_input=rule.on_input, pdl=self.pdl,
        )  # fmt: skip
        update = self._update(h, work, site + 2, 1, gather=False)
        out = x.new_empty(len(work.order), x.shape[1])
        config = _expert_config(down, 1, work)
        product(h, down, work, out, config, gather=False, update=update, pdl=self.pdl)
        return Pairs(out, x.dtype, work, shared, weighed=rule.on_input)

    def _update(self, x: Tensor, work: Sorted, site: int, sides: int, gather: bool) -> ExpertUpdate | None:
        """The shrunk inputs of `sides` sites, if any row carries an adapter."""
        if self.lora is None:
            return None
        z = moe_lora.shrunk(len(work.order), sides, self.lora.rank_blocks * lora.RANKS, x)
        update = ExpertUpdate(self.lora.table, site, z)
        moe_lora.shrink(x, work, update, gather=gather, config=self.lora.expert_config, pdl=self.pdl)
        return update


def _few(x: Tensor) -> bool:
    """Whether x is multiplied by `dense_product`."""
    return 0 < len(x) <= dense.MOST_ROWS


def _expert_config(weights: ExpertWeights, sides: int, work: Sorted) -> ProductConfig:
    """How to compile a product of experts for these tiles."""
    (_, features, depth), tiles = weights.shape, len(work.tiles)
    return tuned(
        "moe_product", product_config(weights, sides, work.rows, tiles), features=features // sides, depth=depth,
        sides=sides, rows=work.rows, few=int(tiles <= FEW_TILES), packed=int(isinstance(weights.weight, Mxfp4)),
    )  # fmt: skip


class GpuDevice:
    """Weights in bfloat16 or four bits, in the memory of one GPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = device
        self.dtype = dtype

    def tensor(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def bytes(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def vector(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, torch.float32)

    def table(self, tensor: Tensor) -> Tensor:
        return self.tensor(tensor)

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous()

    def per_head(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous()

    def experts(
        self,
        gate_up: Iterable[Tensor] | FourBit,
        down: Iterable[Tensor] | FourBit,
        activation: Activation,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> GpuExperts:
        return GpuExperts(
            ExpertWeights(self._stack(gate_up), gate_up_bias),
            ExpertWeights(self._stack(down), down_bias),
            activation,
        )

    def _stack(self, weights: Iterable[Tensor] | FourBit) -> Tensor | Mxfp4:
        if isinstance(weights, FourBit):
            return Mxfp4.pack(weights.codes, weights.scales)
        return torch.stack([weight.contiguous() for weight in weights])


def copies_bytes(decoder: Decoder) -> int:
    """What copies of its four-bit experts in the dtype of its products would take."""
    packed = [
        weights
        for layer in decoder.layers
        if isinstance(layer.mlp, SparseMLP) and isinstance(layer.mlp.experts, GpuExperts)
        for weights in (layer.mlp.experts.gate_up, layer.mlp.experts.down)
        if isinstance(weights.weight, Mxfp4)
    ]
    return sum(math.prod(weights.shape) for weights in packed) * decoder.embedding.dtype.itemsize


def with_copies(decoder: Decoder) -> Decoder:
    """The decoder with such copies."""
    dtype = decoder.embedding.dtype
    return replace(
        decoder, layers=[replace(layer, mlp=_copied(layer.mlp, dtype)) for layer in decoder.layers]
    )


def _copied(mlp: DenseMLP | SparseMLP, dtype: torch.dtype) -> DenseMLP | SparseMLP:
    if not isinstance(mlp, SparseMLP) or not isinstance(mlp.experts, GpuExperts):
        return mlp
    experts = mlp.experts
    if not isinstance(experts.gate_up.weight, Mxfp4):
        return mlp
    copies = _plain(experts.gate_up, dtype), _plain(experts.down, dtype)
    return replace(mlp, experts=replace(experts, copies=copies))


def _plain(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """One expert after the other: the way there takes several times as much memory."""
    packed = weights.weight
    assert isinstance(packed, Mxfp4)
    plain = torch.empty(weights.shape, dtype=dtype, device=packed.words.device)
    for expert, target in enumerate(plain):
        target.copy_(Mxfp4(packed.words[expert], packed.scales[expert]).dequantise(dtype))
    return ExpertWeights(plain, weights.bias)
