"""Keys and tenants in a database: SQLite by default, PostgreSQL or another by its SQLAlchemy URL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from sqlalchemy import Column, Connection, Float, MetaData, String, Table, Text, create_engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from motet.config import TenantPolicy
from motet.errors import ConfigError, MotetError
from motet.tenancy.keys import KeyRecord
from motet.tenancy.tenants import check_tenant_name

_metadata = MetaData()
_keys = Table(
    "motet_keys",
    _metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
)
_tenants = Table(
    "motet_tenants",
    _metadata,
    Column("name", String(64), primary_key=True),
    Column("policy", Text, nullable=False),  # JSON
)


class StoreUnavailable(MotetError):
    """The database of keys and tenants cannot be reached or written."""

    status = 503
    code = "tenancy_unavailable"


class NoSuchKey(MotetError):
    """No key has this id."""

    status = 404
    code = "key_not_found"


class Contents(msgspec.Struct, frozen=True):
    """All that the database says at one time."""

    keys: dict[str, KeyRecord]
    tenants: dict[str, TenantPolicy]


class Store:
    """The two tables; they are made if they are not there. Every method may block, and raise StoreUnavailable."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that is none, or whose driver is not installed."""
        try:
            self._engine = create_engine(url, pool_pre_ping=True)
        except (ArgumentError, ImportError) as error:
            raise ConfigError(f"database: {error}") from error
        with self._begin() as connection:
            for table in _metadata.sorted_tables:  # another server may do so at the same time
                connection.execute(CreateTable(table, if_not_exists=True))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def read(self) -> Contents:
        """Every key and every tenant."""
        with self._begin() as connection:
            keys = connection.execute(_keys.select().order_by(_keys.c.created)).mappings().all()
            tenants = connection.execute(_tenants.select().order_by(_tenants.c.name)).mappings().all()
        return Contents(
            {row["id"]: msgspec.convert({str(k): v for k, v in row.items()}, KeyRecord) for row in keys},
            {row["name"]: msgspec.json.decode(row["policy"], type=TenantPolicy) for row in tenants},
        )

    def add_key(self, record: KeyRecord) -> None:
        """Keep a new key. Raises ConfigError for a bad tenant name."""
        check_tenant_name(record.tenant)
        with self._begin() as connection:
            connection.execute(_keys.insert().values(msgspec.structs.asdict(record)))

    def revoke_key(self, key_id: str) -> None:
        """Make a key useless for ever. Raises NoSuchKey; revoking twice changes nothing."""
        with self._begin() as connection:
            found = connection.execute(_keys.select().where(_keys.c.id == key_id)).first()
            if found is None:
                raise NoSuchKey(f"no key {key_id[:100]!r}")
            good = (_keys.c.id == key_id) & _keys.c.revoked.is_(None)
            connection.execute(_keys.update().where(good).values(revoked=time.time()))

    def set_tenant(self, name: str, policy: TenantPolicy) -> None:
        """Give a tenant this policy, whatever it had before. Raises ConfigError for a bad name."""
        check_tenant_name(name)
        text = msgspec.json.encode(policy).decode()
        with self._begin() as connection:
            connection.execute(_tenants.delete().where(_tenants.c.name == name))
            connection.execute(_tenants.insert().values(name=name, policy=text))

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"database: {str(error).splitlines()[0]}") from error
