"""The registry: immutable versions of adapters, aliases that move between them, and a log of who did what.

Files come first, rows second: a version's files are in place and synced before the transaction that names them
commits, and files go only after no row names them. So whatever moment a process dies at, every row has its files. Who
keeps or removes files holds the folder's lock around the database's, because a connection may lose the latter.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.engine import URL, make_url

from motet.errors import AdapterConflict, ConfigError, InvalidRequest
from motet.registry.artifacts import CONFIG, Artifacts
from motet.registry.records import (
    PROD,
    Alias,
    Canary,
    Event,
    Facts,
    Label,
    NotRegistered,
    Snapshot,
    Version,
    check_name,
    check_word,
    split_ref,
    version_number,
)
from motet.registry.tables import Database, aliases, audit, moves, versions


class Registry:
    """One registry: a database, and a folder of artifacts."""

    def __init__(self, url: str) -> None:
        """`url` is a folder, sqlite:///FILE with the artifacts beside it, or
        postgresql://USER@HOST/DATABASE?artifacts=FOLDER. Raises ConfigError.
        """
        database, artifacts = _places(url)
        self.url = url
        self.artifacts = Artifacts(artifacts)
        self._db = Database(database)

    def close(self) -> None:
        self._db.close()

    # Reading

    def snapshot(self) -> Snapshot:
        """Everything that a server needs to know, as of one moment."""
        with self._db.read() as db:
            return _snapshot(db)

    def revision(self) -> int:
        """Grows with every change."""
        with self._db.read() as db:
            return _revision(db)

    def version(self, ref: str) -> Version:
        """The version that `support@7`, `support@prod` or `support` names now. Raises NotRegistered."""
        with self._db.read() as db:
            return _version(db, *_number(db, ref))

    def history(self, subject: str | None = None, last: int = 100) -> list[Event]:
        """The audit log, newest first; of all that concerns one adapter, version or alias if one is named."""
        query = select(audit).order_by(audit.c.id.desc()).limit(last)
        if subject is not None:
            begin = f"{subject}@"  # compared as it is: SQLite's LIKE takes large for small letters
            inside = func.substr(audit.c.subject, 1, len(begin)) == begin
            query = query.where((audit.c.subject == subject) | inside)
        with self._db.read() as db:
            return [Event(*row) for row in db.execute(query)]

    # Versions

    def push(self, name: str, source: Path, examine: Callable[[Path], Facts], label: Label) -> Version:
        """Copy the adapter in `source` as the next version of `name`.

        `examine` judges the very copy that is kept, and raises to refuse it. AdapterConflict if the latest version
        has the same files.
        """
        check_name(name)
        if label.org:
            check_word(label.org, "org")
        for metric, number in label.metrics.items():
            if not math.isfinite(number):
                raise InvalidRequest(f"metric {metric[:100]!r} is {number}, which is no number", "metrics")
        with self.artifacts.staged(source) as (folder, artifact):
            facts = examine(folder)
            config = _config(folder)
            with self.artifacts.alone(), self._db.write() as db:
                number = 1 + (
                    db.scalar(select(func.max(versions.c.number)).where(versions.c.name == name)) or 0
                )
                if (
                    number > 1
                    and not (last := _version(db, name, number - 1)).retired
                    and last.artifact == artifact
                ):
                    raise AdapterConflict(f"{last.ref} has the same files; push what is new")
                version = Version(name, number, artifact, facts, label, config, time.time())
                self.artifacts.keep(folder, artifact)
                db.execute(insert(versions), [_row(version)])
                metrics = ", ".join(f"{key} {value:g}" for key, value in label.metrics.items())
                _log(
                    db,
                    label.who,
                    "push",
                    version.ref,
                    f"digest {facts.digest} from {label.source}; {metrics or 'no metrics'}",
                )
        return version

    def sign(self, ref: str, bundle: bytes, who: str, signer: str) -> Version:
        """Keep a signature beside a version's files."""
        with self._db.write() as db:
            version = _version(db, *version_number(ref))
            self.artifacts.add_signature(version.artifact, bundle)
            _log(db, who, "sign", version.ref, f"by {signer}")
        return version

    def retire(self, ref: str, who: str) -> Version:
        """Take a version out of use: it is served no more and no alias may point at it; its row stays.

        AdapterConflict while an alias does.
        """
        with self._db.write() as db:
            version = _version(db, *version_number(ref))
            users = [alias.ref for alias in _aliases(db, version.name) if version.number in _numbers(alias)]
            if users:
                raise AdapterConflict(f"{version.ref} is what {', '.join(users)} points at; move that first")
            here = (versions.c.name == version.name) & (versions.c.number == version.number)
            db.execute(update(versions).where(here).values(retired=True))
            _log(db, who, "retire", version.ref, "")
        return msgspec.structs.replace(version, retired=True)

    # Aliases

    def promote(self, ref: str, who: str, to: str = PROD, reason: str = "") -> Alias:
        """Point `name@to` at the version that `ref` names now; a canary of the alias ends."""
        check_word(to, "alias")
        with self._db.write() as db:
            version = _usable(_version(db, *_number(db, ref)))
            old = _alias(db, version.name, to)
            if old is not None and old.stable == version.number and old.canary is None:
                return old
            alias = Alias(version.name, to, version.number)
            _put(db, alias)
            if old is None or old.stable != version.number:
                db.execute(insert(moves).values(name=alias.name, alias=to, stable=alias.stable))
            was = "new" if old is None else f"was {_points(old)}"
            _log(db, who, "promote", alias.ref, f"now {alias.stable}, {was}{reason and '; ' + reason}")
        return alias

    def rollback(self, ref: str, who: str, reason: str = "", only: Canary | None = None) -> Alias:
        """End the canary of the alias that `ref` names, or if there is none go back to the version before.

        With `only`, nothing happens unless that still is the canary, so that several may judge the same one.
        AdapterConflict if there is nothing to go back to.
        """
        name, which = _alias_ref(ref)
        with self._db.write() as db:
            old = _known(_alias(db, name, which), f"{name}@{which}")
            if only is not None and old.canary != only:
                return old
            stable = old.stable
            if old.canary is None:
                here = (moves.c.name == name) & (moves.c.alias == which)
                rows = db.execute(
                    select(moves.c.id, moves.c.stable).where(here).order_by(moves.c.id.desc()).limit(2)
                ).all()
                if len(rows) < 2:
                    raise AdapterConflict(f"{old.ref} has pointed at nothing but {name}@{stable}")
                stable = _usable(_version(db, name, rows[1].stable)).number
                db.execute(delete(moves).where(moves.c.id == rows[0].id))
            alias = Alias(name, which, stable)
            _put(db, alias)
            _log(
                db, who, "rollback", alias.ref, f"now {stable}, was {_points(old)}{reason and '; ' + reason}"
            )
        return alias

    def canary(self, ref: str, canary: Canary, who: str) -> Alias:
        """Let `canary` take its share of the alias that `ref` names."""
        if not 0 < canary.weight <= 1:
            raise InvalidRequest(f"weight must be above 0 and at most 1, got {canary.weight}", "weight")
        name, which = _alias_ref(ref)
        with self._db.write() as db:
            old = _known(_alias(db, name, which), f"{name}@{which}")
            if canary.number == _usable(_version(db, name, canary.number)).number == old.stable:
                raise AdapterConflict(f"{old.ref} already points at {name}@{canary.number}")
            alias = msgspec.structs.replace(old, canary=canary)
            _put(db, alias)
            _log(db, who, "canary", alias.ref, f"now {_points(alias)}")
        return alias

    def drop_alias(self, ref: str, who: str) -> None:
        """Forget an alias and where it has pointed."""
        name, which = _alias_ref(ref)
        with self._db.write() as db:
            old = _known(_alias(db, name, which), f"{name}@{which}")
            for table in (aliases, moves):
                db.execute(delete(table).where((table.c.name == name) & (table.c.alias == which)))
            _log(db, who, "drop", old.ref, f"was {_points(old)}")

    def note(self, who: str, action: str, notes: Iterable[tuple[str, str]]) -> None:
        """Add to the audit log what changed nothing, such as refusals: of which subject, and what is to be said."""
        with self._db.write() as db:
            for subject, detail in notes:
                _log(db, who, action, subject, detail)

    # Housekeeping

    def collect(self, who: str) -> list[str]:
        """Remove the files that no version in use names, and what dead processes have left; the folders' names."""
        with self.artifacts.alone(), self._db.write() as db:
            gone = self.artifacts.sweep(_wanted(db))
            if gone:
                _log(db, who, "gc", "artifacts", f"{len(gone)} removed")
        return gone

    def check(self) -> list[str]:
        """Everything that is not as it should be; empty is sound. Reads all files."""
        found = self._db.problems()
        with self._db.read() as db:
            snapshot = _snapshot(db)
            for alias in snapshot.aliases.values():
                for number in _numbers(alias):
                    version = snapshot.versions.get(f"{alias.name}@{number}")
                    if version is None or version.retired:
                        why = "retired" if version else "not there"
                        found.append(f"{alias.ref} points at {alias.name}@{number}, which is {why}")
            wanted = _wanted(db)
        for artifact in sorted(wanted):
            if problem := self.artifacts.problem(artifact):
                users = [
                    version.ref for version in snapshot.versions.values() if version.artifact == artifact
                ]
                found.append(f"{', '.join(users)}: {problem}")
        return found


