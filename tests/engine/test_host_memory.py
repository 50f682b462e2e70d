"""The memory that a process may take, from the files of machines and containers of both kinds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from motet.config import EngineConfig
from motet.engine import device
from motet.engine.device import HOST_BYTES, make_host_tier
from motet.engine.host_memory import memory_left

GIB = 1 << 30
PAGE = os.sysconf("SC_PAGE_SIZE")
UNLIMITED = "9223372036854771712"


def machine(root: Path, gib: int, groups: str | None, limits: Mapping[str, str]) -> Path:
    """A tree of /proc and /sys. The process has 5 pages in memory, 2 of them mapped from files."""
    files = {
        "proc/meminfo": f"MemTotal:       {gib << 20} kB\nMemFree:         1000 kB\nHugePages_Total:    0\n",
        "proc/self/statm": "900 5 2 1 0 300 0\n",
        **{f"sys/fs/cgroup/{name}": f"{limit}\n" for name, limit in limits.items()},
    }
    if groups is not None:
        files["proc/self/cgroup"] = groups
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "12:cpu,cpuacct:/user\n7:memory:/kube/pod/box\n0::/user/box\n"


@pytest.mark.parametrize(
    ("groups", "limits", "gib"),
    [
        pytest.param(None, {}, 64, id="no control groups"),
        pytest.param("0::/\n", {}, 64, id="the top group of a machine"),
        pytest.param("0::/\n", {"memory.max": f"{6 * GIB}"}, 6, id="v2, a container"),
        pytest.param("0::/\n", {"memory.max": "max"}, 64, id="v2, without a limit"),
        pytest.param(
            "0::/a/b\n", {"a/memory.max": f"{9 * GIB}", "a/b/memory.max": "max"}, 9, id="v2, above its own"
        ),
        pytest.param(
            "0::/a/b\n", {"a/memory.max": f"{9 * GIB}", "a/b/memory.max": f"{3 * GIB}"}, 3, id="v2, the least"
        ),
        pytest.param("0::/a\n", {"memory.max": f"{100 * GIB}"}, 64, id="v2, more than there is"),
        pytest.param(V1, {"memory/kube/pod/box/memory.limit_in_bytes": f"{5 * GIB}"}, 5, id="v1"),
        pytest.param(V1, {"memory/memory.limit_in_bytes": f"{5 * GIB}"}, 5, id="v1, a container"),
        pytest.param(V1, {"memory/memory.limit_in_bytes": UNLIMITED}, 64, id="v1, without a limit"),
    ],
)
def test_the_least_limit_counts(
    tmp_path: Path, groups: str | None, limits: Mapping[str, str], gib: int
) -> None:
    assert memory_left(machine(tmp_path, 64, groups, limits)) == gib * GIB - 3 * PAGE


def test_who_has_taken_all_has_none_left(tmp_path: Path) -> None:
    assert memory_left(machine(tmp_path, 64, "0::/\n", {"memory.max": f"{2 * PAGE}"})) == 0


def test_this_process_has_a_part_of_this_machine() -> None:
    assert 0 < memory_left() < os.sysconf("SC_PHYS_PAGES") * PAGE


@pytest.mark.parametrize(("left", "size"), [(4 * GIB, GIB), (400 * GIB, HOST_BYTES), (0, 0)])
def test_on_a_gpu_the_host_tier_takes_a_quarter_of_what_is_left(
    left: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = [0]

    def tier(max_bytes: int, page_bytes: int, pinned: bool) -> object:
        assert (page_bytes, pinned) == (PAGE, True)
        taken[0] = max_bytes
        return object()

    monkeypatch.setattr(device, "memory_left", lambda: left)
    monkeypatch.setattr(device, "HostTier", tier)
    made = make_host_tier(EngineConfig(model="m", device="cuda"), PAGE)
    assert (taken[0], made is None) == (size, size == 0)
    assert make_host_tier(EngineConfig(model="m", device="cpu"), PAGE) is None
