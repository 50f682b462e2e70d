"""Keys and tenants in a database, SQLite or PostgreSQL, by its SQLAlchemy URL.

Every statement that decides names one row, so no isolation but the databases' own is needed; two that make the same
row at the same time are told by its key, and the later one begins again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from sqlalchemy import Column, Connection, Float, MetaData, String, Table, Text, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, SQLAlchemyError

from motet.config import TenantPolicy
from motet.errors import ConfigError, MotetError
from motet.tenancy.keys import KeyRecord
from motet.tenancy.tenants import check_tenant_name

# A PostgreSQL that is cut off is noticed, unless the URL says others: seconds, of tcp_user_timeout milliseconds.
_PSYCOPG = {"connect_timeout": "5", "keepalives_idle": "5", "keepalives_interval": "2", "keepalives_count": "3",
            "tcp_user_timeout": "10000"}  # fmt: skip
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
            place = make_url(url)
            if place.get_driver_name() == "psycopg":
                place = place.set(query={**_PSYCOPG, **place.query})
            self._engine = create_engine(place, pool_pre_ping=True)
        except ArgumentError as error:
            raise ConfigError(f"database: {error}") from error
        except ImportError as error:
            raise ConfigError(
                f"database: {error}; PostgreSQL needs the extra: pip install 'motet[postgresql]'"
            ) from error
        with _told():
            try:
                _metadata.create_all(self._engine)
            except DatabaseError:  # another server has just made the same table
                _metadata.create_all(self._engine)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def read(self) -> Contents:
        """Every key, then every tenant: so no key is seen without a policy that was there before it."""
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
        with _told():
            try:
                self._put_tenant(name, text)
            except IntegrityError:  # somebody else has just made the row
                self._put_tenant(name, text)

    def _put_tenant(self, name: str, policy: str) -> None:
        with self._engine.begin() as connection:
            changed = connection.execute(
                _tenants.update().where(_tenants.c.name == name).values(policy=policy)
            )
            if not changed.rowcount:
                connection.execute(_tenants.insert().values(name=name, policy=policy))

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with _told(), self._engine.begin() as connection:
            yield connection


@contextmanager
def _told() -> Iterator[None]:
    """The database's failures as ours."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"database: {str(error).splitlines()[0]}") from error
