"""Progress: a bar for everything that takes more than a moment, plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Report = Callable[[str, float], None]


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[Report]:
    """A bar that follows calls `report(stage, fraction)`; it stays as a line when done."""
    columns = (
        TextColumn("{task.fields[title]}"),
        BarColumn(30),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, title=title)
        seen = ""

        def report(stage: str, fraction: float) -> None:
            nonlocal seen
            bar.update(task, completed=fraction, description=stage)
            if not console.is_terminal and stage != seen:
                console.print(f"{title}: {stage}")
            seen = stage

        yield report
        bar.update(task, completed=1.0)
