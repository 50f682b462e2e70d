"""`motet adapters push` and what comes after it: versions, aliases, canaries, the audit log."""

from __future__ import annotations

import getpass
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from motet.errors import ConfigError

if TYPE_CHECKING:
    from motet.registry.records import Alias, Event, Version
    from motet.registry.store import Registry

registry_app = typer.Typer(rich_markup_mode=None)
RegistryUrl = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URL",
        help="A folder, or the URL of a database. [default: $MOTET_REGISTRY, or the user's own]",
    ),
]
Who = Annotated[str | None, typer.Option(help="For the audit log. [default: the login name]")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", envvar="MOTET_POLICY", help="A TOML file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Ref = Annotated[str, typer.Argument(help="support@7, support@prod, or support for support@prod.")]


@registry_app.command()
def push(
    path: Annotated[
        str,
        typer.Argument(
            help="A PEFT LoRA directory, or an https, s3, gs or hf URL that the policy lets fetch."
        ),
    ],
    name: Annotated[str, typer.Option(help="The adapter that it becomes the next version of.")],
    model: Annotated[
        str, typer.Option(help="Its base: a model directory or hub id; 'embedded' is Motet's own.")
    ] = "embedded",
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="An evaluation to attach; repeatable.")
    ] = None,
    license: Annotated[str, typer.Option(help="An SPDX identifier, such as apache-2.0.")] = "",
    org: Annotated[str, typer.Option(help="For names as ft:base:org:name:id.")] = "",
    expires: Annotated[
        str | None, typer.Option(help="The last day that it may be served, as 2027-01-31.")
    ] = None,
    policy: PolicyFile = None,
    who: Who = None,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
) -> None:
    """Put an adapter into the registry as a new version that never changes; refused if it does not bind to its base.

    A signature that lies beside its files, model.sig, comes along; with --policy it must be of a signer named there.
    """
    from motet.cli.service import model_directory
    from motet.config import cache_dir
    from motet.models.registry import load_spec
    from motet.registry.examine import examine
    from motet.registry.policy import read_policy
    from motet.registry.records import Facts, Label
    from motet.registry.signing import signers
    from motet.registry.sources import is_remote
    from motet.registry.sources import opened as opened_source

    source = path if is_remote(path) else str(Path(path).resolve())
    label = Label(source, who or _login(), _metrics(metric or []), license, org, _end_of(expires))
    rules = read_policy(policy) if policy else None
    spec = load_spec(model_directory(model, Console(stderr=True)))

    def judge(copy: Path) -> Facts:
        if rules is not None:
            signers(copy, rules.signers)
        return examine(copy, spec)

    allowed = rules.fetch if rules is not None else ()
    with opened(registry) as store, opened_source(source, allowed, cache_dir() / "sources") as folder:
        version = store.push(name, folder, judge, label)
    _print_version(version, as_json)


@registry_app.command("list")
def list_versions(registry: RegistryUrl = None, as_json: AsJson = False) -> None:
    """List adapters: their versions, newest first, and the aliases that point at them."""
    with opened(registry) as store:
        snapshot = store.snapshot()
    if as_json:
        _print_json(snapshot)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("version", "aliases", "digest", "rank", "metrics", "pushed", "by"):
        table.add_column(column)
    for version in sorted(snapshot.versions.values(), key=lambda v: (v.name, -v.number)):
        pointing = [_points(a, version.number) for a in snapshot.aliases.values() if a.name == version.name]
        table.add_row(
            version.ref, "retired" if version.retired else ", ".join(filter(None, pointing)), version.facts.digest[:12],
            str(version.facts.rank), _said(version.label.metrics), _day(version.created), escape(version.label.who),
        )  # fmt: skip
    Console().print(table)


@registry_app.command()
def show(ref: Ref, registry: RegistryUrl = None, as_json: AsJson = False) -> None:
    """Show one version: what it is, where it came from, and what has happened to it."""
    with opened(registry) as store:
        version = store.version(ref)
        events = [] if as_json else store.history(version.ref)
    _print_version(version, as_json)
    if events:
        _print_events(events)


