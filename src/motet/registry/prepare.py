"""An adapter's directory → a verified, packed image that the engine can load. Runs outside the engine process."""

from __future__ import annotations

from pathlib import Path

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.image import pack
from motet.adapters.store import ImageStore
from motet.types import ModelSpec, PreparedAdapter, TierStats


class Preparer:
    """`prepare` for one base and one engine: what a catalog prepares adapters with, and an engine's `Disk`."""

    def __init__(self, spec: ModelSpec, page_bytes: int, images: ImageStore, rounded: bool = False) -> None:
        self._spec = spec
        self._page_bytes = page_bytes
        self._images = images
        self._rounded = rounded

    def __call__(self, source: Path) -> PreparedAdapter:
        return prepare(source, self._spec, self._page_bytes, self._images, self._rounded)

    def stats(self) -> TierStats:
        """What lies on disk, and what was written and removed."""
        return self._images.stats()


def prepare(
    source: Path, spec: ModelSpec, page_bytes: int, images: ImageStore, rounded: bool = False
) -> PreparedAdapter:
    """Check and digest `source`, and pack what was read; the image is written unless a sound one is there.

    `rounded` packs float32 factors as bfloat16, as GPUs take them.
    Raises AdapterRefused for files that do not bind to the base, StorageFull.
    """
    checkpoint = load_checkpoint(source, spec)
    path = images.path(checkpoint.digest, page_bytes, rounded)
    num_pages = images.num_pages(path)
    if num_pages is None:
        image = pack(checkpoint, page_bytes, rounded)
        images.put(image, path)
        num_pages = image.num_pages
    return PreparedAdapter(
        digest=checkpoint.digest,
        image=str(path),
        source=str(source),
        rank=checkpoint.rank,
        num_parameters=checkpoint.num_parameters,
        num_pages=num_pages,
        size_bytes=num_pages * page_bytes,
    )
