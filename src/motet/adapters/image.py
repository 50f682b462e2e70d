"""Normal form → packed pages: what the pager copies into the pool and the pointer table points at.

Semantics, for a site with A [r, in] and B [out, r]:
    scaling · B @ A = sum over chunks c of scaling · Bt_c.T @ A_c,  A_c = A[rows of c], Bt_c = B.T[rows of c]
A chunk is a slice of the rank, so A_c [rc, in] and Bt_c [rc, out] are runs of whole rows, row-major. No run
crosses a page, so pages may lie anywhere in the pool. Runs begin at multiples of 64 bytes (a cache line; what
vector loads and TMA want). A factor that sites share, as A of gate and up or one of all experts, is stored once and
pointed to by all of them.

Packing goes through sites in order and puts a run into the first of a few open pages that has room. Runs
are at most a quarter of a page where their rows allow, so that little stays empty. A page is opened only
when a site needs it, so the pages that the first layers of a prefill need are the first pages.

File: header (72 bytes, with a checksum of header and tables), chunk table, crc32 of every page, zeros up to a
multiple of 4096, pages.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.adapters.checkpoint import Checkpoint, LoraFactors, raw_bytes
from motet.errors import AdapterRefused, MotetError
from motet.kernels.lora import BFLOAT16, FLOAT32

ALIGNMENT = 64
DTYPES = {BFLOAT16: torch.bfloat16, FLOAT32: torch.float32}

GRANULES = (16, 4)  # ranks per chunk are multiples: a tensor-core product is 16 deep, the CPU kernel's loop 4
MAX_RUN_SHARE = 4  # a run takes at most 1/4 of a page if it can
OPEN_PAGES = 16  # pages considered for a run

MAGIC, VERSION = b"MOTETIMG", 2
_HEADER = struct.Struct("<8sII32sQQQ")  # magic, version, checksum, digest, page_bytes, pages, chunks
_DATA_ALIGNMENT = 4096
_SUM = np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """One row per chunk, ordered by site and then by rank. All arrays are [chunks].

    `dtype` is BFLOAT16 or FLOAT32, offsets are bytes in the page, features are the row widths of A and Bt.
    """

    site: NDArray[np.int32]
    rank: NDArray[np.int32]
    dtype: NDArray[np.int32]
    scaling: NDArray[np.float32]
    in_features: NDArray[np.int32]
    out_features: NDArray[np.int32]
    a_page: NDArray[np.int64]
    a_offset: NDArray[np.int64]
    b_page: NDArray[np.int64]
    b_offset: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.site)

    @staticmethod
    def empty() -> ChunkTable:
        """No chunk."""
        return _table(np.zeros(0, _ROW))


_ROW = np.dtype(
    [
        ("site", "<i4"), ("rank", "<i4"), ("dtype", "<i4"), ("scaling", "<f4"),
        ("in_features", "<i4"), ("out_features", "<i4"),
        ("a_page", "<i8"), ("a_offset", "<i8"), ("b_page", "<i8"), ("b_offset", "<i8"),
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """A packed adapter. `pages` is [num_pages, page_bytes] uint8, read-only."""

    digest: str
    page_bytes: int
    chunks: ChunkTable
    pages: NDArray[np.uint8]

    @property
    def num_pages(self) -> int:
        """Pages of the pool that it takes."""
        return int(self.pages.shape[0])

    @property
    def size_bytes(self) -> int:
        """Bytes of the pool that it takes."""
        return self.num_pages * self.page_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes that hold weights; a shared factor counts once."""
        return sum(size for _, _, size in set(_runs(self.chunks)))

    @property
    def waste(self) -> float:
        """The share of its pages that holds nothing."""
        return 1 - self.used_bytes / self.size_bytes


def pages_by_layer(chunks: ChunkTable, layer_of: NDArray[np.int64], num_layers: int) -> tuple[int, ...]:
    """For each layer, how many of the first pages hold everything of it and of the layers before.

    `layer_of` [sites] is each site's layer; the embedding counts as the first one's, the head as the last one's.
    """
    needed = np.zeros(num_layers, np.int64)
    layer = np.clip(layer_of[chunks.site], 0, num_layers - 1)
    np.maximum.at(needed, layer, np.maximum(chunks.a_page, chunks.b_page) + 1)
    return tuple(np.maximum.accumulate(needed).tolist())


def _runs(chunks: ChunkTable) -> list[tuple[int, int, int]]:
    """(page, offset, bytes) of every A and Bt."""
    row = np.where(chunks.dtype == BFLOAT16, 2, 4) * chunks.rank.astype(np.int64)
    sides = (
        (chunks.a_page, chunks.a_offset, row * chunks.in_features),
        (chunks.b_page, chunks.b_offset, row * chunks.out_features),
    )
    return [
        (int(p), int(o), int(s))
        for page, offset, size in sides
        for p, o, s in zip(page, offset, size, strict=True)
    ]


