from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["shipped_dense", "shipped_latent", "shipped_moe", "shipped_tuned"])
def test_kernels_compile_for_sm_90_without_spilling(module: str) -> None:
    """In a process of its own: here kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.hopper", f"tests.kernels.gpu.{module}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "HGMMA" in done.stdout
    for line in done.stdout.splitlines():
        if line.startswith("_dense_kernel"):  # one kind of product for every number of rows: the same bits
            assert "HGMMA" in line, line
            assert " HMMA" not in line, line
            assert " 0 spill" in line, line
