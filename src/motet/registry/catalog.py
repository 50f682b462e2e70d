"""Names point at digests, aliases at names: what is served under which, and the only place where that changes.

A request resolves its name once and keeps the digest, so moving a name (`replace`) or taking it away never
touches work in flight; the engine is told to forget a digest when the last name has left it. Loads of one
name happen one after the other, loads of different names beside each other.
"""

from __future__ import annotations

import asyncio
import errno
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import msgspec

from motet.errors import AdapterConflict, AdapterRefused, InvalidRequest, ModelNotFound
from motet.errors import StorageFull as StorageFull
from motet.registry.release import Split, choose
from motet.types import AdapterRecord, ModelSpec, PreparedAdapter

_NAME = re.compile(r"[A-Za-z0-9._:@/-]{1,200}")
_LISTED = 50  # names in a "not found" message


class AdapterEngine(Protocol):
    """The engine's side of a digest: where its image lies, and that no name needs it any more."""

    async def register_adapter(self, digest: str, image: str, num_pages: int, source: str, /) -> None: ...

    async def forget_adapter(self, digest: str, /) -> None:
        """Drop the digest once the last request on it has finished."""
        ...


class Catalog:
    """The served models: one base, and adapters by name."""

    def __init__(
        self,
        spec: ModelSpec,
        base: str,
        root: str,
        prepare: Callable[[Path], PreparedAdapter],
        engine: AdapterEngine,
    ) -> None:
        """`root` is the base model's path as given; `prepare` runs in a thread, on the path of each load."""
        self.spec = spec
        self.base = base
        self.root = root
        self.created = time.time()
        self._prepare = prepare
        self._engine = engine
        self._records: dict[str, AdapterRecord] = {}
        self._aliases: dict[str, Split] = {}
        self._registered: set[str] = set()  # digests that the engine knows
        self._holds: Counter[str] = Counter()  # requests that resolved to a digest and have not ended
        self._unnamed: set[str] = set()  # digests to forget when their last hold ends
        self._tasks: set[asyncio.Task[None]] = set()
        self._names = Locks()
        self._digests = Locks()

    def records(self, tenant: str | None = None) -> list[AdapterRecord]:  # noqa: ARG002
        """All adapters by name, aliases as the adapter of their stable version. Nothing here depends on the tenant."""
        named = {name: self._records[split.stable] for name, split in self._aliases.items()}
        named = {
            name: msgspec.structs.replace(record, name=name) for name, record in named.items()
        } | self._records
        return [named[name] for name in sorted(named)]

    def aliases(self) -> dict[str, Split]:
        """The names that stand for others, and for which."""
        return dict(self._aliases)

    def point(self, aliases: Mapping[str, Split]) -> None:
        """Replace all aliases at once: a request sees those before or those after, never some of each.

        A name of an adapter's own comes before an alias. ModelNotFound if an alias stands for nothing served.
        """
        for split in aliases.values():
            for name in filter(None, (split.stable, split.canary)):
                if name not in self._records:
                    raise self._not_found(name)
        self._aliases = dict(aliases)

    async def sync(self) -> None:
        """Serve what the place that names come from says now, if there is one."""

    async def follow(self) -> None:
        """Keep doing so, until cancelled."""

    async def want(self, name: str, tenant: str | None = None) -> None:
        """Make `name` known, where there is a place to look for names that are not served yet."""

    def resolve(self, name: str, user: str = "", tenant: str | None = None) -> AdapterRecord | None:  # noqa: ARG002
        """The adapter served as `name`; None is the base. An alias may stand for another one with each `user`.

        Raises ModelNotFound. Nothing here depends on the tenant.
        """
        if name == self.base:
            return None
        split = self._aliases.get(name)
        record = self._records.get(name)
        if record is None and split is not None:
            record = self._records.get(choose(name, split, user))
        if record is None:
            raise self._not_found(name)
        return record

    @contextmanager
    def hold(self, name: str, user: str = "", tenant: str | None = None) -> Iterator[AdapterRecord | None]:
        """`resolve`, and the engine keeps accepting the digest until the block ends, wherever the name goes."""
        record = self.resolve(name, user, tenant)
        if record is None:
            yield None
            return
        self._holds[record.digest] += 1
        try:
            yield record
        finally:
            self._holds[record.digest] -= 1
            if not self._holds[record.digest]:
                del self._holds[record.digest]
                if record.digest in self._unnamed:
                    self._later(self._drop(record.digest))

    async def load(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        digest: str | None = None,
        source: str | None = None,
    ) -> AdapterRecord:
        """Serve the adapter at `path` as `name`; with `replace`, move the name from the digest it has.

        Loading the digest that the name already has changes nothing. Raises InvalidRequest for a bad name,
        AdapterRefused for bad files and for others than those of `digest`, AdapterConflict when the name has another
        digest and `replace` is false. `source` is where the same files stay, if not at `path`.
        """
        self._check_name(name)
        _check_path(path)
        async with self._names.hold(name):
            prepared = await self._prepared(path)
            if digest is not None and prepared.digest != digest:
                raise AdapterRefused(f"{name!r} must have digest {digest}; its files have {prepared.digest}")
            old = self._records.get(name)
            if old is not None and old.digest == prepared.digest:
                return old
            if old is not None and not replace:
                raise AdapterConflict(
                    f"{name!r} already serves digest {old.digest} from {old.source!r}; {path!r} has digest "
                    f"{prepared.digest}. Unload {name!r} first, load under another name, or pass replace=true"
                )
            if source is not None:
                prepared = msgspec.structs.replace(prepared, source=source)
            record = await self._point(name, source or path, prepared)
            if old is not None:
                await self._drop(old.digest)
            return record

    async def unload(self, name: str) -> AdapterRecord:
        """Stop serving `name`; work in flight finishes. Raises ModelNotFound; InvalidRequest for the base."""
        if name == self.base:
            raise InvalidRequest(f"{name!r} is the base model and cannot be unloaded", "lora_name")
        async with self._names.hold(name):
            record = self._records.pop(name, None)
            if record is None:
                raise self._not_found(name)
            await self._drop(record.digest)
            return record

    def _later(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)

    async def _prepared(self, path: str) -> PreparedAdapter:
        """Validate, digest and pack the files off the event loop."""
        try:
            return await asyncio.to_thread(self._prepare, Path(path))
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise AdapterRefused(f"cannot read adapter {path!r}: {error.strerror}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"no space left to pack adapter {path!r}") from error
            raise

    async def _point(self, name: str, source: str, prepared: PreparedAdapter) -> AdapterRecord:
        digest = prepared.digest
        record = AdapterRecord(
            name=name,
            digest=digest,
            source=source,
            image=prepared.image,
            rank=prepared.rank,
            num_parameters=prepared.num_parameters,
            size_bytes=prepared.size_bytes,
            num_pages=prepared.num_pages,
            created=time.time(),
        )
        async with self._digests.hold(digest):
            if digest not in self._registered:
                await self._engine.register_adapter(digest, record.image, record.num_pages, prepared.source)
                self._registered.add(digest)
            self._records[name] = record
        return record

    async def _drop(self, digest: str) -> None:
        """Forget `digest` if no name points at it, once nobody holds it."""
        async with self._digests.hold(digest):
            self._unnamed.discard(digest)
            if digest not in self._registered or any(r.digest == digest for r in self._records.values()):
                return
            if self._holds[digest]:
                self._unnamed.add(digest)
                return
            self._registered.discard(digest)
            await self._engine.forget_adapter(digest)

    def _check_name(self, name: str) -> None:
        segments = name.split("/")
        if not _NAME.fullmatch(name) or ".." in name or "" in segments or "." in segments:
            raise InvalidRequest(
                f"adapter name {name[:200]!r} must be 1-200 of the characters A-Z a-z 0-9 . _ : @ / - "
                "and hold no '..', no empty path segment and no leading or trailing '/'",
                "lora_name",
            )
        if name == self.base:
            raise InvalidRequest(f"{name!r} is the name of the base model", "lora_name")

    def _not_found(self, name: str) -> ModelNotFound:
        names = [self.base, *sorted({*self._records, *self._aliases})]
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        served = ", ".join(repr(n) for n in names[:_LISTED])
        return ModelNotFound(f"no model {name[:200]!r}; served here: {served}{more}")


def _check_path(path: str) -> None:
    if not path or "\0" in path or len(path) > 4096:
        raise InvalidRequest("lora_path must be a path of 1-4096 characters without NUL", "lora_path")


class Locks:
    """One lock per key, kept only while somebody holds or awaits it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def hold(self, key: str) -> asyncio.Lock:
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock
