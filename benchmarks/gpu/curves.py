"""Where cost grows: a step's time by batch, rank, adapters and context, with adapters and without, on one GPU.

    python benchmarks/gpu/curves.py gpt-oss-20b steps.csv [--layers N]     measures; a line per point
    python benchmarks/gpu/curves.py --plot steps.csv docs/plots            draws what such a file holds (matplotlib)

Each axis is varied by itself from 16 rows, 8 adapters of rank 32 and 1,900 tokens of context, that of adapters at 64
rows. Steps are medians of graph replays on a stack of the model's shape with random weights (`motet.bench.stack`).
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[2] / "src"))
from benchmarks.gpu.random_checkpoint import COMMON, CONFIGS
from motet.bench.stack import Stack, Work, few_layers
from motet.bench.tune import Step, milliseconds
from motet.kernels.gpu import tuned


@dataclass(frozen=True)
class Point:
    """One measurement; `tokens` is the context of a decode step or the length of a prompt, times are milliseconds."""

    model: str
    axis: str
    rows: int
    adapters: int
    rank: int
    tokens: int
    with_adapters: float = 0.0
    base_only: float = 0.0

    @property
    def at(self) -> int:
        """Where it lies on its axis."""
        return {
            "batch": self.rows, "rank": self.rank, "adapters": self.adapters,
            "context": self.tokens, "prompt": self.tokens,
        }[self.axis]  # fmt: skip


def points(model: str) -> Iterator[Point]:
    """What is measured, those that fit one stack side by side."""
    for rows in (1, 2, 4, 8, 16, 32, 64):
        yield Point(model, "batch", rows, 8, 32, 1900)
    for rank in (8, 16, 32, 64, 128):
        yield Point(model, "rank", 16, 8, rank, 1900)
    for adapters in (1, 2, 4, 8, 16, 32, 64):
        yield Point(model, "adapters", 64, adapters, 32, 1900)
    for tokens in (128, 512, 2048, 8192, 32_000):
        yield Point(model, "context", 16, 8, 32, tokens)
    for tokens in (128, 256, 512, 1024, 1600):
        yield Point(model, "prompt", 1, 8, 32, tokens)


def measure(model: str, layers: int, device: str = "cuda", clock: object = milliseconds) -> Iterator[Point]:
    """All points; a stack too large for the GPU is told and left out."""
    assert callable(clock)
    values = few_layers({**COMMON, **CONFIGS[model]}, layers)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    longest = max(_work(point).positions for point in points(model))
    stack: Stack | None = None
    for work, group in groupby(points(model), _work):
        gc.collect()
        try:
            if stack is None:
                stack = Stack(values, replace(work, positions=longest), device, kind)
                tuned.load(None, stack.gpu)
            stack.take(work)
        except torch.OutOfMemoryError as error:
            sys.stderr.write(f"{work} does not fit: {str(error).splitlines()[0]}\n")
            continue
        for point in group:
            prompt = point.axis == "prompt"
            count = point.tokens if prompt else point.rows
            times = [clock(stack, Step(prompt, count, adapted=adapted)) for adapted in (True, False)]
            yield replace(point, with_adapters=times[0], base_only=times[1])
        if device == "cuda":
            torch.cuda.empty_cache()


def _work(point: Point) -> Work:
    rows = 64 if point.axis in ("batch", "adapters") else point.rows
    context = 128 if point.axis == "prompt" else point.tokens
    return Work(rows, context, max(4096, context + 1), point.adapters, point.rank)


def read(file: Path) -> list[Point]:
    """The points of a file that `measure` filled."""
    kinds = {field.name: {"str": str, "int": int, "float": float}[str(field.type)] for field in fields(Point)}
    with file.open(newline="") as lines:
        return [
            Point(**{name: kinds[name](value) for name, value in row.items()})
            for row in csv.DictReader(lines)
        ]


def plot(found: list[Point], folder: Path) -> list[Path]:
    """A picture per model and axis; the files written."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    written = []
    for (model, axis), group in groupby(found, lambda point: (point.model, point.axis)):
        line = list(group)
        figure, axes = pyplot.subplots(figsize=(5, 3), layout="constrained")
        axes.plot([p.at for p in line], [p.with_adapters for p in line], "o-", label="with adapters")
        axes.plot([p.at for p in line], [p.base_only for p in line], "s--", label="base only")
        axes.set(xscale="log", xlabel=axis, ylabel="ms per step", title=model, ylim=(0, None))
        axes.set_xticks([p.at for p in line], [str(p.at) for p in line])
        axes.minorticks_off()
        axes.legend()
        written.append(folder / f"{model}-{axis}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
        pyplot.close(figure)
    return written


def main() -> None:
    """Measure, or draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="one of " + ", ".join(CONFIGS) + "; with --plot a file")
    parser.add_argument("out", type=Path, help="the file; with --plot a folder")
    parser.add_argument("--layers", type=int, default=1000, help="at most so many [default: the model's]")
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    if options.plot:
        options.out.mkdir(parents=True, exist_ok=True)
        for file in plot(read(Path(options.model)), options.out):
            sys.stdout.write(f"{file}\n")
        return
    with options.out.open("w", newline="") as lines, torch.inference_mode():
        table = csv.writer(lines)
        table.writerow([field.name for field in fields(Point)])
        for point in measure(options.model, options.layers):
            row = [getattr(point, field.name) for field in fields(Point)]
            table.writerow([round(value, 4) if isinstance(value, float) else value for value in row])
            lines.flush()
            sys.stdout.write(f"{point}\n")


if __name__ == "__main__":
    main()
