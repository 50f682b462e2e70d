"""Which tensors of a PEFT file belong together, told from their names and number of dimensions alone.

    base_model.model.<path>(.base_layer)*.lora_A[.<adapter>].weight      A of a module or of its parameter; also B
    base_model.model.<path>.lora_embedding_A[.<adapter>]                 A of an embedding; also B

A and B of one path are a pair. Megatron-Bridge writes experts that have one factor in common as

    <experts>.<leaf>.lora_A.weight [1, r, in]   with every   <experts>.<e>.<leaf>.lora_B.weight [out, r]

or with A and B in each other's place: that is one pair for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from motet.adapters.peft_config import LoraConfig
from motet.adapters.safetensors_check import TensorInfo, refused

PREFIX = "base_model.model."
WRAPPER = ".base_layer"
MAX_MATCHING = 10_000_000  # microseconds; 10 regular expressions on 20,000 modules

_FACTOR = re.compile(
    r"base_model\.model\.(?P<path>.+?)(?P<wrappers>(?:\.base_layer)*)"
    r"\.lora_(?:(?P<factor>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<of_embedding>[AB])(?:\.[^.]+)?)"
)
"""The name of a factor. Some training frameworks leave the adapter's name in it. Quadratic in the name's length."""

_OF_EXPERT = re.compile(r"(?P<experts>.+)\.\d+\.(?P<leaf>[^.]+)")

_FOREIGN = (
    (".lora_magnitude_vector", "a DoRA magnitude"),
    (".lora_diag", "a KaSA diagonal"),
    (".modules_to_save.", "a fully trained module (modules_to_save)"),
    (".original_module.", "a fully trained module (modules_to_save)"),
    (".token_adapter.", "trained embedding rows (trainable_token_indices)"),
    ("trainable_tokens", "trained embedding rows (trainable_token_indices)"),
    (".bias", "a bias"),
)
"""Parts of tensor names that stand for something known but not supported."""

_OF_BASE = re.compile(r".*(\.base_layer|\.embed_tokens|\.lm_head)\.weight")
"""Weights of the base beside the adapter: embed_tokens.base_layer.weight if the embedding has factors,
embed_tokens.weight if its size was changed; likewise lm_head."""


class Name(NamedTuple):
    """A tensor name in parts: the module's path, how many wrappers lie around the factor's, and A or B."""

    path: str
    wrappers: int
    factor: str
    embedding: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of a module, or of one wrapper around a module with adapted parameters.

    `shared` is A or B if this factor [1, ...] is common to all experts while the other is this expert's.
    """

    path: str
    wrappers: int
    embedding: bool
    a: TensorInfo
    b: TensorInfo
    shared: str = ""

    @property
    def rank(self) -> int:
        """Of a module; PEFT gives the parameter of E experts this many ranks in all."""
        return self.a.shape[-2]


def split_name(info: TensorInfo) -> Name:
    """The parts of a tensor's name. AdapterRefused says what the tensor is instead of a LoRA factor."""
    match = _FACTOR.fullmatch(info.name)
    if match:
        wrappers = len(match["wrappers"]) // len(WRAPPER)
        embedding = match["of_embedding"] is not None
        return Name(match["path"], wrappers, match["of_embedding"] or match["factor"], embedding)
    what = next((meaning for part, meaning in _FOREIGN if part in info.name), None)
    if what is not None:
        raise refused(f"tensor {info} is {what}, which is not supported")
    if _OF_BASE.fullmatch(info.name):
        raise refused(
            f"tensor {info} is a weight of the base itself, as PEFT saves beside adapters of embeddings; it may "
            "differ from this base's, so save again with save_pretrained(…, save_embedding_layers=False)"
        )
    raise refused(f"unknown tensor {info}; expected {PREFIX}<module>.lora_A.weight or lora_B")


def pair_up(tensors: Sequence[TensorInfo], config: LoraConfig) -> list[Pair]:
    """Match every A with its B.

    AdapterRefused names a tensor that is alone, doubled or neither a matrix nor a stack of matrices. It is also
    raised when the config has more patterns than can be tried on so many modules.
    """
    found: dict[tuple[str, int, bool], dict[str, TensorInfo]] = {}
    for info in tensors:
        name = split_name(info)
        if len(info.shape) not in (2, 3) or info.size == 0:
            raise refused(
                f"tensor {info} has shape {list(info.shape)}, not a matrix's or a stack of matrices'"
            )
        factors = found.setdefault((name.path, name.wrappers, name.embedding), {})
        if name.factor in factors:
            raise refused(f"tensors {factors[name.factor]} and {info} are the same factor")
        factors[name.factor] = info
    if not found:
        raise refused("no LoRA tensors")
    if (config.ranks.cost + config.alphas.cost) * len(found) > MAX_MATCHING:
        raise refused(f"too many rank and alpha patterns to match with {len(found)} modules")
    pairs = []
    single: dict[tuple[str, str], TensorInfo] = {}
    for (path, wrappers, embedding), factors in found.items():
        if len(factors) == 2:
            pairs.append(Pair(path, wrappers, embedding, factors["A"], factors["B"]))
            continue
        ((factor, info),) = factors.items()
        if wrappers or embedding:
            raise _alone(factor, info)
        single[path, factor] = info
    return pairs + list(_join(single))


def scaling_of(pair: Pair, module: str, rank: int, config: LoraConfig) -> float:
    """The scaling of a module or parameter. AdapterRefused if its rank is not the one that the config states."""
    stated = config.rank(module)
    if rank != stated:
        raise refused(f"tensor {pair.a} has rank {rank}, the config states {stated} for it")
    return config.scaling(module, rank)


def _join(single: Mapping[tuple[str, str], TensorInfo]) -> Iterator[Pair]:
    """Pair what experts have in common with each expert's own. `single` is keyed by path and factor."""
    used = set()
    for (path, factor), info in single.items():
        other = "B" if factor == "A" else "A"
        match = _OF_EXPERT.fullmatch(path)
        common = single.get((f"{match['experts']}.{match['leaf']}", other)) if match else None
        if common is None or len(info.shape) != 2 or len(common.shape) != 3:
            continue
        used |= {info.name, common.name}
        a, b = (common, info) if other == "A" else (info, common)
        yield Pair(path, 0, False, a, b, shared=other)
    for (_, factor), info in single.items():
        if info.name not in used:
            raise _alone(factor, info)


def _alone(factor: str, info: TensorInfo) -> Exception:
    return refused(f"tensor {info} has no lora_{'B' if factor == 'A' else 'A'} beside it")
