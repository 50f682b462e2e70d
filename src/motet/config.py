"""Frozen configuration. Unknown keys fail by name."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from motet.errors import ConfigError


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one engine runs with.

    `pool_bytes` is the one allocation for KV cache and adapters. `max_step_tokens` bounds the tokens of a step
    (decode rows first, then prefill chunks), `max_running` the sequences in flight. `max_model_len` None means the
    model's own. `threads` None means torch's default. `verify_adapters` runs a
    prompt through each adapter before it is accepted.
    """

    model: str
    pool_bytes: int = 1 << 30
    page_tokens: int = 16
    max_step_tokens: int = 512
    max_running: int = 64
    max_model_len: int | None = None
    prefix_caching: bool = True
    threads: int | None = None
    verify_adapters: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pool_bytes", "page_tokens", "max_step_tokens", "max_running"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_model_len is not None and self.max_model_len <= 0:
            raise ConfigError(f"max_model_len must be positive, got {self.max_model_len}")


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


def cache_dir() -> Path:
    """Where Motet keeps what it can make again: `$MOTET_CACHE`, or `~/.cache/motet`."""
    configured = os.environ.get("MOTET_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "motet"
