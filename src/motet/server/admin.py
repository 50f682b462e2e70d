"""Loading and unloading adapters while the server runs, with vLLM's routes and field names."""

from __future__ import annotations

import logging

from motet.config import ServerConfig
from motet.engine.protocol import AdapterHost
from motet.observe.metrics import Metrics
from motet.server.failures import Forbidden
from motet.server.openai import ModelCard, Strict
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

    async def load(self, asked: LoadRequest) -> ModelCard:
        self._check_allowed()
        replace = asked.replace or asked.load_inplace
        record = await self._host.load(asked.lora_name, asked.lora_path, replace=replace)
        logger.info("adapter loaded", extra={"adapter": record.name, "digest": record.digest})
        return adapter_card(record, self._host)

    async def unload(self, asked: UnloadRequest) -> ModelCard:
        self._check_allowed()
        record = await self._host.unload(asked.lora_name)
        self._metrics.forget(record.name)
        logger.info("adapter unloaded", extra={"adapter": record.name, "digest": record.digest})
        return adapter_card(record, self._host)

    def _check_allowed(self) -> None:
        if not self._config.allow_runtime_adapters:
            raise Forbidden("loading and unloading adapters at run time is switched off on this server")


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
