"""Logits on a GPU → tokens. What the device can decide it decides; the rest goes through the host's sampler.

Which of the two a row takes follows from its own parameters alone, so the same seed gives the same text in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from motet.engine.sampler import SamplingRow, sample
from motet.engine.staging import Field, Staging
from motet.kernels.gpu.sample import SamplingTensors
from motet.kernels.gpu.sample import sample as sample_on_device
from motet.types import Sampled, TokenLogprob

_FLOATS, _INTS = ("temperature", "top_p", "min_p"), ("position", "top_k")


@dataclass(frozen=True)
class GpuDraw:
    """Tokens on their way to the host: `found` [2, S or more] int32, tokens and the bits of logprobs, once `done`.

    `others` are the places of rows that the host must sample, `logits` theirs.
    """

    rows: Sequence[SamplingRow]
    found: Tensor
    others: Sequence[int]
    logits: Tensor
    done: torch.cuda.Event

    @property
    def overlaps(self) -> bool:
        """Whether the next step may be launched before the result is known."""
        return not self.others

    def result(self) -> list[Sampled]:
        """Wait for the device; one token per row."""
        self.done.synchronize()
        found = self.found[:, : len(self.rows)]
        tokens, logprobs = found[0].tolist(), found[1].view(torch.float32).tolist()
        chosen = [
            Sampled(row.seq, token, None if row.params.logprobs is None else TokenLogprob(token, logprob))
            for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True)
        ]
        if self.others:
            theirs = sample(self.logits.float(), [self.rows[i] for i in self.others])
            for place, sampled in zip(self.others, theirs, strict=True):
                chosen[place] = sampled
        return chosen


class GpuSampler:
    """Samples up to R rows into `drawn` [2, R] int32 on the device: tokens, and the bits of their logprobs."""

    def __init__(self, drawn: Tensor) -> None:
        rows, device = drawn.shape[1], drawn.device
        layout = {name: Field(torch.float32, (rows,)) for name in _FLOATS}
        layout |= {name: Field(torch.int32, (rows,)) for name in _INTS} | {
            "seed": Field(torch.int64, (rows,))
        }
        self._staging = Staging(layout, device, sides=2)
        self._drawn = drawn

    def draw(self, logits: Tensor, rows: Sequence[SamplingRow]) -> GpuDraw:
        """logits [S, V], one row per entry of `rows`; returns while the device still works."""
        self._on_device(logits, rows)
        others = [i for i, row in enumerate(rows) if not _simple(row)]
        found = torch.empty(self._drawn.shape, dtype=torch.int32, pin_memory=True)
        found.copy_(self._drawn, non_blocking=True)
        theirs = torch.empty(len(others), logits.shape[1], dtype=logits.dtype, pin_memory=bool(others))
        if others:
            theirs.copy_(logits[others], non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return GpuDraw(rows, found, others, theirs, done)

    def _on_device(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        count, host = len(rows), self._staging.host
        params = [row.params for row in rows]
        for name in (*_FLOATS, "top_k"):
            host[name][:count] = [getattr(p, name) for p in params]
        host["position"][:count] = [row.position for row in rows]
        host["seed"][:count] = [(p.seed or 0) & 0x7FFFFFFFFFFFFFFF for p in params]
        truncate = any(p.temperature > 0 and (p.top_p < 1 or p.top_k or p.min_p > 0) for p in params)
        self._staging.upload()
        on = self._staging.device
        tensors = SamplingTensors(
            *(on[name][:count] for name in ("temperature", "seed", "position", "top_k", "top_p", "min_p"))
        )
        tokens, logprobs = self._drawn[:, :count]
        sample_on_device(logits, tensors, truncate, (tokens, logprobs.view(torch.float32)))


def _simple(row: SamplingRow) -> bool:
    """Whether the device can sample a row: nothing that depends on its earlier tokens, no list of alternatives."""
    p = row.params
    penalties = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0 or p.logit_bias
    return not penalties and not p.logprobs and p.min_tokens == 0
