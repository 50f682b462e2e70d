from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.adapters import image as images
from motet.adapters.checkpoint import Checkpoint, LoraFactors, load_checkpoint
from motet.adapters.image import (
    AdapterImage,
    chunk_factors,
    open_image,
    pack,
    pages_by_layer,
    unpack,
    write_image,
)
from motet.adapters.peft_config import parse_config
from motet.errors import AdapterRefused, MotetError
from motet.kernels import lora
from motet.memory.pool import page_bytes
from tests.adapters.peft_files import FUSED, peft_adapter, spec_of

DIGEST = "5a" * 32
CONFIG = parse_config(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
Shape = tuple[int, int, int]  # in, out, rank


def checkpoint_of(shapes: Sequence[Shape], dtype: torch.dtype = torch.float32, seed: int = 0) -> Checkpoint:
    """Random factors on sites 3, 5, 7, …"""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        3 + 2 * index: LoraFactors(
            torch.randn(rank, depth, generator=generator).to(dtype),
            torch.randn(width, rank, generator=generator).to(dtype),
            0.5 + index,
        )
        for index, (depth, width, rank) in enumerate(shapes)
    }
    return Checkpoint(DIGEST, factors, CONFIG, 0, ("F32",), ())


def check(image: AdapterImage, checkpoint: Checkpoint) -> None:
    """The image holds the checkpoint bit for bit, in order, aligned, within pages and without overlaps."""
    for site, one in checkpoint.factors.items():
        found = unpack(image, site)
        assert found.a.dtype == one.a.dtype
        assert torch.equal(found.a, one.a)
        assert torch.equal(found.b, one.b)
        assert found.scaling == np.float32(one.scaling)
    chunks = image.chunks
    assert np.all(np.diff(chunks.site) >= 0)
    assert np.all(chunks.rank >= 1)
    runs = sorted(set(images._runs(chunks)))
    for page, offset, size in runs:
        assert 0 <= page < image.num_pages
        assert offset % 64 == 0
        assert 0 < size <= image.page_bytes - offset
    for (page, offset, size), (next_page, next_offset, _) in pairwise(runs):
        assert page != next_page or offset + size <= next_offset
    assert {page for page, _, _ in runs} == set(range(image.num_pages)), "an empty page"


SHAPES = [(48, 80, 4), (7, 5, 3), (1, 1, 1), (48, 24, 17), (80, 48, 1), (33, 129, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [576, 1024, 4096, 65536, 1 << 20])
def test_round_trip(dtype: torch.dtype, size: int) -> None:
    checkpoint = checkpoint_of(SHAPES, dtype)
    check(pack(checkpoint, size), checkpoint)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=12
    ),
    half=st.booleans(),
    size=st.sampled_from([320, 640, 1600, 8192]),
)
def test_round_trip_of_anything(shapes: list[Shape], half: bool, size: int) -> None:
    checkpoint = checkpoint_of(shapes, torch.bfloat16 if half else torch.float32)
    check(pack(checkpoint, size), checkpoint)


def test_mixed_dtypes() -> None:
    whole = checkpoint_of(SHAPES)
    half = {site: LoraFactors(one.a.bfloat16(), one.b.bfloat16(), 1.0) for site, one in whole.factors.items()}
    mixed = {site: half[site] if site % 4 == 1 else one for site, one in whole.factors.items()}
    checkpoint = Checkpoint(DIGEST, mixed, CONFIG, 0, ("BF16", "F32"), ())
    image = pack(checkpoint, 2048)
    check(image, checkpoint)
    assert set(image.chunks.dtype) == {lora.BFLOAT16, lora.FLOAT32}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.integers(2, 70), st.integers(2, 70), st.integers(1, 40)), min_size=1, max_size=12
    ),
    layers=st.lists(st.integers(-1, 4), min_size=27, max_size=27),
    size=st.sampled_from([320, 1600]),
)
def test_a_layer_is_there_with_its_last_page(shapes: list[Shape], layers: list[int], size: int) -> None:
    """With sites in any order: run by run, the embedding (-1) in the first of four layers, the head (4) in the last."""
    image = pack(checkpoint_of(shapes), size)
    found = pages_by_layer(image.chunks, np.array(layers), 4)
    chunks, most = image.chunks, 0
    for layer in range(4):
        for site, *pages in zip(chunks.site, chunks.a_page, chunks.b_page, strict=True):
            if min(max(layers[site], 0), 3) == layer:
                most = max(most, *(int(page) + 1 for page in pages))
        assert found[layer] == most
    assert found[-1] == image.num_pages


