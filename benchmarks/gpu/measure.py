"""What GPU benchmarks share: a report of checks and timings, medians of graph replays, random inputs.

Importing it puts the source tree on the path, also on a machine where Motet is not installed.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

BANDWIDTH, OPERATIONS = 4.3e12, 790e12
"""What a copy and a large bfloat16 product reach on an H200, per second."""
BF16, F32 = torch.bfloat16, torch.float32
Call = Callable[[], object]


def i32(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device="cuda")


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").normal_()


@dataclass
class Report:
    """What was checked and timed. Everything goes to $OUT, if there is one; `show` prints what matters."""

    checks: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    failed: bool = False

    def check(self, name: str, actual: Tensor, expected: Tensor, bound: float = 1e-2) -> None:
        """Relative error in the Frobenius norm; what is not a number fails."""
        error = float((actual.double() - expected.double()).norm() / expected.double().norm())
        self.same(f"{name} {error:.1e}", error <= bound)

    def same(self, name: str, fine: bool) -> None:
        self.failed |= not fine
        self.checks.append(f"{'ok  ' if fine else 'FAIL'} {name}")

    def time(self, name: str, calls: Sequence[Call], moved: float, flops: float = 0.0) -> float:
        """`moved` bytes and `flops` operations of one call; its microseconds, infinite if it cannot be."""
        floor = max(moved / BANDWIDTH, flops / OPERATIONS) * 1e6
        try:
            took, spread = measure(calls)
        except Exception as error:  # noqa: BLE001  # a variant that needs too much of something
            self.rows.append(f"{name:56} {type(error).__name__} {str(error)[:40]}")
            return math.inf
        rate = f"{flops / took / 1e6:4.0f} TFLOP/s" if flops else f"{moved / took / 1e6:4.2f} TB/s"
        numbers = f"{took:8.2f} us ±{spread:2.0f}% floor {floor:7.2f} {floor / took:4.0%} {rate}"
        self.rows.append(f"{name:56} {numbers}")
        return took

    def section(self, part: Callable[[Report], None]) -> None:
        """Run one part; if it breaks, say where and go on."""
        begin = time.monotonic()
        try:
            part(self)
        except Exception:  # noqa: BLE001
            self.same(f"{part}\n{traceback.format_exc(limit=-3)}", False)
        torch.cuda.empty_cache()
        print(f"{getattr(part, '__name__', part)}: {time.monotonic() - begin:.0f} s", flush=True)

    def show(self) -> None:
        lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}", *self.checks, *self.rows]
        if "OUT" in os.environ:
            Path(os.environ["OUT"], "kernels.txt").write_text("\n".join(lines) + "\n")
        bad = [line for line in self.checks if not line.startswith("ok")]
        print(
            "\n".join(
                [
                    lines[0],
                    *bad,
                    f"{len(self.checks) - len(bad)} of {len(self.checks)} checks hold",
                    *self.rows,
                ]
            )
        )


def measure(calls: Sequence[Call], launches: int = 48) -> tuple[float, float]:
    """Median µs of a call among graph replays of all of them, and the spread of the middle half in percent.

    A graph has about `launches` calls.
    """
    repeated = list(calls) * max(1, launches // len(calls))
    graph, count = captured(repeated), len(repeated)
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    low, middle, high = statistics.quantiles(times[3:], n=4)
    return middle, (high - low) / middle * 100


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    for call in calls[:2]:  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replays_equal(
    report: Report, name: str, call: Call, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Two eager runs and two replays from the same inputs give the same bits; outputs are poisoned in between."""
    kept = [one.clone() for one in inputs]

    def run(go: Call) -> list[Tensor]:
        for one in outputs:
            one.view(torch.uint8).fill_(0xFF)
        for one, value in zip(inputs, kept, strict=True):
            one.copy_(value)
        go()
        torch.cuda.synchronize()
        return [one.clone() for one in (*outputs, *inputs)]

    first = run(call)
    graph = captured([call])
    others = [run(call), run(graph.replay), run(graph.replay)]
    same = all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for other in others
        for a, b in zip(first, other, strict=True)
    )
    report.same(f"{name}: replays equal eager", same)
