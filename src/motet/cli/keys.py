"""`motet keys` and `motet tenants`: who may use a server, and how much. A running server notices in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, cast, get_args

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from motet.config import TenantPolicy
from motet.errors import ConfigError
from motet.tenancy.keys import Role, new_key
from motet.tenancy.store import Store

keys_app = typer.Typer(help="API keys of tenants.", no_args_is_help=True, rich_markup_mode=None)
tenants_app = typer.Typer(help="Tenants and their limits.", no_args_is_help=True, rich_markup_mode=None)

Database = Annotated[
    str | None,
    typer.Option(envvar="MOTET_DATABASE", help="SQLAlchemy URL, such as sqlite:////var/lib/motet/motet.db."),
]
Config = Annotated[Path | None, typer.Option(help="The server's TOML file; its [server] database is used.")]


@keys_app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose requests the key's are.")],
    role: Annotated[
        str, typer.Option(help="inference; metrics (reads /metrics); or admin (everything).")
    ] = "inference",
    database: Database = None,
    config: Config = None,
) -> None:
    """Make a key and print its token, which is stored nowhere and shown only now."""
    if role not in get_args(Role):
        raise ConfigError(f"--role must be inference, metrics or admin, got {role!r}")
    record, token = new_key(tenant, cast("Role", role))
    with _store(database, config) as store:
        store.add_key(record)
    print(token)


@keys_app.command("list")
def list_keys(database: Database = None, config: Config = None) -> None:
    """List the keys, without their tokens."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("id", "tenant", "role", "created", "revoked"):
        table.add_column(column)
    with _store(database, config) as store:
        keys = store.read().keys.values()
    for key in keys:
        revoked = _date(key.revoked) if key.revoked is not None else ""
        table.add_row(key.id, key.tenant, key.role, _date(key.created), revoked)
    Console().print(table)


@keys_app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The id that `motet keys list` shows.")],
    database: Database = None,
    config: Config = None,
) -> None:
    """Make a key useless for ever."""
    with _store(database, config) as store:
        store.revoke_key(key)


@tenants_app.command("set")
def set_tenant(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.")],
    limits: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE...", help="Of " + ", ".join(TenantPolicy.__struct_fields__) + "."
        ),
    ] = None,
    database: Database = None,
    config: Config = None,
) -> None:
    """Give a tenant these limits and no others. Patterns of adapters are separated by commas.

    Example: motet tenants set acme weight=2 requests_per_minute=600 adapters=support,acme/*
    """
    policy = policy_of(limits or [])
    with _store(database, config) as store:
        store.set_tenant(tenant, policy)


@tenants_app.command("list")
def list_tenants(database: Database = None, config: Config = None) -> None:
    """List the tenants of the database and what differs from the defaults."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("tenant")
    table.add_column("limits")
    with _store(database, config) as store:
        tenants = store.read().tenants.items()
    for name, policy in tenants:
        table.add_row(name, escape(" ".join(_differences(policy))))
    Console().print(table)


def policy_of(limits: list[str]) -> TenantPolicy:
    """The policy that FIELD=VALUE words say. Raises ConfigError naming the field."""
    values: dict[str, object] = {}
    for word in limits:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"limits are FIELD=VALUE, got {word!r}")
        values[name] = [part for part in value.split(",") if part] if name == "adapters" else value
    try:
        return msgspec.convert(values, TenantPolicy, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"limits: {error}") from error


def _differences(policy: TenantPolicy) -> list[str]:
    defaults = msgspec.structs.asdict(TenantPolicy())
    changed = {k: v for k, v in msgspec.structs.asdict(policy).items() if v != defaults[k]}
    return [f"{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in changed.items()]


@contextmanager
def _store(database: str | None, config: Path | None) -> Iterator[Store]:
    if database is None and config is not None:
        from motet.cli.settings import read_settings

        database = read_settings(config, {}, {}, []).server.database
    if database is None:
        raise ConfigError(
            "name the database: --database URL, $MOTET_DATABASE, or --config with [server] database"
        )
    with closing(Store(database)) as store:
        yield store


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
