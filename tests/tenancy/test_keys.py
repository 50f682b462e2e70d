"""Tokens: what is kept of them, what opens, and what the database remembers."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from motet.config import TenantPolicy
from motet.errors import ConfigError
from motet.tenancy.keys import KeyRecord, key_id_of, new_key, opens
from motet.tenancy.store import NoSuchKey, Store, StoreUnavailable


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'motet.db'}")
    yield store
    store.close()


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


def test_tokens_are_not_kept(store: Store, tmp_path: Path) -> None:
    record, token = new_key("acme", "admin")
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


def test_databases_that_do_not_open(tmp_path: Path) -> None:
    for url in ("nonsense", "nosuchdriver://x"):
        with pytest.raises(ConfigError, match="database"):
            Store(url)
    with pytest.raises(StoreUnavailable):
        Store(f"sqlite:///{tmp_path}/no/such/folder/motet.db")


def test_servers_that_start_together_on_a_new_file(tmp_path: Path) -> None:
    url, together = f"sqlite:///{tmp_path / 'new.db'}", threading.Barrier(8)

    def start() -> None:
        together.wait()
        Store(url).close()

    with ThreadPoolExecutor(8) as servers:
        for started in [servers.submit(start) for _ in range(8)]:
            started.result()


def test_two_stores_on_one_file(store: Store, tmp_path: Path) -> None:
    other = Store(f"sqlite:///{tmp_path / 'motet.db'}")
    record, _ = new_key("acme", "inference")
    store.add_key(record)
    assert other.read().keys == {record.id: record}
    with closing(sqlite3.connect(tmp_path / "motet.db")) as file:
        assert file.execute("select count(*) from motet_keys").fetchone() == (1,)
    other.close()
