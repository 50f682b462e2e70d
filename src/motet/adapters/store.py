"""The disk tier: packed images by digest, in one folder that any number of servers share, under a byte budget.

Every image can be made again from its source, so the least recently used go when there is no room. What holds is
settled by `flock`, which the system lets go of when a process dies, however it dies:

- An image is locked (shared) while somebody reads it, and only one that can be locked alone is removed.
- A draft is locked by its writer; one without a living writer is rubbish.
- Room is made, and a draft given its whole length, under the lock of the folder; it is written outside of it.

The time of the last use is the file's access time, its identity (`Identity`) what every write changes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import msgspec

from motet.adapters.image import AdapterImage, draft, dump_image, file_bytes, map_image
from motet.config import DEFAULT_IMAGE_BYTES
from motet.errors import MotetError, StorageFull
from motet.types import TierStats

Identity = tuple[int, int, int, int]
"""Device, inode, length and time of the last write of a file."""
_SUFFIX = ".image"


def identity(path: Path) -> Identity | None:
    """The identity of the file at `path`; None if it is not there."""
    try:
        return _identity(os.stat(path))
    except OSError:
        return None


@contextmanager
def reading(path: Path, checked: Identity | None = None) -> Iterator[AdapterImage]:
    """The image at `path`; no store removes it before the block has ended and the image is let go of.

    MotetError if it is damaged: all of it is checked, unless it still is the file whose pages somebody `checked`.
    """
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        found = os.fstat(file.fileno())
        with suppress(PermissionError):  # somebody else's file
            os.utime(file.fileno(), ns=(time.time_ns(), found.st_mtime_ns))
        yield map_image(file, path, every_page=_identity(found) != checked)


class ImageStore:
    """The folder, as who prepares adapters sees it. Its methods may be called from any thread."""

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_IMAGE_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._stats = TierStats(max_bytes=max_bytes)
        self._counting = Lock()

    def path(self, digest: str, page_bytes: int, rounded: bool) -> Path:
        """Where the image of an adapter is, or would be."""
        return self._folder / f"{digest}-{page_bytes}{'-bf16' if rounded else ''}{_SUFFIX}"

    def num_pages(self, path: Path) -> int | None:
        """The pages of the image at `path`, all of which are checked; None if it is missing or damaged."""
        try:
            with reading(path) as image:
                return image.num_pages
        except (OSError, MotetError):
            return None

    def put(self, image: AdapterImage, path: Path) -> None:
        """Write an image, whole or not at all; older ones make room. StorageFull if they cannot."""
        began = time.monotonic()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as stack:
            with self._alone():
                file = self._reserve(path, file_bytes(image), stack)
            dump_image(image, file)
        self._count(loads=1, load_seconds=time.monotonic() - began)

    def stats(self) -> TierStats:
        """What lies in the folder, and what this process has written and removed."""
        sizes = [found.st_size for _, found in self._images()]
        return msgspec.structs.replace(self._stats, resident=len(sizes), bytes=sum(sizes))

    def _reserve(self, path: Path, size: int, stack: ExitStack) -> BinaryIO:
        """A draft of `size` bytes for `path`, entered into `stack`."""
        self._sweep()
        taken = sum(found.st_size for name, found in self._files() if name != path.name)
        while taken + size > self._max_bytes:
            if not (freed := self._evict_one(path.name)):
                raise StorageFull(
                    f"an image of {size} bytes has no place: of image_bytes {self._max_bytes}, {taken} are in use"
                )
            taken -= freed
        while True:
            try:
                return stack.enter_context(draft(path, size))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if not self._evict_one(path.name):
                    raise StorageFull(f"no space left on disk for an image of {size} bytes") from error

    def _evict_one(self, spare: str) -> int:
        """Remove the image that was not used for longest and is not in use; the bytes of it, 0 if there is none."""
        for name, found in sorted(self._images(), key=lambda file: file[1].st_atime_ns):
            if name != spare and _remove_unless_locked(self._folder / name):
                self._count(evictions=1)
                return found.st_size
        return 0

    def _sweep(self) -> None:
        """Remove drafts whose writers have died."""
        for name, _ in self._drafts():
            _remove_unless_locked(self._folder / name)

    def _images(self) -> list[tuple[str, os.stat_result]]:
        return [file for file in self._files() if not file[0].startswith(".")]

    def _drafts(self) -> list[tuple[str, os.stat_result]]:
        return [file for file in self._files() if file[0].startswith(".")]

    def _files(self) -> list[tuple[str, os.stat_result]]:
        files = []
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                stem = entry.name.rpartition(".")[0] if entry.name.startswith(".") else entry.name
                if stem.endswith(_SUFFIX):
                    with suppress(FileNotFoundError):  # gone since
                        files.append((entry.name, entry.stat()))
        return files

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock."""
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _count(self, loads: int = 0, load_seconds: float = 0.0, evictions: int = 0) -> None:
        with self._counting:
            now = self._stats
            self._stats = msgspec.structs.replace(
                now,
                loads=now.loads + loads,
                load_seconds=now.load_seconds + load_seconds,
                evictions=now.evictions + evictions,
            )


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _remove_unless_locked(path: Path) -> bool:
    """Whether the file was there, nobody held it, and it is gone now."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
