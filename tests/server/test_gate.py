"""Keys on every route, tenants that do not see each other, and paths that stay where they may be.

Cases 1 to 4 of the catalogue of faults.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from motet.config import ServerConfig, TenantPolicy
from motet.errors import ConfigError
from motet.server.gate import ADMIN, INFERENCE, METRICS, PUBLIC, RULES, SEEN, check_exposure, for_operators
from motet.tenancy.access import Guard
from motet.tenancy.keys import new_key
from motet.tenancy.store import Contents

from .fakes import adapter_at, build, listening
from .tenants import Platform, platform


@pytest.fixture
def served(tmp_path: Path) -> Platform:
    return platform(tmp_path)


def routes(served: Platform) -> list[tuple[str, str]]:
    """Method and declared path of everything that is answered."""
    found = []
    for route in served.house.app.routes:
        assert isinstance(route, Route), f"{route} is of a kind that the gate has no rules for"
        found += [(method, route.path) for method in sorted(route.methods or ())]
    return found


def filled(path: str) -> str:
    for parameter in ("model:path", "name:path", "name", "version", "alias"):
        path = path.replace(f"{{{parameter}}}", "base" if parameter.endswith("path") else "x")
    return path


def test_case_1_every_route_has_a_rule_and_every_rule_a_route(served: Platform) -> None:
    declared = {f"{'GET' if method == 'HEAD' else method} {path}" for method, path in routes(served)}
    assert declared == set(RULES)


def test_case_1_keys_on_every_route_and_method(served: Platform) -> None:
    stranger = new_key("acme", "admin")[1]
    for method, path in routes(served):
        rule = RULES[f"{'GET' if method == 'HEAD' else method} {path}"]
        where = filled(path)
        for token in (None, "", "nonsense", stranger, served.acme[:-1], served.acme.upper()):
            refused = served.ask(token, method, where, {})
            if rule is PUBLIC:
                assert refused.status_code == 200, (method, path)
                continue
            assert refused.status_code == 401, (method, path, token)
            assert refused.headers["www-authenticate"] == "Bearer"
        status = {
            role: served.ask(token, method, where, {}).status_code
            for role, token in (
                ("inference", served.beta),
                ("metrics", served.monitor),
                ("admin", served.admin),
            )
        }
        for role, got in status.items():
            if rule is SEEN and role == "inference":
                continue
            assert (got == 403) == (rule is not PUBLIC and role not in rule.roles), (method, path, role)
            assert got != 401
    assert {ADMIN, INFERENCE, METRICS, PUBLIC, SEEN} == set(RULES.values())
    assert not served.house.generator.calls


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/nowhere", "/v1/chat/completions", "/metrics", "/docs"])
def test_case_1_what_no_route_answers_takes_a_key(served: Platform, method: str, path: str) -> None:
    assert served.ask(None, method, path, {}).status_code == 401
    assert served.ask(served.acme, method, path, {}).status_code in (400, 403, 404, 405)


@pytest.mark.parametrize("header", ["Basic {}", "{}", "Bearer {} x", "Bearer{}", "Token {}", "Bearer"])
def test_case_1_other_spellings_of_a_key(served: Platform, header: str) -> None:
    value = header.format(served.acme)
    assert served.ask(None, "GET", "/v1/models", authorization=value).status_code == 401
    for good in ("Bearer {}", "bearer {}", "BEARER   {}"):
        assert (
            served.ask(None, "GET", "/v1/models", authorization=good.format(served.acme)).status_code == 200
        )


VARIANTS = [
    *(
        "//metrics",
        "/metrics/",
        "/./metrics",
        "/v1/../metrics",
        "/v1/%2e%2e/metrics",
        "/%6detrics",
        "/METRICS",
    ),
    *("/v1%2f..%2fmetrics", "/metrics%00", "/health/../metrics", "/health/%2e%2e/metrics", "/metrics;x"),
    *("/health;/../metrics", "/health%2f..%2fmetrics", "/\\metrics", "/metrics?x", "/health%00/../metrics"),
]


@pytest.mark.parametrize("host", ["localhost", "evil.example", "", "127.0.0.1:1", "a" * 300])
def test_case_2_the_host_changes_nothing(served: Platform, host: str) -> None:
    assert served.ask(None, "GET", "/metrics", host=host).status_code == 401
    assert served.ask(served.acme, "GET", "/metrics", host=host).status_code == 403
    assert served.ask(served.monitor, "GET", "/metrics", host=host).status_code == 200


def test_case_2_spellings_of_a_path_meet_the_same_rule(served: Platform) -> None:
    """Over a real socket, where no client tidies paths up."""

    async def ask(address: str, path: str, token: str | None) -> tuple[int, bytes]:
        host, port = address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        key = f"Authorization: Bearer {token}\r\n" if token else ""
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{key}Connection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return int(answer.split()[1]), answer

    async def scenario(address: str) -> None:
        for path, token in itertools.product(VARIANTS, (None, served.acme)):
            status, answer = await ask(address, path, token)
            assert status in ((401, 400) if token is None else (403, 404, 400)), (path, token, status)
            assert b"motet_requests" not in answer

    with listening(served.house) as address:
        asyncio.run(scenario(address))


def test_case_3_another_tenants_adapter_is_not_there(served: Platform) -> None:
    def told(token: str, name: str) -> list[tuple[int, str]]:
        answers = [
            served.chat(token, model=name),
            served.ask(token, "POST", "/v1/completions", {"model": name, "prompt": "x"}),
            served.ask(token, "GET", f"/v1/models/{name}"),
            served.ask(token, "POST", "/v1/unload_lora_adapter", {"lora_name": name}),
        ]
        return [(answer.status_code, answer.text.replace(name, "NAME")) for answer in answers]

    hidden, absent = told(served.acme, "beta/poet"), told(served.acme, "beta/nobody")
    assert hidden == absent, "what is hidden and what does not exist must not differ in a word"
    assert [status for status, _ in hidden] == [404] * 4
    assert all("beta" not in text for _, text in hidden)
    assert [card["id"] for card in served.ask(served.acme, "GET", "/v1/models").json()["data"]] == [
        "base",
        "acme/poet",
    ]
    assert [card["id"] for card in served.ask(served.admin, "GET", "/v1/models").json()["data"]] == [
        "base", "acme/poet", "beta/poet"
    ]  # fmt: skip
    assert served.chat(served.acme, model="acme/poet").status_code == 200
    assert (
        served.ask(served.acme, "POST", "/v1/unload_lora_adapter", {"lora_name": "acme/poet"}).status_code
        == 403
    )
    assert served.chat(served.beta, model="beta/poet").status_code == 200, "nothing was unloaded"


def test_case_3_a_tenant_without_the_base(tmp_path: Path) -> None:
    served = platform(tmp_path, acme=TenantPolicy(base=False, adapters=()))
    assert served.chat(served.acme).status_code == 404
    assert served.ask(served.acme, "GET", "/v1/models").json()["data"] == []
    assert "served here: nothing" in served.chat(served.acme).json()["error"]["message"]
    assert served.chat(served.beta).status_code == 200


def test_case_4_adapters_come_from_the_allowed_folders_only(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    served = platform(root)
    adapter_at(outside, "secret")
    os.symlink(outside, root / "link")
    adapter_at(root / "half", "half")
    (root / "half" / "weights").unlink()
    os.symlink(outside / "weights", root / "half" / "weights")
    os.symlink(root / "circle", root / "circle")
    for path in (outside, root / "link", root / "half", root / ".." / "outside", "../outside", "/etc", root / "circle",
                 f"{root}\0/x", f"{root}/%2e%2e/outside", f"{root}-not", root / "nothing", "x" * 9999,
                 "https://example.com/adapter"):  # fmt: skip
        answer = served.load("new", str(path))
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["param"] == "lora_path"
    assert served.load("../new", str(root / "acme")).status_code == 400
    os.symlink(root / "acme", root / "good")
    assert served.load("new", str(root / "good")).status_code == 200


def test_case_4_no_folders_are_allowed_unless_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no adapter_roots are configured"):
        platform(tmp_path, config=ServerConfig())


def test_accounts_reach_the_engine(tmp_path: Path) -> None:
    served = platform(tmp_path, acme=TenantPolicy(weight=2.5, priority=1))
    served.chat(served.acme)
    served.ask(served.acme, "POST", "/v1/completions", {"model": "base", "prompt": ["a", "b"]})
    served.chat(served.beta)
    *acme, beta = served.house.generator.accounts
    assert len(acme) == 3
    assert len(set(acme)) == 1
    assert (acme[0].tenant, acme[0].weight, acme[0].priority) == ("acme", 2.5, 1)
    assert (beta.tenant, beta.weight, beta.priority) == ("beta", 1.0, 0)
    assert len(acme[0].salt) == len(beta.salt) == 64
    assert acme[0].salt != beta.salt


def test_without_keys_there_is_one_account() -> None:
    house = build()
    house.chat()
    (account,) = house.generator.accounts
    assert (account.tenant, account.salt) == ("", "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_open_on_loopback_with_a_clear_line(host: str, caplog: pytest.LogCaptureFixture) -> None:
    check_exposure(ServerConfig(host=host), Guard())
    assert "no API keys: everybody on this machine may use" in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "", "no.such.host.invalid"])
def test_open_elsewhere_only_if_told(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="no API keys"):
        check_exposure(ServerConfig(host=host), Guard())
    check_exposure(ServerConfig(host=host, allow_open=True), Guard())
    assert "everybody on the network" in caplog.text
    record, _ = new_key("acme", "inference")
    check_exposure(ServerConfig(host=host), Guard(lambda: Contents({record.id: record}, {})))


def test_two_ports(tmp_path: Path) -> None:
    """What belongs to operators is not served beside inference, and inference not beside it."""
    config = ServerConfig(admin_port=0, adapter_roots=(str(tmp_path),))
    house = build(config=config)

    async def ask(admin: bool, method: str, path: str) -> int:
        app = for_operators(house.app) if admin else house.app
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.request(method, path, json={})).status_code

    for name, rule in RULES.items():
        method, path = name.split()
        main, side = (asyncio.run(ask(admin, method, filled(path))) for admin in (False, True))
        if rule is PUBLIC:
            assert main == side == 200
        else:
            assert (main == 404, side == 404) == (rule.for_operators, not rule.for_operators), name
            assert main != 404 or side != 404


def test_keys_and_tokens_stay_out_of_the_logs(served: Platform, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "motet")
    served.chat(served.acme)
    served.chat("mk-0123456789abcdef-" + "s" * 43)
    secret = served.acme.split("-", 2)[2]
    lines = [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert any("'tenant': 'acme'" in line for line in lines)
    assert not any(secret in line or "ssss" in line for line in lines)


def test_a_route_that_nobody_wrote_a_rule_for_is_the_operators(served: Platform) -> None:
    async def answer(_: Request) -> Response:
        return Response("ok")

    served.house.app.router.routes.append(Route("/extra", answer, methods=["GET"]))
    tokens = {None: 401, served.acme: 403, served.monitor: 403, served.admin: 200}
    assert {token: served.ask(token, "GET", "/extra").status_code for token in tokens} == tokens
