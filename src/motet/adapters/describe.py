"""What an adapter directory holds, and whether it binds to a base: the facts behind `motet adapters inspect`.

Works without a model on the config and the tensors' names and shapes alone. With one, the adapter is loaded
as for serving, so "binds" is the server's own answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from msgspec import field
from msgspec.structs import replace

from motet.adapters.checkpoint import Checkpoint, load_checkpoint, read_config, weights_path
from motet.adapters.experts import PARAMETERS
from motet.adapters.pairs import Pair, pair_up
from motet.adapters.peft_config import LoraConfig
from motet.adapters.safetensors_check import TensorInfo, open_regular, read_header
from motet.errors import AdapterRefused
from motet.types import ModelSpec, Struct

MAX_TENSORS = 100_000  # without a model: 256 experts × 58 layers × 3 × 2 is 89,088
MAX_FILES = 1000

_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})(?:\.|$)")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d{1,6})(?:\.|$)")


class FileReport(Struct, frozen=True):
    """A file of the adapter's directory and its size."""

    name: str
    bytes: int


class ModuleReport(Struct, frozen=True):
    """The adapted modules of one kind: how many, their ranks and scalings, and how many different A and B they have.

    Less of A or B than modules means that modules share it, as experts may. Without a model the kind is the last part
    of the module's path, a stack of all experts' factors counts as one module, and fused experts, whose parameter the
    names do not tell, have the ranks and scalings that the config states for either.
    """

    module: str
    count: int
    min_rank: int
    max_rank: int
    min_scaling: float
    max_scaling: float
    different_a: int
    different_b: int


class AdapterReport(Struct, frozen=True):
    """The facts of an adapter directory; JSON-able. What could not be read is empty.

    `bytes` is the size of the weights, `no_effect` names sites whose update is exactly zero. `binds` is
    None when no model was given and nothing speaks against the adapter; `reason` is why not.
    """

    path: str
    files: tuple[FileReport, ...]
    base_model: str | None = None
    peft_version: str | None = None
    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    modules: tuple[ModuleReport, ...] = ()
    layers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    num_parameters: int = 0
    bytes: int = 0
    dtypes: tuple[str, ...] = ()
    digest: str | None = None
    no_effect: tuple[str, ...] = ()
    binds: bool | None = None
    reason: str | None = None


def describe(path: Path, spec: ModelSpec | None) -> AdapterReport:
    """Report on the adapter at `path`, bound to `spec` if given. Never raises for the adapter's faults."""
    report = AdapterReport(str(path), _files(path))
    try:
        config = read_config(path)
        report = _with_config(report, config)
        with open_regular(weights_path(path)) as file:
            tensors = read_header(file, 2 * len(spec.sites) if spec else MAX_TENSORS)
        report = _with_tensors(report, tensors)
        report = _with_names(report, pair_up(tensors, config), config)
        if spec is not None:
            report = _with_binding(report, load_checkpoint(path, spec), spec)
    except AdapterRefused as error:
        report = replace(report, binds=False, reason=str(error))
    return report


def _files(path: Path) -> tuple[FileReport, ...]:
    try:
        with os.scandir(path) as entries:
            files = [
                (entry.name, entry.stat().st_size) for entry in islice(entries, MAX_FILES) if entry.is_file()
            ]
    except (OSError, ValueError):
        return ()  # the reason comes with the config
    return tuple(FileReport(name, size) for name, size in sorted(files))


def _with_config(report: AdapterReport, config: LoraConfig) -> AdapterReport:
    return replace(
        report,
        base_model=config.base_model,
        peft_version=config.peft_version,
        rank=config.r,
        alpha=config.alpha,
        rslora=config.rslora,
        rank_pattern=config.rank_values,
        alpha_pattern=config.alpha_values,
        targets=config.targets,
    )


def _with_tensors(report: AdapterReport, tensors: list[TensorInfo]) -> AdapterReport:
    return replace(
        report,
        num_parameters=sum(info.size for info in tensors),
        bytes=tensors[-1].end if tensors else 0,
        dtypes=tuple(sorted({info.dtype for info in tensors})),
    )


class _Row(NamedTuple):
    """An adapted module; `a` and `b` tell its factors from others."""

    kind: str
    rank: int
    scaling: float
    a: Hashable
    b: Hashable


def _with_names(report: AdapterReport, pairs: list[Pair], config: LoraConfig) -> AdapterReport:
    rows: list[_Row] = []
    fused: list[_Row] = []
    for pair in pairs:
        factors = pair.a.name, pair.b.name
        kind = pair.path.rpartition(".")[2]
        if kind != "experts":
            scaling = config.scaling(config.targeted(pair.path), pair.rank)
            rows.append(_Row(kind, pair.rank, scaling, *factors))
            continue
        for parameter in PARAMETERS:
            name = f"{pair.path}.{parameter}"
            rank = config.rank(name)
            fused.append(_Row(kind, rank, config.scaling(name, rank), *factors))
    modules = _modules(rows) + tuple(replace(kind, count=kind.count // 2) for kind in _modules(fused))
    return replace(report, modules=modules, layers=_numbers(_LAYER, pairs), experts=_numbers(_EXPERT, pairs))


def _with_binding(report: AdapterReport, checkpoint: Checkpoint, spec: ModelSpec) -> AdapterReport:
    sites = [spec.sites[index] for index in checkpoint.factors]
    return replace(
        report,
        modules=_modules(
            _Row(site.module, one.rank, one.scaling, id(one.a), id(one.b))
            for site, one in zip(sites, checkpoint.factors.values(), strict=True)
        ),
        layers=tuple(sorted({site.layer for site in sites if 0 <= site.layer < spec.num_layers})),
        experts=tuple(sorted({site.expert for site in sites if site.expert >= 0})),
        digest=checkpoint.digest,
        no_effect=tuple(str(spec.sites[index]) for index in checkpoint.no_effect),
        binds=True,
    )


def _modules(rows: Iterable[_Row]) -> tuple[ModuleReport, ...]:
    """Gather rows by kind, kinds in order of appearance."""
    kinds: dict[str, list[_Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    reports = []
    for kind, found in kinds.items():
        ranks, scalings = [row.rank for row in found], [row.scaling for row in found]
        different = len({row.a for row in found}), len({row.b for row in found})
        spans = min(ranks), max(ranks), min(scalings), max(scalings)
        reports.append(ModuleReport(kind, len(found), *spans, *different))
    return tuple(reports)


def _numbers(pattern: re.Pattern[str], pairs: list[Pair]) -> tuple[int, ...]:
    found = (pattern.search(pair.path) for pair in pairs)
    return tuple(sorted({int(match[1]) for match in found if match}))
