"""Loads: from disk and from memory, of images that are there, damaged, swapped or gone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from motet.adapters.host import HostTier
from motet.adapters.image import AdapterImage, pages_by_layer, write_image
from motet.adapters.pager import ImageFile, LoadResult, Pager
from motet.memory.pool import Copies, Pool, page_bytes
from motet.types import Load
from tests.adapters.bases import base
from tests.adapters.test_store import image_of

SPEC = base("llama")
SIZE = page_bytes(SPEC, 4)


class Desk:
    """A pager, a pool of 200 pages, images on disk."""

    def __init__(self, folder: Path, host: HostTier | None, pool: Pool | None = None) -> None:
        self.folder = folder
        self.pool = pool or Pool(SPEC, 200 * SIZE, 4)
        self.ended = threading.Semaphore(0)
        self.pager = Pager(self.pool, host, self.ended.release)
        self.next_page = 0

    def write(self, number: int) -> ImageFile:
        image, path = image_of(number, page=SIZE), self.folder / f"{number}.image"
        write_image(image, path)
        return ImageFile.just_checked(path, f"/source/{number}")

    def begin(self, number: int, file: ImageFile) -> tuple[int, ...]:
        image = image_of(number, page=SIZE)
        pages = tuple(range(self.next_page, self.next_page + image.num_pages))[::-1]
        self.next_page += len(pages)
        self.pager.start(Load(image.digest, pages), file)
        return pages

    def end(self) -> LoadResult:
        assert self.ended.acquire(timeout=10)
        (result,) = self.pager.finished()
        return result

    def load(self, number: int, file: ImageFile) -> str | None:
        """Load an image and check that its bytes are in the pool, and nothing is if it failed; the error if it did."""
        pages = self.begin(number, file)
        before = self.pool.data.clone()
        result = self.end()
        assert (result.chunks is None) == (result.error is not None)
        if result.error is None:
            assert self.holds(pages, image_of(number, page=SIZE))
        elif result.is_missing:
            assert self.pool.data.equal(before)
        assert not self.pager.busy
        self.was_missing = result.is_missing
        return result.error

    def holds(self, pages: tuple[int, ...], image: AdapterImage) -> bool:
        return np.array_equal(self.pool.data.numpy()[list(pages)], image.pages)


@pytest.fixture(params=[False, True], ids=["disk", "host"])
def desk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Desk]:
    host = HostTier(64 * SIZE, SIZE, pinned=False, slab_bytes=5 * SIZE) if request.param else None
    desk = Desk(tmp_path, host)
    yield desk
    desk.pager.close()


def test_loads_in_turn(desk: Desk) -> None:
    files = {number: desk.write(number) for number in range(5)}
    pages = {number: desk.begin(number, file) for number, file in files.items()}
    for _ in files:
        assert desk.ended.acquire(timeout=10)
    found = {result.load.digest: result for result in desk.pager.finished()}
    for number in files:
        image = image_of(number, page=SIZE)
        assert found[image.digest].error is None
        assert found[image.digest].load.pages == pages[number]
        assert desk.holds(pages[number], image)


def test_what_is_in_memory_is_not_read_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path, HostTier(64 * SIZE, SIZE, pinned=False))
    file = desk.write(1)
    assert desk.load(1, file) is None
    file.path.unlink()
    assert desk.load(1, file) is None
    tiers = desk.pager.stats()
    assert (tiers["disk"].hits, tiers["host"].hits, tiers["host"].loads) == (1, 1, 1)
    assert (tiers["host"].resident, tiers["host"].bytes) == (1, image_of(1, page=SIZE).size_bytes)
    desk.pager.forget(image_of(1).digest)
    assert "No such file" in (desk.load(1, file) or "")
    assert desk.was_missing
    assert desk.pager.stats()["host"].resident == 0
    desk.pager.close()


def test_an_image_too_large_for_memory_comes_from_disk(tmp_path: Path) -> None:
    desk = Desk(tmp_path, HostTier(2 * SIZE, SIZE, pinned=False))
    file = desk.write(1)
    assert desk.load(1, file) is None
    assert desk.load(1, file) is None
    tiers = desk.pager.stats()
    assert (tiers["disk"].hits, tiers["host"].resident) == (2, 0)
    desk.pager.close()


def damage_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


def damage_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-SIZE] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    write_image(image_of(99, page=SIZE), path)


def swap_pages(path: Path) -> None:
    """Another adapter's weights under this one's header and tables."""
    content, other = path.read_bytes(), path.with_name("other")
    write_image(image_of(99, page=SIZE), other)
    path.write_bytes(content[:4096] + other.read_bytes()[4096:])


@pytest.mark.parametrize("spoil", [os.unlink, damage_header, damage_page, swap, swap_pages])
def test_only_the_checked_bytes_are_served(desk: Desk, spoil: Callable[[Path], None]) -> None:
    """Whatever happened to the file since it was checked: it is missing, and nothing of it is served."""
    file = desk.write(1)
    spoil(file.path)
    assert desk.load(1, file)
    assert desk.was_missing
    assert desk.load(2, desk.write(2)) is None
    assert desk.load(1, desk.write(1)) is None, "the failure does not stick to the digest"


def test_a_failure_nobody_thought_of_ends_its_load_only(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = desk.write(1)

    def broken(*_: object) -> None:
        raise RuntimeError("no memory on the device")

    with monkeypatch.context() as patch:
        patch.setattr(desk.pool, "fill", broken)
        assert "RuntimeError: no memory on the device" in (desk.load(1, file) or "")
        assert not desk.was_missing, "another image would not help"
    assert "could not be loaded" in caplog.text
    assert desk.load(1, file) is None


class Copying:
    """Copies under way, as an event tells of them."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def synchronize(self) -> None:
        assert self.over.wait(timeout=10)


