"""`motet keys` and `motet tenants` on a database."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from motet.cli.keys import policy_of
from motet.config import TenantPolicy
from motet.errors import ConfigError
from motet.tenancy.keys import key_id_of, opens
from motet.tenancy.store import NoSuchKey, Store

from .test_cli import motet


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'motet.db'}"


def test_create_list_revoke(database: str) -> None:
    made = motet("keys", "create", "acme", "--database", database)
    token = made.stdout.strip()
    key_id = key_id_of(token)
    assert key_id is not None
    with closing(Store(database)) as store:
        assert opens(store.read().keys[key_id], token)
    motet("keys", "create", "ops", "--role", "admin", MOTET_DATABASE=database)
    listed = motet("keys", "list", MOTET_DATABASE=database).stdout
    assert key_id in listed
    assert "admin" in listed
    assert token not in listed
    assert motet("keys", "revoke", key_id, MOTET_DATABASE=database).exit_code == 0
    with closing(Store(database)) as store:
        assert not opens(store.read().keys[key_id], token)


def test_the_database_of_a_config_file(database: str, tmp_path: Path) -> None:
    (tmp_path / "motet.toml").write_text(f'[server]\ndatabase = "{database}"')
    assert motet("keys", "create", "acme", "--config", tmp_path / "motet.toml").exit_code == 0
    assert "acme" in motet("keys", "list", "--database", database).stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("keys", "create", "acme"), ConfigError),
        (("keys", "create", "a/b", "--database", "sqlite://"), ConfigError),
        (("keys", "create", "acme", "--role", "king", "--database", "sqlite://"), ConfigError),
        (("keys", "revoke", "0", "--database", "sqlite://"), NoSuchKey),
        (("tenants", "set", "acme", "weight=heavy", "--database", "sqlite://"), ConfigError),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], error: type[Exception]) -> None:
    assert isinstance(motet(*arguments).exception, error)


def test_tenants(database: str) -> None:
    limits = ("weight=2.5", "requests_per_minute=60", "adapters=support,acme/*", "base=false")
    motet("tenants", "set", "acme", *limits, "--database", database)
    wanted = TenantPolicy(weight=2.5, requests_per_minute=60, adapters=("support", "acme/*"), base=False)
    with closing(Store(database)) as store:
        assert store.read().tenants == {"acme": wanted}
    listed = motet("tenants", "list", "--database", database).stdout
    assert "weight=2.5" in listed
    assert "adapters=support,acme/*" in listed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed=3"], "unknown field `speed`"),
        (["weight"], "FIELD=VALUE"),
        (["weight=0"], "weight must be positive"),
        (["max_queued=1.5"], "max_queued"),
    ],
)
def test_limits_that_are_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_of(words)
