"""The folder of packed images: under a budget, shared by servers, whoever dies when."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from motet.adapters.checkpoint import Checkpoint, LoraFactors
from motet.adapters.image import AdapterImage, file_bytes, pack, unpack
from motet.adapters.peft_config import parse_config
from motet.adapters.store import ImageStore, identity, reading
from motet.errors import MotetError, StorageFull

PAGE = 4096
CONFIG = parse_config(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')


def digest_of(number: int) -> str:
    return f"{number:064x}"


def image_of(number: int, rank: int = 24, page: int = PAGE) -> AdapterImage:
    generator = torch.Generator().manual_seed(number)
    a, b = torch.randn(rank, 61, generator=generator), torch.randn(83, rank, generator=generator)
    return pack(Checkpoint(digest_of(number), {0: LoraFactors(a, b, 2.0)}, CONFIG, 0, ("F32",), ()), page)


SIZE = file_bytes(image_of(0))


def put(store: ImageStore, number: int) -> Path:
    path = store.path(digest_of(number), PAGE, rounded=False)
    store.put(image_of(number), path)
    return path


def there(folder: Path) -> set[int]:
    """The numbers of the images in the folder, each of them whole."""
    numbers = set()
    for path in folder.glob("*.image"):
        with reading(path) as image:
            numbers.add(int(image.digest, 16))
            assert image.digest == path.name.partition("-")[0]
    return numbers


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """Room for three images and a bit."""
    return ImageStore(tmp_path / "images", 3 * SIZE + 100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "images"


def test_what_is_put_is_read(store: ImageStore, folder: Path) -> None:
    path = put(store, 1)
    assert store.num_pages(path) == image_of(1).num_pages
    with reading(path) as image:
        assert torch.equal(unpack(image, 0).a, unpack(image_of(1), 0).a)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.listdir(folder) == [path.name]


def test_the_least_recently_used_goes(store: ImageStore, folder: Path) -> None:
    paths = {number: put(store, number) for number in (1, 2, 3)}
    with reading(paths[1]):
        pass
    put(store, 4)
    assert there(folder) == {1, 3, 4}
    found = store.stats()
    assert (found.resident, found.bytes, found.loads, found.evictions) == (3, 3 * SIZE, 4, 1)
    assert found.load_seconds > 0
    assert found.max_bytes == 3 * SIZE + 100


def test_an_image_that_is_read_stays(store: ImageStore, folder: Path) -> None:
    oldest = put(store, 1)
    for number in (2, 3):
        put(store, number)
    with reading(oldest) as image:
        before = image.pages.copy()
        for number in range(4, 12):
            put(store, number)
        assert oldest.exists()
        assert np.array_equal(image.pages, before)
    assert there(folder) == {1, 10, 11}
    del image  # whose mapping keeps the file open
    for number in (12, 13, 14):
        put(store, number)
    assert there(folder) == {12, 13, 14}


def test_room_that_cannot_be_made_is_said(store: ImageStore, folder: Path) -> None:
    paths = [put(store, number) for number in (1, 2, 3)]
    with reading(paths[0]), reading(paths[1]), reading(paths[2]), pytest.raises(StorageFull) as failure:
        put(store, 4)
    assert "image_bytes" in str(failure.value)
    assert failure.value.status == 507
    with pytest.raises(StorageFull):
        ImageStore(folder, SIZE - 1).put(image_of(5), folder / "5.image")
    assert not hidden(folder)
    assert there(folder) <= {1, 2, 3}


def test_a_full_disk_costs_the_oldest_and_then_is_said(
    store: ImageStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room for two images, however much the budget allows."""
    reserve = os.posix_fallocate

    def small_disk(descriptor: int, offset: int, size: int) -> None:
        if sum(path.stat().st_size for path in folder.glob("*.image")) + size > 2 * SIZE:
            raise OSError(28, "No space left on device")
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", small_disk)
    paths = [put(store, number) for number in (1, 2, 3)]
    assert there(folder) == {2, 3}
    with reading(paths[1]), reading(paths[2]), pytest.raises(StorageFull, match="no space left"):
        put(store, 4)
    assert there(folder) == {2, 3}
    assert not hidden(folder)


