"""Copies of images in memory: what fits, who leaves, and that pages are what they were."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from motet.adapters.host import HostTier
from motet.adapters.image import AdapterImage
from tests.adapters.test_store import PAGE, image_of


def content(tier: HostTier, number: int) -> np.ndarray:
    image = tier.get(image_of(number).digest)
    assert image is not None
    return np.concatenate([run.numpy() for run in tier.runs(image)])


def put(tier: HostTier, image: AdapterImage) -> bool:
    found = tier.put(image) is not None
    tier.check_integrity()
    return found


def test_images_of_mixed_sizes_come_and_go() -> None:
    """Against a plain least-recently-used list; budget and integrity hold after every step."""
    tier = HostTier(50 * PAGE, PAGE, pinned=False, slab_bytes=7 * PAGE)
    images = {i: image_of(i, rank=5 + 17 * (i % 9)) for i in range(30)}
    chance, kept = random.Random(3), list[int]()
    most = 50 // 7 * 7
    for _ in range(400):
        i = chance.randrange(30)
        if i in kept:
            assert np.array_equal(content(tier, i), images[i].pages)
            kept.remove(i)
        else:
            while sum(images[k].num_pages for k in kept) + images[i].num_pages > most:
                kept.pop(0)
            assert put(tier, images[i])
        kept.append(i)
        assert {k for k in images if images[k].digest in tier} == set(kept)
        found = tier.stats(0, 0.0)
        assert found.bytes == sum(images[k].num_pages for k in kept) * PAGE <= found.max_bytes
    assert tier.stats(0, 0.0).evictions > 50
    for i in kept:
        tier.drop(images[i].digest)
        tier.check_integrity()
    assert tier.stats(0, 0.0).resident == 0


def test_what_is_too_large_stays_outside_and_costs_nobody() -> None:
    tier = HostTier(10 * PAGE, PAGE, pinned=False)
    small, large = image_of(1), image_of(2, rank=200)
    assert large.num_pages > 10
    assert put(tier, small)
    assert not put(tier, large)
    assert small.digest in tier
    assert large.digest not in tier


def test_a_budget_below_a_page_holds_nothing() -> None:
    assert not put(HostTier(PAGE - 1, PAGE, pinned=False), image_of(1))


def test_a_machine_without_more_memory_keeps_the_tier_as_large_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = image_of(1)
    size = image.num_pages
    tier = HostTier(4 * size * PAGE, PAGE, pinned=False, slab_bytes=size * PAGE)
    assert put(tier, image)
    assert put(tier, image_of(2))

    def full(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("cannot pin")

    monkeypatch.setattr(torch, "empty", full)
    assert put(tier, image_of(3))
    assert [image_of(i).digest in tier for i in (1, 2, 3)] == [False, True, True]
    fresh = HostTier(4 * size * PAGE, PAGE, pinned=False)
    assert not put(fresh, image)


def test_runs_are_as_long_as_can_be() -> None:
    tier = HostTier(64 * PAGE, PAGE, pinned=False)
    put(tier, image_of(1))
    image = tier.get(image_of(1).digest)
    assert image is not None
    assert [len(run) for run in tier.runs(image)] == [image_of(1).num_pages]
    assert len(tier.runs(replace(image, places=(5, 6, 9, 8)))) == 3
