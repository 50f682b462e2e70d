"""Does an adapter do what its file says? A short prompt goes through base and adapter in one batch, observed.

A tensor that was bound and changes nothing, or an adapter that changes rows of the base, would otherwise be served
without a sign. The probe has memory of its own and leaves the engine's pool alone.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import torch
from torch import Tensor

from motet.adapters.image import AdapterImage
from motet.adapters.table import AdapterTable
from motet.engine.inputs import build_inputs
from motet.errors import AdapterRefused
from motet.kernels.lora import LONG_SEGMENT, LoraTable, Segment, lora_add, split_rows
from motet.layers.cpu import CpuBatch
from motet.layers.decoder import Decoder
from motet.memory.pool import Pool, page_bytes
from motet.types import BASE, Chunk, ModelSpec, Plan, Site

PROMPT_TOKENS = 48
PAGE_TOKENS = 16


class SiteEffect(msgspec.Struct, frozen=True):
    """What an adapter does at one site.

    `relative` is its largest update over the base's largest output there, in the probe's prompt; `reached` is false for
    an expert that no token was routed to: then random inputs were used, and `relative` compares with their size.
    """

    layer: int
    module: str
    expert: int
    relative: float
    reached: bool

    def __str__(self) -> str:
        return str(Site(self.layer, self.module, self.expert, 0, 0, ()))


class AdapterEffect(msgspec.Struct, frozen=True):
    """What an adapter does to the model: at each site that it adapts, and to the logits that follow the prompt.

    `logits` is the largest change of a logit over the largest logit. `base_untouched` says that the rows of the base
    beside it kept every bit.
    """

    digest: str
    sites: tuple[SiteEffect, ...]
    logits: float
    base_untouched: bool

    @property
    def without_effect(self) -> tuple[SiteEffect, ...]:
        """Sites whose tensors change nothing."""
        return tuple(site for site in self.sites if site.relative == 0)

    def require(self) -> None:
        """AdapterRefused unless every tensor has an effect, the answer changes, and the base's does not."""
        if not self.base_untouched:
            raise AdapterRefused("verification: rows of the base model changed beside the adapter's")
        if dead := self.without_effect:
            others = f" and {len(dead) - 1} other places" if len(dead) > 1 else ""
            raise AdapterRefused(f"verification: the adapter's weights for {dead[0]}{others} change nothing")
        if self.logits == 0:
            raise AdapterRefused("verification: the adapter changes no logit of the probe's prompt")


class _Seen:
    """The largest base output and the largest update of each site that was observed."""

    def __init__(self) -> None:
        self.base: dict[int, float] = {}
        self.update: dict[int, float] = {}

    def __call__(self, site: int, base: Tensor, update: Tensor) -> None:
        for largest, found in ((self.base, base), (self.update, update)):
            largest[site] = max(largest.get(site, 0.0), float(found.abs().max()))


@torch.inference_mode()
def probe_adapter(decoder: Decoder, spec: ModelSpec, image: AdapterImage) -> AdapterEffect:
    """Run a prompt of random tokens through base and adapter, and look at every site of the adapter."""
    memory = torch.from_numpy(np.array(image.pages)).view(-1)
    table = AdapterTable(len(spec.sites), memory, image.page_bytes)
    table.add(image.digest, image.chunks, tuple(range(image.num_pages)))
    seen = _Seen()
    observed = replace(table.current, observer=seen)
    alone = decoder(_batch(spec, table, BASE))
    batch = _batch(spec, table, image.digest)
    assert batch.lora is not None
    mixed = decoder(replace(batch, lora=replace(batch.lora, table=observed)))
    adapted = sorted({int(site) for site in image.chunks.site})
    reached = frozenset(seen.update)
    for index in adapted:
        if index not in reached:
            _reach(spec, index, observed)
    effects = []
    for index in adapted:
        site = spec.sites[index]
        relative = seen.update[index] / (seen.base[index] or 1.0)
        effects.append(SiteEffect(site.layer, site.module, site.expert, relative, index in reached))
    change = float((mixed[1] - alone[1]).abs().max() / alone[1].abs().max())
    return AdapterEffect(image.digest, tuple(effects), change, bool(torch.equal(mixed[0], alone[0])))


def _batch(spec: ModelSpec, table: AdapterTable, adapter: str) -> CpuBatch:
    """The prompt twice, as the base's and as the adapter's, with KV pages of its own."""
    generator = torch.Generator().manual_seed(0)
    prompt = tuple(torch.randint(spec.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist())
    each = PROMPT_TOKENS // PAGE_TOKENS
    groups = len(spec.kv_groups)
    pool = Pool(spec, 2 * groups * each * page_bytes(spec, PAGE_TOKENS), PAGE_TOKENS)
    tables = [tuple(range(i * each, (i + 1) * each)) for i in range(2 * groups)]
    chunks = (
        Chunk(0, prompt, 0, tuple(tables[:groups]), BASE, True),
        Chunk(1, prompt, 0, tuple(tables[groups:]), adapter, True),
    )
    return build_inputs(Plan(chunks=chunks), pool, table).batch


def _reach(spec: ModelSpec, site: int, table: LoraTable) -> None:
    """Apply the update of a site that the prompt did not reach to random inputs, over an output of zeros."""
    shape = spec.sites[site]
    x = torch.randn(LONG_SEGMENT, shape.in_features, generator=torch.Generator().manual_seed(site))
    y = torch.zeros(LONG_SEGMENT, shape.out_features)
    lora_add(y, x, table, site, (shape.out_features,), split_rows([Segment(0, LONG_SEGMENT, 0)]))