@pytest.mark.parametrize("size", [512, 4096, 1 << 20])
def test_a_shared_factor_is_stored_once(size: int) -> None:
    one = checkpoint_of([(48, 80, 12)]).factors[3]
    twin = LoraFactors(one.a, one.b + 1, 2.0)
    apart = LoraFactors(one.a.clone(), one.b + 1, 2.0)
    shared = Checkpoint(DIGEST, {0: one, 1: twin}, CONFIG, 0, (), ())
    image = pack(shared, size)
    check(image, shared)
    gate, up = image.chunks.site == 0, image.chunks.site == 1
    assert np.array_equal(image.chunks.a_page[gate], image.chunks.a_page[up])
    assert np.array_equal(image.chunks.a_offset[gate], image.chunks.a_offset[up])
    doubled = pack(Checkpoint(DIGEST, {0: one, 1: apart}, CONFIG, 0, (), ()), size)
    assert doubled.used_bytes - image.used_bytes == one.a.nbytes
    reader = LoraFactors(one.a + 1, one.b, 2.0)
    same_b = Checkpoint(DIGEST, {0: one, 1: twin, 2: reader}, CONFIG, 0, (), ())
    image = pack(same_b, size)
    check(image, same_b)
    assert image.used_bytes == 2 * (one.a.nbytes + one.b.nbytes)


def test_fused_experts_share_in_the_image(tmp_path: Path) -> None:
    peft_adapter("mixtral", tmp_path, torch.bfloat16, target_modules=["q_proj"], target_parameters=FUSED, r=3)
    spec = spec_of("mixtral")
    checkpoint = load_checkpoint(tmp_path, spec)
    image = pack(checkpoint, page_bytes(spec, page_tokens=4))
    check(image, checkpoint)
    assert image.digest == checkpoint.digest
    assert image.used_bytes == 2 * checkpoint.num_parameters


def test_a_chunk_is_a_slice_of_the_rank() -> None:
    checkpoint = checkpoint_of([(48, 80, 21)])
    image = pack(checkpoint, 2048)
    one = checkpoint.factors[3]
    delta = torch.zeros(80, 48)
    at = 0
    for index in range(len(image.chunks)):
        a, bt = chunk_factors(image, index)
        rank = int(image.chunks.rank[index])
        assert torch.equal(a, one.a[at : at + rank])
        assert torch.equal(bt, one.b.T[at : at + rank])
        assert image.chunks.scaling[index] == np.float32(one.scaling)
        delta += bt.T @ a
        at += rank
    assert at == 21
    torch.testing.assert_close(delta, one.b @ one.a)


@pytest.mark.parametrize(
    ("rank", "row", "page", "ranks"),
    [
        (16, 1024, 1 << 20, [16]),
        (64, 1024, 1 << 20, [64]),
        (64, 8192, 1 << 20, [32, 32]),
        (100, 4096, 1 << 20, [64, 36]),
        (24, 8192, 1 << 20, [24]),
        (24, 8192, 1 << 19, [16, 8]),
        (21, 320, 2048, [1] * 21),
        (21, 320, 6400, [4, 4, 4, 4, 4, 1]),
        (3, 600, 640, [1, 1, 1]),
    ],
)
def test_split(rank: int, row: int, page: int, ranks: list[int]) -> None:
    cuts = images._split(rank, row, page)
    assert [end - start for start, end in cuts] == ranks
    assert cuts[0][0] == 0
    assert cuts[-1][1] == rank


def test_a_row_larger_than_a_page_is_refused() -> None:
    checkpoint = checkpoint_of([(48, 80, 4)])
    pack(checkpoint, 320)
    with pytest.raises(
        AdapterRefused, match="rank of the adapter needs 320 bytes in one page; a page has 256"
    ):
        pack(checkpoint, 256)


def layer(hidden: int, wide: int, rank: int) -> list[Shape]:
    q, kv = hidden, hidden // 4
    attention = [(hidden, q, rank), (hidden, kv, rank), (hidden, kv, rank), (q, hidden, rank)]
    return [*attention, (hidden, wide, rank), (hidden, wide, rank), (wide, hidden, rank)]


