"""Logits on a GPU → tokens. What the device can decide it decides; the rest goes through the host's sampler.

Which of the two a row takes follows from its own parameters alone, so the same seed gives the same text in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motet.engine.sampler import SamplingRow, sample
from motet.engine.staging import Field, Staging
from motet.kernels.gpu.sample import SamplingTensors
from motet.kernels.gpu.sample import sample as sample_on_device
from motet.types import Sampled, TokenLogprob

_FLOATS, _INTS = ("temperature", "top_p", "min_p"), ("position", "top_k")


class GpuSampler:
    """Parameters of up to `rows` rows on their way to the device, tokens on their way back."""

    def __init__(self, rows: int, device: torch.device) -> None:
        layout = {name: Field(torch.float32, (rows,)) for name in _FLOATS}
        layout |= {name: Field(torch.int32, (rows,)) for name in _INTS} | {
            "seed": Field(torch.int64, (rows,))
        }
        self._staging = Staging(layout, device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._logprobs = torch.zeros(rows, pin_memory=device.type == "cuda")

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
        """logits [S, V], one row per entry of `rows`."""
        host = [i for i, row in enumerate(rows) if not _simple(row)]
        chosen = self._on_device(logits, rows)
        if host:
            theirs = sample(logits[host].float().cpu(), [rows[i] for i in host])
            for i, sampled in zip(host, theirs, strict=True):
                chosen[i] = sampled
        return chosen

    def _on_device(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
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
        tokens, logprobs = sample_on_device(logits, tensors, truncate)
        self._tokens[:count].copy_(tokens, non_blocking=True)
        self._logprobs[:count].copy_(logprobs, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        found = zip(rows, self._tokens[:count].tolist(), self._logprobs[:count].tolist(), strict=True)
        return [
            Sampled(row.seq, token, None if row.params.logprobs is None else TokenLogprob(token, logprob))
            for row, token, logprob in found
        ]


def _simple(row: SamplingRow) -> bool:
    """Whether the device can sample a row: nothing that depends on its earlier tokens, no list of alternatives."""
    p = row.params
    penalties = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0 or p.logit_bias
    return not penalties and not p.logprobs and p.min_tokens == 0