@pytest.mark.parametrize("at", [10, 80, 5000, -1])
def test_damage_is_found_anywhere(store: ImageStore, at: int) -> None:
    path = put(store, 1)
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
    assert store.num_pages(path) is None
    with pytest.raises(MotetError, match=r"damaged|is not an adapter image|of version"), reading(path):
        pass
    put(store, 1)
    assert store.num_pages(path) == image_of(1).num_pages


def test_pages_are_checked_again_only_when_the_file_is_another(store: ImageStore) -> None:
    path = put(store, 1)
    checked = identity(path)
    written = path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(MotetError, match="damaged"), reading(path, checked):
        pass
    os.utime(path, ns=(written, written))  # what a disk does that loses a bit: nobody has written
    with reading(path, checked):
        pass
    with pytest.raises(MotetError, match="damaged"), reading(path):
        pass
    assert identity(path.with_name("nothing")) is None


def test_a_page_that_was_not_an_image_is_left_alone(store: ImageStore, folder: Path) -> None:
    folder.mkdir()
    for name in ("notes.txt", ".hidden", "directory.images"):
        (folder / name).write_text("mine")
    for number in range(6):
        put(store, number)
    assert {"notes.txt", ".hidden", "directory.images"} < set(os.listdir(folder))


# Other processes

WRITER = """
import sys
from pathlib import Path
from tests.adapters.test_store import SIZE, image_of, put
from motet.adapters.store import ImageStore, reading
from motet.errors import StorageFull
folder, first, count, budget = Path(sys.argv[1]), *map(int, sys.argv[2:])
store = ImageStore(folder, budget * SIZE)
print("ready", flush=True)
input()
for number in range(first, first + count):
    path = put(store, number)
    with reading(path) as image:
        assert image.digest.endswith(f"{number:x}")
"""


def writer(folder: Path, first: int, count: int, budget: int) -> subprocess.Popen[str]:
    arguments = [str(folder), str(first), str(count), str(budget)]
    command = [sys.executable, "-c", WRITER, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def held(store: ImageStore, folder: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A draft whose writer is another process, which lives until the test ends."""
    put(store, 0)
    draft = folder / ".77-4096.image.abcdef"
    draft.write_bytes(b"x" * 100)
    code = (
        f"import fcntl; f = open({str(draft)!r}); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield draft, process
        process.kill()


def test_a_draft_lives_as_long_as_its_writer(
    store: ImageStore, folder: Path, held: tuple[Path, subprocess.Popen[bytes]]
) -> None:
    draft, process = held
    put(store, 1)
    assert draft.exists()
    process.kill()
    process.wait()
    put(store, 2)
    assert not draft.exists()
    assert there(folder) == {0, 1, 2}
    assert not hidden(folder)


def test_two_servers_share_a_folder_within_the_budget(folder: Path) -> None:
    """Two processes write 150 images each where 20 fit, and read each right after."""
    processes = [writer(folder, first, 150, 20) for first in (1, 5001)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    found = there(folder)
    assert len(found) == 20
    assert {150, 5150} & found, "the newest of all"
    assert not hidden(folder)


def test_a_killed_writer_leaves_nothing_half(folder: Path) -> None:
    """Killed 6 times at any moment; what is there is whole, and the next writer cleans up."""
    chance = random.Random(5)
    for attempt in range(6):
        with writer(folder, 1 + 1000 * attempt, 10**6, 30) as process:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            time.sleep(chance.uniform(0.01, 0.15))
            process.kill()
        assert len(there(folder)) <= 30
    put(ImageStore(folder, 30 * SIZE), 999_999)
    assert not hidden(folder)
    assert 999_999 in there(folder)


def test_a_lock_of_a_reader_in_another_process_counts(store: ImageStore) -> None:
    oldest = put(store, 1)
    with oldest.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # flock belongs to the opened file, so this stands for any process
        for number in range(2, 9):
            put(store, number)
        assert oldest.exists()
    put(store, 9)
    assert not oldest.exists()
