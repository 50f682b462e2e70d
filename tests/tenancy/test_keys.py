"""Tokens: what is kept of them, what opens, and what the database remembers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec
import pytest

from motet.config import TenantPolicy
from motet.errors import ConfigError
from motet.tenancy.keys import KeyRecord, key_id_of, new_key, opens
from motet.tenancy.store import NoSuchKey, Store, StoreUnavailable
from tests.databases import Postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty one."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'motet.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.url(server.database())


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    store = Store(database)
    yield store
    store.close()


def together(*work: Callable[[], object]) -> None:
    """Begin all of `work` at the same moment; none may fail."""
    start = threading.Barrier(len(work))

    def one(what: Callable[[], object]) -> None:
        start.wait()
        what()

    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(one, what) for what in work]:
            done.result()


def test_a_token_opens_its_own_key_only() -> None:
    (mine, token), (other, _) = new_key("acme", "inference"), new_key("acme", "inference")
    assert opens(mine, token)
    assert not opens(other, token)
    assert not opens(mine, token[:-1] + ("A" if token[-1] != "A" else "B"))
    assert not opens(msgspec.structs.replace(mine, revoked=1.0), token)
    assert key_id_of(token) == mine.id


@pytest.mark.parametrize(
    "token", ["", "mk-", "sk-abc", "mk-0123456789abcdef-short", "Ä" * 64, "mk-" + "0" * 10**5]
)
def test_what_is_no_token(token: str) -> None:
    assert key_id_of(token) is None


def test_tokens_are_not_kept(tmp_path: Path) -> None:
    record, token = new_key("acme", "admin")
    with closing(Store(f"sqlite:///{tmp_path / 'motet.db'}")) as store:
        store.add_key(record)
        assert store.read().keys == {record.id: record}
    kept = (tmp_path / "motet.db").read_bytes()
    secret = token.split("-", 2)[2].encode()
    assert record.id.encode() in kept
    assert secret not in kept
    assert token not in repr(record)


def test_revoking_is_for_ever(store: Store) -> None:
    record, _ = new_key("acme", "inference")
    store.add_key(record)
    store.revoke_key(record.id)
    revoked = store.read().keys[record.id].revoked
    assert revoked is not None
    store.revoke_key(record.id)
    assert store.read().keys[record.id].revoked == revoked
    with pytest.raises(NoSuchKey):
        store.revoke_key("nobody")


def test_tenants_are_kept(store: Store) -> None:
    store.set_tenant("acme", TenantPolicy(weight=2.0, adapters=("acme/*",)))
    store.set_tenant("acme", TenantPolicy(weight=3.0, priority=-1))
    assert store.read().tenants == {"acme": TenantPolicy(weight=3.0, priority=-1)}


@pytest.mark.parametrize("name", ["", "*", "a/b", "-a", "a b", "x" * 65, "a\n"])
def test_tenant_names_that_are_refused(store: Store, name: str) -> None:
    with pytest.raises(ConfigError):
        store.set_tenant(name, TenantPolicy())
    with pytest.raises(ConfigError):
        store.add_key(KeyRecord("0", name, "inference", "", 0.0))
    assert not store.read().keys
    assert not store.read().tenants


def test_databases_that_do_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("nonsense", "nosuchdriver://x"):
        with pytest.raises(ConfigError, match="database"):
            Store(url)
    with pytest.raises(StoreUnavailable):
        Store(f"sqlite:///{tmp_path}/no/such/folder/motet.db")
    with pytest.raises(StoreUnavailable, match="refused"):
        Store("postgresql+psycopg://ada@127.0.0.1:9/none")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"motet\[postgresql\]"):
        Store("postgresql+psycopg://ada@127.0.0.1:9/none")


def test_servers_that_start_together_on_a_new_database(database: str) -> None:
    def start() -> None:
        Store(database).close()

    together(*[start] * 8)


def test_two_stores_on_one_database(store: Store, database: str) -> None:
    with closing(Store(database)) as other:
        record, _ = new_key("acme", "inference")
        store.add_key(record)
        assert other.read().keys == {record.id: record}
        other.revoke_key(record.id)
        assert store.read().keys[record.id].revoked is not None


def test_the_same_new_tenant_from_many_at_once(database: str) -> None:
    stores = [Store(database) for _ in range(4)]
    for number in range(20):
        name = f"tenant{number}"
        together(*[partial(store.set_tenant, name, TenantPolicy(weight=7.0)) for store in stores])
        assert stores[0].read().tenants[name] == TenantPolicy(weight=7.0)
    for store in stores:
        store.close()


def test_a_server_needs_to_read_and_no_more(postgres: Postgres) -> None:
    name = postgres.database()
    with closing(Store(postgres.url(name))) as store:
        store.add_key(new_key("acme", "inference")[0])
    postgres.run("CREATE ROLE reader LOGIN")
    postgres.run("GRANT SELECT ON motet_keys, motet_tenants TO reader", name)
    with closing(Store(postgres.url(name, "reader"))) as reader:
        assert len(reader.read().keys) == 1
        with pytest.raises(StoreUnavailable, match="permission denied"):
            reader.set_tenant("acme", TenantPolicy())


def test_a_connection_that_was_cut_is_made_anew(postgres: Postgres) -> None:
    name = postgres.database()
    with closing(Store(postgres.url(name))) as store:
        store.set_tenant("acme", TenantPolicy(weight=2.0))
        postgres.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        assert store.read().tenants == {"acme": TenantPolicy(weight=2.0)}
        postgres.drop(name)
        with pytest.raises(StoreUnavailable, match="does not exist"):
            store.read()
