"""Pages on their way to a GPU: from arrays and from pinned memory, in one run and in many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motet.adapters.host import HostTier
from motet.memory.pool import STAGED_PAGES, Pool, page_bytes
from tests.adapters.bases import base
from tests.adapters.test_store import image_of

SPEC = base("llama")
SIZE = page_bytes(SPEC, 4)


@pytest.mark.parametrize("slab_pages", [3, 1000])
@pytest.mark.parametrize("rank", [24, 2000])
def test_pages_arrive_as_they_are(slab_pages: int, rank: int) -> None:
    image = image_of(1, rank, SIZE)
    assert rank < 2000 or image.num_pages > 2 * STAGED_PAGES
    pool = Pool(SPEC, (3 * image.num_pages + 5) * SIZE, 4, device="cuda")
    host = HostTier((image.num_pages + 1000) * SIZE, SIZE, pinned=True, slab_bytes=slab_pages * SIZE)
    held = host.put(image)
    assert held is not None
    assert all(run.is_pinned() for run in host.runs(held))
    places = np.random.default_rng(1).permutation(pool.num_pages)[: 2 * image.num_pages].tolist()
    first, second = tuple(places[: image.num_pages]), tuple(places[image.num_pages :])
    pool.fill(first, [image.pages], pool.mark())
    pool.fill(second, host.runs(held), pool.mark())
    found = pool.data.cpu().numpy()
    assert np.array_equal(found[list(first)], image.pages)
    assert np.array_equal(found[list(second)], image.pages)
    rest = sorted(set(range(pool.num_pages)) - {*first, *second})
    assert not torch.from_numpy(found[rest]).any()
