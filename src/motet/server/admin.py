"""Loading and unloading adapters while the server runs, with vLLM's routes and field names."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from motet.config import ServerConfig
from motet.engine.protocol import AdapterHost
from motet.errors import InvalidRequest
from motet.observe.metrics import Metrics
from motet.server.failures import Forbidden
from motet.server.openai import ModelCard, Strict
from motet.server.visible import Visible
from motet.tenancy.access import Principal
from motet.types import AdapterRecord

logger = logging.getLogger(__name__)


class LoadRequest(Strict, frozen=True):
    """`load_inplace` is vLLM's word for `replace`."""

    lora_name: str
    lora_path: str
    replace: bool = False
    load_inplace: bool = False


class UnloadRequest(Strict, frozen=True):
    lora_name: str


class Admin:
    """The adapter lifecycle as an operator drives it over HTTP."""

    def __init__(self, host: AdapterHost, config: ServerConfig, metrics: Metrics) -> None:
        self._host = host
        self._config = config
        self._metrics = metrics

    async def load(self, asked: LoadRequest, principal: Principal) -> ModelCard:
        self._check_allowed()
        path = asked.lora_path
        if principal.key or self._config.adapter_roots:
            path = await asyncio.to_thread(confined, path, self._config.adapter_roots)
        replace = asked.replace or asked.load_inplace
        record = await self._host.load(asked.lora_name, path, replace=replace)
        fields = {"adapter": record.name, "digest": record.digest, "key": principal.key}
        logger.info("adapter loaded", extra=fields)
        return adapter_card(record, self._host)

    async def unload(self, asked: UnloadRequest, principal: Principal) -> ModelCard:
        Visible(self._host, principal).check(asked.lora_name)
        if not principal.is_admin:
            raise Forbidden(f"a key of role {principal.role!r} may not do this")
        self._check_allowed()
        record = await self._host.unload(asked.lora_name)
        self._metrics.forget(record.name)
        fields = {"adapter": record.name, "digest": record.digest, "key": principal.key}
        logger.info("adapter unloaded", extra=fields)
        return adapter_card(record, self._host)

    def _check_allowed(self) -> None:
        if not self._config.allow_runtime_adapters:
            raise Forbidden("loading and unloading adapters at run time is switched off on this server")


def confined(path: str, roots: Sequence[str]) -> str:
    """`path` without links, if it and what lies in it is under one of `roots`. Raises InvalidRequest, nothing opened.

    Links in it are followed here and must not leave the root either.
    """
    allowed = [Path(root).expanduser().resolve() for root in roots]
    try:
        found = Path(path).resolve()
        for root in allowed:
            if found.is_relative_to(root):
                with os.scandir(found) as entries:
                    inside = [Path(entry.path).resolve() for entry in entries if entry.is_symlink()]
                if all(target.is_relative_to(root) for target in inside):
                    return str(found)
    except (OSError, ValueError, RuntimeError):  # no such folder; NUL in the path; a circle of links
        pass
    where = ", ".join(map(repr, roots)) or "none, as no adapter_roots are configured"
    raise InvalidRequest(
        f"{path[:200]!r} is not a folder in those that adapters may be loaded from: {where}", "lora_path"
    )


def base_card(host: AdapterHost) -> ModelCard:
    """The base model as `/v1/models` shows it."""
    return ModelCard(
        id=host.base,
        created=int(host.created),
        root=host.root,
        parent=None,
        digest=host.spec.digest,
        max_model_len=host.spec.max_model_len,
    )


def adapter_card(record: AdapterRecord, host: AdapterHost) -> ModelCard:
    """An adapter as `/v1/models` shows it: where it came from and what it changes."""
    return ModelCard(
        id=record.name,
        created=int(record.created),
        root=record.source,
        parent=host.base,
        digest=record.digest,
        max_model_len=host.spec.max_model_len,
        rank=record.rank,
        size_bytes=record.size_bytes,
    )
