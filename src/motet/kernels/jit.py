"""How CPU kernels are compiled, and how the work of a call is shared among threads.

Numba compiles a kernel at its first call and caches the machine code, so only the first start of a new version pays
for it. Numba would look for changes in the kernel's own file only; kernels call each other, so the cache's folder is
named after all their sources. The floating-point freedoms granted are those that let LLVM vectorise a reduction; NaN
and infinity keep their meaning, because masks and error checks rely on them.

Threads are those of torch's OpenMP library: it is there first, and Numba's own binds to it. So kernels and torch's
operations take turns on one pool. A call costs 3 µs on two threads, 1 µs on one.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch

try:
    import llvmlite.binding
    import numba
    import numba.extending
except ImportError:
    numba = None  # type: ignore[assignment]  # what is missing is said when it is called

settings: Any = None if numba is None else numba.config

P = ParamSpec("P")
R = TypeVar("R")

_FREEDOMS = {"reassoc", "contract", "arcp", "nsz"}

_PRANGE_ONLY = {
    "prange": True, "comprehension": False, "fusion": False, "inplace_binop": False, "numpy": False,
    "reduction": False, "setitem": False, "stencil": False,
}  # fmt: skip
"""Numba's options of `parallel`: looking for more to share takes it longer than all else."""

MANY_ROWS = 64
"""Rows from which threads share norms, rotations and activations: waking one is dear where others use the CPU."""

prange: Callable[[int], range] = range if numba is None else numba.prange
"""The loop over the shares in a kernel of `shared`."""


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for this CPU; it runs on the calling thread and releases the GIL."""
    return _cached(function, nogil=True)


def shared(function: Callable[..., None]) -> Shared:
    """Compile `function`, whose last argument is a number of shares and whose body is a `prange` over them."""
    return Shared(function)


def inline(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a helper that kernels call; it is inlined into them."""
    return _compiled(function, inline="always")


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A helper that kernels call, which `function` writes in LLVM's language."""
    found: Callable[..., Any] = (
        _Missing(function.__name__) if numba is None else numba.extending.intrinsic(function)
    )
    return found


def cpu_has(feature: str) -> bool:
    """Whether this CPU has an extension of that name (LLVM's)."""
    return numba is not None and bool(llvmlite.binding.get_host_cpu_features().get(feature))


class Shared:
    """A kernel whose work torch's threads share; callers leave the number of shares, its last argument, out."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._many = _cached(function, nogil=True, parallel=_PRANGE_ONLY)
        self._alone = _cached(function, nogil=True)

    def __call__(self, *args: object) -> None:
        threads = torch.get_num_threads()
        if _set.threads != threads:
            _set.to(threads)
        self._many(*args, threads)

    def over(self, rows: int) -> Callable[..., None]:
        """The same for so many rows of a cheap kernel: few are not worth waking threads for."""
        return self if rows >= MANY_ROWS else self._by_one

    def _by_one(self, *args: object) -> None:
        self._alone(*args, 1)


class _Threads(threading.local):
    """How many of Numba's threads the calling thread uses; asking Numba takes as long as a small kernel."""

    threads = 0

    def to(self, threads: int) -> None:
        """Use so many, or as many as Numba has. Its start sets the number of OpenMP's, torch's: that is put back."""
        if numba is not None:
            numba.set_num_threads(min(threads, settings.NUMBA_NUM_THREADS))
            torch.set_num_threads(threads)
        self.threads = threads


_set = _Threads()


def _compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """Without Numba, as on a GPU machine whose NumPy is too new for it, only a call fails."""
    if numba is None:
        return cast("Callable[P, R]", _Missing(function.__name__))
    return cast("Callable[P, R]", numba.njit(fastmath=_FREEDOMS, error_model="numpy", **options)(function))


def _cached(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    if numba is None:
        return _compiled(function)
    others = settings.CACHE_DIR
    # Numba's index does not tell a shared kernel from the same one alone.
    settings.CACHE_DIR = str(_cache_folder() / ("shared" if "parallel" in options else "alone"))
    try:
        return _compiled(function, cache=True, **options)
    finally:
        settings.CACHE_DIR = others


@cache
def _cache_folder() -> Path:
    """Beside the sources; where that cannot be written, Numba takes the user's own cache."""
    folder = Path(__file__).parent
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    return folder / "__pycache__" / f"numba-{hashlib.sha256(sources).hexdigest()[:16]}"


class _Missing:
    """Stands for a kernel that cannot be compiled here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: object) -> None:
        raise RuntimeError(f"{self._name} needs Numba, which is not installed or does not fit this NumPy")
