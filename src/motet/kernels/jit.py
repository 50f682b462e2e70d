"""How CPU kernels are compiled.

Numba compiles a kernel at its first call and caches the machine code beside the source, so only the first start of a
new version pays for it. The floating-point freedoms granted are those that let LLVM vectorise a reduction; NaN and
infinity keep their meaning, because masks and error checks rely on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")

_FREEDOMS = {"reassoc", "contract", "arcp", "nsz"}


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for this CPU; it runs on the calling thread and releases the GIL."""
    return cast(
        "Callable[P, R]",
        numba.njit(fastmath=_FREEDOMS, cache=True, nogil=True, error_model="numpy")(function),
    )


def inline(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a helper that kernels call; it is inlined into them."""
    return cast(
        "Callable[P, R]", numba.njit(fastmath=_FREEDOMS, inline="always", error_model="numpy")(function)
    )
