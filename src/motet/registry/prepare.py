"""An adapter's directory → a verified, packed image that the engine can load. Runs outside the engine process."""

from __future__ import annotations

from pathlib import Path

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.image import pack, write_image
from motet.types import ModelSpec, PreparedAdapter


def prepare(source: Path, spec: ModelSpec, page_bytes: int, images: Path) -> PreparedAdapter:
    """Check, digest and pack `source`; the image is written to `images` unless it is there already.

    Raises AdapterRefused for files that do not bind to the base.
    """
    checkpoint = load_checkpoint(source, spec)
    image = pack(checkpoint, page_bytes)
    path = images / f"{checkpoint.digest}-{page_bytes}.image"
    if not path.exists():
        images.mkdir(parents=True, exist_ok=True)
        write_image(image, path)
    return PreparedAdapter(
        digest=checkpoint.digest,
        image=str(path),
        rank=checkpoint.rank,
        num_parameters=checkpoint.num_parameters,
        num_pages=image.num_pages,
        size_bytes=image.num_pages * page_bytes,
    )