@pytest.mark.parametrize("rank", [1, 8, 16, 64])
@pytest.mark.parametrize(("size", "most"), [(1 << 15, 0.12), (1 << 16, 0.08), (1 << 18, 0.05)])
def test_little_is_wasted(rank: int, size: int, most: float) -> None:
    """Apart from the last page, which is as full as chance has it."""
    image = pack(checkpoint_of(layer(576, 1536, rank) * 8, torch.bfloat16), size)
    if image.num_pages > 4:
        assert 1 - image.used_bytes / (image.num_pages - 1) / size < most
    assert image.waste == 1 - image.used_bytes / image.size_bytes


def test_first_layers_lie_in_the_first_pages() -> None:
    image = pack(checkpoint_of(layer(576, 1536, 16) * 8), 1 << 16)
    chunks = image.chunks
    last = np.maximum.accumulate(np.maximum(chunks.a_page, chunks.b_page))
    first_half = chunks.site < 3 + 2 * 7 * 4
    assert last[first_half].max() <= image.num_pages * 0.55


def test_many_pages_are_packed_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    place: Callable[[images._Filler, int], tuple[int, int]] = images._Filler.place

    def watched(self: images._Filler, size: int) -> tuple[int, int]:
        assert len(self._used) <= images.OPEN_PAGES
        return place(self, size)

    monkeypatch.setattr(images._Filler, "place", watched)
    image = pack(checkpoint_of([(64, 96, 4)] * 400), 4096)
    assert image.num_pages > 2 * images.OPEN_PAGES


@pytest.fixture
def stored(tmp_path: Path) -> tuple[AdapterImage, Path]:
    image = pack(checkpoint_of(SHAPES, torch.bfloat16), 1024)
    write_image(image, tmp_path / "x.image")
    return image, tmp_path / "x.image"


def test_written_image_opens_equal(stored: tuple[AdapterImage, Path]) -> None:
    image, path = stored
    found = open_image(path)
    assert (found.digest, found.page_bytes, found.num_pages) == (DIGEST, 1024, image.num_pages)
    assert isinstance(found.pages, np.memmap)
    assert not found.pages.flags.writeable
    assert not image.pages.flags.writeable
    assert np.array_equal(found.pages, image.pages)
    assert found.pages.offset % 4096 == 0
    check(found, checkpoint_of(SHAPES, torch.bfloat16))
    for name in images._ROW.names or ():
        assert np.array_equal(getattr(found.chunks, name), getattr(image.chunks, name))
    assert os.listdir(path.parent) == ["x.image"]


def test_writing_replaces_at_once(stored: tuple[AdapterImage, Path]) -> None:
    _, path = stored
    before = open_image(path)
    other = pack(checkpoint_of([(5, 7, 2)]), 2048)
    write_image(other, path)
    check(before, checkpoint_of(SHAPES, torch.bfloat16))  # mapped from the file that was replaced
    assert open_image(path).page_bytes == 2048


def test_nothing_is_left_of_a_failed_write(
    stored: tuple[AdapterImage, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, path = stored

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_image(image, path.with_name("y.image"))
    assert os.listdir(path.parent) == ["x.image"]


@pytest.mark.parametrize("at", [0, 9, 13, 16, 50, 60, 68, 72, 100, 300])
def test_damaged_header_or_table_is_refused(stored: tuple[AdapterImage, Path], at: int) -> None:
    _, path = stored
    content = bytearray(path.read_bytes())
    content[at] ^= 0x41
    path.write_bytes(content)
    with pytest.raises(MotetError, match=r"is not an adapter image|pack it again"):
        open_image(path)


@pytest.mark.parametrize("length", [0, 50, 72, 1000, 5000, -1])
def test_cut_file_is_refused(stored: tuple[AdapterImage, Path], length: int) -> None:
    _, path = stored
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(MotetError, match=r"is not an adapter image|pack it again"):
        open_image(path)


def test_missing_site_and_missing_file(stored: tuple[AdapterImage, Path]) -> None:
    image, path = stored
    with pytest.raises(KeyError):
        unpack(image, 4)
    with pytest.raises(FileNotFoundError):
        open_image(path.with_name("z"))
