"""Where adapters may be pushed from: folders, https://, and through fsspec s3://, gs:// and hf:// (the hub).

Only what a pattern of the allow-list names is fetched, into a private folder that is gone afterwards. What comes out of
it is checked like any other adapter: bound to its base, copied by digest.
"""

from __future__ import annotations

import errno
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit

from motet.errors import ConfigError, StorageFull
from motet.registry.artifacts import CONFIG, MAX_BYTES, SIGNATURE, WEIGHTS
from motet.registry.https import Download, SourceFailed, SourceRefused

SECONDS = 900.0
REMOTE = ("https", "s3", "gs", "hf")
_CHUNK = 8 << 20
_FILES = (CONFIG, WEIGHTS, SIGNATURE)


def is_remote(source: str) -> bool:
    """Whether `source` is a URL and no folder."""
    return "://" in source


def check_source(source: str, allowed: Sequence[str]) -> None:
    """Raise SourceRefused unless `source` is a plain URL that one of the patterns names."""
    parts = urlsplit(source)
    odd = any(c <= " " or c in "\\%?#@;\x7f" for c in source.replace("@", "", parts.scheme == "hf"))
    segments = parts.path.split("/")[1:]
    if parts.scheme not in REMOTE or not parts.hostname or odd or ".." in segments or "." in segments:
        raise SourceRefused(
            f"{source[:200]!r} is not a plain {', '.join(f'{scheme}://' for scheme in REMOTE)} URL of a folder"
        )
    if not any(fnmatchcase(source, pattern) for pattern in allowed):
        raise SourceRefused(
            f"{source!r} is not on the allow-list of sources: {', '.join(allowed) or 'it is empty'}"
        )


@contextmanager
def opened(source: str, allowed: Sequence[str], parent: Path) -> Iterator[Path]:
    """The folder that `source` is, or that it is fetched into."""
    if is_remote(source):
        with fetched(source, allowed, parent) as folder:
            yield folder
    else:
        yield Path(source)


@contextmanager
def fetched(
    source: str,
    allowed: Sequence[str],
    parent: Path,
    max_bytes: int = MAX_BYTES,
    seconds: float = SECONDS,
    download: Callable[[int, float], Download] = Download,
) -> Iterator[Path]:
    """The adapter at `source` in a folder below `parent`, gone at the end.

    Raises SourceRefused, SourceFailed or StorageFull.
    """
    check_source(source, allowed)
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="source-", dir=parent) as name:
        folder = Path(name)
        try:
            if source.startswith("https://"):
                budget = download(max_bytes, seconds)
                found = [budget.fetch(f"{source.rstrip('/')}/{file}", folder / file) for file in _FILES]
            else:
                found = _through_fsspec(source.rstrip("/"), folder, max_bytes, seconds)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"no space left to fetch {source!r}") from error
            raise SourceFailed(f"{source}: {error}") from error
        if not all(found[:2]):
            raise SourceFailed(f"{source} has no {CONFIG} or no {WEIGHTS}")
        yield folder


def _through_fsspec(source: str, folder: Path, max_bytes: int, seconds: float) -> list[bool]:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    deadline = time.monotonic() + seconds
    found = []
    for name in _FILES:
        there = system.exists(f"{root}/{name}")
        found.append(there)
        if not there:
            continue
        with system.open(f"{root}/{name}", "rb") as remote, (folder / name).open("xb") as file:
            while chunk := remote.read(_CHUNK):
                max_bytes -= len(chunk)
                if max_bytes < 0:
                    raise SourceFailed(f"{source}/{name} is larger than allowed")
                if time.monotonic() > deadline:
                    raise SourceFailed(f"{source}/{name} took longer than allowed")
                file.write(chunk)
    return found
