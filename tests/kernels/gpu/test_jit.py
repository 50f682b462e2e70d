from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from motet.kernels.gpu.jit import compile_only, kernel, tl


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _device: 0)


@kernel()
def double(x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x + at, tl.load(x + at) * 2)


triton.runtime.driver.set_active(Driver())
launch = triton.JITFunction.run
begun = []
triton.knobs.runtime.jit_cache_hook = lambda *_, **what: begun.append(what["repr"])
with compile_only():
    for size in (16, 32, 32, 64):
        double[(1,)](torch.empty(size, device="meta"), N=size)
    asked = len(begun)
assert triton.JITFunction.run is launch
assert asked == 3, begun
with compile_only():
    double[(1,)](torch.empty(32, device="meta"), N=32)
assert len(begun) == asked, "what was compiled was not kept"
try:
    with compile_only():
        double[(1,)](torch.empty(3, device="meta"), N=3)
except triton.CompilationError as error:
    assert "power of 2" in str(error), error
else:
    raise AssertionError("a kernel that cannot be compiled went unnoticed")
assert triton.JITFunction.run is launch
with compile_only():
    double[(1,)](torch.empty(128, device="meta"), N=128)
assert len(begun) == asked + 2, "nothing is compiled after a failure"
"""


def test_launches_only_compile_and_what_is_compiled_is_kept(tmp_path: Path) -> None:
    """In a process of its own: here kernels are interpreted. Its driver has no device to launch on."""
    program = tmp_path / "program.py"  # kernels are read from files
    program.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
