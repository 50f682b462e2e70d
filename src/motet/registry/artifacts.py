"""An adapter's files on disk, in a folder named by the digest of their bytes: written whole or not at all.

    artifacts/<digest>/{adapter_config.json, adapter_model.safetensors, model.sig}

A copy is made in a staging folder, synced, and renamed in place. Whoever writes holds a lock on the staging
folder, which the system lets go of when the process dies; so what nobody holds is rubbish.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from motet.errors import AdapterRefused, StorageFull

CONFIG, WEIGHTS, SIGNATURE = "adapter_config.json", "adapter_model.safetensors", "model.sig"
_SIGNED = (CONFIG, WEIGHTS)  # the files that make the digest; a signature can be added later
_STAGING = ".staging-"
_CHUNK = 1 << 20
MAX_BYTES = 64 << 30  # the largest adapters of today's bases have 4 GB


class Tampered(AdapterRefused):
    """An artifact's files are not those that were pushed."""

    status = 403
    code = "adapter_tampered"


class Artifacts:
    """The folder that holds them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        return self.root / digest

    @contextmanager
    def staged(self, source: Path) -> Iterator[tuple[Path, str]]:
        """A synced private copy of the adapter in `source` and its digest; gone at the end unless it was kept.

        Raises AdapterRefused for a file that is missing or special, StorageFull.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with _locked(self.root, fcntl.LOCK_SH):  # a sweep must not see the folder before it is held
            folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.root))
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            sums = {name: _copy(source / name, folder / name) for name in _SIGNED}
            if (source / SIGNATURE).exists():
                _copy(source / SIGNATURE, folder / SIGNATURE)
            os.fsync(lock)
            yield folder, _digest(sums)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"no space left to copy adapter {str(source)!r}") from error
            raise
        finally:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)  # not there any more if it was kept

    def keep(self, folder: Path, digest: str) -> None:
        """Rename a staged folder to its place; only `alone`. What is there already stays, its signature too, unless it
        is damaged."""
        place = self.path(digest)
        if place.exists():
            if self.problem(digest) is None:
                if (folder / SIGNATURE).exists() and not (place / SIGNATURE).exists():
                    os.replace(folder / SIGNATURE, place / SIGNATURE)
                return
            self._discard(place)
        os.rename(folder, place)
        _sync_folder(self.root)

    def add_signature(self, digest: str, bundle: bytes) -> None:
        """Put a signature beside the files."""
        place = self.path(digest)
        descriptor, name = tempfile.mkstemp(prefix=".", dir=place)
        with os.fdopen(descriptor, "wb") as file:
            file.write(bundle)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, place / SIGNATURE)
        _sync_folder(place)

    @contextmanager
    def private_copy(self, digest: str, parent: Path) -> Iterator[Path]:
        """The files of `digest` in a folder below `parent` that nobody else writes to; gone at the end.

        So what is checked is what is used. Raises Tampered if they are not what they were, StorageFull.
        """
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="registry-", dir=parent) as name:
            folder = Path(name)
            try:
                sums = {name: _copy(self.path(digest) / name, folder / name) for name in _SIGNED}
                if (self.path(digest) / SIGNATURE).exists():
                    _copy(self.path(digest) / SIGNATURE, folder / SIGNATURE)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise StorageFull(f"no space left to copy adapter {digest}") from error
                raise
            if (found := _digest(sums)) != digest:
                raise Tampered(f"the files of artifact {digest} were changed: they have digest {found}")
            yield folder

    def problem(self, digest: str) -> str | None:
        """What is wrong with the files of `digest`, if anything: all bytes are read."""
        sums = {}
        for name in _SIGNED:
            try:
                with (self.path(digest) / name).open("rb") as file:
                    sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        found = _digest(sums)
        return None if found == digest else f"its files have digest {found}"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else keeps or sweeps, until the block ends or this process dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with _locked(self.root, fcntl.LOCK_EX):
            yield

    def sweep(self, wanted: Collection[str]) -> list[str]:
        """Remove what no version needs and no writer holds; the names of what went. Only `alone`."""
        gone = self.unwanted(wanted)
        for name in gone:
            self._discard(self.root / name)
        return gone

    def unwanted(self, wanted: Collection[str]) -> list[str]:
        """What `sweep` would remove."""
        return [entry.name for entry in self._entries() if entry.name not in wanted and not _is_held(entry)]

    def _entries(self) -> list[Path]:
        return sorted(self.root.iterdir()) if self.root.exists() else []

    def _discard(self, place: Path) -> None:
        """Remove a folder; it loses its name first, so that no half of it is ever taken for an artifact."""
        if not place.name.startswith(_STAGING):
            trash = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.root))
            place = place.rename(trash / place.name).parent
        shutil.rmtree(place)


def _copy(source: Path, target: Path) -> str:
    """Copy one regular file and sync it; the sha256 of what was written."""
    total = hashlib.sha256()
    size = 0
    with _open_regular(source) as file, target.open("xb") as copy:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            if size > MAX_BYTES:
                raise AdapterRefused(f"{source.name}: larger than {MAX_BYTES >> 30} GiB")
            total.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    return total.hexdigest()


def _open_regular(source: Path) -> BinaryIO:
    try:
        # a FIFO opened without O_NONBLOCK would wait for a writer for ever
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise AdapterRefused(f"{str(source.parent)!r} has no {source.name}") from None
    except OSError as error:
        raise AdapterRefused(f"{source.name}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterRefused(f"{source.name}: not a regular file")
    return os.fdopen(descriptor, "rb")


def _digest(sums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _is_held(entry: Path) -> bool:
    """Whether a living process writes it."""
    if not entry.name.startswith(_STAGING):
        return False
    try:
        lock = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return True  # its writer has just kept or removed it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
