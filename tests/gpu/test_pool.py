"""Pages on their way to a GPU: from arrays and from pinned memory, in one run and in many, beside what it computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motet.adapters.host import HostTier
from motet.adapters.image import AdapterImage
from motet.memory.pool import SLABS, STAGED_PAGES, Pool, page_bytes
from tests.adapters.bases import base
from tests.adapters.test_store import image_of

SPEC = base("llama")
SIZE = page_bytes(SPEC, 4)
LONG = 200_000_000
"""Cycles of a tenth of a second."""


def room_for(image: AdapterImage) -> tuple[Pool, tuple[int, ...]]:
    """A pool, and pages of it for the image."""
    pool = Pool(SPEC, (3 * image.num_pages + 5) * SIZE, 4, device="cuda")
    places = np.random.default_rng(1).permutation(pool.num_pages)
    return pool, tuple(places[: image.num_pages].tolist())


@pytest.mark.parametrize("slab_pages", [3, 1000])
@pytest.mark.parametrize("rank", [24, 2000])
def test_pages_arrive_as_they_are(slab_pages: int, rank: int) -> None:
    """While the device is busy for long: who writes to a buffer too early spoils what it has not fetched yet."""
    image = image_of(1, rank, SIZE)
    assert rank < 2000 or image.num_pages > (SLABS + 1) * STAGED_PAGES
    pool, first = room_for(image)
    host = HostTier((image.num_pages + 1000) * SIZE, SIZE, pinned=True, slab_bytes=slab_pages * SIZE)
    held = host.put(image)
    assert held is not None
    assert all(run.is_pinned() for run in host.runs(held))
    rest = sorted(set(range(pool.num_pages)) - set(first))
    second, rest = tuple(rest[: image.num_pages]), rest[image.num_pages :]
    torch.cuda._sleep(LONG)
    pool.fill(first, [image.pages], pool.mark())
    (there,) = pool.fill(second, host.runs(held), pool.mark())
    there.synchronize()
    found = pool.data.cpu().numpy()
    assert np.array_equal(found[list(first)], image.pages)
    assert np.array_equal(found[list(second)], image.pages)
    assert not torch.from_numpy(found[rest]).any()


def test_copies_wait_for_the_steps_before_them_and_nobody_waits_for_copies() -> None:
    image = image_of(1, 24, SIZE)
    pool, pages = room_for(image)
    host = HostTier(1000 * SIZE, SIZE, pinned=True)
    held = host.put(image)
    assert held is not None
    pool.fill(pages, host.runs(held))[-1].synchronize()  # all that is done once only
    pool.data.fill_(7)
    torch.cuda._sleep(LONG)
    read = pool.data.clone()
    (there,) = pool.fill(pages, host.runs(held), pool.mark())
    assert not there.query()
    there.synchronize()
    assert (read == 7).all()
    assert np.array_equal(pool.data.cpu().numpy()[list(pages)], image.pages)


def test_each_part_is_told_of_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts end before, at and after the ends of pieces; each is looked at by a stream that waits for it alone."""
    image = image_of(1, 2000, SIZE)
    pool, pages = room_for(image)
    host = HostTier(image.num_pages * SIZE, SIZE, pinned=True)
    held = host.put(image)
    assert held is not None
    pieces = image.num_pages // STAGED_PAGES
    parts = (0, 5, 5, STAGED_PAGES, 2 * STAGED_PAGES + 1, image.num_pages - 1, image.num_pages)
    fetch = pool._fetch

    def slowly(*what: object) -> torch.Tensor:
        torch.cuda._sleep(LONG // 10)
        return fetch(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(pool, "_fetch", slowly)
    copies = pool.fill(pages, host.runs(held), parts=parts)
    assert len(copies) == len(parts)
    assert len({id(copy) for copy in copies}) <= pieces + 1
    assert not copies[-1].query()
    beside, found = torch.cuda.Stream(), list[torch.Tensor]()
    with torch.cuda.stream(beside):
        for part, copy in zip(parts, copies, strict=True):
            beside.wait_event(copy)
            where = torch.tensor(pages[:part], dtype=torch.int64).pin_memory()
            found.append(pool.data[where.to("cuda", non_blocking=True)])
    torch.cuda.synchronize()
    for part, seen in zip(parts, found, strict=True):
        assert np.array_equal(seen.cpu().numpy(), image.pages[:part])


def test_nothing_is_written_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of(1, 2000, SIZE)
    pool, pages = room_for(image)
    fetch, calls = pool._fetch, list[int]()

    def failing(*what: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no memory on the device")
        return fetch(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(pool, "_fetch", failing)
    torch.cuda._sleep(LONG)
    with pytest.raises(RuntimeError, match="no memory"):
        pool.fill(pages, [image.pages], pool.mark())
    assert pool._stream is not None
    assert pool._stream.query()
