"""GPU kernels are tested on the device where there is one, elsewhere through Triton's interpreter, or not at all."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

try:
    from triton.runtime.jit import JITFunction  # type: ignore[import-untyped,import-not-found,unused-ignore]
except ImportError:
    collect_ignore_glob = ["test_*.py"]
else:
    if not torch.cuda.is_available():
        from triton.runtime.interpreter import InterpretedFunction  # type: ignore[import-untyped,import-not-found,unused-ignore]

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            return InterpretedFunction(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return InterpretedFunction(self.fn)(*args, **kwargs)

        # The variable alone is not enough: other tests may have imported Triton before this file is read.
        os.environ["TRITON_INTERPRET"] = "1"
        JITFunction.run, JITFunction.__call__ = run, call

ON_DEVICE = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_DEVICE else [torch.float16, torch.float32]
"""The interpreter computes bfloat16 wrongly without a word."""
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest error by the largest magnitude: about one rounding of a result, with products in the inputs' dtype."""


@pytest.fixture
def device() -> str:
    return "cuda" if ON_DEVICE else "cpu"


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind
