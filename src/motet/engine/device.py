"""What an engine runs on: "auto" resolved, weights' destination, the pool's size, the runner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import msgspec
import torch

from motet.adapters.host import HostTier
from motet.config import EngineConfig, tuned_folder
from motet.engine.host_memory import memory_left
from motet.engine.runner import Runner
from motet.errors import ConfigError
from motet.layers.batch import Device
from motet.layers.cpu import CpuDevice
from motet.layers.decoder import Decoder
from motet.memory.pool import KV_DTYPE, Pool, page_bytes
from motet.models.registry import LoadedModel
from motet.types import ModelSpec

if TYPE_CHECKING:
    from motet.engine.gpu_runner import GpuRunner

CPU_POOL = 1 << 30
STEP_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens of a step. On a GPU a chunk of 2,048 keeps neighbours waiting for some 60 ms and still fills the device."""
HOST_BYTES = 8 << 30
"""The most that the host tier takes by default: 11 adapters of rank 32 on every expert of gpt-oss-20b."""
WORKSPACE = 3 << 30
"""GPU memory kept for activations, graphs and compiled code."""


def has_gpu() -> bool:
    """Whether there is a GPU that kernels can be compiled for."""
    return torch.cuda.is_available() and find_spec("triton") is not None


def resolve(config: EngineConfig, gpu: bool) -> EngineConfig:
    """The config with nothing left to choose, but for a GPU's pool, whose size is known once the weights are there."""
    device = config.device if config.device != "auto" else "cuda" if gpu else "cpu"
    if device == "cuda" and not gpu:
        raise ConfigError(
            'device = "cuda" needs a CUDA GPU, and torch and Triton that can use it; none was found'
        )
    if device == "cuda" and config.verify_adapters:
        raise ConfigError("verify_adapters runs on a CPU only so far; use `motet adapters verify`")
    if device == "cpu" and config.prompt_copies:
        raise ConfigError("prompt_copies are for the products of a GPU; this engine runs on a CPU")
    if device == "cpu" and config.tuned_configs is not None:
        raise ConfigError("tuned_configs are for the kernels of a GPU; this engine runs on a CPU")
    return msgspec.structs.replace(
        config,
        device=device,
        pool_bytes=config.pool_bytes or (CPU_POOL if device == "cpu" else None),
        max_step_tokens=config.max_step_tokens or STEP_TOKENS[device],
    )


def weights_device(config: EngineConfig) -> Device:
    """Where a resolved config wants the weights; kernels for them are compiled as configured from now on."""
    if config.device == "cpu":
        return CpuDevice()
    from motet.kernels.gpu import tuned
    from motet.layers.gpu import GpuDevice  # brings Triton, which a CPU's engine has no use for: 60 MB

    tuned.load(tuned_folder(config), torch.cuda.get_device_name())
    return GpuDevice(torch.device("cuda"))


def with_prompt_copies(config: EngineConfig, spec: ModelSpec, model: LoadedModel) -> LoadedModel:
    """The model with the copies of its weights that the config wants, or that there is room for."""
    if config.device == "cpu" or config.prompt_copies is False:
        return model
    from motet.layers.gpu import copies_bytes, with_copies

    size = copies_bytes(model.decoder)
    if not size:
        return model
    left = _left_on_gpu(config, spec)
    if config.prompt_copies and size > left:
        raise ConfigError(f"prompt_copies take {size >> 20} MiB, and the weights leave {left >> 20}")
    if not config.prompt_copies and size > min(left // 2, left - (config.pool_bytes or 0)):
        return model
    return LoadedModel(with_copies(model.decoder), model.nbytes + size)


def make_pool(config: EngineConfig, spec: ModelSpec) -> Pool:
    """The pool of a resolved config; the weights are loaded already."""
    size = config.pool_bytes if config.pool_bytes is not None else _left_on_gpu(config, spec)
    return Pool(spec, size, config.page_tokens, KV_DTYPE[config.device], config.device)


def make_host_tier(config: EngineConfig, page_bytes: int) -> HostTier | None:
    """The host tier of a resolved config, if it has one."""
    size = config.host_bytes
    if size is None:
        size = min(memory_left() // 4, HOST_BYTES) if config.device == "cuda" else 0
    return HostTier(size, page_bytes, pinned=config.device == "cuda") if size else None


def _left_on_gpu(config: EngineConfig, spec: ModelSpec) -> int:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    left = int(config.memory_fraction * total) - (total - free) - WORKSPACE
    if left < 16 * page_bytes(spec, config.page_tokens, KV_DTYPE[config.device]):
        raise ConfigError(
            f"the weights leave {max(left, 0) >> 20} MiB of {total >> 20} MiB for KV cache and adapters; raise "
            f"memory_fraction (now {config.memory_fraction}) or take a smaller model"
        )
    return left


@contextmanager
def fitting(what: str, change: str) -> Iterator[None]:
    """Say what to change if `what` does not fit in the GPU's memory."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise ConfigError(
            f"{what} needs more memory than the GPU has: {free >> 20} MiB of {total >> 20} MiB are free; {change}"
        ) from error


def workspace_bytes(config: EngineConfig, pool: Pool, weights: int) -> int:
    """What the GPU's memory holds beside weights and pool, other processes' share among it; 0 on a CPU."""
    if config.device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return max(0, total - free - weights - pool.data.nbytes)


def make_runner(config: EngineConfig, decoder: Decoder, pool: Pool, max_model_len: int) -> Runner | GpuRunner:
    """What executes plans on the config's device."""
    if config.device == "cpu":
        return Runner(decoder, pool)
    from motet.engine.gpu_runner import GpuRunner

    assert config.max_step_tokens is not None
    return GpuRunner(decoder, pool, max_model_len, config.max_running, config.max_step_tokens)
