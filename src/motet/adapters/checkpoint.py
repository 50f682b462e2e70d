"""A PEFT LoRA directory → its normal form, bound to a base model or refused, never half-applied.

    adapter_config.json, adapter_model.safetensors  →  {site: (A [r, in], B [out, r], scaling)}

Checks go from cheap to dear: config, file size, header, names and shapes against the base, and only then are the
weights read, once. Nothing is rounded: bf16 and fp32 stay, fp16 becomes fp32, a pair of unequal dtypes becomes fp32.
Equal factors are one tensor, whether the file says so (a factor that experts share) or repeats them: so what the
packed image shares follows from the digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from motet.adapters.binding import Binding, bind
from motet.adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES, LoraConfig, parse_config
from motet.adapters.safetensors_check import (
    WEIGHTS_NAME,
    TensorInfo,
    check_size,
    open_regular,
    read_data,
    read_header,
    refused,
)
from motet.errors import AdapterRefused
from motet.types import ModelSpec

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
DIGEST_VERSION = b"motet-adapter-2"
MAX_RANK_OF_FILE = 512  # the highest that vLLM serves; adapters in the field stay below 256


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The update scaling · B @ A of one linear map.

    `a` [r, in] and `b` [out, r] are contiguous, both bf16 or both fp32. Factors that are equal in several sites are
    the same tensor object in all of them.
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
        check_size(file, _max_weights(spec), 2 * len(spec.sites))
        tensors = read_header(file, 2 * len(spec.sites))
        bindings = bind(tensors, spec, config)
        data = read_data(file, tensors)
    for info in tensors:
        extremes = torch.stack(torch.aminmax(data[info.name]))  # carry NaN; 9× as fast as isfinite(…).all()
        if not torch.isfinite(extremes).all():
            raise refused(f"tensor {info} holds NaN or infinity")
    factors, sums = _shared(_factors(bindings, data))
    if config.tied:
        _check_tied(factors, spec)
    distinct = {id(one.b): one.b for one in factors.values()}
    zero = {key for key, b in distinct.items() if not b.any()}
    return Checkpoint(
        digest=_digest(spec, factors, sums),
        factors=factors,
        config=config,
        num_parameters=sum(info.size for info in tensors),
        dtypes=tuple(sorted({info.dtype for info in tensors})),
        no_effect=tuple(site for site, one in factors.items() if one.scaling == 0 or id(one.b) in zero),
    )


def _max_weights(spec: ModelSpec) -> int:
    """Bytes of an adapter of every map of the base with the highest rank, in fp32."""
    return 4 * MAX_RANK_OF_FILE * sum(site.in_features + site.out_features for site in spec.sites)


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


def _factors(bindings: list[Binding], data: dict[str, Tensor]) -> dict[int, LoraFactors]:
    """The factors of every adapted site, ascending."""
    wide: dict[str, Tensor] = {}  # in fp32, converted once even if many bindings share it
    found: dict[int, LoraFactors] = {}
    for binding in bindings:
        a, b = _common(binding.a, binding.b, data, wide)
        for site, one_a, one_b in binding.split(a, b):
            found[site] = LoraFactors(one_a, one_b, binding.scaling)
    return {site: found[site] for site in sorted(found)}


def _common(
    a: TensorInfo, b: TensorInfo, data: dict[str, Tensor], wide: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The pair in the one dtype that holds both exactly: bf16, or fp32."""
    if a.dtype == b.dtype == "BF16":
        return data[a.name], data[b.name]
    for info in (a, b):
        if info.name not in wide:
            wide[info.name] = data[info.name].float()
    return wide[a.name], wide[b.name]


Sums = dict[int, bytes]
"""sha256 of tensors, by id()."""


def _shared(found: Mapping[int, LoraFactors]) -> tuple[dict[int, LoraFactors], Sums]:
    """The same factors with equal tensors made one, and the sums of these tensors."""
    by_place: dict[tuple[object, ...], Tensor] = {}  # views of one place need one sum
    by_sum: dict[tuple[object, ...], Tensor] = {}
    sums: Sums = {}

    def one_of(tensor: Tensor) -> Tensor:
        place = tensor.data_ptr(), tensor.shape, tensor.dtype
        if place not in by_place:
            total = hashlib.sha256(raw_bytes(tensor).numpy().data).digest()
            first = by_sum.setdefault((total, tensor.shape, tensor.dtype), tensor)
            sums[id(first)] = total
            by_place[place] = first
        return by_place[place]

    factors = {site: LoraFactors(one_of(one.a), one_of(one.b), one.scaling) for site, one in found.items()}
    return factors, sums


def _check_tied(factors: Mapping[int, LoraFactors], spec: ModelSpec) -> None:
    """PEFT makes the head's factors the embedding's: A is B transposed, and B is A transposed."""
    found = {spec.sites[index].module: one for index, one in factors.items()}
    embed, head = found.get("embed"), found.get("head")
    if embed is None and head is None:
        return
    if embed and head and torch.equal(head.a, embed.b.T) and torch.equal(head.b, embed.a.T):
        return
    raise AdapterRefused(
        f"{CONFIG_NAME}: ensure_weight_tying=True, but {WEIGHTS_NAME} does not hold one update for both embed_tokens "
        "and lm_head; set it to false if they are not tied, as in PEFT before 0.19 and bases with two matrices"
    )


def _digest(spec: ModelSpec, factors: Mapping[int, LoraFactors], sums: Sums) -> str:
    """sha256 over the base's digest and, by site, shapes, dtype, scaling and sums of bytes: one text, one meaning."""
    digest = hashlib.sha256(DIGEST_VERSION + b"\n" + spec.digest.encode() + b"\n")
    for site, one in factors.items():
        shape = f"{one.rank} {one.a.shape[1]} {one.b.shape[0]}"
        digest.update(f"{site} {shape} {one.a.dtype} {one.scaling.hex()}\n".encode())
        digest.update(sums[id(one.a)] + sums[id(one.b)])
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, [n] uint8, not copied."""
    return tensor.view(-1).view(torch.uint8)