@registry_app.command()
def promote(
    ref: Ref,
    to: Annotated[str, typer.Option(help="The alias to move.")] = "prod",
    who: Who = None,
    registry: RegistryUrl = None,
) -> None:
    """Point an alias at a version, at once; requests in flight finish where they began."""
    with opened(registry) as store:
        _print_alias(store.promote(ref, who or _login(), to))


@registry_app.command()
def rollback(ref: Ref, who: Who = None, registry: RegistryUrl = None) -> None:
    """End an alias' canary, or point the alias at the version before."""
    with opened(registry) as store:
        _print_alias(store.rollback(ref, who or _login()))


@registry_app.command()
def canary(
    ref: Annotated[str, typer.Argument(help="The candidate: support@8.")],
    of: Annotated[str, typer.Option(help="The alias that it takes a share of.")] = "prod",
    weight: Annotated[float, typer.Option(help="The share of users, above 0 and at most 1.")] = 0.1,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Answer nobody; run a copy of this share of prompts and compare.")
    ] = False,
    max_errors: Annotated[
        float,
        typer.Option(help="Roll back when so much more of its requests fail than of the stable version's."),
    ] = 0.05,
    max_latency: Annotated[
        float,
        typer.Option(help="Roll back when its p95 latency is more than so many times the stable version's."),
    ] = 2.0,
    min_requests: Annotated[int, typer.Option(help="Decide nothing on fewer requests.")] = 20,
    who: Who = None,
    registry: RegistryUrl = None,
) -> None:
    """Give a candidate a share of an alias, sticky by user; `promote` or `rollback` ends it."""
    from motet.registry.records import Canary, Limits, version_number

    name, number = version_number(ref)
    limits = Limits(max_errors, max_latency, min_requests)
    with opened(registry) as store:
        _print_alias(store.canary(f"{name}@{of}", Canary(number, weight, shadow, limits), who or _login()))


@registry_app.command()
def alias(
    ref: Ref,
    alias: Annotated[str | None, typer.Argument(help="The alias to point at it.")] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Forget the alias that REF names instead.")
    ] = False,
    who: Who = None,
    registry: RegistryUrl = None,
) -> None:
    """Point another name at a version: `motet adapters alias support@7 best` makes support@best."""
    if (alias is None) != delete:
        raise ConfigError("give an alias to point at the version, or --delete")
    with opened(registry) as store:
        if alias is None:
            store.drop_alias(ref, who or _login())
        else:
            _print_alias(store.promote(ref, who or _login(), alias))


@registry_app.command()
def sign(
    ref: Annotated[str, typer.Argument(help="A version, support@7, or a directory that is not pushed yet.")],
    key: Annotated[Path, typer.Option(help="An elliptic-curve private key, PEM.")],
    certificate: Annotated[
        Path | None,
        typer.Option(help="The key's certificate and those above it, PEM; for signers known by authority."),
    ] = None,
    who: Who = None,
    registry: RegistryUrl = None,
) -> None:
    """Sign an adapter's files, as OpenSSF's model signing does; the signature lies beside them as model.sig.

    A key: openssl ecparam -name prime256v1 -genkey -noout -out release.pem; its public half:
    openssl ec -in release.pem -pubout -out release.pub
    """
    from motet.registry.artifacts import SIGNATURE
    from motet.registry.signing import sign as signature_of

    if Path(ref).is_dir():
        (Path(ref) / SIGNATURE).write_bytes(signature_of(Path(ref), key, certificate))
        print("signed", Path(ref) / SIGNATURE)
        return
    with opened(registry) as store, tempfile.TemporaryDirectory() as parent:
        version = store.version(ref)
        with store.artifacts.private_copy(version.artifact, Path(parent)) as copy:
            bundle = signature_of(copy, key, certificate)
        store.sign(version.ref, bundle, who or _login(), str(key))
    print("signed", version.ref)