class SlowPool(Pool):
    """A pool that is filled when a test says so, from what lies in the sources then."""

    def __init__(self) -> None:
        super().__init__(SPEC, 200 * SIZE, 4)
        self.begun: list[Copying] = []
        self.parts: Sequence[int] = ()
        self._todo: list[tuple[Any, ...]] = []

    def fill(self, pages: Any, content: Any, after: Any = None, parts: Sequence[int] = ()) -> Copies:
        assert after is None
        copying, self.parts = Copying(), parts
        self.begun.append(copying)
        self._todo.append((pages, content))
        return cast("Copies", (Copying(), copying))

    def end(self) -> None:
        """What was begun first is copied."""
        super().fill(*self._todo.pop(0))
        self.begun[-1 - len(self._todo)].over.set()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[Desk, SlowPool]]:
    """With room for one image in the host tier."""
    pool = SlowPool()
    desk = Desk(tmp_path, HostTier(image_of(1, page=SIZE).num_pages * SIZE, SIZE, pinned=False), pool)
    yield desk, pool
    for copying in pool.begun:
        copying.over.set()
    desk.pager.close()


def test_a_load_is_finished_when_its_copies_are_enqueued(slow: tuple[Desk, SlowPool]) -> None:
    desk, pool = slow
    pages = desk.begin(1, desk.write(1))
    result = desk.end()
    image = image_of(1, page=SIZE)
    assert result.error is None
    assert cast("Any", result.copies[-1]) is pool.begun[0]
    assert not pool.begun[0].over.is_set()
    assert not desk.holds(pages, image)
    assert pool.parts == pages_by_layer(image.chunks, np.array([s.layer for s in SPEC.sites]), 1)
    time.sleep(0.05)
    assert desk.pager.load_seconds == 0
    pool.end()
    desk.pager.close()
    assert desk.pager.load_seconds >= 0.05
    assert desk.holds(pages, image)


def test_the_next_load_begins_when_the_copies_of_the_last_are_over(slow: tuple[Desk, SlowPool]) -> None:
    """Its image takes the other's place in memory, which is still being read; so does one that was forgotten."""
    desk, pool = slow
    files = {number: desk.write(number) for number in (1, 2, 3)}
    pages = {1: desk.begin(1, files[1])}
    assert desk.end().error is None
    for number in (2, 3):
        pages[number] = desk.begin(number, files[number])
        desk.pager.forget(image_of(number - 1).digest)
    for number in (1, 2, 3):
        assert not desk.ended.acquire(timeout=0.05)
        assert len(pool.begun) == number
        pool.end()
        assert desk.holds(pages[number], image_of(number, page=SIZE))
        if number < 3:
            assert desk.end().error is None


def test_copies_are_over_when_the_pager_is_closed(slow: tuple[Desk, SlowPool]) -> None:
    desk, pool = slow
    desk.begin(1, desk.write(1))
    assert desk.end().error is None
    closing = threading.Thread(target=desk.pager.close)
    closing.start()
    closing.join(timeout=0.05)
    assert closing.is_alive()
    pool.end()
    closing.join(timeout=10)
    assert not closing.is_alive()


def test_forgetting_what_is_not_there_changes_nothing(desk: Desk) -> None:
    desk.pager.forget("f" * 64)
    assert desk.load(1, desk.write(1)) is None
    time.sleep(0.01)
    assert desk.pager.finished() == []
