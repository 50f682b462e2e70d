"""One file and the command line → frozen configuration. The command line wins; unknown keys fail by name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from motet.config import EngineConfig, ServerConfig
from motet.errors import ConfigError

EMBEDDED = "embedded"
"""The name of the small model that Motet fetches itself; served when no other is named."""

SAGEMAKER_MODEL = "/opt/ml/model"
SAGEMAKER: dict[str, Any] = {
    "host": "0.0.0.0",
    "port": 8080,
    "allow_open": True,
    "adapter_roots": ("/opt/ml",),
}
"""What SageMaker expects of a container: where it puts models, where it asks. It lets nobody in but those who may."""

_TABLES = ("engine", "server", "adapters", "tenants")


class Settings(msgspec.Struct, frozen=True):
    """What `motet serve` runs with."""

    engine: EngineConfig
    server: ServerConfig


def read_settings(
    file: Path | None, engine: Mapping[str, Any], server: Mapping[str, Any], adapters: Sequence[str]
) -> Settings:
    """Merge `motet.toml` with the options given; None means not given. Its tables: [engine], [server], [adapters] and,
    for each tenant, [tenants.NAME].

    Raises ConfigError naming the file and the key at fault.
    """
    tables = _read(file) if file is not None else {}
    named = {**tables.get("adapters", {}), **_by_name(adapters)}
    asked = {**tables.get("server", {}), **_given(server)}
    contract = asked.get("sagemaker") is True
    merged = {
        "engine": {
            "model": SAGEMAKER_MODEL if contract else EMBEDDED,
            **tables.get("engine", {}),
            **_given(engine),
        },
        "server": {
            **(SAGEMAKER if contract else {}),
            **asked,
            "adapters": named,
            "tenants": tables.get("tenants", {}),
        },
    }
    try:
        settings = msgspec.convert(merged, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file or 'options'}: {error}") from error
    for name in ("port", "admin_port"):
        port = getattr(settings.server, name)
        if port is not None and not 0 <= port <= 65535:
            raise ConfigError(f"{name} must be between 0 and 65535, got {port}")
    return settings


def split_adapter(option: str) -> tuple[str, str]:
    """NAME=PATH to its two halves."""
    name, equals, path = option.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--adapter takes NAME=PATH, got {option!r}")
    return name, path


def parse_size(text: str) -> int:
    """Bytes of '512MiB', '2GiB', '1.5g' or a plain number."""
    units = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    body = text.strip().lower().removesuffix("ib").removesuffix("b")
    number, unit = (body[:-1], body[-1]) if body[-1:] in "kmgt" and body else (body, "")
    try:
        size = int(float(number) * units[unit])
    except (ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not a size; write 512MiB, 2GiB or a number of bytes") from None
    if size <= 0:
        raise ConfigError(f"a size must be positive, got {text!r}")
    return size


def _by_name(options: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name, path in map(split_adapter, options):
        if name in named:
            raise ConfigError(f"--adapter names {name!r} twice")
        named[name] = path
    return named


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The tables of the file."""
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    for name, table in tables.items():
        if name not in _TABLES:
            raise ConfigError(f"{file}: unknown table [{name}]; there are [{'], ['.join(_TABLES)}]")
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {name} must be a table, [{name}]")
    for name in ("adapters", "tenants"):
        if name in tables.get("server", {}):
            raise ConfigError(f"{file}: {name} have a table of their own, [{name}], outside [server]")
    return tables
