"""How CPU kernels are compiled.

Numba compiles a kernel at its first call and caches the machine code beside the source, so only the first start of a
new version pays for it. The floating-point freedoms granted are those that let LLVM vectorise a reduction; NaN and
infinity keep their meaning, because masks and error checks rely on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

try:
    import numba
except ImportError:
    numba = None  # type: ignore[assignment]  # what is missing is said when it is called

P = ParamSpec("P")
R = TypeVar("R")

_FREEDOMS = {"reassoc", "contract", "arcp", "nsz"}


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for this CPU; it runs on the calling thread and releases the GIL."""
    return _compiled(function, cache=True, nogil=True)


def inline(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a helper that kernels call; it is inlined into them."""
    return _compiled(function, inline="always")


def _compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """Without Numba, as on a GPU machine whose NumPy is too new for it, only a call fails."""
    if numba is None:
        return cast("Callable[P, R]", _Missing(function.__name__))
    return cast("Callable[P, R]", numba.njit(fastmath=_FREEDOMS, error_model="numpy", **options)(function))


class _Missing:
    """Stands for a kernel that cannot be compiled here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: object) -> None:
        raise RuntimeError(f"{self._name} needs Numba, which is not installed or does not fit this NumPy")
