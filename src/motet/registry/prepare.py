"""An adapter's directory → a verified, packed image that the engine can load. Runs outside the engine process."""

from __future__ import annotations

from pathlib import Path

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.image import open_image, pack, write_image
from motet.errors import MotetError
from motet.types import ModelSpec, PreparedAdapter


def prepare(
    source: Path, spec: ModelSpec, page_bytes: int, images: Path, rounded: bool = False
) -> PreparedAdapter:
    """Check, digest and pack `source`; the image is written to `images` unless a sound one is there.

    `rounded` packs float32 factors as bfloat16, as GPUs take them.
    Raises AdapterRefused for files that do not bind to the base.
    """
    checkpoint = load_checkpoint(source, spec)
    image = pack(checkpoint, page_bytes, rounded)
    path = images / f"{checkpoint.digest}-{page_bytes}{'-bf16' if rounded else ''}.image"
    if not _is_sound(path):
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


def _is_sound(path: Path) -> bool:
    """Whether an image is there and its header, table and length are right."""
    try:
        open_image(path)
    except (OSError, MotetError):
        return False
    return True
