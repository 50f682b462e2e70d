"""Frozen configuration. Unknown keys fail by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from motet.errors import ConfigError

DEFAULT_IMAGE_BYTES = 64 << 30
"""Of packed adapters on disk: 90 of rank 32 on every expert of gpt-oss-20b."""


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one engine runs with.

    `device` "auto" is a GPU where there is one. `pool_bytes` is the one allocation for KV cache and adapters; None
    means 1 GiB on a CPU, and on a GPU what `memory_fraction` of its memory leaves. `max_step_tokens` bounds the tokens
    of a step (decode rows first, then prefill chunks; None: 512 on a CPU, 2,048 on a GPU), `max_running` the sequences
    in flight. `max_model_len` None means the model's own. `threads` None means torch's default. `verify_adapters` runs
    a prompt through each adapter before it is accepted. `tuned_configs` is a folder of configurations of GPU kernels
    (None: `$MOTET_TUNED_CONFIGS`, if set); they come before Motet's own. `prompt_copies` keeps four-bit experts in
    bfloat16 too, for prompts (None: on a GPU, if they take at most half of what the weights leave for the pool).
    `image_bytes` is the budget of packed adapters on disk, `host_bytes` that of copies of them in memory (None: on a
    GPU a quarter of the memory that is left to it, at most 8 GiB, pinned; on a CPU none, where the page cache holds
    them).
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
    image_bytes: int = DEFAULT_IMAGE_BYTES
    host_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = (
            "pool_bytes",
            "page_tokens",
            "max_step_tokens",
            "max_running",
            "max_model_len",
            "image_bytes",
        )
        for name in bounds:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}")
        if self.host_bytes is not None and self.host_bytes < 0:
            raise ConfigError(f"host_bytes must be 0 or more, got {self.host_bytes}")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction must be above 0 and at most 1, got {self.memory_fraction}")


class TenantPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a tenant may use and how much of it. None is no limit.

    Tenants of a higher `priority` are served first, those of one class in proportion to `weight`. `adapters` are
    patterns of served names ("support", "acme/*"); None means the tenant's own: NAME and NAME/*. A request reserves its
    prompt and its `max_tokens` of `tokens_per_minute`, and gets back what it did not use. `max_queued` requests may
    wait for their first token, `queue_seconds` each. `adapter_bytes` bounds the adapters in use by requests in flight.
    """

    weight: float = 1.0
    priority: int = 0
    base: bool = True
    adapters: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_queued: int | None = None
    queue_seconds: float | None = None
    adapter_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name not in ("priority", "base", "adapters") and value is not None and not 0 < value < 2**53:
                raise ConfigError(f"{name} must be positive, got {value}")


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the HTTP server listens, what it serves, to whom, and how much it takes from one client.

    `database` (an SQLAlchemy URL) holds API keys and tenants; without a key in it everybody is served, and only on
    loopback unless `allow_open`. `tenants` come before those of the database. With `admin_port`, administration and
    metrics are answered there and nowhere else. `adapter_roots` are the folders that adapters may be loaded from at run
    time; with keys there are none but these. `redis` (a URL) shares quotas between servers. `max_queued` and
    `queue_seconds` bound the wait for a first token over all tenants. A request's head must come within `head_seconds`
    of its first byte, its body within `body_seconds` and one more for each `body_rate` bytes that have come. `registry`
    is a folder or URL whose adapters are served by their names there, `policy` the file that says which to whom.
    `sagemaker` answers to the routes of a SageMaker container too. `otlp_endpoint` is where traces go.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    admin_port: int | None = None
    served_model_name: str | None = None
    adapters: dict[str, str] = {}
    tenants: dict[str, TenantPolicy] = {}
    database: str | None = None
    sagemaker: bool = False
    registry: str | None = None
    policy: str | None = None
    allow_open: bool = False
    redis: str | None = None
    otlp_endpoint: str | None = None
    allow_runtime_adapters: bool = True
    adapter_roots: tuple[str, ...] = ()
    max_queued: int = 2048
    queue_seconds: float | None = None
    max_n: int = 16
    max_logprobs: int = 20
    max_body_bytes: int = 8 << 20
    head_seconds: float = 60.0  # as nginx and Node.js
    body_seconds: float = 60.0  # with the rate, as Apache, which begins with 20 s
    body_rate: float = 500.0

    def __post_init__(self) -> None:
        for name in ("head_seconds", "body_seconds", "body_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


def tuned_folder(config: EngineConfig) -> Path | None:
    """The folder of tuned configurations that a config or `$MOTET_TUNED_CONFIGS` names."""
    configured = config.tuned_configs or os.environ.get("MOTET_TUNED_CONFIGS")
    return Path(configured).expanduser() if configured else None


def cache_dir() -> Path:
    """Where Motet keeps what it can make again: `$MOTET_CACHE`, or `~/.cache/motet`."""
    configured = os.environ.get("MOTET_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "motet"