class _Filler:
    """Places runs into pages, first fit among the open ones."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.num_pages = 0
        self._used: dict[int, int] = {}

    def place(self, size: int) -> tuple[int, int]:
        """The (page, offset) of `size` more bytes."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        page = next((page for page, used in self._used.items() if used + size <= self.page_bytes), None)
        if page is None:
            page = self.num_pages
            self.num_pages += 1
            self._used[page] = 0
            if len(self._used) > OPEN_PAGES:
                del self._used[max(self._used, key=self._used.__getitem__)]
        offset = self._used[page]
        self._used[page] = offset + size
        return page, offset


def pack(checkpoint: Checkpoint, page_bytes: int, rounded: bool = False) -> AdapterImage:
    """Pack an adapter into pages of `page_bytes` bytes, a multiple of 64; with `rounded`, float32 becomes bfloat16.

    AdapterRefused if a single row of a factor is larger than a page.
    """
    assert page_bytes > 0
    assert page_bytes % ALIGNMENT == 0
    factors = _rounded(checkpoint.factors) if rounded else checkpoint.factors
    filler = _Filler(page_bytes)
    rows: list[tuple[float, ...]] = []
    copies: list[tuple[int, int, Tensor]] = []  # page, offset, run
    placed: dict[tuple[int, str, int, int], tuple[int, int]] = {}  # where ranks [start, end) of a factor are

    def put(factor: Tensor, side: str, start: int, end: int) -> tuple[int, int]:
        key = id(factor), side, start, end
        if key not in placed:
            run = factor[start:end] if side == "A" else factor[:, start:end].T
            placed[key] = filler.place(run.numel() * run.element_size())
            copies.append((*placed[key], run))
        return placed[key]

    for site, one in factors.items():
        wide = max(one.a.shape[1], one.b.shape[0])
        for start, end in _split(one.rank, wide * one.a.element_size(), page_bytes):
            a_place, b_place = put(one.a, "A", start, end), put(one.b, "B", start, end)
            widths = one.a.shape[1], one.b.shape[0]
            code = BFLOAT16 if one.a.dtype == torch.bfloat16 else FLOAT32
            rows.append((site, end - start, code, one.scaling, *widths, *a_place, *b_place))
    pages = np.zeros((filler.num_pages, page_bytes), np.uint8)
    for page, offset, run in copies:
        data = raw_bytes(run.contiguous()).numpy()
        pages[page, offset : offset + len(data)] = data
    pages.flags.writeable = False
    return AdapterImage(checkpoint.digest, page_bytes, _table(np.array(rows, _ROW)), pages)


def _rounded(factors: dict[int, LoraFactors]) -> dict[int, LoraFactors]:
    """All factors as bfloat16; what sites shared they still share."""
    halves: dict[int, Tensor] = {}

    def half(factor: Tensor) -> Tensor:
        return halves.setdefault(id(factor), factor.to(torch.bfloat16))

    return {site: replace(one, a=half(one.a), b=half(one.b)) for site, one in factors.items()}


