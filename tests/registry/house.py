"""A registry of fake adapters, without a model: an adapter is what its two files say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from motet.errors import AdapterRefused
from motet.registry.records import Facts, Label
from motet.registry.store import Registry

BASE = "ba5e"


def adapter_at(folder: Path, text: str, rank: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adapter_model.safetensors").write_text(text)
    return folder


def examine(folder: Path) -> Facts:
    weights = (folder / "adapter_model.safetensors").read_bytes()
    if weights == b"bad":
        raise AdapterRefused("adapter_model.safetensors: bad")
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    return Facts(hashlib.sha256(weights).hexdigest(), BASE, rank, ("q", "v"), len(weights))


def label(source: str = "here", who: str = "ada", **more: Any) -> Label:
    return Label(source=source, who=who, **more)


def registry_at(folder: Path, database: str = "") -> Registry:
    """With its artifacts in `folder`: in SQLite there too, or in PostgreSQL at the URL `database`."""
    if not database:
        return Registry(str(folder / "registry"))
    return Registry(f"{database}&artifacts={folder / 'registry' / 'artifacts'}")


def push(registry: Registry, folder: Path, text: str, name: str = "support", **more: Any) -> str:
    source = adapter_at(folder / f"{name}-{text}", text)
    return registry.push(name, source, examine, label(str(source), **more)).ref
