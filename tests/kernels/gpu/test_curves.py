from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.gpu import curves
from benchmarks.gpu.curves import Point
from benchmarks.gpu.random_checkpoint import CONFIGS
from motet.bench.stack import Stack
from motet.bench.tune import Step
from tests.kernels.gpu.test_ablation import TINY


def test_every_axis_is_measured_and_drawn(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(model: str) -> list[Point]:
        varied = [Point(model, "adapters", 4, count, 16, 20) for count in (1, 2)]
        return [*varied, Point(model, "prompt", 1, 2, 16, 9), Point(model, "prompt", 1, 2, 16, 5)]

    steps: list[tuple[int, Step]] = []

    def clock(stack: Stack, step: Step) -> float:
        step.batch(stack)
        steps.append((stack.work.adapters, step))
        return float(len(steps))

    monkeypatch.setattr(curves, "points", few)
    monkeypatch.setitem(CONFIGS, "tiny", dict(TINY.config))
    found = list(curves.measure("tiny", 2, device, clock))
    assert [(p.with_adapters, p.base_only) for p in found] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert steps[2] == (2, Step(False, 4))
    assert steps[5] == (2, Step(True, 9, adapted=False))

    file = tmp_path / "steps.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([list(vars(found[0])), *(list(vars(p).values()) for p in found)])
    assert curves.read(file) == found
    drawn = curves.plot(found, tmp_path)
    assert [file.name for file in drawn] == ["tiny-adapters.svg", "tiny-prompt.svg"]
    assert all("<svg" in file.read_text() for file in drawn)


def test_points_lie_on_five_axes() -> None:
    points = list(curves.points("gpt-oss-20b"))
    assert {p.axis for p in points} == {"batch", "rank", "adapters", "context", "prompt"}
    assert all(p.at > 0 for p in points)