def _split(rank: int, row_bytes: int, page_bytes: int) -> list[tuple[int, int]]:
    """Cut ranks [0, rank) into chunks of about equal size whose runs fit a page, rather a quarter of one."""
    if row_bytes > page_bytes:
        raise AdapterRefused(
            f"one rank of the adapter needs {row_bytes} bytes in one page; a page has {page_bytes}"
        )
    most = max(page_bytes // MAX_RUN_SHARE // row_bytes, 1)
    granule = next((granule for granule in GRANULES if granule <= most), 1)
    most -= most % granule
    count = -(-rank // most)
    size = -(-rank // count)
    size = -(-size // granule) * granule
    return [(start, min(start + size, rank)) for start in range(0, rank, size)]


def _table(rows: NDArray[np.void]) -> ChunkTable:
    return ChunkTable(**{field.name: np.ascontiguousarray(rows[field.name]) for field in fields(ChunkTable)})


def file_bytes(image: AdapterImage) -> int:
    """The length of the image's file."""
    return _begin(len(image.chunks), image.num_pages) + image.size_bytes


def _begin(num_chunks: int, num_pages: int) -> int:
    """Where the pages begin in the file."""
    tables = num_chunks * _ROW.itemsize + num_pages * _SUM.itemsize
    return -(-(_HEADER.size + tables) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT


def _sums(pages: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The crc32 of every page (3 GB/s a core)."""
    return np.array([zlib.crc32(page) for page in pages], _SUM)


def _encode(image: AdapterImage) -> bytes:
    """Header and tables, zero-padded to where the pages begin."""
    rows = np.zeros(len(image.chunks), _ROW)
    for field in fields(ChunkTable):
        rows[field.name] = getattr(image.chunks, field.name)
    tables = rows.tobytes() + _sums(image.pages).tobytes()
    facts = bytes.fromhex(image.digest), image.page_bytes, image.num_pages, len(image.chunks)
    checksum = zlib.crc32(_HEADER.pack(MAGIC, VERSION, 0, *facts) + tables)
    head = _HEADER.pack(MAGIC, VERSION, checksum, *facts) + tables
    return head.ljust(_begin(len(image.chunks), image.num_pages), b"\0")


@contextmanager
def draft(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file of `size` bytes that takes its place at `path` when the block ends, whole or not at all.

    Until then it lies beside `path` under a hidden name, and its flock tells that its writer lives.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.posix_fallocate(descriptor, 0, size)  # a full disk shows now
            yield file
            file.flush()
            os.fsync(descriptor)
            os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def dump_image(image: AdapterImage, file: BinaryIO) -> None:
    """Write the `file_bytes(image)` bytes of the image."""
    file.write(_encode(image))
    file.write(np.ascontiguousarray(image.pages).data)


def write_image(image: AdapterImage, path: Path) -> None:
    """Write `image` to `path`, whole or not at all, even if the machine stops half-way."""
    with draft(path, file_bytes(image)) as file:
        dump_image(image, file)


def open_image(path: Path) -> AdapterImage:
    """Map the image at `path`; pages are read from disk as they are touched. MotetError if it is damaged."""
    with path.open("rb") as file:
        return map_image(file, path)


def map_image(file: BinaryIO, path: Path, *, every_page: bool = False) -> AdapterImage:
    """`open_image` of a file that is open. With `every_page` all pages are read and checked."""
    total = os.fstat(file.fileno()).st_size
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(MAGIC):
        raise MotetError(f"{path} is not an adapter image")
    _, version, checksum, digest, page_bytes, num_pages, num_chunks = _HEADER.unpack(head)
    if version != VERSION:
        raise MotetError(f"{path} is an adapter image of version {version}, not {VERSION}; pack it again")
    begin = _begin(num_chunks, num_pages)
    if total != begin + num_pages * page_bytes or not num_pages or not page_bytes:
        raise MotetError(f"{path} is damaged: {total} bytes long; pack it again")
    table, sums = file.read(num_chunks * _ROW.itemsize), file.read(num_pages * _SUM.itemsize)
    bare = _HEADER.pack(MAGIC, VERSION, 0, digest, page_bytes, num_pages, num_chunks)
    if zlib.crc32(bare + table + sums) != checksum:
        raise MotetError(f"{path} is damaged: its tables have another checksum; pack it again")
    pages = np.memmap(file, np.uint8, "r", begin, (num_pages, page_bytes))
    if every_page and len(bad := np.flatnonzero(_sums(pages) != np.frombuffer(sums, _SUM))):
        raise MotetError(f"{path} is damaged: page {bad[0]} has another checksum; pack it again")
    return AdapterImage(digest.hex(), page_bytes, _table(np.frombuffer(table, _ROW)), pages)


def chunk_factors(image: AdapterImage, index: int) -> tuple[Tensor, Tensor]:
    """Copies of A [rc, in] and Bt [rc, out] of chunk `index`, as its pages hold them."""
    chunks = image.chunks
    rank, dtype = int(chunks.rank[index]), DTYPES[int(chunks.dtype[index])]

    def read(page: int, offset: int, width: int) -> Tensor:
        size = rank * width * dtype.itemsize
        run = np.array(image.pages[page, offset : offset + size])
        return torch.from_numpy(run).view(dtype).view(rank, width)

    a = read(chunks.a_page[index], chunks.a_offset[index], int(chunks.in_features[index]))
    return a, read(chunks.b_page[index], chunks.b_offset[index], int(chunks.out_features[index]))


def unpack(image: AdapterImage, site: int) -> LoraFactors:
    """The factors of a site put together again, bit for bit what was packed; scaling rounded to float32."""
    parts = [chunk_factors(image, int(index)) for index in np.flatnonzero(image.chunks.site == site)]
    if not parts:
        raise KeyError(site)
    a, b = (torch.cat(side) for side in zip(*parts, strict=True))
    scaling = image.chunks.scaling[np.flatnonzero(image.chunks.site == site)[0]]
    return LoraFactors(a, b.T.contiguous(), float(scaling))
