"""Who gets in, as whom, and how fast a revoked key stops."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import msgspec
import pytest
from sqlalchemy import create_engine, text

import motet.tenancy.access
from motet.config import TenantPolicy
from motet.errors import ConfigError
from motet.tenancy.access import (
    EMPTY,
    GIVE_UP_SECONDS,
    OPERATOR,
    REFRESH_SECONDS,
    Guard,
    Principal,
    Unauthenticated,
)
from motet.tenancy.keys import Role, new_key
from motet.tenancy.store import Contents, Store, StoreUnavailable
from motet.tenancy.tenants import Tenant
from tests.databases import Postgres


class Database:
    """Contents that change, and may be out of reach."""

    def __init__(self) -> None:
        self.contents = EMPTY
        self.reads = 0
        self.down = False

    def read(self) -> Contents:
        self.reads += 1
        if self.down:
            raise StoreUnavailable("no route")
        return self.contents

    def key(self, tenant: str, role: Role = "inference") -> str:
        record, token = new_key(tenant, role)
        self.contents = Contents({**self.contents.keys, record.id: record}, self.contents.tenants)
        return token

    def revoke_all(self) -> None:
        keys = {k: msgspec.structs.replace(record, revoked=1.0) for k, record in self.contents.keys.items()}
        self.contents = Contents(keys, self.contents.tenants)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def who(guard: Guard, token: str | None) -> Principal:
    return asyncio.run(guard.principal(token))


def test_without_keys_everybody_is_the_operator() -> None:
    guard = Guard(Database().read)
    assert guard.is_open
    assert who(guard, None) == who(guard, "mk-nonsense") == OPERATOR
    assert OPERATOR.may_see("anything")


def test_a_key_says_who(caplog: pytest.LogCaptureFixture) -> None:
    database = Database()
    database.contents = Contents({}, {"acme": TenantPolicy(weight=2.0), "beta": TenantPolicy(weight=9.0)})
    acme, beta, root = database.key("acme"), database.key("beta"), database.key("ops", "admin")
    guard = Guard(database.read, {"beta": TenantPolicy(weight=3.0, priority=1)})
    assert not guard.is_open
    first, second = who(guard, acme), who(guard, beta)
    assert (first.tenant.name, first.role, first.account.tenant, first.account.weight) == (
        "acme",
        "inference",
        "acme",
        2.0,
    )
    assert (second.account.weight, second.account.priority) == (3.0, 1), "the config file comes first"
    assert who(guard, root).is_admin
    assert len({first.account.salt, second.account.salt, who(guard, root).account.salt}) == 3
    assert who(guard, acme).account.salt == first.account.salt
    assert acme not in caplog.text


@pytest.mark.parametrize("token", [None, "", "mk-", "Bearer"])
def test_without_a_good_key_nobody_gets_in(token: str | None) -> None:
    database = Database()
    database.key("acme")
    with pytest.raises(Unauthenticated):
        who(Guard(database.read), token)


def test_a_right_id_with_a_wrong_secret() -> None:
    database = Database()
    mine, other = database.key("acme"), database.key("acme")
    forged = mine[:20] + other[20:]
    guard = Guard(database.read)
    assert who(guard, mine)
    with pytest.raises(Unauthenticated):
        who(guard, forged)


def test_salts_of_two_servers_differ() -> None:
    database = Database()
    token = database.key("acme")
    assert who(Guard(database.read), token).account.salt != who(Guard(database.read), token).account.salt


def test_a_revoked_key_stops_soon_and_the_server_stays_locked() -> None:
    database, clock = Database(), Clock()
    token = database.key("acme")
    guard = Guard(database.read, clock=clock)
    assert who(guard, token)
    database.revoke_all()
    clock.now += REFRESH_SECONDS
    with pytest.raises(Unauthenticated):
        who(guard, token)
    database.contents = EMPTY
    clock.now += REFRESH_SECONDS
    with pytest.raises(Unauthenticated):
        who(guard, None)


def test_a_database_that_is_down_changes_nothing() -> None:
    database, clock = Database(), Clock()
    token = database.key("acme")
    guard = Guard(database.read, clock=clock)
    database.down = True
    clock.now += REFRESH_SECONDS
    assert who(guard, token).tenant.name == "acme"
    reads = database.reads
    assert who(guard, token)
    assert database.reads == reads, "it is not asked again at once"


def test_a_database_that_hangs_is_waited_for_once_and_not_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motet.tenancy.access, "READ_SECONDS", 0.5)
    database, clock, hang = Database(), Clock(), threading.Event()
    token = database.key("acme")

    def read() -> Contents:
        if clock.now > 100:
            hang.wait(10)
        return database.read()

    guard = Guard(read, clock=clock)
    database.revoke_all()

    async def scenario() -> None:
        clock.now += REFRESH_SECONDS
        assert (await guard.principal(token)).tenant.name == "acme"
        began = time.monotonic()
        await asyncio.gather(*(guard.principal(token) for _ in range(50)))
        assert time.monotonic() - began < 0.45, "nobody waits again so soon"
        hang.set()
        clock.now += REFRESH_SECONDS
        with pytest.raises(Unauthenticated):
            await guard.principal(token)

    asyncio.run(scenario())
    assert database.reads == 2


def test_a_database_that_never_answers_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motet.tenancy.access, "READ_SECONDS", 0.05)
    database, clock, dead = Database(), Clock(), threading.Event()
    token = database.key("acme")

    def read() -> Contents:
        if database.reads == 1:
            database.reads += 1
            dead.wait(10)
        return database.read()

    guard = Guard(read, clock=clock)
    database.revoke_all()

    async def scenario() -> None:
        for _ in range(int(GIVE_UP_SECONDS / REFRESH_SECONDS) + 1):
            clock.now += REFRESH_SECONDS
            assert (await guard.principal(token)).tenant.name == "acme"
        clock.now += REFRESH_SECONDS
        assert (await guard.principal(token)).tenant.name == "acme"
        clock.now += REFRESH_SECONDS
        with pytest.raises(Unauthenticated):
            await guard.principal(token)
        dead.set()

    asyncio.run(scenario())


def test_a_real_database_that_stands_still(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection lives and nobody answers: the next one is better, nothing else waits, and the loop ends."""
    monkeypatch.setattr(motet.tenancy.access, "READ_SECONDS", 0.2)
    clock, name = Clock(), postgres.database()
    store, admin = Store(postgres.url(name)), create_engine(postgres.url())
    record, token = new_key("acme", "inference")
    store.add_key(record)
    guard = Guard(store.read, clock=clock)
    with admin.connect() as connection:
        pids = connection.execute(text(f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'"))
        backends = [int(row[0]) for row in pids]
    assert backends

    async def scenario() -> None:
        for backend in backends:
            os.kill(backend, signal.SIGSTOP)
        for _ in range(int(GIVE_UP_SECONDS / REFRESH_SECONDS) + 2):
            clock.now += REFRESH_SECONDS
            assert (await guard.principal(token)).tenant.name == "acme"
        other = Store(postgres.url(name))
        other.revoke_key(record.id)
        other.close()
        clock.now += REFRESH_SECONDS
        with pytest.raises(Unauthenticated):
            await guard.principal(token)

    try:
        began = time.monotonic()
        asyncio.run(scenario())
        assert time.monotonic() - began < 5
    finally:
        for backend in backends:
            os.kill(backend, signal.SIGCONT)
        for thread in threading.enumerate():
            if thread.name == "tenancy":
                thread.join(10)
        store.close()
        admin.dispose()


def test_what_cannot_be_understood_changes_nothing() -> None:
    database, clock = Database(), Clock()
    token, odd = database.key("acme"), False

    def read() -> Contents:
        if odd:
            raise msgspec.ValidationError("unknown field `budget`")
        return database.read()

    guard = Guard(read, clock=clock)
    odd = True
    clock.now += REFRESH_SECONDS
    assert who(guard, token).tenant.name == "acme"


def test_many_requests_read_once() -> None:
    database, clock = Database(), Clock()
    token = database.key("acme")
    guard = Guard(database.read, clock=clock)
    clock.now += REFRESH_SECONDS

    async def scenario() -> None:
        await asyncio.gather(*(guard.principal(token) for _ in range(100)))

    asyncio.run(scenario())
    assert database.reads == 2


@pytest.mark.parametrize(
    ("patterns", "seen", "hidden"),
    [
        (None, ("acme", "acme/poet", "acme/poet@7"), ("acmeX", "beta/poet", "poet", "ACME")),
        (("support", "law-*"), ("support", "support@prod", "law-eu"), ("acme/poet", "supporter", "law")),
        (("support",), ("ft:base:org:support:1a2b",), ("ft:base:support:legal:1a2b", "ft:base:org:support")),
        ((), (), ("acme", "acme/poet", "")),
        (("*",), ("anything", "a/b"), ()),
    ],
)
def test_what_a_tenant_sees(
    patterns: tuple[str, ...] | None, seen: tuple[str, ...], hidden: tuple[str, ...]
) -> None:
    tenant = Tenant("acme", TenantPolicy(adapters=patterns))
    assert all(map(tenant.may_use, seen))
    assert not any(map(tenant.may_use, hidden))


@pytest.mark.parametrize("field", ["weight", "requests_per_minute", "queue_seconds", "adapter_bytes"])
def test_policies_that_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        msgspec.convert({field: -1}, TenantPolicy)
    with pytest.raises(ConfigError, match="tenant name"):
        Guard(configured={"a/b": TenantPolicy()})
