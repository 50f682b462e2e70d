"""A PEFT LoRA directory → its normal form, bound to a base model or refused, never half-applied.

    adapter_config.json, adapter_model.safetensors  →  {site: (A [r, in], B [out, r], scaling)}

Checks go from cheap to dear: config, header, names and shapes against the base, and only then are the weights
read, once. Nothing is rounded: bf16 and fp32 stay, fp16 becomes fp32, a pair of unequal dtypes becomes fp32.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from motet.adapters.binding import Binding, ExpertsBinding, bind
from motet.adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES, LoraConfig, parse_config
from motet.adapters.safetensors_check import (
    WEIGHTS_NAME,
    TensorInfo,
    open_regular,
    read_data,
    read_header,
    refused,
)
from motet.errors import AdapterRefused
from motet.types import ModelSpec

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
DIGEST_VERSION = b"motet-adapter-1"


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The update scaling · B @ A of one linear map.

    `a` [r, in] and `b` [out, r] are contiguous, both bf16 or both fp32. Gate and up of fused experts share
    A: then `a` is the same tensor object in both.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An adapter in normal form.

    `factors` is keyed by the position in spec.sites, ascending. `num_parameters` counts the numbers in the
    file, `dtypes` are the file's, `no_effect` the sites whose update is exactly zero (B all zero, or
    scaling 0).
    """

    digest: str
    factors: dict[int, LoraFactors]
    config: LoraConfig
    num_parameters: int
    dtypes: tuple[str, ...]
    no_effect: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The highest rank of any site."""
        return max(factors.rank for factors in self.factors.values())


def load_checkpoint(path: Path, spec: ModelSpec) -> Checkpoint:
    """Read the adapter in directory `path` and bind it to the base `spec`.

    AdapterRefused names the file, key or tensor at fault; nothing of the adapter is kept then.
    """
    config = read_config(path)
    with open_regular(weights_path(path)) as file:
        tensors = read_header(file, 2 * len(spec.sites))
        bindings = bind(tensors, spec, config)
        data = read_data(file, tensors)
    for info in tensors:
        extremes = torch.stack(torch.aminmax(data[info.name]))  # carry NaN; 9× as fast as isfinite(…).all()
        if not torch.isfinite(extremes).all():
            raise refused(f"tensor {info} holds NaN or infinity")
    found = {site: factors for binding in bindings for site, factors in _factors(binding, data)}
    factors = {site: found[site] for site in sorted(found)}
    return Checkpoint(
        digest=_digest(spec, factors),
        factors=factors,
        config=config,
        num_parameters=sum(info.size for info in tensors),
        dtypes=tuple(sorted({info.dtype for info in tensors})),
        no_effect=tuple(site for site, one in factors.items() if one.scaling == 0 or not one.b.any()),
    )


def read_config(path: Path) -> LoraConfig:
    """The parsed adapter_config.json of directory `path`. AdapterRefused if it is missing or not clear."""
    if not os.path.isdir(path):  # unlike Path.is_dir, False for every path that cannot be looked at
        pickle = ", and pickles are never opened" if path.suffix in PICKLES else ""
        raise AdapterRefused(
            f"{str(path)!r} is not a directory with {CONFIG_NAME} and {WEIGHTS_NAME}{pickle}"
        )
    weights_path(path)
    with open_regular(path / CONFIG_NAME) as file:
        return parse_config(file.read(MAX_CONFIG_BYTES + 1))


def weights_path(path: Path) -> Path:
    """Where directory `path` has its weights. AdapterRefused if there is only a pickle."""
    weights = path / WEIGHTS_NAME
    if not os.path.exists(weights):
        for suffix in PICKLES:
            pickle = path / f"adapter_model{suffix}"
            if os.path.exists(pickle):
                raise AdapterRefused(
                    f"{pickle.name} is a pickle, which can run code when it is opened, so it is not; "
                    f"save the adapter as {WEIGHTS_NAME}"
                )
    return weights


def _factors(binding: Binding, data: dict[str, Tensor]) -> Iterator[tuple[int, LoraFactors]]:
    a, b = _common(binding.a, binding.b, data)
    if not isinstance(binding, ExpertsBinding):
        yield binding.site, LoraFactors(a, b, binding.scaling)
        return
    experts, rank = len(binding.sites), binding.rank
    rows = a.view(experts, rank, -1)  # [E, r, columns of A]
    columns = b.view(-1, rank, experts)  # [rows of B, r, E]
    if binding.transposed:
        rows, columns = columns.permute(2, 1, 0).contiguous(), rows.transpose(1, 2).contiguous()
    else:
        columns = columns.permute(2, 0, 1).contiguous()
    for sites, a_expert, b_expert in zip(binding.sites, rows, columns, strict=True):
        for site, part in zip(sites, b_expert.chunk(len(sites)), strict=True):
            yield site, LoraFactors(a_expert, part, binding.scaling)


def _common(a: TensorInfo, b: TensorInfo, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The pair in the one dtype that holds both exactly: bf16, or fp32."""
    dtype = torch.bfloat16 if a.dtype == b.dtype == "BF16" else torch.float32
    return data[a.name].to(dtype), data[b.name].to(dtype)


def _digest(spec: ModelSpec, factors: dict[int, LoraFactors]) -> str:
    """sha256 over the base's digest and, by site, shapes, dtype, scaling and bytes: one text, one meaning."""
    digest = hashlib.sha256(DIGEST_VERSION + b"\n" + spec.digest.encode() + b"\n")
    for site, one in factors.items():
        shape = f"{one.rank} {one.a.shape[1]} {one.b.shape[0]}"
        digest.update(f"{site} {shape} {one.a.dtype} {one.scaling.hex()}\n".encode())
        digest.update(raw_bytes(one.a).numpy().data)
        digest.update(raw_bytes(one.b).numpy().data)
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, [n] uint8, not copied."""
    return tensor.view(-1).view(torch.uint8)
