from __future__ import annotations

import os
import subprocess
import sys


def test_dense_kernels_compile_for_sm_90_without_spilling() -> None:
    """In a process of its own: here kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.hopper", "tests.kernels.gpu.shipped_dense"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "HGMMA" in done.stdout
