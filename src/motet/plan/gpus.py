"""GPUs: memory as programs find it, bandwidth and arithmetic from data sheets, and a price for who names none.

Prices differ by a factor of three between clouds and with every commitment: those here are round figures of on-demand
offers, there to be overridden.
"""

from __future__ import annotations

import msgspec

from motet.errors import ConfigError

GIB = 1 << 30


class Gpu(msgspec.Struct, frozen=True):
    """Memory in bytes, bandwidth in bytes per second, dense bfloat16 operations per second, price per hour."""

    name: str
    memory: int
    bandwidth: float
    flops: float
    price: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("L4", 22 * GIB, 0.30e12, 121e12, 0.8),
        Gpu("L40S", 44 * GIB, 0.86e12, 362e12, 1.9),
        Gpu("A100", 79 * GIB, 2.04e12, 312e12, 2.5),
        Gpu("H100", 79 * GIB, 3.35e12, 989e12, 4.0),
        Gpu("H200", 139 * GIB, 4.80e12, 989e12, 5.0),
        Gpu("B200", 178 * GIB, 7.70e12, 2250e12, 8.0),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU of the table; ConfigError names those that there are."""
    for gpu in GPUS.values():
        if gpu.name.lower() == name.lower():
            return gpu
    raise ConfigError(f"no GPU {name!r} is known; there are {', '.join(GPUS)}")
