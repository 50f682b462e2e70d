"""Reading a base model's tensors from safetensors files, one at a time, none forgotten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from motet.errors import ModelRefused
from motet.kernels.fp8 import dequantise, scale_shape
from motet.layers.batch import Device

INDEX = "model.safetensors.index.json"
FLOATS = torch.float32, torch.bfloat16, torch.float16


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, sharded or not."""
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [directory / name for name in names]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ModelRefused(f"{file} is missing; Motet loads safetensors weights only")
    return files


def fingerprint(directory: Path) -> str:
    """What identifies a base model: sha256 over its config and, of every weight file, header, size and a sample.

    A header holds all names, dtypes, shapes and offsets; the sample (16 × 4 KiB) tells fine-tunes of one architecture
    apart. Hashing all of a 14 GB checkpoint would cost ten seconds at each start.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in weight_files(directory):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(length, 1 << 26)))
            for part in range(16):
                stream.seek(8 + length + (file.stat().st_size - 8 - length) * part // 16)
                digest.update(stream.read(4096))
        digest.update(str(file.stat().st_size).encode())
    return digest.hexdigest()


class Weights:
    """Tensors by name; what nobody asked for is an error at the end.

    `nbytes` is the memory of what was taken so far, as it was handed out. With `fp8_block`, tensors that have scales
    beside them (`NAME_scale_inv`) are in eight-bit floats and handed out dequantised.
    """

    def __init__(
        self,
        where: dict[str, Path],
        device: Device,
        on_progress: Callable[[float], None],
        fp8_block: tuple[int, int] | None = None,
    ) -> None:
        self.device = device
        self._files = where
        self._where = dict(where)
        self._on_progress = on_progress
        self._prefix = ""
        self._fp8_block = fp8_block
        self.nbytes = 0

    def narrow(self, prefix: str, skipped: tuple[str, ...]) -> None:
        """From here on names are those below `prefix`; tensors below one of `skipped` are known not to be wanted."""
        self._prefix = prefix
        self._where = {name: file for name, file in self._where.items() if not name.startswith(skipped)}

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._files

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name on the device, in the dtype of its products, its shape checked."""
        if self._fp8_block is not None and f"{name}_scale_inv" in self:
            tensor = self._dequantised(self._prefix + name, self._fp8_block, *shape)
        else:
            tensor = self._open(self._prefix + name, *shape)
        return self._taken(name, self.device.tensor(tensor))

    def vector(self, name: str, *shape: int) -> Tensor:
        """The same as float32, never rounded to less: norms, sinks, biases of routers."""
        return self._taken(name, self.device.vector(self._open(self._prefix + name, *shape)))

    def _dequantised(self, name: str, block: tuple[int, int], *shape: int) -> Tensor:
        scales = f"{name}_scale_inv"
        scale = self._open(scales, *scale_shape(shape, block), dtypes=(*FLOATS, torch.float8_e8m0fnu))
        self._where.pop(scales, None)
        return dequantise(self._open(name, *shape, dtypes=(torch.float8_e4m3fn,)), scale, block)

    def take_bytes(self, name: str, *shape: int) -> Tensor:
        """The uint8 tensor of that name, a packed format of its own; on the CPU it is mapped from its file."""
        return self._taken(
            name, self.device.bytes(self._open(self._prefix + name, *shape, dtypes=(torch.uint8,)))
        )

    def _taken(self, name: str, tensor: Tensor) -> Tensor:
        self._where.pop(self._prefix + name, None)
        self.nbytes += tensor.nbytes
        self._on_progress(1 - len(self._where) / len(self._files))
        return tensor

    def table(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name for looking rows up; it may be taken as well."""
        tensor = self.device.table(self._open(self._prefix + name, *shape))
        self._where.pop(self._prefix + name, None)
        self.nbytes += tensor.nbytes
        return tensor

    def _open(self, name: str, *shape: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
        file = self._files.get(name)
        if file is None:
            raise ModelRefused(f"the checkpoint has no tensor {name}")
        with safe_open(file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelRefused(f"tensor {name} is {tuple(tensor.shape)}, the config says {shape}")
        if tensor.dtype not in dtypes:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ModelRefused(f"tensor {name} is {tensor.dtype}; supported here: {supported}")
        return tensor

    def left(self) -> list[str]:
        """Names that were not taken."""
        return sorted(self._where)


@contextmanager
def open_weights(
    directory: Path,
    device: Device,
    on_progress: Callable[[float], None] = lambda _fraction: None,
    fp8_block: tuple[int, int] | None = None,
) -> Iterator[Weights]:
    """All tensors of a model directory; leaving the block with tensors not taken raises ModelRefused.

    `on_progress` is told the fraction of tensors taken after each; `fp8_block` is the block size of eight-bit weights.
    """
    where: dict[str, Path] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as handle:
            where.update(dict.fromkeys(handle.keys(), file))
    weights = Weights(where, device, on_progress, fp8_block)
    yield weights
    left = [name for name in weights.left() if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise ModelRefused(
            f"the checkpoint has {len(left)} tensors that the architecture does not, first {left[0]}"
        )