def default_url() -> str:
    """`$MOTET_REGISTRY`, or a folder for what Motet cannot make again."""
    return os.environ.get("MOTET_REGISTRY") or str(Path.home() / ".local" / "share" / "motet" / "registry")


def _places(url: str) -> tuple[URL, Path]:
    """The database and the artifacts' folder."""
    if "://" not in url:
        folder = Path(url).expanduser()
        return URL.create("sqlite", database=str(folder / "registry.db")), folder / "artifacts"
    parts = urlsplit(url)
    if parts.scheme == "sqlite" and not parts.netloc and len(parts.path) > 1 and not parts.query:
        file = Path(unquote(parts.path[1:])).expanduser()
        return URL.create("sqlite", database=str(file)), file.parent / "artifacts"
    if parts.scheme in ("postgresql", "postgresql+psycopg"):
        database = make_url(url).set(drivername="postgresql+psycopg")
        artifacts = database.query.get("artifacts")
        if isinstance(artifacts, str):
            return database.difference_update_query(["artifacts"]), Path(artifacts).expanduser()
    raise ConfigError(
        f"registry {parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()!r} must be a folder, "
        "sqlite:///FILE or postgresql://USER@HOST/DATABASE?artifacts=FOLDER"
    )


def _config(folder: Path) -> dict[str, Any]:
    found = msgspec.json.decode((folder / CONFIG).read_bytes())
    assert isinstance(found, dict)  # examined
    return found


