"""Frozen configuration. Unknown keys fail by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from motet.errors import ConfigError


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one engine runs with.

    `device` "auto" is a GPU where there is one. `pool_bytes` is the one allocation for KV cache and adapters; None
    means 1 GiB on a CPU, and on a GPU what `memory_fraction` of its memory leaves. `max_step_tokens` bounds the tokens
    of a step (decode rows first, then prefill chunks; None: 512 on a CPU, 2,048 on a GPU), `max_running` the sequences
    in flight. `max_model_len` None means the model's own. `threads` None means torch's default. `verify_adapters` runs
    a prompt through each adapter before it is accepted. `tuned_configs` is a folder of configurations of GPU kernels
    (None: `$MOTET_TUNED_CONFIGS`, if set); they come before Motet's own. `prompt_copies` keeps four-bit experts in
    bfloat16 too, for prompts (None: on a GPU, if they take at most half of what the weights leave for the pool).
    """

    model: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    memory_fraction: float = 0.9
    pool_bytes: int | None = None
    page_tokens: int = 16
    max_step_tokens: int | None = None
    max_running: int = 64
    max_model_len: int | None = None
    prefix_caching: bool = True
    threads: int | None = None
    verify_adapters: bool = False
    tuned_configs: str | None = None
    prompt_copies: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pool_bytes", "page_tokens", "max_step_tokens", "max_running", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction must be above 0 and at most 1, got {self.memory_fraction}")


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the HTTP server listens, what it serves and how much it takes from one client."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    adapters: dict[str, str] = {}
    allow_runtime_adapters: bool = True
    max_n: int = 16
    max_logprobs: int = 20
    max_body_bytes: int = 8 << 20


def tuned_folder(config: EngineConfig) -> Path | None:
    """The folder of tuned configurations that a config or `$MOTET_TUNED_CONFIGS` names."""
    configured = config.tuned_configs or os.environ.get("MOTET_TUNED_CONFIGS")
    return Path(configured).expanduser() if configured else None


def cache_dir() -> Path:
    """Where Motet keeps what it can make again: `$MOTET_CACHE`, or `~/.cache/motet`."""
    configured = os.environ.get("MOTET_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "motet"
