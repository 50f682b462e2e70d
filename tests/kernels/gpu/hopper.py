"""Compiles for sm_90 what launchers launch, on a machine without a GPU, and reads the machine code.

    python -m tests.kernels.gpu.hopper tests.kernels.gpu.shipped_dense    one line per kernel; fails if one spills much

The module named must have a function `launches()`, which calls launchers with meta tensors: what they would launch is
compiled with their own configuration and specialisation.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_SPILLED = 64
"""Bytes per thread: the assembler keeps a few words in memory where that lets one more warp run."""
MOST_SHARED = 227 << 10
"""Bytes of shared memory that a program may have on sm_90."""


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one launch needs; `spills` in bytes, `instructions` counts by their first word."""

    name: str
    config: str
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]

    def __str__(self) -> str:
        kinds = ("HGMMA", "HMMA", "LDGSTS", "LDG", "UTMALDG", "LDL")
        seen = " ".join(f"{kind}:{self.instructions[kind]}" for kind in kinds if kind in self.instructions)
        facts = f"{self.registers:4} regs {self.spills:4} spill {self.shared:7} smem"
        return f"{self.name:26} {facts}  {sum(self.instructions.values()):5} instr  {seen}  {self.config}"


def compile_launches(launches: Callable[[], None]) -> list[Compiled]:
    """Everything that `launches` launches, each once. Must run without TRITON_INTERPRET."""
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from triton.runtime.jit import JITFunction  # type: ignore[import-untyped,import-not-found,unused-ignore]

    class Driver:
        """Says that the device is a Hopper chip; nothing is ever loaded onto it."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    compiled: dict[str, Compiled] = {}
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in compiled:
            config = {k: v for k, v in kwargs.items() if isinstance(v, int | bool | float | tuple)}
            compiled[kernel.hash] = _inspect(kernel, " ".join(f"{k}={v}" for k, v in config.items()))
        return kernel

    JITFunction.run = run
    try:
        launches()
    finally:
        JITFunction.run = launch
    return list(compiled.values())


def _inspect(kernel: Any, config: str) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        )
    text = usage.stdout + usage.stderr
    instructions: dict[str, int] = {}
    for match in re.finditer(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", code.stdout, re.MULTILINE):
        instructions[match[1]] = instructions.get(match[1], 0) + 1
    return Compiled(
        name=kernel.name,
        config=config,
        registers=int(re.search(r"REG:(\d+)", text)[1]),  # type: ignore[index]
        spills=int(re.search(r"LOCAL:(\d+)", text)[1])  # type: ignore[index]
        + int(re.search(r"STACK:(\d+)", text)[1]),  # type: ignore[index]
        shared=kernel.metadata.shared,
        instructions=instructions,
    )


def main() -> int:
    """Compile what the modules named on the command line launch; 1 if a kernel spills more than a few registers
    or does not fit in shared memory."""
    compiled: list[Compiled] = []
    for name in sys.argv[1:]:
        compiled += compile_launches(importlib.import_module(name).launches)
    for one in compiled:
        sys.stdout.write(f"{one}\n")
    return int(any(one.spills > MOST_SPILLED or one.shared > MOST_SHARED for one in compiled))


if __name__ == "__main__":
    sys.exit(main())
