"""An application with keys: two tenants, an operator, and who may see what."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import httpx

from motet.config import ServerConfig, TenantPolicy
from motet.observe.tracing import NO_TRACER, Tracer
from motet.server.gate import Tenancy
from motet.tenancy.access import Guard
from motet.tenancy.keys import Role, new_key
from motet.tenancy.load import Load
from motet.tenancy.quota import LocalCounters
from motet.tenancy.store import Contents

from .fakes import FakeGenerator, House, adapter_at, build

CHAT: dict[str, object] = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


@dataclass
class Platform:
    """The application of `house` and a token for each who uses it."""

    house: House
    acme: str
    beta: str
    admin: str
    monitor: str

    def ask(
        self, token: str | None, method: str, path: str, body: object = None, **headers: str
    ) -> httpx.Response:
        if token is not None:
            headers["authorization"] = f"Bearer {token}"

        async def call() -> httpx.Response:
            async with self.house.client() as client:
                return await client.request(method, path, json=body, headers=headers)

        return asyncio.run(call())

    def chat(self, token: str | None, **fields: object) -> httpx.Response:
        return self.ask(token, "POST", "/v1/chat/completions", {**CHAT, **fields})

    def load(self, name: str, path: str) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path}
        return self.ask(self.admin, "POST", "/v1/load_lora_adapter", body)


def platform(
    root: Path,
    generator: FakeGenerator | None = None,
    config: ServerConfig | None = None,
    tracer: Tracer = NO_TRACER,
    **policies: TenantPolicy,
) -> Platform:
    """Tenants `acme` and `beta` have an adapter `poet` each, their own. Their buckets do not fill by themselves."""
    keys, tokens = {}, {}
    roles: dict[str, Role] = {
        "acme": "inference",
        "beta": "inference",
        "admin": "admin",
        "monitor": "metrics",
    }
    for tenant, role in roles.items():
        record, tokens[tenant] = new_key(tenant, role)
        keys[record.id] = record
    config = config or ServerConfig(adapter_roots=(str(root),))
    guard = Guard(lambda: Contents(keys, {}), policies)
    house = build(
        generator, config, Tenancy(guard, LocalCounters(lambda: 0.0), Load(config.max_queued)), tracer
    )
    made = Platform(house, **tokens)
    for tenant in ("acme", "beta"):
        answer = made.load(f"{tenant}/poet", adapter_at(root / tenant, tenant))
        assert answer.status_code == 200, answer.text
    return made
