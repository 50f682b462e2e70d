"""How GPU kernels are compiled: Triton where it is installed, a clear error where it is not.

Modules of this package import everywhere; only a launch needs Triton and a device. Under TRITON_INTERPRET=1 kernels
run on the CPU, one program after the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

try:
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

    HAVE_TRITON = True
except ImportError:  # a machine without a GPU needs none; kernel bodies only name `tl`, they never run there
    triton = None
    tl = None
    HAVE_TRITON = False


class _Missing:
    """Stands for a kernel that cannot be compiled here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: object) -> Callable[..., None]:
        raise RuntimeError(f"{self._name} needs Triton, which is not installed")


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function with Triton at its first launch; `options` go to `triton.jit`."""

    def decorate(function: Callable[..., Any]) -> Any:
        if HAVE_TRITON:
            return triton.jit(function, **options)
        return _Missing(function.__name__)

    return decorate


def launch_options(pdl: bool) -> dict[str, bool]:
    """What a launch passes so that its kernel may start before the kernel in front of it has ended.

    Such a kernel takes a constexpr PDL, waits (`gdc_wait`) in every program before its first read of what that kernel
    wrote and before any write, and lets its successor start early (`gdc_launch_dependents`). The interpreter has
    neither, and runs in order anyway.
    """
    pdl = pdl and not triton.knobs.runtime.interpret
    return {"PDL": pdl, "launch_pdl": pdl}


@kernel()
def begin(LAUNCH: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the kernel in front; the next one may start before that (LAUNCH 1), after it (2) or not yet."""
    if PDL:
        if LAUNCH == 1:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if LAUNCH == 2:
            tl.extra.cuda.gdc_launch_dependents()


@contextmanager
def compile_only() -> Iterator[None]:
    """Within, launches compile their kernel and do nothing else; what was asked for is there at the end.

    Most of a compilation runs outside Python's lock, so several go on at once, one per core. What Triton raises about
    one that fails is raised at the end, when the others are there.
    """
    function = triton.JITFunction
    launch = function.run
    asked = set()

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del warmup
        key = (self, *map(_seen, args), *((name, _seen(value)) for name, value in options.items()))
        if key not in asked:  # to find out what a launch would be compiled to takes Triton half a millisecond
            asked.add(key)
            launch(self, *args, grid=grid, warmup=True, **options)

    function.run = compiled
    try:
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True) as mode,  # else it stays active after an error
        ):
            yield
    finally:
        function.run = launch
    for compilation in mode.raw_futures:
        compilation.result()


def _seen(argument: Any) -> Any:
    """What a compiler sees of an argument, or more."""
    if hasattr(argument, "data_ptr"):
        return argument.dtype, argument.data_ptr() % 16
    return type(argument), argument


__all__ = ["HAVE_TRITON", "begin", "compile_only", "kernel", "launch_options", "tl", "triton"]
