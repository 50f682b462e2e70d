"""How much memory this process may take: a container often has less of it than its machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def memory_left(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what machine and control groups allow, less its own anonymous memory.

    Control groups of both kinds count, and those above its own too. `root` is where /proc and /sys are.
    """
    total = _machine_bytes(root)
    limits = [limit for file in _limit_files(root) if (limit := _limit(file)) is not None]
    return max(0, min([total, *limits]) - _anonymous_bytes(root))


def _machine_bytes(root: Path) -> int:
    lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    return int(lines["MemTotal"].split()[0]) << 10


def _anonymous_bytes(root: Path) -> int:
    """Of this process; files that it has mapped, as weights that were read, give way when memory is short."""
    _, resident, shared, *_ = map(int, (root / "proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _limit_files(root: Path) -> Iterator[Path]:
    """Where the limits of its control group and those above may be written.

    A container may see the names of its machine and none of the groups above its own, which then lies at the top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, file = ("memory", "memory.limit_in_bytes") if kinds else ("", "memory.max")
        group = Path(name.lstrip("/"))
        for each in (group, *group.parents):
            yield root / "sys/fs/cgroup" / top / each / file


def _limit(file: Path) -> int | None:
    """None if there is no such group, or no limit."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
