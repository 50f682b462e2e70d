"""What an adapter's files are, seen from a base model: bound, or refused."""

from __future__ import annotations

from pathlib import Path

from motet.adapters.checkpoint import load_checkpoint
from motet.registry.records import Facts
from motet.types import ModelSpec


def examine(folder: Path, spec: ModelSpec) -> Facts:
    """Bind the adapter in `folder` to the base. Raises AdapterRefused."""
    checkpoint = load_checkpoint(folder, spec)
    return Facts(
        digest=checkpoint.digest,
        base=spec.digest,
        rank=checkpoint.rank,
        modules=tuple(dict.fromkeys(spec.sites[index].module for index in checkpoint.factors)),
        num_parameters=checkpoint.num_parameters,
    )