def _row(version: Version) -> dict[str, Any]:
    row = msgspec.structs.asdict(version)
    return {**row, "facts": msgspec.to_builtins(version.facts), "label": msgspec.to_builtins(version.label)}


def _revision(db: Connection) -> int:
    return db.scalar(select(func.max(audit.c.id))) or 0


def _snapshot(db: Connection) -> Snapshot:
    all_versions = [_read_version(row) for row in db.execute(select(versions)).mappings()]
    return Snapshot(
        _revision(db),
        {version.ref: version for version in all_versions},
        {alias.ref: alias for alias in _aliases(db)},
    )


def _read_version(row: Any) -> Version:
    return msgspec.convert({str(key): value for key, value in row.items()}, Version)


def _version(db: Connection, name: str, number: int) -> Version:
    here = (versions.c.name == name) & (versions.c.number == number)
    row = db.execute(select(versions).where(here)).mappings().first()
    if row is None:
        raise NotRegistered(f"no version {name}@{number}")
    return _read_version(row)


def _usable(version: Version) -> Version:
    if version.retired:
        raise AdapterConflict(f"{version.ref} is retired")
    return version


def _number(db: Connection, ref: str) -> tuple[str, int]:
    name, which = split_ref(ref)
    return name, int(which) if which.isdigit() else _known(_alias(db, name, which), f"{name}@{which}").stable


def _aliases(db: Connection, name: str | None = None) -> list[Alias]:
    query = select(aliases).order_by(aliases.c.name, aliases.c.alias)
    rows = db.execute(query if name is None else query.where(aliases.c.name == name)).mappings()
    return [msgspec.convert({str(key): value for key, value in row.items()}, Alias) for row in rows]


def _alias(db: Connection, name: str, alias: str) -> Alias | None:
    return next((found for found in _aliases(db, name) if found.alias == alias), None)


def _known(alias: Alias | None, ref: str) -> Alias:
    if alias is None:
        raise NotRegistered(f"no alias {ref}")
    return alias


def _alias_ref(ref: str) -> tuple[str, str]:
    name, which = split_ref(ref)
    if which.isdigit():
        raise InvalidRequest(f"{ref!r} is a version, not an alias", "name")
    return name, which


def _put(db: Connection, alias: Alias) -> None:
    canary = None if alias.canary is None else msgspec.to_builtins(alias.canary)
    here = (aliases.c.name == alias.name) & (aliases.c.alias == alias.alias)
    changed = db.execute(update(aliases).where(here).values(stable=alias.stable, canary=canary))
    if not changed.rowcount:
        db.execute(
            insert(aliases).values(name=alias.name, alias=alias.alias, stable=alias.stable, canary=canary)
        )


def _numbers(alias: Alias) -> list[int]:
    return [alias.stable] if alias.canary is None else [alias.stable, alias.canary.number]


def _points(alias: Alias) -> str:
    if alias.canary is None:
        return str(alias.stable)
    share = f"{alias.canary.weight:.0%}"
    return (
        f"{alias.stable} with {alias.canary.number} {'shadowing' if alias.canary.shadow else 'for'} {share}"
    )


def _wanted(db: Connection) -> set[str]:
    """The artifacts of the versions in use."""
    return set(db.scalars(select(versions.c.artifact).where(~versions.c.retired)))


def _log(db: Connection, who: str, action: str, subject: str, detail: str) -> None:
    row = {"who": who, "action": action, "subject": subject, "detail": detail}
    db.execute(insert(audit).values(at=time.time(), **{key: _text(value) for key, value in row.items()}))


def _text(value: str) -> str:
    """What a database can keep of any string: a path's odd bytes and NUL are written out."""
    return value.encode(errors="backslashreplace").decode().replace("\0", "\\0")