@registry_app.command()
def retire(ref: Ref, who: Who = None, registry: RegistryUrl = None) -> None:
    """Take a version out of use; its row stays, its files go with the next gc."""
    with opened(registry) as store:
        print("retired", store.retire(ref, who or _login()).ref)


@registry_app.command()
def gc(who: Who = None, registry: RegistryUrl = None) -> None:
    """Remove the files that no version in use needs."""
    with opened(registry) as store:
        print("removed", len(store.collect(who or _login())))


@registry_app.command()
def check(registry: RegistryUrl = None) -> None:
    """Read the whole registry and say what is unsound. Exits with 1 if anything is."""
    with opened(registry) as store:
        problems = store.check()
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    print("sound")


@registry_app.command()
def log(
    subject: Annotated[str | None, typer.Argument(help="An adapter, version or alias.")] = None,
    last: Annotated[int, typer.Option(help="How many lines.")] = 50,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
) -> None:
    """Who did what, newest first."""
    with opened(registry) as store:
        events = store.history(subject, last)
    if as_json:
        _print_json(events)
    else:
        _print_events(events)


@contextmanager
def opened(url: str | None) -> Iterator[Registry]:
    """The registry that an option names."""
    from motet.registry.store import Registry, default_url

    store = Registry(url or default_url())
    try:
        yield store
    finally:
        store.close()


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def _metrics(options: list[str]) -> dict[str, float]:
    metrics = {}
    for option in options:
        name, _, number = option.partition("=")
        try:
            metrics[name] = float(number)
        except ValueError:
            raise ConfigError(f"--metric takes NAME=NUMBER, got {option!r}") from None
    return metrics


def _end_of(day: str | None) -> float | None:
    """Unix time of the end of a day, UTC."""
    if day is None:
        return None
    try:
        found = date.fromisoformat(day)
    except ValueError:
        raise ConfigError(f"--expires takes a day as 2027-01-31, got {day!r}") from None
    return datetime(found.year, found.month, found.day, tzinfo=UTC).timestamp() + 86400


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _said(metrics: dict[str, float]) -> str:
    return escape(", ".join(f"{name} {value:g}" for name, value in metrics.items()))


def _points(alias: Alias, number: int) -> str:
    """The alias, if it points at version `number`."""
    if alias.stable == number:
        return alias.alias
    if alias.canary is not None and alias.canary.number == number:
        return f"{alias.alias} {'shadow' if alias.canary.shadow else 'canary'} {alias.canary.weight:.0%}"
    return ""


def _print_alias(alias: Alias) -> None:
    beside = ""
    if alias.canary is not None:
        what = "shadowed by" if alias.canary.shadow else "with"
        beside = f", {what} {alias.name}@{alias.canary.number} for {alias.canary.weight:.0%}"
    print(f"{alias.ref} → {alias.name}@{alias.stable}{beside}")


def _print_version(version: Version, as_json: bool) -> None:
    if as_json:
        _print_json(version)
        return
    label = version.label
    rows = {
        "version": version.ref + (" (retired)" if version.retired else ""),
        "digest": version.facts.digest,
        "files": version.artifact,
        "base": version.facts.base,
        "rank": str(version.facts.rank),
        "modules": " ".join(version.facts.modules),
        "parameters": f"{version.facts.num_parameters:,}",
        "metrics": _said(label.metrics) or "none",
        "license": label.license or "not stated",
        "source": label.source,
        "pushed": f"{_day(version.created)} by {label.who}",
        "expires": "never" if label.expires is None else _day(label.expires),
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    Console().print(table)


def _print_events(events: list[Event]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("when", "who", "did", "to", "detail"):
        table.add_column(column)
    for event in events:
        table.add_row(_day(event.at), *map(escape, (event.who, event.action, event.subject, event.detail)))
    Console().print(table)


def _print_json(value: object) -> None:
    from motet.registry.records import to_json

    Console().print_json(to_json(value))
