"""A running server's catalog that follows a registry: what is promoted there is served here within a second.

Every alias of the registry is served as `support@prod` (and `support`, if it is the production alias), every version
that an alias needs as `support@7` and ft:base:org:support:id; other versions when somebody asks for them. A version
that cannot be loaded moves no alias: the server goes on with what it has, says why, and tries again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Set
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeVar

from motet.errors import AdapterConflict, MotetError
from motet.registry.artifacts import Tampered
from motet.registry.catalog import AdapterEngine, Catalog, Locks
from motet.registry.judge import Judge
from motet.registry.monitor import Monitor
from motet.registry.policy import ANYBODY, Decision, PolicyDenied
from motet.registry.records import PROD, Alias, Snapshot, Version
from motet.registry.release import Divergence, Figures, Split, verdict
from motet.registry.store import Registry
from motet.types import AdapterRecord, ModelSpec, PreparedAdapter, Struct

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0
RETRY_SECONDS = 30.0
T = TypeVar("T")


class Release(Struct, frozen=True):
    """An alias and how its versions do on this server."""

    alias: Alias
    stable: Figures
    canary: Figures | None = None
    divergence: Divergence | None = None


class RegistryCatalog(Catalog):
    """The served models, by the names of a registry beside those that are loaded by hand."""

    def __init__(
        self,
        registry: Registry,
        copies: Path,
        spec: ModelSpec,
        base: str,
        root: str,
        prepare: Callable[[Path], PreparedAdapter],
        engine: AdapterEngine,
        judge: Judge | None = None,
        forget: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`copies` is a folder for private copies of adapters while they are loaded; the rest is Catalog's.

        Without a `judge` everything may be served; `forget` is told of names that are served no more. Raises
        PolicyDenied if the base may not run.
        """
        if judge is not None:
            judge.check_base(spec.digest)
        super().__init__(spec, base, root, prepare, engine)
        self.registry = registry
        self._copies = copies
        self._judge = judge
        self._forget = forget
        self._snapshot = Snapshot(-1, {}, {})
        self._shadows: dict[str, tuple[str, float]] = {}  # by alias: the candidate and its share of prompts
        self._fine_tunes: dict[str, str] = {}  # OpenAI's names of what is served
        self.monitor = Monitor()
        self._failures: dict[str, str] = {}  # what kept a version from being served, by its name
        self._retry = 0.0
        self._syncing = asyncio.Lock()
        self._loading = Locks()

    @property
    def fetch(self) -> tuple[str, ...]:
        """Patterns of URLs that adapters may be fetched from: the policy's, if there is one."""
        return self._judge.policy.fetch if self._judge is not None else ()

    async def follow(self) -> None:
        """Serve what the registry says, for ever."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                revision = await asyncio.to_thread(self.registry.revision)
                overdue = self._failures and time.monotonic() >= self._retry
                if revision != self._snapshot.revision or overdue:
                    await self.sync()
                await self._judge_canaries()
            except MotetError as failure:  # the registry cannot be read now: serve what is known
                logger.warning("registry: %s", failure)
            except Exception:  # serve what is known, and go on looking
                logger.exception("registry: unexpected failure")

    async def sync(self) -> None:
        """Load what the registry's aliases need, move all aliases at once, let go of what is retired."""
        async with self._syncing:
            snapshot = await asyncio.to_thread(self.registry.snapshot)
            for ref in _needed(snapshot, self.spec.digest):
                await self._try(snapshot.versions[ref])
            before, self._snapshot = self._snapshot, snapshot
            self._publish()
            for ref, alias in snapshot.aliases.items():
                old = before.aliases.get(ref)
                if alias.canary is not None and (old is None or old.canary != alias.canary):
                    self.monitor.forget(ref)
            compared = {(ref, v) for ref, alias in snapshot.aliases.items() for v in _versions_of(alias)}
            self.monitor.keep(compared)
            for version in snapshot.versions.values():
                if version.retired and self._serves(version):
                    self._failures.pop(version.ref, None)
                    await super().unload(version.ref)
                    self._forget(version.ref)
            self._retry = time.monotonic() + RETRY_SECONDS

    async def load(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        digest: str | None = None,
        source: str | None = None,
    ) -> AdapterRecord:
        """As Catalog's. PolicyDenied where there is a policy, which can judge only what was pushed."""
        if self._judge is not None:
            raise PolicyDenied(f"there is a policy, so {name!r} must come from the registry: push it there")
        return await super().load(name, path, replace=replace, digest=digest, source=source)

    async def want(self, name: str, tenant: str | None = ANYBODY) -> None:
        """Look for a name that is not served yet in the registry; the name stays unknown if it is not there.

        Raises what keeps the version from being served.
        """
        if self._is_known(name):
            return
        if await asyncio.to_thread(self.registry.revision) != self._snapshot.revision:
            await self.sync()
        version = None if self._is_known(name) else self._find(name)
        if version is not None and (self._judge is None or self._judge.may_ask(version, tenant)):
            await self._serve(version)
            self._publish()

    def records(self, tenant: str | None = ANYBODY) -> list[AdapterRecord]:
        """As Catalog's, of the versions that a rule of the policy is about for this tenant."""
        records = super().records()
        if self._judge is None or tenant is ANYBODY:
            return records
        aliases, versions = self.aliases(), self._snapshot.versions
        refs = {r.name: aliases[r.name].stable if r.name in aliases else r.name for r in records}
        return [
            r
            for r in records
            if refs[r.name] in versions and self._judge.may_see(versions[refs[r.name]], tenant)
        ]

    def resolve(self, name: str, user: str = "", tenant: str | None = ANYBODY) -> AdapterRecord | None:
        """As Catalog's, for ft:base:org:name:id too. PolicyDenied, or ModelNotFound if no rule is about the tenant."""
        record = super().resolve(self._fine_tunes.get(name, name), user)
        if record is not None and self._judge is not None:
            version = self._snapshot.versions.get(record.name)
            if version is None:  # it is being loaded, and its names come after it
                raise self._not_found(name)
            self._judge.check(version, tenant)
        return record

    def alias_of(self, name: str) -> str | None:
        """The alias that a request for `name` goes by, in full: support@prod for support. None for a version."""
        if name in self._records or name not in self._aliases:
            return None
        return name if "@" in name else f"{name}@{PROD}"

    def shadow_of(self, alias: str) -> tuple[str, float] | None:
        """The served name that shadows what the alias answers, and the share of prompts that it gets."""
        return self._shadows.get(alias)

    def releases(self) -> dict[str, Release]:
        """Every alias with what this server has seen of its versions since its canary began."""
        return {ref: self._release(alias) for ref, alias in self._snapshot.aliases.items()}

    def _release(self, alias: Alias) -> Release:
        versions = _versions_of(alias)
        stable, *candidates = (self.monitor.figures(alias.ref, version) for version in versions)
        if not candidates:
            return Release(alias, stable)
        return Release(alias, stable, candidates[0], self.monitor.divergence(alias.ref, versions[1]))

    async def _judge_canaries(self) -> None:
        """Take back the candidates that are worse than their limits allow."""
        for ref, alias in self._snapshot.aliases.items():
            canary = alias.canary
            if canary is None:
                continue
            stable, candidate = (self.monitor.figures(ref, version) for version in _versions_of(alias))
            reason = verdict(canary.limits, stable, candidate)
            if reason is not None:
                logger.error("%s: %s@%d is taken back: %s", ref, alias.name, canary.number, reason)
                await asyncio.to_thread(self.registry.rollback, ref, "motet", reason, canary)
                await self.sync()

    async def unload(self, name: str) -> AdapterRecord:
        """As Catalog's. AdapterConflict for what the registry serves: it is retired there."""
        if name in self._snapshot.versions or name in self.aliases():
            raise AdapterConflict(f"{name!r} is served from the registry; retire it or move its alias there")
        return await super().unload(name)

    def _is_known(self, name: str) -> bool:
        return name == self.base or any(
            name in names for names in (self._records, self._aliases, self._fine_tunes)
        )

    def _serves(self, version: Version) -> bool:
        record = self._records.get(version.ref)
        return record is not None and record.digest == version.facts.digest

    def _find(self, name: str) -> Version | None:
        """The version for this base that is called so, by number or as OpenAI would."""
        version = self._snapshot.versions.get(name)
        if version is None and name.startswith("ft:"):
            every = self._snapshot.versions.values()
            version = next((v for v in every if v.fine_tune(self.base) == name and not v.retired), None)
        usable = version is not None and not version.retired and version.facts.base == self.spec.digest
        return version if usable else None

    async def _try(self, version: Version) -> None:
        try:
            await self._serve(version)
        except Exception as failure:  # whatever it is, no other version waits for this one
            if self._failures.get(version.ref) != str(failure):
                expected = isinstance(failure, (MotetError, OSError))
                logger.error("%s is not served: %s", version.ref, failure, exc_info=not expected)
            self._failures[version.ref] = str(failure)

    async def _serve(self, version: Version) -> None:
        """Load a version from a private copy of its files, which must be those that were pushed; once at a time."""
        async with self._loading.hold(version.ref):
            if not self._serves(version):
                await self._load_copy(version)

    async def _load_copy(self, version: Version) -> None:
        artifacts = self.registry.artifacts
        try:
            async with _in_thread(artifacts.private_copy(version.artifact, self._copies)) as folder:
                if self._judge is not None:
                    await asyncio.to_thread(self._judge.admit, version, folder)
                source = str(artifacts.path(version.artifact))
                await super().load(version.ref, str(folder), digest=version.facts.digest, source=source)
        except Tampered as failure:
            if self._judge is not None:
                self._judge.note(version, ANYBODY, Decision(False, (str(failure),)))
            raise
        self._failures.pop(version.ref, None)
        logger.info(
            "%s is served", version.ref, extra={"adapter": version.ref, "digest": version.facts.digest}
        )

    def _publish(self) -> None:
        """Point the aliases at what is served; where the new version is not, leave them where they are."""
        before, after = self.aliases(), dict[str, Split]()
        usable = {ref for ref, v in self._snapshot.versions.items() if not v.retired and self._serves(v)}
        self._shadows = {}
        for alias in self._snapshot.aliases.values():
            stable, old = f"{alias.name}@{alias.stable}", before.get(alias.ref)
            if stable in usable:
                split = self._with_canary(alias, stable, usable)
            elif old is not None and old.stable in usable:
                split = Split(old.stable)
            else:
                continue
            after[alias.ref] = split
            if alias.alias == PROD:
                after[alias.name] = split
        self._fine_tunes = {self._snapshot.versions[ref].fine_tune(self.base): ref for ref in usable}
        for name in after.keys() & before.keys():
            if after[name] != before[name]:
                logger.info("%s moves from %s to %s", name, before[name], after[name])
        self.point(after)

    def _with_canary(self, alias: Alias, stable: str, usable: Set[str]) -> Split:
        canary = alias.canary
        candidate = f"{alias.name}@{canary.number}" if canary is not None else ""
        if canary is None or candidate not in usable:
            return Split(stable)
        if canary.shadow:
            self._shadows[alias.ref] = (candidate, canary.weight)
            return Split(stable)
        return Split(stable, candidate, canary.weight)


@asynccontextmanager
async def _in_thread(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter and leave `manager` off the event loop."""
    value = await asyncio.to_thread(manager.__enter__)
    try:
        yield value
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


def _versions_of(alias: Alias) -> list[str]:
    """The stable version of an alias and, if there is one, its candidate."""
    canary = [] if alias.canary is None else [alias.canary.number]
    return [f"{alias.name}@{number}" for number in (alias.stable, *canary)]


def _needed(snapshot: Snapshot, base: str) -> list[str]:
    """The versions for this base that an alias points at."""
    every = [_versions_of(alias) for alias in snapshot.aliases.values()]
    refs = [ref for versions in every for ref in versions[:1]]
    refs += [ref for versions in every for ref in versions[1:]]
    return [ref for ref in dict.fromkeys(refs) if snapshot.versions[ref].facts.base == base]
