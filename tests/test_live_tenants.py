"""A shared server as a whole: keys of a database, tenants of a file, the real engine, and clients that leave it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from motet.tenancy.keys import Role, new_key
from motet.tenancy.store import Store
from tests.live import LiveServer, live_server, until
from tests.tiny import write_adapter, write_model

pytestmark = pytest.mark.xdist_group("live")

CONFIG = """
[server]
database = "{database}"
[tenants.acme]
weight = 2.0
adapters = ["red"]
[tenants.beta]
adapters = []
max_concurrent = 2
queue_seconds = 30
"""


@dataclass
class Shared:
    server: LiveServer
    store: Store
    tokens: dict[str, str]

    def ask(self, who: str, **fields: object) -> httpx.Response:
        body = {"model": "model", "prompt": "p" * 200, "max_tokens": 8, "temperature": 0, **fields}
        headers = {"authorization": f"Bearer {self.tokens[who]}"}
        return httpx.post(f"{self.server.url}/v1/completions", json=body, headers=headers, timeout=60)

    def cached(self, who: str, **fields: object) -> int:
        answer = self.ask(who, **fields)
        assert answer.status_code == 200, answer.text
        found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    home = tmp_path_factory.mktemp("shared")
    model = write_model(home / "model", "mixtral", max_position_embeddings=2048)
    for name, seed in (("red", 1), ("blue", 2)):
        write_adapter(
            home / name, model, "mixtral", seed, r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]
        )
    database = f"sqlite:///{home / 'motet.db'}"
    (home / "motet.toml").write_text(CONFIG.format(database=database))
    roles: dict[str, Role] = {"acme": "inference", "beta": "inference", "leaver": "inference", "ops": "admin"}
    adapters = {name: home / name for name in ("red", "blue")}
    with closing(Store(database)) as store:
        tokens = {}
        for tenant, role in roles.items():
            record, tokens[tenant] = new_key(tenant, role)
            store.add_key(record)
        with live_server(
            home / "model", adapters, home / "cache", "--pool=16MiB", f"--config={home / 'motet.toml'}"
        ) as server:
            server.key = tokens["ops"]
            yield Shared(server, store, tokens)


def test_tenants_do_not_meet(shared: Shared) -> None:
    assert shared.ask("acme", model="red").status_code == 200
    for who, model in (("acme", "blue"), ("beta", "red"), ("beta", "blue")):
        assert shared.ask(who, model=model).status_code == 404
    assert httpx.get(f"{shared.server.url}/v1/models").status_code == 401
    assert not [line for line in shared.server.log if shared.tokens["acme"].split("-", 2)[2] in line]


def test_case_16_no_prefix_is_shared_between_tenants(shared: Shared) -> None:
    prompt = "only acme asks this " * 10
    assert shared.cached("acme", prompt=prompt) == 0
    assert shared.cached("acme", prompt=prompt) > 100
    assert shared.cached("beta", prompt=prompt) == 0
    assert shared.cached("beta", prompt=prompt) > 100
    assert shared.cached("acme", prompt=prompt, model="red") == 0


def test_what_an_operator_reads(shared: Shared) -> None:
    shared.ask("acme", model="red")
    shared.ask("beta", temperature=9)
    samples = shared.server.samples()
    assert samples['motet_tenant_requests_total{outcome="length",tenant="acme"}'] >= 1
    assert samples['motet_tenant_errors_total{code="invalid_request",tenant="beta"}'] >= 1
    assert samples['motet_queue_seconds_count{model="red"}'] >= 1
    assert samples['motet_tenant_queue_seconds_count{tenant="acme"}'] >= 1
    assert samples["motet_prefill_seconds_total"] > 0
    assert samples["motet_decode_seconds_total"] > 0


def test_a_revoked_key_stops_while_the_server_runs(shared: Shared) -> None:
    record, token = new_key("acme", "inference")
    shared.store.add_key(record)
    shared.tokens["visitor"] = token
    until(lambda: shared.ask("visitor").status_code == 200, 5)
    shared.store.revoke_key(record.id)
    until(lambda: shared.ask("visitor").status_code == 401, 5)


def test_case_22_five_hundred_clients_leave_the_engine(shared: Shared) -> None:
    """Most of them while they are queued: 64 run at a time. A neighbour's answer is what it was."""
    alone = shared.ask("acme", max_tokens=32, ignore_eos=True).json()["choices"][0]["text"]
    where = urlsplit(shared.server.url)

    async def leave(number: int) -> None:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        body = {"model": "model", "prompt": f"{number} " + "x" * 300, "max_tokens": 1500, "ignore_eos": True,
                "stream": number % 2 == 0}  # fmt: skip
        text = json.dumps(body)
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {shared.tokens['leaver']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
        )
        await writer.drain()
        if number % 8 == 0:
            await asyncio.wait_for(reader.readuntil(b"data: "), 60)
        else:
            await asyncio.sleep(0.02 * (number % 50))
        writer.transport.abort()

    async def scenario() -> None:
        await asyncio.gather(*(leave(number) for number in range(500)))

    asyncio.run(scenario())
    until(shared.server.is_idle, 10)
    assert shared.ask("acme", max_tokens=32, ignore_eos=True).json()["choices"][0]["text"] == alone
    samples = shared.server.samples()
    cancelled = samples['motet_tenant_requests_total{outcome="cancelled",tenant="leaver"}']
    dropped = samples.get('motet_tenant_errors_total{code="client_gone",tenant="leaver"}', 0.0)
    assert cancelled > 500 // 8, "those that read, and some of those that were queued in the engine"
    assert cancelled + dropped > 400, "who left sooner was never tokenised"
    assert shared.server.get("/health").status_code == 200


def test_a_server_without_keys_does_not_listen_to_the_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "motet.cli.main", "serve", str(tmp_path), "--host=0.0.0.0", "--port=0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "there are no API keys" in ended.stderr
    assert "Traceback" not in ended.stderr
